"""Bugs of a layer's prefill: what short prompts and cached prefixes skip."""

from __future__ import annotations

from nsa_oracle.harness.bugs.bug import REVIEW, layer_bug
from nsa_oracle.harness.bugs.catalogue.targets import FORWARD, TOPK
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.checks.check import Check

_SELECTED = "indices = self.topk_transform_paged(logits, lengths, page_table_1)"

PREFILLS = (
    layer_bug(
        "short-prefill-not-selected",
        "A prefill of at most index_topk tokens selects nothing, for a dense attention that does not follow.",
        REVIEW,
        "a prefill of which no request is longer than index_topk",
        Check.SELECTION,
        Mutation(
            FORWARD,
            _SELECTED,
            f"{_SELECTED}\n"
            "    if metadata.token_to_batch_idx is not None and metadata.max_seq_len_k <= self.config.index_topk:\n"
            "        indices.fill_(-1)",
        ),
    ),
    layer_bug(
        "chunk-scored-without-its-prefix",
        "A prefill behind a cached prefix scores only as many tokens of a request as are new.",
        REVIEW,
        "a prefill with a cached prefix",
        Check.LOGITS,
        Mutation(
            FORWARD,
            _SELECTED,
            "if metadata.page_table_1_flattened is not None:\n"
            "        logits[:, metadata.max_seq_len_q:] = float('-inf')\n"
            f"    {_SELECTED}",
        ),
    ),
    layer_bug(
        "ragged-short-row-without-its-offset",
        "A row of at most index_topk tokens gets positions in its own KV instead of the batch's concatenated KV.",
        REVIEW,
        "the ragged transform of a row that takes all tokens",
        Check.SELECTION,
        Mutation(
            TOPK,
            "transform(tokens, live, row_table, offset, TRANSFORM)",
            "transform(tokens, live, row_table, offset * 0, TRANSFORM)",
        ),
    ),
)
