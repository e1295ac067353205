"""Bugs of attention over the selected slots."""

from __future__ import annotations

from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, layer_bug
from nsa_oracle.harness.bugs.catalogue.targets import ATTEND, COMBINE, FETCH_ON_HOPPER, LOAD_KEYS, RESULT
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.checks.check import Check

# Alone, a request may be shared by programs whose results a second kernel joins: in production's sizes that one has the
# bug, and the kernel that does without it does not.
BY_ITS_KERNEL = frozenset({Check.ATTENTION, Check.RELATION})

BUGS: tuple[Bug, ...] = (
    layer_bug(
        "masked-slot-leaks-in",
        "A negative slot gets the weight of a key of zeros instead of no weight.",
        REVIEW,
        "fewer tokens than index_topk",
        Check.ATTENTION,
        Mutation(ATTEND, 'tl.where(slots[None, :] >= 0, scores, float("-inf"))', "scores + 0.0"),
    ),
    layer_bug(
        "rescale-decided-by-the-first-head",
        "The rescale of the accumulator is skipped for all heads when the maximum of the first head does not change.",
        REVIEW,
        "several heads, and a head other than the first that meets its maximum late",
        Check.ATTENTION,
        Mutation(
            ATTEND,
            "            rescale = weight(max_score, new_max, scale_log2)\n",
            "            kept = (tl.arange(0, HEAD_BLOCK) == 0) & (new_max == max_score)\n"
            "            kept = tl.sum(kept.to(tl.int32), 0) == 1\n"
            "            rescale = tl.where(kept, 1.0, weight(max_score, new_max, scale_log2))\n",
        ),
    ),
    layer_bug(
        "split-boundary-off-by-one",
        "A program that shares a row omits the last key of its chunk.",
        REVIEW,
        "a row of 512 selected tokens or more, shared by several programs",
        Check.ATTENTION,
        Mutation(ATTEND, "end = tl.minimum(begin + CHUNK, keys_end)", "end = tl.minimum(begin + CHUNK - 1, keys_end)"),
    ),
    layer_bug(
        "tile-boundary-off-by-one",
        "The last key of a row is omitted.",
        REVIEW,
        "any row with a key",
        Check.ATTENTION,
        Mutation(ATTEND, "chunk_end = tl.minimum(chunk_begin + CHUNK, end)", "chunk_end = end - 1"),
    ),
    layer_bug(
        "partial-results-in-bf16",
        "What a program leaves to the one that combines a row's chunks is rounded to bf16.",
        REVIEW,  # of SGLang 0.5.23's sparse attention in Triton: docs/peers.md
        "more than 512 selected tokens",
        Check.ATTENTION,
        Mutation(
            ATTEND,
            "            tl.store(total_cells, total, mask=live)\n",
            "            tl.store(total_cells, total.to(tl.bfloat16).to(tl.float32), mask=live)\n",
        ),
    ),
    layer_bug(
        "fold-without-weights",
        "Chunks are combined as if their maxima were equal.",
        REVIEW,
        "more than 512 selected tokens",
        Check.ATTENTION,
        Mutation(
            "nsa_oracle.optimized.kernels.attention:fold",
            "tl.fma(acc, acc_weight, chunk_acc * chunk_weight)",
            "tl.fma(acc, tl.where(acc_weight > 0.0, 1.0, 0.0), chunk_acc)",
        ),
    ),
    layer_bug(
        "rope-part-read-at-the-wrong-byte",
        "The RoPE part of a key is read from the byte at which its third scale begins.",
        REVIEW,
        "an FP8 cache",
        Check.ATTENTION,
        Mutation(LOAD_KEYS, "token + RANK + 4 * NUM_QUANT_TILES", "token + RANK + 2 * NUM_QUANT_TILES"),
    ),
    layer_bug(
        "rope-part-not-waited-for",
        "Copies of RoPE parts are in no group, so the wait for groups ends before they have arrived.",
        REVIEW,  # of this repository's own kernel: no GPU had shown it
        "an FP8 cache of production's key sizes",
        Check.ATTENTION,
        Mutation(FETCH_ON_HOPPER, "async_copy.commit_group()  # what is in no group is not waited for", "pass"),
        cpu=True,  # on a GPU they arrive in time, by chance
    ),
    layer_bug(
        "scale-of-the-next-tile",
        "A tile of the latent is scaled by the scale of the next one.",
        REVIEW,
        "an FP8 cache and tiles of different magnitude",
        Check.ATTENTION,
        Mutation(
            LOAD_KEYS,
            "scale_lanes = tl.arange(0, NUM_QUANT_TILES)",
            "scale_lanes = (tl.arange(0, NUM_QUANT_TILES) + 1) % NUM_QUANT_TILES",
        ),
    ),
    layer_bug(
        "values-not-scaled",
        "The latent is scaled as a key, but not as a value.",
        "sglang#34765",
        "an FP8 cache and scales other than 1",
        Check.ATTENTION,
        Mutation(
            ATTEND,
            "            acc = dot(to_bf16(weights), latent, acc * rescale[:, None])\n",
            "            values = latent\n"
            "            if FP8:\n"
            "                cells = kv + slots.to(tl.int64)[:, None] * kv_stride + lanes[None, :]\n"
            "                codes = tl.load(cells, mask=slots[:, None] >= 0, other=0)\n"
            "                values = to_bf16(from_e4m3_bits(codes, tl.float32))\n"
            "            acc = dot(to_bf16(weights), values, acc * rescale[:, None])\n",
        ),
    ),
    layer_bug(
        "bf16-rounding-truncates",
        "Results are truncated to bf16 instead of rounded to nearest even.",
        REVIEW,
        "a result that is not representable",
        BY_ITS_KERNEL,
        Mutation(
            "nsa_oracle.optimized.kernels.attention:to_bf16",
            "    if INTERPRETED:\n"
            "        bits = x.to(tl.uint32, bitcast=True)\n"
            "        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16\n",
            "    if True:\n        bits = x.to(tl.uint32, bitcast=True)\n        rounded = bits >> 16\n",
        ),
    ),
    layer_bug(
        "slot-offset-loses-high-bits",
        "The offset of a slot is truncated to 31 bits when the slot is read.",
        "sglang#34725",
        "slots far apart",
        Check.ATTENTION,
        Mutation(
            LOAD_KEYS,
            "token = kv + slots.to(tl.int64) * kv_stride",
            "token = kv + ((slots.to(tl.int64) * kv_stride) & 0x7FFFFFFF)",
        ),
    ),
    layer_bug(
        "query-row-loses-high-bits",
        "The offset of a row of queries is truncated to 31 bits: at 128 heads of 576 it wraps from row 29,128 on.",
        "exllamav3#263",
        "queries far apart",
        Check.ATTENTION,
        Mutation(ATTEND, "(row * q_row_stride + heads * q_head", "((row * q_row_stride & 0x7FFFFFFF) + heads * q_head"),
        cpu=True,
    ),
    layer_bug(
        "cache-assumed-dense",
        "Slots are assumed to be adjacent, although the cache is a slice of a larger tensor.",
        "vllm#42135",
        "slots that are not adjacent",
        Check.ATTENTION,
        Mutation(
            LOAD_KEYS,
            "token = kv + slots.to(tl.int64) * kv_stride",
            "token = kv + slots.to(tl.int64) * (RANK + 4 * NUM_QUANT_TILES + 2 * ROPE if FP8 else RANK + ROPE)",
        ),
    ),
    layer_bug(
        "lse-in-base-2",
        "The lse contains the binary logarithm of the sum instead of the natural logarithm.",
        REVIEW,
        "a row with several keys whose weights count",
        BY_ITS_KERNEL,
        Mutation(RESULT, "natural_log(divisor)", "tl.log2(divisor)"),
    ),
    layer_bug(
        "lse-without-the-scale",
        "The largest score is added to the lse without sm_scale.",
        REVIEW,
        "a largest score other than 0",
        BY_ITS_KERNEL,
        Mutation(RESULT, "tl.zeros_like(max_score) + scale", "tl.zeros_like(max_score) + 1.0"),
    ),
    layer_bug(
        "empty-row-gives-nan",
        "A row without keys is divided by its sum of weights, which is 0.",
        REVIEW,
        "a row without a key",
        Check.ATTENTION,
        Mutation(RESULT, "tl.where(weight_sum == 0.0, 1.0, weight_sum)", "weight_sum + 0.0"),
    ),
    layer_bug(
        "workspace-read-before-it-is-written",
        "The first chunk of a row is combined with what an earlier launch left in the workspace.",
        "TensorRT-LLM#15783",
        "any row that a single program computes",
        Check.ATTENTION,
        Mutation(ATTEND, "mask=heads[:, None] < heads_with_total", "mask=live"),
        group=Group.BUFFERS,
    ),
    layer_bug(
        "empty-chunk-read-from-the-workspace",
        "The workspace is also read for chunks that had no key and wrote no partial result.",
        "TensorRT-LLM#14297",
        "index_topk above 512 and a row with fewer tokens, shared by several programs",
        Check.ATTENTION,
        Mutation(COMBINE, "mask=chunk_sum[:, None] > 0.0", "mask=chunk_sum[:, None] >= 0.0"),
        group=Group.BUFFERS,
    ),
    layer_bug(
        "tiles-cut-by-the-size-of-the-launch",
        "Where the tiles of a row begin depends on the number of launched programs, so a request's low bits depend "
        "on its batch.",
        REVIEW,
        "ordinary numbers, more keys than one tile, another batch size",
        Check.RELATION,
        Mutation(
            ATTEND,
            "        for key_begin in range(chunk_begin, chunk_end, KEY_BLOCK):\n"
            "            keys = key_begin + tl.arange(0, KEY_BLOCK)\n"
            "            slots = tl.load(row_indices + keys, mask=keys < chunk_end, other=-1)\n",
            "        for key_begin in range(chunk_begin - tl.num_programs(0) % KEY_BLOCK, chunk_end, KEY_BLOCK):\n"
            "            keys = key_begin + tl.arange(0, KEY_BLOCK)\n"
            "            of_chunk = (keys >= chunk_begin) & (keys < chunk_end)\n"
            "            slots = tl.load(row_indices + keys, mask=of_chunk, other=-1)\n",
        ),
    ),
    layer_bug(
        "second-head-block-repeats-the-first",
        "The second program of a row recomputes the heads of the first program; its own heads are never computed.",
        REVIEW,
        "more than 64 heads, which only runs on a GPU draw",
        Check.ATTENTION,
        Mutation(ATTEND, "heads = pid % head_blocks * HEAD_BLOCK + tl.arange", "heads = tl.arange"),
        gpu=True,
    ),
)
