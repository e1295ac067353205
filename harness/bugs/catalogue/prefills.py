"""Bugs of a layer's prefill: what short prompts and cached prefixes skip."""

from __future__ import annotations

from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, by_mutation, layer_bug
from nsa_oracle.harness.bugs.catalogue.targets import FORWARD, TOPK
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.checks.check import Check

TOPK_MODULE = "nsa_oracle.optimized.kernels.topk"
_SELECTED = "indices = self.topk_transform_paged(logits, lengths, page_table_1)"

BUGS: tuple[Bug, ...] = (
    Bug(
        name="prefill-of-cached-tokens-refused",
        group=Group.TABLES,
        sentence="A prefill asserts that some token is new, as none is if the tokens of all requests are cached.",
        reference=REVIEW,
        trigger="a prefill of requests whose tokens are all cached",
        caught_by=frozenset({Check.CRASH}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.metadata:read_sizes",
                "flattened = sum(seq_lens) if",
                'assert not bs or sum(q_lens), "nothing to prefill"\n        flattened = sum(seq_lens) if',
            )
        ),
    ),
    layer_bug(
        "programs-shared-by-no-row",
        "The indexer divides its programs by the number of rows, which is 0 if no request has a new token.",
        REVIEW,
        "an eager call of requests without a row",
        Check.CRASH,
        Mutation(
            "nsa_oracle.optimized.indexer:indexer_logits",
            "    logits = torch.empty(",
            "    PROGRAMS // index_q.shape[0] if max_seq_len_k else 0\n    logits = torch.empty(",
        ),
    ),
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
        "chunk-selected-from-the-first-pages",
        "The rows of a prefill are selected in chunks of 128, and each chunk reads the page tables of the first one.",
        REVIEW,
        "a prefill of more than 128 rows of several requests",
        Check.SELECTION,
        Mutation(
            FORWARD,
            _SELECTED,
            "chunks = list(zip(logits.split(128), lengths.split(128)))\n"
            "    selected = [self.topk_transform_paged(*chunk, page_table_1[:len(chunk[1])]) for chunk in chunks]\n"
            "    indices = torch.cat(selected)",
        ),
    ),
    layer_bug(
        "candidates-beyond-4096-dropped",
        "Of a wide row, the tokens behind the first 4,096 candidates for a place are dropped.",
        REVIEW,
        "a row of more than 16,384 tokens whose numbers are close to each other",
        Check.SELECTION,
        Mutation(
            f"{TOPK_MODULE}:topk_filter_kernel",
            "threshold = likely_threshold(row_logits, length, k, COLUMNS)",
            "threshold = likely_threshold(row_logits, length, k, COLUMNS).to(tl.int32, bitcast=True) & -0x200000\n"
            "        threshold = threshold.to(tl.float32, bitcast=True)  # the lower end of its bin\n"
            "        most = 4096 // num_shares",
        ),
        Mutation(
            f"{TOPK_MODULE}:topk_filter_kernel",
            "entries, mask=is_likely)",
            "entries, mask=is_likely & (count + places <= most))",
        ),
        Mutation(f"{TOPK_MODULE}:topk_filter_kernel", "count += total", "count = tl.minimum(count + total, most)"),
    ),
    layer_bug(
        "large-scores-compared-in-half-precision",
        "Scores that half precision cannot express count as infinite, and tie.",
        REVIEW,
        "more scores beyond 65,504 than places",
        Check.SELECTION,
        Mutation(
            f"{TOPK_MODULE}:score",
            'return number_or(logits, float("-inf"))',
            'known = number_or(logits, float("-inf"))\n    return tl.where(known > 65504.0, float("inf"), known)',
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
