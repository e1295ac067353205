"""Bugs of the indexer and of top-k."""

from __future__ import annotations

import torch

from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, by_wrapping, layer_bug
from nsa_oracle.harness.bugs.catalogue.targets import FILTER, FORWARD, INDEXER, SELECT, TOPK
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.protocol import SparseAttention
from nsa_oracle.reference.types import AttentionConfig, BackendConfig


def selecting_by_an_old_plan(config: BackendConfig, attention: AttentionConfig) -> SparseAttention:
    """A layer of ``optimized/`` of which a plan says for which rows another kernel selects, by the number of rows.

    That kernel selects for the planned rows, the last one for all that are not long. A row that has become long since
    the plan was made gets what lay in the memory.
    """
    from nsa_oracle.optimized.layer import SparseAttention as Clean  # late: importing Triton fixes how kernels run

    class SelectingByAnOldPlan(Clean):
        def __init__(self) -> None:
            super().__init__(config, attention)
            self.plans: dict[int, torch.Tensor] = {}

        def topk_transform_paged(
            self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
        ) -> torch.Tensor:
            selected = super().topk_transform_paged(logits, seqlens_expanded, page_table_1)
            is_long = seqlens_expanded > config.index_topk
            planned = self.plans.setdefault(len(selected), is_long.clone())
            return selected.where((planned | ~is_long)[:, None], 0)

    return SelectingByAnOldPlan()


def selecting_into_a_workspace(config: BackendConfig, attention: AttentionConfig) -> SparseAttention:
    """A layer that writes its selection to a workspace that it never clears, and writes no entry that is -1."""
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


_INDEXERS = (
    layer_bug(
        "nan-scores-as-zero",
        "The score of a key with a NaN is 0, which exceeds every negative score.",
        REVIEW,
        "an index key with a NaN or an infinity",
        Check.LOGITS,
        Mutation(INDEXER, "tl.where(live, result,", "tl.where(live, tl.where(result == result, result, 0.0),"),
    ),
    layer_bug(
        "fourth-tile-of-a-program-left-out",
        "A program that shares a row with others computes three tiles of tokens at most; later ones are not scored.",
        REVIEW,
        "so many rows that few programs share each of them",
        frozenset({Check.RELATION, Check.LOGITS}),
        Mutation(
            INDEXER,
            "range(first, num_tiles, programs_per_row)",
            "range(first, tl.minimum(num_tiles, first + 3 * programs_per_row), programs_per_row)",
        ),
    ),
    layer_bug(
        "page-offset-loses-high-bits",
        "The offset of a page is truncated to 31 bits: page * 8448 wraps near page 254,200.",
        "sglang#34725",
        "pages far apart",
        Check.LOGITS,
        Mutation(
            INDEXER, "index_k_cache + page_ids * page_stride", "index_k_cache + ((page_ids * page_stride) & 0x7FFFFFFF)"
        ),
    ),
    layer_bug(
        "logits-row-loses-high-bits",
        "The offset of a row of logits is truncated to 31 bits: 16,384 rows of 131,072 logits wrap.",
        REVIEW,
        "rows of logits far apart",
        Check.SELECTION,
        *(
            Mutation(kernel, "logits + row * logits_stride", "logits + ((row * logits_stride) & 0x7FFFFFFF)")
            for kernel in (TOPK, FILTER)
        ),
        cpu=True,
    ),
    layer_bug(
        "length-mask-skipped",
        "Tokens beyond a row's length, but in its last tile, get a score.",
        "sglang#33247",
        "a table wider than the row is long",
        Check.LOGITS,
        Mutation(INDEXER, 'tl.where(live, result, float("-inf"))', "result"),
    ),
    layer_bug(
        "no-fill-beyond-the-last-tile",
        "Logits beyond a row's last tile keep their old content.",
        "sglang#31824",
        "a table more than a tile wider than the row is long",
        Check.LOGITS,
        Mutation(
            INDEXER,
            "filled + first * FILL_BLOCK, width, programs_per_row * FILL_BLOCK",
            "filled + first * FILL_BLOCK, filled, programs_per_row * FILL_BLOCK",
        ),
    ),
    layer_bug(
        "no-relu",
        "Negative products of an index head and a key are not clamped to 0, but lower the score.",
        REVIEW,
        "a negative product whose head has a weight",
        Check.LOGITS,
        Mutation(INDEXER, "scores = tl.where(scores < 0, 0.0, scores)", "scores = scores + 0.0"),
    ),
    layer_bug(
        "index-scales-read-interleaved",
        "The scale of an index key is read from the bytes after the key, not from the page's plane of scales.",
        REVIEW,
        "pages of several tokens",
        Check.LOGITS,
        Mutation(INDEXER, "PAGE_SIZE * DIM + offsets * 4", "offsets * (DIM + 4) + DIM"),
    ),
    layer_bug(
        "last-partial-page-skipped",
        "Tokens on a partially filled page are scored with the keys of page 0.",
        REVIEW,
        "a length that is not a multiple of the page size",
        Check.LOGITS,
        Mutation(
            INDEXER,
            "tl.load(pages + tokens // PAGE_SIZE, mask=live, other=0)",
            "tl.load(pages + tokens // PAGE_SIZE, mask=tokens // PAGE_SIZE < length // PAGE_SIZE, other=0)",
        ),
    ),
    layer_bug(
        "last-partial-tile-skipped",
        "Tokens after a row's last full tile are not scored.",
        REVIEW,
        "a length that is not a multiple of 128",
        Check.LOGITS,
        Mutation(INDEXER, "num_tiles = tl.cdiv(length, BLOCK)", "num_tiles = length // BLOCK"),
    ),
    layer_bug(
        "page-table-of-the-row-before",
        "A row is scored with the pages of the row before it.",
        REVIEW,
        "two requests",
        Check.LOGITS,
        Mutation(INDEXER, "page_table + row * table_stride", "page_table + tl.maximum(row - 1, 0) * table_stride"),
    ),
)

_SELECTIONS = (
    layer_bug(
        "threshold-bin-by-arrival",
        "Scores that agree in sign, exponent and two mantissa bits count as equal: the first to arrive are selected.",
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
    layer_bug(
        "ties-to-the-higher-position",
        "Of equal scores at the threshold, the last ones are selected.",
        REVIEW,
        "equal scores at the threshold",
        Check.SELECTION,
        Mutation(SELECT, "ties <= k - above", "ties > at_threshold - k"),
    ),
    layer_bug(
        "nan-is-the-largest-score",
        "Scores are compared by their bits, so NaN is the largest.",
        REVIEW,  # of SGLang's fast_topk: docs/peers.md
        "a row of scores with NaN",
        Check.SELECTION,
        Mutation(
            "nsa_oracle.optimized.kernels.topk:score",
            'number_or(logits, float("-inf"))',
            'number_or(logits, float("inf"))',
        ),
    ),
    Bug(
        "long-rows-left-to-an-old-plan",
        Group.LAYER,
        "Rows longer than a limit are left to a kernel that selects for those of an old plan only.",
        REVIEW,  # of SGLang 0.5.23's top-k v2: docs/upstream.md
        "a row that is longer than index_topk, and was not when as many rows were first served",
        frozenset({Check.SELECTION}),
        by_wrapping(layer=selecting_by_an_old_plan),
        layer=True,
    ),
    Bug(
        "minus-one-not-seeded",
        Group.LAYER,
        "Entries after a short row's tokens keep the content of the caller's workspace.",
        "vllm#55299",
        "fewer tokens than index_topk",
        frozenset({Check.SELECTION}),
        by_wrapping(layer=selecting_into_a_workspace),
        layer=True,
    ),
    layer_bug(
        "short-row-ends-with-the-table",
        "A row of at most index_topk tokens selects tokens up to the table's width, not up to its own length.",
        "flashinfer#2489",
        "a row shorter than index_topk in a wider table",
        Check.SELECTION,
        Mutation(TOPK, "live = tokens < length", "live = tokens < width"),
    ),
    layer_bug(
        "take-all-path-off-by-one",
        "A row of index_topk + 1 tokens is treated as a row that selects all its tokens.",
        REVIEW,
        "a length of index_topk + 1",
        Check.SELECTION,
        Mutation(TOPK, "if length <= k:", "if length <= k + 1:"),
    ),
    layer_bug(
        "shortcut-takes-the-first-tokens",
        "All rows take the shortcut for rows of at most index_topk tokens, and select their first index_topk tokens.",
        "sglang#12816",
        "more tokens than index_topk",
        Check.SELECTION,
        Mutation(
            FORWARD,
            "self.topk_transform_paged(logits, lengths, page_table_1)",
            "self.topk_transform_paged(logits, metadata.nsa_cache_seqlens_int32, page_table_1)",
        ),
    ),
    layer_bug(
        "selection-2048-wide",
        "The selection is 2048 wide, whatever index_topk is.",
        "sglang#39431",
        "an index_topk other than 2048",
        frozenset({Check.SHAPE}),
        Mutation(
            "nsa_oracle.optimized.topk:_select",
            "torch.empty(logits.shape[0], index_topk,",
            "torch.empty(logits.shape[0], 2048,",
        ),
    ),
    layer_bug(
        "ragged-offset-of-the-first-row",
        "The positions of all rows are offset by the start of the first row's request in the concatenated KV.",
        REVIEW,
        "a prefill of two requests",
        Check.SELECTION,
        Mutation(TOPK, "tl.load(offsets + row * offsets_stride)", "tl.load(offsets)"),
    ),
)
BUGS: tuple[Bug, ...] = (*_INDEXERS, *_SELECTIONS)
