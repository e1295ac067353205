"""Defects of the attention layer: caches, indexer, top-k, attention, and how a forward pass strings them together."""

from __future__ import annotations

import torch

from nsa_oracle.harness.bugs.bug import Bug, Check, Group, by_mutation, by_wrapping
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.protocol import SparseAttention
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    AttentionOutputs,
    BackendConfig,
    Metadata,
)

REVIEW = "kernel review"  # seen in review before it went anywhere

FORWARD = "nsa_oracle.optimized.layer:SparseAttention.forward"
STORE = "nsa_oracle.optimized.kernels.kv_cache:store_cache_kernel"
QUANTIZE = "nsa_oracle.optimized.kernels.kv_cache:quantize"
TO_E4M3 = "nsa_oracle.optimized.kernels.fp8:to_e4m3_bits"
INDEXER = "nsa_oracle.optimized.kernels.indexer:indexer_logits_kernel"
TOPK = "nsa_oracle.optimized.kernels.topk:topk_kernel"
SELECT = "nsa_oracle.optimized.kernels.topk:select"
ATTEND = "nsa_oracle.optimized.kernels.attention:sparse_mla_kernel"
LOAD_KEYS = "nsa_oracle.optimized.kernels.attention:load_keys"
RESULT = "nsa_oracle.optimized.kernels.attention:write_result"
COMBINE = "nsa_oracle.optimized.kernels.attention:sparse_mla_combine_kernel"


def _bug(
    name: str,
    sentence: str,
    reference: str,
    trigger: str,
    caught_by: Check | frozenset[Check],
    *mutations: Mutation,
    group: Group = Group.LAYER,
    gpu: bool = False,
) -> Bug:
    checks = caught_by if isinstance(caught_by, frozenset) else frozenset({caught_by})
    return Bug(name, group, sentence, reference, trigger, checks, by_mutation(*mutations), layer=True, gpu=gpu)


def selecting_into_a_workspace(config: BackendConfig, attention: AttentionConfig) -> SparseAttention:
    """A layer that selects into memory which it never clears, and writes what there is to write."""
    from nsa_oracle.optimized.layer import SparseAttention as Clean  # late: importing Triton fixes how kernels run

    class SelectingIntoAWorkspace(Clean):
        def __init__(self) -> None:
            super().__init__(config, attention)
            self.workspaces: dict[int, torch.Tensor] = {}

        def topk_transform_paged(
            self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
        ) -> torch.Tensor:
            selected = super().topk_transform_paged(logits, seqlens_expanded, page_table_1)
            workspace = self.workspaces.setdefault(len(selected), torch.zeros_like(selected))
            return workspace.copy_(torch.where(selected >= 0, selected, workspace))

    return SelectingIntoAWorkspace()


def reusing_selections(config: BackendConfig, attention: AttentionConfig) -> SparseAttention:
    """A layer whose later draft steps attend to what the first one selected."""
    from nsa_oracle.optimized.layer import SparseAttention as Clean  # late: importing Triton fixes how kernels run

    class ReusingSelections(Clean):
        step: int | None = None  # of the forward pass that is running
        passes = 0
        selected: torch.Tensor

        def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
            self.step = self.passes % config.speculative_num_steps
            self.passes += 1
            outputs = super().forward(inputs, caches, metadata)
            self.step = None
            return outputs

        def topk_transform_paged(
            self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
        ) -> torch.Tensor:
            if not self.step:
                self.selected = super().topk_transform_paged(logits, seqlens_expanded, page_table_1)
            return self.selected

    return ReusingSelections(config, attention)


_STORES = (
    _bug(
        "e4m3-rounding-truncates",
        "Quantising cuts off what e4m3 has no bits for, instead of rounding to nearest even.",
        REVIEW,
        "a key that is not representable",
        Check.STORE,
        Mutation(TO_E4M3, "magnitude + HALF_QUANTUM + ((magnitude >> DROPPED_BITS) & 1)", "magnitude"),
    ),
    _bug(
        "e4m3-subnormals-flushed",
        "Quantised values below the least normal e4m3 number become zero.",
        REVIEW,
        "a key with elements far below its largest",
        Check.STORE,
        Mutation(TO_E4M3, "magnitude < MIN_NORMAL, subnormal, normal", "magnitude < MIN_NORMAL, 0, normal"),
    ),
    _bug(
        "scale-by-reciprocal",
        "A tile's scale is its largest magnitude times a rounded 1/448, not divided by 448.",
        REVIEW,
        "a scale whose last bit the product gets wrong",
        Check.STORE,
        Mutation(QUANTIZE, "tl.div_rn(amax, divisor)", "amax * (1.0 / 448.0)"),
    ),
    _bug(
        "zero-tile-gets-scale-zero",
        "A tile of zeros gets the scale 0, and 0 / 0 for its values.",
        REVIEW,
        "a tile of the latent that is zero, in an FP8 cache",
        Check.STORE,
        Mutation(QUANTIZE, "tl.where(amax == 0, 1.0, tl.div_rn(amax, divisor))", "tl.div_rn(amax, divisor)"),
    ),
    _bug(
        "neighbour-tile-decides-the-scale",
        "All tiles of a latent are quantised by the largest magnitude of the first.",
        REVIEW,
        "an FP8 cache and tiles of different magnitude",
        Check.STORE,
        Mutation(
            QUANTIZE,
            "amax = tl.max(magnitudes, axis=1, keep_dims=True)",
            "amax = tl.broadcast_to(tl.max(tl.where(tl.arange(0, x.shape[0])[:, None] == 0, magnitudes, 0)), "
            "(x.shape[0], 1))",
        ),
    ),
    _bug(
        "store-offset-loses-high-bits",
        "The offset of a slot is kept in 31 bits, so far slots are written somewhere near the beginning.",
        "sglang#34725",
        "slots far apart",
        Check.STORE,
        Mutation(STORE, "target = kv + slot * slot_stride", "target = kv + ((slot * slot_stride) & 0x7FFFFFFF)"),
    ),
    _bug(
        "index-keys-alias-the-scales",
        "Index keys are laid out with room for a scale each, and run into the page's plane of scales.",
        "ROCm/ATOM#1466",
        "pages of several tokens",
        Check.STORE,
        Mutation(
            STORE,
            "tl.store(page_begin + offset * INDEX_DIM + lanes, index_codes",
            "tl.store(page_begin + offset * (INDEX_DIM + SCALE_BYTES) + lanes, index_codes",
        ),
    ),
    _bug(
        "rope-part-stored-in-halves",
        "Only as many bytes of the RoPE part are stored as it has elements.",
        REVIEW,
        "an FP8 cache",
        Check.STORE,
        Mutation(STORE, "in_rope = rope_bytes < ROPE * ROPE_BYTES", "in_rope = rope_bytes < ROPE"),
    ),
)

_INDEXERS = (
    _bug(
        "page-offset-loses-high-bits",
        "The offset of a page is kept in 31 bits: page * 8448 wraps near page 254,200.",
        "sglang#34725",
        "pages far apart",
        Check.LOGITS,
        Mutation(
            INDEXER, "index_k_cache + page_ids * page_stride", "index_k_cache + ((page_ids * page_stride) & 0x7FFFFFFF)"
        ),
    ),
    _bug(
        "length-mask-skipped",
        "Tokens beyond a row's length that share its last tile get a score.",
        "sglang#33247",
        "a table wider than the row is long",
        Check.LOGITS,
        Mutation(INDEXER, 'tl.where(live, result, float("-inf"))', "result"),
    ),
    _bug(
        "no-fill-beyond-the-last-tile",
        "Logits beyond a row's last tile are left as they were.",
        "sglang#31824",
        "a table more than a tile wider than the row is long",
        Check.LOGITS,
        Mutation(
            INDEXER,
            "filled + first * FILL_BLOCK, width, programs_per_row * FILL_BLOCK",
            "filled + first * FILL_BLOCK, filled, programs_per_row * FILL_BLOCK",
        ),
    ),
    _bug(
        "no-relu",
        "Negative products of an index head with a key lower the score.",
        REVIEW,
        "a negative product and a weight",
        Check.LOGITS,
        Mutation(INDEXER, "scores = tl.where(scores < 0, 0.0, scores)", "scores = scores + 0.0"),
    ),
    _bug(
        "index-scales-read-interleaved",
        "The scale of an index key is looked for right behind it, not in the page's plane of scales.",
        REVIEW,
        "pages of several tokens",
        Check.LOGITS,
        Mutation(INDEXER, "PAGE_SIZE * DIM + offsets * 4", "offsets * (DIM + 4) + DIM"),
    ),
    _bug(
        "last-partial-page-skipped",
        "Tokens on a page that is not full are scored by the keys of page 0.",
        REVIEW,
        "a length that is no multiple of the page size",
        Check.LOGITS,
        Mutation(
            INDEXER,
            "tl.load(pages + tokens // PAGE_SIZE, mask=live, other=0)",
            "tl.load(pages + tokens // PAGE_SIZE, mask=tokens // PAGE_SIZE < length // PAGE_SIZE, other=0)",
        ),
    ),
    _bug(
        "last-partial-tile-skipped",
        "Tokens behind a row's last full tile are not scored.",
        REVIEW,
        "a length that is no multiple of 128",
        Check.LOGITS,
        Mutation(INDEXER, "num_tiles = tl.cdiv(length, BLOCK)", "num_tiles = length // BLOCK"),
    ),
    _bug(
        "page-table-of-the-row-before",
        "A row is scored by the pages of the row before it.",
        REVIEW,
        "two requests",
        Check.LOGITS,
        Mutation(INDEXER, "page_table + row * table_stride", "page_table + tl.maximum(row - 1, 0) * table_stride"),
    ),
)

_SELECTIONS = (
    _bug(
        "threshold-bin-by-arrival",
        "Scores that agree in sign, exponent and two bits more are not told apart: the first to arrive are taken.",
        "sglang#35257",
        "near-equal scores around the threshold",
        Check.SELECTION,
        Mutation(
            "nsa_oracle.optimized.kernels.topk:score",
            'return number_or(logits, float("-inf"))',
            'bits = number_or(logits, float("-inf")).to(tl.int32, bitcast=True) & -0x200000\n'
            "    return bits.to(tl.float32, bitcast=True)",
        ),
    ),
    _bug(
        "ties-to-the-higher-position",
        "Of equal scores around the threshold, the last ones are taken.",
        REVIEW,
        "equal scores around the threshold",
        Check.SELECTION,
        Mutation(SELECT, "ties <= k - above", "ties > at_threshold - k"),
    ),
    Bug(
        "minus-one-not-seeded",
        Group.LAYER,
        "Entries behind a short row's tokens are left as the caller's workspace had them.",
        "vllm#55299",
        "fewer tokens than index_topk",
        frozenset({Check.SELECTION}),
        by_wrapping(layer=selecting_into_a_workspace),
        layer=True,
    ),
    _bug(
        "short-row-ends-with-the-table",
        "A row of at most index_topk tokens selects up to the table's width, not to its own length.",
        "flashinfer#2489",
        "a row shorter than index_topk in a wider table",
        Check.SELECTION,
        Mutation(TOPK, "live = tokens < length", "live = tokens < width"),
    ),
    _bug(
        "take-all-path-off-by-one",
        "A row of index_topk + 1 tokens is taken for one that selects all of them.",
        REVIEW,
        "a length of index_topk + 1",
        Check.SELECTION,
        Mutation(TOPK, "if length <= k:", "if length <= k + 1:"),
    ),
    _bug(
        "shortcut-takes-the-first-tokens",
        "The shortcut for rows of at most index_topk tokens is taken by all: the first index_topk are selected.",
        "sglang#12816",
        "more tokens than index_topk",
        Check.SELECTION,
        Mutation(
            FORWARD,
            "self.topk_transform_paged(logits, lengths, page_table_1)",
            "self.topk_transform_paged(logits, metadata.nsa_cache_seqlens_int32, page_table_1)",
        ),
    ),
    _bug(
        "selection-2048-wide",
        "The selection is 2048 wide, whatever index_topk is.",
        "sglang#39431",
        "another index_topk than 2048",
        frozenset({Check.SHAPE}),
        Mutation(
            "nsa_oracle.optimized.topk:_select",
            "torch.empty(logits.shape[0], index_topk,",
            "torch.empty(logits.shape[0], 2048,",
        ),
    ),
    _bug(
        "ragged-offset-of-the-first-row",
        "Positions of all rows are put where the first row's request starts in the concatenated KV.",
        REVIEW,
        "a prefill of two requests",
        Check.SELECTION,
        Mutation(TOPK, "tl.load(offsets + row * offsets_stride)", "tl.load(offsets)"),
    ),
)

_ATTENTIONS = (
    _bug(
        "masked-slot-leaks-in",
        "A negative slot weighs as a key of zeros does, instead of nothing.",
        REVIEW,
        "fewer tokens than index_topk",
        Check.ATTENTION,
        Mutation(ATTEND, 'tl.where(slots[None, :] >= 0, scores, float("-inf"))', "scores + 0.0"),
    ),
    _bug(
        "rescale-decided-by-the-first-head",
        "The rescale of the accumulator is dropped for all heads when the maximum of the first does not change.",
        REVIEW,
        "several heads, and a maximum that another than the first meets late",
        Check.ATTENTION,
        Mutation(
            ATTEND,
            "            rescale = weight(max_score, new_max, scale_log2)\n",
            "            kept = (tl.arange(0, HEAD_BLOCK) == 0) & (new_max == max_score)\n"
            "            kept = tl.sum(kept.to(tl.int32), 0) == 1\n"
            "            rescale = tl.where(kept, 1.0, weight(max_score, new_max, scale_log2))\n",
        ),
    ),
    _bug(
        "split-boundary-off-by-one",
        "A program that shares a row leaves out the last key of its chunk.",
        REVIEW,
        "a row of 512 selected tokens or more, shared by several programs",
        Check.ATTENTION,
        Mutation(ATTEND, "end = tl.minimum(begin + CHUNK, keys_end)", "end = tl.minimum(begin + CHUNK - 1, keys_end)"),
    ),
    _bug(
        "tile-boundary-off-by-one",
        "The last key of a row is left out.",
        REVIEW,
        "any row with a key",
        Check.ATTENTION,
        Mutation(ATTEND, "chunk_end = tl.minimum(chunk_begin + CHUNK, end)", "chunk_end = end - 1"),
    ),
    _bug(
        "fold-without-weights",
        "Chunks are joined as if their maxima were equal.",
        REVIEW,
        "more than 512 selected tokens",
        Check.ATTENTION,
        Mutation(
            "nsa_oracle.optimized.kernels.attention:fold",
            "tl.fma(acc, acc_weight, chunk_acc * chunk_weight)",
            "tl.fma(acc, tl.where(acc_weight > 0.0, 1.0, 0.0), chunk_acc)",
        ),
    ),
    _bug(
        "rope-part-read-at-the-wrong-byte",
        "The RoPE part of a key is read from the byte where its third scale lies.",
        REVIEW,
        "an FP8 cache",
        Check.ATTENTION,
        Mutation(LOAD_KEYS, "token + RANK + 4 * NUM_QUANT_TILES", "token + RANK + 2 * NUM_QUANT_TILES"),
    ),
    _bug(
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
    _bug(
        "values-not-scaled",
        "The latent is scaled where it is a key, and not where it is a value.",
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
    _bug(
        "bf16-rounding-truncates",
        "Results are cut off to bf16 instead of rounded to nearest even.",
        REVIEW,
        "a result that is not representable",
        Check.ATTENTION,
        Mutation(
            "nsa_oracle.optimized.kernels.attention:to_bf16",
            "    if INTERPRETED:\n"
            "        bits = x.to(tl.uint32, bitcast=True)\n"
            "        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16\n",
            "    if True:\n        bits = x.to(tl.uint32, bitcast=True)\n        rounded = bits >> 16\n",
        ),
    ),
    _bug(
        "slot-offset-loses-high-bits",
        "The offset of a slot is kept in 31 bits when it is read.",
        "sglang#34725",
        "slots far apart",
        Check.ATTENTION,
        Mutation(
            LOAD_KEYS,
            "token = kv + slots.to(tl.int64) * kv_stride",
            "token = kv + ((slots.to(tl.int64) * kv_stride) & 0x7FFFFFFF)",
        ),
    ),
    _bug(
        "cache-assumed-dense",
        "Slots are taken to lie next to each other, though the cache is a slice of something larger.",
        "vllm#42135",
        "slots that lie apart",
        Check.ATTENTION,
        Mutation(
            LOAD_KEYS,
            "token = kv + slots.to(tl.int64) * kv_stride",
            "token = kv + slots.to(tl.int64) * (RANK + 4 * NUM_QUANT_TILES + 2 * ROPE if FP8 else RANK + ROPE)",
        ),
    ),
    _bug(
        "lse-in-base-2",
        "The lse adds the binary logarithm of the sum to the natural one of the maximum.",
        REVIEW,
        "a row with several keys that weigh something",
        Check.ATTENTION,
        Mutation(RESULT, "natural_log(divisor)", "tl.log2(divisor)"),
    ),
    _bug(
        "lse-without-the-scale",
        "The largest score enters the lse without sm_scale.",
        REVIEW,
        "a largest score other than 0",
        Check.ATTENTION,
        Mutation(RESULT, "tl.zeros_like(max_score) + scale", "tl.zeros_like(max_score) + 1.0"),
    ),
    _bug(
        "empty-row-gives-nan",
        "A row without a key divides by its sum of weights, 0.",
        REVIEW,
        "a row without a key",
        Check.ATTENTION,
        Mutation(RESULT, "tl.where(weight_sum == 0.0, 1.0, weight_sum)", "weight_sum + 0.0"),
    ),
    _bug(
        "workspace-read-before-it-is-written",
        "The first chunk of a row is joined with what an earlier launch left in the workspace.",
        "TensorRT-LLM#15783",
        "any row that one program has to itself",
        Check.ATTENTION,
        Mutation(ATTEND, "mask=heads[:, None] < heads_with_total", "mask=live"),
        group=Group.BUFFERS,
    ),
    _bug(
        "empty-chunk-read-from-the-workspace",
        "Partials are joined of chunks that had no key and wrote none.",
        "TensorRT-LLM#14297",
        "index_topk above 512 and a row with fewer tokens, shared by several programs",
        Check.ATTENTION,
        Mutation(COMBINE, "mask=chunk_sum[:, None] > 0.0", "mask=chunk_sum[:, None] >= 0.0"),
        group=Group.BUFFERS,
    ),
    _bug(
        "tiles-cut-by-the-size-of-the-launch",
        "Where the tiles of a row begin depends on how many programs were launched, so a request's low bits depend "
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
    _bug(
        "second-head-block-repeats-the-first",
        "The second program of a row computes the heads of the first one again, and nobody its own.",
        REVIEW,
        "more than 64 heads, as only a GPU run draws",
        Check.ATTENTION,
        Mutation(ATTEND, "heads = pid % head_blocks * HEAD_BLOCK + tl.arange", "heads = tl.arange"),
        gpu=True,
    ),
)

_FORWARDS = (
    _bug(
        "stored-after-it-is-read",
        "A forward pass writes its keys when its attention is done, so rows miss their own.",
        REVIEW,
        "any forward pass whose rows see their own key",
        frozenset({Check.LOGITS, Check.ATTENTION}),  # what the slot held before may have the same index key
        Mutation(FORWARD, "    self.store_cache(caches, inputs)\n", ""),
        Mutation(FORWARD, "    return Att", "    self.store_cache(caches, inputs)\n    return Att"),
    ),
    _bug(
        "width-frozen-by-item",
        "The forward pass asks the device for its longest row, and a graph would keep the answer.",
        "tokenspeed#348",
        "a capture",
        Check.CAPTURE,
        Mutation(FORWARD, "metadata.max_seq_len_k,", "int(lengths.max().item()),"),
        group=Group.BUFFERS,
    ),
    _bug(
        "lengths-ignore-the-padded-queries",
        "The KV length of a request does not count the query tokens that each request is padded to.",
        "sglang#12295",
        "several query tokens a request",
        Check.LOGITS,
        Mutation(
            FORWARD,
            "lengths = metadata.seqlens_expanded",
            "lengths = metadata.seqlens_expanded\n"
            "    padded = len(lengths) // max(1, len(metadata.cache_seqlens_int32))\n"
            "    lengths = (lengths - max(0, padded - 1)).clamp(min=0)",
        ),
        group=Group.PADDING,
    ),
    _bug(
        "prefill-rows-dealt-evenly",
        "Rows of a prefill are dealt to its requests in equal shares.",
        "vllm#52500",
        "a prefill of requests with different numbers of new tokens",
        Check.LOGITS,
        Mutation(
            FORWARD,
            "requests = metadata.token_to_batch_idx",
            "requests = metadata.token_to_batch_idx\n"
            "        rows = torch.arange(len(requests), device=requests.device)\n"
            "        requests = rows * len(page_table_1) // max(1, len(requests))",
        ),
        group=Group.PADDING,
    ),
    Bug(
        "steps-reuse-the-first-selection",
        Group.LAYER,
        "Later draft steps attend to the slots that the first one selected.",
        "sglang#30839",
        "several draft steps and more tokens than index_topk",
        frozenset({Check.SELECTION}),
        by_wrapping(layer=reusing_selections),
        layer=True,
    ),
)

BUGS: tuple[Bug, ...] = (*_STORES, *_INDEXERS, *_SELECTIONS, *_ATTENTIONS, *_FORWARDS)
