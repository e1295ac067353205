"""Bugs of the attention layer: caches, indexer, top-k, attention, and the forward pass that calls them."""

from __future__ import annotations

import torch

from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, by_mutation, by_wrapping, layer_bug
from nsa_oracle.harness.bugs.catalogue.targets import FORWARD
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.protocol import SparseAttention
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    AttentionOutputs,
    BackendConfig,
    Metadata,
)


def reusing_selections(config: BackendConfig, attention: AttentionConfig) -> SparseAttention:
    """A layer whose later draft steps attend to the slots that the first step selected."""
    from nsa_oracle.optimized.layer import SparseAttention as Clean  # late: importing Triton fixes how kernels run

    class ReusingSelections(Clean):
        step: int | None = None  # draft step of the running forward pass; None outside a pass
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


BUGS: tuple[Bug, ...] = (
    layer_bug(
        "stored-after-it-is-read",
        "A forward pass writes its keys after attention, so rows do not see their own keys.",
        REVIEW,
        "any forward pass whose rows see their own key",
        frozenset({Check.LOGITS, Check.ATTENTION}),  # the slot's old index key may be the same
        Mutation(FORWARD, "    self.store_cache(caches, inputs)\n", ""),
        Mutation(FORWARD, "    return Att", "    self.store_cache(caches, inputs)\n    return Att"),
    ),
    layer_bug(
        "width-frozen-by-item",
        "The forward pass reads the length of its longest row from the device, and a graph would freeze that value.",
        "tokenspeed#348",
        "a capture",
        Check.CAPTURE,
        Mutation(FORWARD, "metadata.max_seq_len_k,", "int(lengths.max().item()),"),
        group=Group.BUFFERS,
    ),
    layer_bug(
        "lengths-ignore-the-padded-queries",
        "The KV length of a request does not count the query tokens to which each request is padded.",
        "sglang#12295",
        "several query tokens per request",
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
    layer_bug(
        "prefill-rows-dealt-evenly",
        "The rows of a prefill are distributed evenly over its requests.",
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
        "padded-queries-scored",
        Group.PADDING,
        "The indexer gets the queries of a padded call whole, and scores more rows than there are lengths.",
        "sglang#33059",
        "rows of the inputs behind those of the metadata",
        frozenset({Check.CRASH}),
        by_mutation(
            Mutation(FORWARD, "inputs.index_q[:num_rows]", "inputs.index_q"),
            Mutation(FORWARD, "inputs.index_weights[:num_rows]", "inputs.index_weights"),
        ),
        layer=True,
        cpu=True,  # on a GPU the lengths behind the last are those of another buffer
    ),
    layer_bug(
        "padded-rows-not-restored",
        "A padded call returns as many rows as the metadata has, not as many as it was given.",
        "sglang#33059",
        "rows of the inputs behind those of the metadata",
        Check.SHAPE,
        Mutation(FORWARD, "if num_extra:", "if False:"),
        Mutation(FORWARD, "self.sparse_mla(inputs.q,", "self.sparse_mla(inputs.q[:num_rows],"),
        group=Group.PADDING,
    ),
    layer_bug(
        "padding-slot-wraps-around",
        "Slot -1 of a padded row is an index from the end, so the row is stored in the last slot.",
        "vllm#43810",
        "rows of slot -1",
        frozenset({Check.STORE, Check.CRASH}),  # several such rows race for it
        Mutation(
            "nsa_oracle.optimized.kv_cache:store_cache",
            "inputs.out_cache_loc,",
            "inputs.out_cache_loc % caches.kv.shape[0],",
        ),
        group=Group.PADDING,
    ),
    Bug(
        "steps-reuse-the-first-selection",
        Group.LAYER,
        "Later draft steps attend to the slots that the first step selected.",
        "sglang#30839",
        "several draft steps and more tokens than index_topk",
        frozenset({Check.SELECTION}),
        by_wrapping(layer=reusing_selections),
        layer=True,
    ),
)
