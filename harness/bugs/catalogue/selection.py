"""Defects of the indexer and of top-k."""

from __future__ import annotations

import torch

from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, by_wrapping, layer_bug
from nsa_oracle.harness.bugs.catalogue.targets import FORWARD, INDEXER, SELECT, TOPK
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.protocol import SparseAttention
from nsa_oracle.reference.types import AttentionConfig, BackendConfig


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


INDEXERS = (
    layer_bug(
        "page-offset-loses-high-bits",
        "The offset of a page is kept in 31 bits: page * 8448 wraps near page 254,200.",
        "sglang#34725",
        "pages far apart",
        Check.LOGITS,
        Mutation(
            INDEXER, "index_k_cache + page_ids * page_stride", "index_k_cache + ((page_ids * page_stride) & 0x7FFFFFFF)"
        ),
    ),
    layer_bug(
        "length-mask-skipped",
        "Tokens beyond a row's length that share its last tile get a score.",
        "sglang#33247",
        "a table wider than the row is long",
        Check.LOGITS,
        Mutation(INDEXER, 'tl.where(live, result, float("-inf"))', "result"),
    ),
    layer_bug(
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
    layer_bug(
        "no-relu",
        "Negative products of an index head with a key lower the score.",
        REVIEW,
        "a negative product and a weight",
        Check.LOGITS,
        Mutation(INDEXER, "scores = tl.where(scores < 0, 0.0, scores)", "scores = scores + 0.0"),
    ),
    layer_bug(
        "index-scales-read-interleaved",
        "The scale of an index key is looked for right behind it, not in the page's plane of scales.",
        REVIEW,
        "pages of several tokens",
        Check.LOGITS,
        Mutation(INDEXER, "PAGE_SIZE * DIM + offsets * 4", "offsets * (DIM + 4) + DIM"),
    ),
    layer_bug(
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
    layer_bug(
        "last-partial-tile-skipped",
        "Tokens behind a row's last full tile are not scored.",
        REVIEW,
        "a length that is no multiple of 128",
        Check.LOGITS,
        Mutation(INDEXER, "num_tiles = tl.cdiv(length, BLOCK)", "num_tiles = length // BLOCK"),
    ),
    layer_bug(
        "page-table-of-the-row-before",
        "A row is scored by the pages of the row before it.",
        REVIEW,
        "two requests",
        Check.LOGITS,
        Mutation(INDEXER, "page_table + row * table_stride", "page_table + tl.maximum(row - 1, 0) * table_stride"),
    ),
)

SELECTIONS = (
    layer_bug(
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
    layer_bug(
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
    layer_bug(
        "short-row-ends-with-the-table",
        "A row of at most index_topk tokens selects up to the table's width, not to its own length.",
        "flashinfer#2489",
        "a row shorter than index_topk in a wider table",
        Check.SELECTION,
        Mutation(TOPK, "live = tokens < length", "live = tokens < width"),
    ),
    layer_bug(
        "take-all-path-off-by-one",
        "A row of index_topk + 1 tokens is taken for one that selects all of them.",
        REVIEW,
        "a length of index_topk + 1",
        Check.SELECTION,
        Mutation(TOPK, "if length <= k:", "if length <= k + 1:"),
    ),
    layer_bug(
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
    layer_bug(
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
    layer_bug(
        "ragged-offset-of-the-first-row",
        "Positions of all rows are put where the first row's request starts in the concatenated KV.",
        REVIEW,
        "a prefill of two requests",
        Check.SELECTION,
        Mutation(TOPK, "tl.load(offsets + row * offsets_stride)", "tl.load(offsets)"),
    ),
)
