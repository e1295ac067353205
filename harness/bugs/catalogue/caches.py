"""Bugs of the store: quantisation and the layout of both caches."""

from __future__ import annotations

from nsa_oracle.harness.bugs.bug import REVIEW, Bug, layer_bug
from nsa_oracle.harness.bugs.catalogue.targets import QUANTIZE, STORE, TO_E4M3
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.checks.check import Check

BUGS: tuple[Bug, ...] = (
    layer_bug(
        "e4m3-rounding-truncates",
        "Quantisation truncates to e4m3 instead of rounding to nearest even.",
        REVIEW,
        "a key that is not representable",
        Check.STORE,
        Mutation(TO_E4M3, "magnitude + HALF_QUANTUM + ((magnitude >> DROPPED_BITS) & 1)", "magnitude"),
    ),
    layer_bug(
        "e4m3-subnormals-flushed",
        "Quantised values below the smallest normal e4m3 number become zero.",
        REVIEW,
        "a key with elements far below its largest",
        Check.STORE,
        Mutation(TO_E4M3, "magnitude < MIN_NORMAL, subnormal, normal", "magnitude < MIN_NORMAL, 0, normal"),
    ),
    layer_bug(
        "scale-by-reciprocal",
        "A tile's scale is its largest magnitude times a rounded 1/448, instead of divided by 448.",
        REVIEW,
        "a scale whose last bit the product gets wrong",
        Check.STORE,
        Mutation(QUANTIZE, "tl.div_rn(amax, divisor)", "amax * (1.0 / 448.0)"),
    ),
    layer_bug(
        "zero-tile-gets-scale-zero",
        "A tile of zeros gets the scale 0, and its values are 0 / 0.",
        REVIEW,
        "a tile of the latent that is zero, in an FP8 cache",
        Check.STORE,
        Mutation(QUANTIZE, "tl.where(amax == 0, 1.0, tl.div_rn(amax, divisor))", "tl.div_rn(amax, divisor)"),
    ),
    layer_bug(
        "neighbour-tile-decides-the-scale",
        "All tiles of a latent are quantised by the largest magnitude of the first tile.",
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
    layer_bug(
        "store-offset-loses-high-bits",
        "The offset of a slot is truncated to 31 bits, so distant slots are written near the beginning of the cache.",
        "sglang#34725",
        "slots far apart",
        Check.STORE,
        Mutation(STORE, "target = kv + slot * slot_stride", "target = kv + ((slot * slot_stride) & 0x7FFFFFFF)"),
    ),
    layer_bug(
        "index-keys-alias-the-scales",
        "Index keys are spaced as if each were followed by its scale, and run into the page's plane of scales.",
        "ROCm/ATOM#1466",
        "pages of several tokens",
        Check.STORE,
        Mutation(
            STORE,
            "tl.store(page_begin + offset * INDEX_DIM + lanes, index_codes",
            "tl.store(page_begin + offset * (INDEX_DIM + SCALE_BYTES) + lanes, index_codes",
        ),
    ),
    layer_bug(
        "rope-part-stored-in-halves",
        "Only as many bytes of the RoPE part are stored as it has elements.",
        REVIEW,
        "an FP8 cache",
        Check.STORE,
        Mutation(STORE, "in_rope = rope_bytes < ROPE * ROPE_BYTES", "in_rope = rope_bytes < ROPE"),
    ),
    layer_bug(
        "padding-written-before-the-cache",
        "A row of slot -1 is stored like any other, before the first slot.",
        "sglang#33816",
        "rows of slot -1",
        frozenset({Check.CRASH, Check.BOUNDS}),
        Mutation(STORE, "if slot >= 0:", "if slot >= -1:"),
    ),
    layer_bug(
        "index-key-of-padding-written",
        "The store leaves out the key of a row of slot -1, but not its index key.",
        REVIEW,
        "rows of slot -1",
        frozenset({Check.CRASH, Check.BOUNDS}),
        Mutation(STORE, "    if slot >= 0:", "    if (slot >= 0) | (pid >= num_rows):"),
    ),
    layer_bug(
        "slots-must-be-aligned",
        "The store refuses slots that do not begin at a multiple of 16 bytes, as those of a later draft step may.",
        REVIEW,
        "the slots of several steps in one tensor, an odd number of rows",
        Check.CRASH,
        Mutation(
            "nsa_oracle.optimized.kv_cache:store_cache",
            "    store_cache_op(",
            "    assert inputs.out_cache_loc.data_ptr() % 16 == 0, 'slots must be aligned'\n    store_cache_op(",
        ),
    ),
)
