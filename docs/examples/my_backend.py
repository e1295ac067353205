"""A third-party metadata planner adapted to the oracle's protocol, and a twin of it with a bug.

The planner has method names of its own and returns a dictionary under field names of its own. The adapter below
renames; it computes and copies nothing, so the oracle judges the planner itself. Replace ``Planner`` by an import of
your planner, and ``NAMES`` by its field names.

Judge both with:

    make check ARGS='-k test_scenarios --oracle-profile dev --oracle-backend docs.examples.my_backend:MyBackend'
    make check ARGS='-k test_scenarios --oracle-profile dev --oracle-backend docs.examples.my_backend:MyBrokenBackend'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo

# The planner's name -> the oracle's. Fields that are not listed have the same name in both, host scalars included.
NAMES = {
    "kv_lens": "cache_seqlens_int32",
    "kv_start": "cu_seqlens_k",
    "query_start": "cu_seqlens_q",
    "token_kv_lens": "seqlens_expanded",
    "sparse_lens": "nsa_cache_seqlens_int32",
    "sparse_start": "nsa_cu_seqlens_k",
    "sparse_query_start": "nsa_cu_seqlens_q",
    "slot_table": "page_table_1",
    "block_table": "real_page_table",
}
OURS_TO_THEIRS = {ours: theirs for theirs, ours in NAMES.items()}
Plan = dict[str, Any]


class Planner:
    """The third party's code: plans one draft step. It stands for your own code, and computes with the reference."""

    refreshed = (*NAMES, "paged_mqa_schedule_metadata", "flashmla_metadata", "flashmla_num_splits")

    def __init__(self, config: BackendConfig, slots: torch.Tensor, step: int) -> None:
        self.config, self.slots, self.step = config, slots, step

    def plan(self, batch: ForwardBatch, fixed_shape: bool) -> Plan:
        """Metadata of ``batch`` by the planner's names; ``fixed_shape``: as wide as a graph's buffers."""
        values = compute_metadata(self.config, self.slots, batch, self.step, fixed_shape)
        return {OURS_TO_THEIRS.get(ours, ours): value for ours, value in vars(values).items()}

    def update(self, plan: Plan, batch: ForwardBatch) -> None:
        """Refresh ``plan`` for ``batch``, in place."""
        fresh = self.plan(batch, fixed_shape=True)
        for name in self.refreshed:
            if plan[name] is not None:
                plan[name].copy_(fresh[name])


class ForgetfulPlanner(Planner):
    """The bug: assumes that the pages of a request never change, and so does not copy them again."""

    refreshed = tuple(name for name in Planner.refreshed if name != "block_table")


class Step:
    """The adapter of one draft step: translates the engine's calls to the planner's."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.plans: dict[tuple[ForwardMode, int], Plan] = {}
        self.forward_metadata: Metadata

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.show(self.planner.plan(forward_batch, fixed_shape=False))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.plans.clear()

    def init_forward_metadata_capture_cuda_graph(
        self,
        bs: int,
        num_tokens: int,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None,
        forward_mode: ForwardMode,
        spec_info: SpecInfo | None,
    ) -> None:
        batch = ForwardBatch(forward_mode, bs, req_pool_indices, seq_lens, spec_info=spec_info)
        self.plans[forward_mode, bs] = self.planner.plan(batch, fixed_shape=True)
        self.show(self.plans[forward_mode, bs])

    def init_forward_metadata_replay_cuda_graph(
        self,
        bs: int,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_sum: int | None,
        encoder_lens: torch.Tensor | None,
        forward_mode: ForwardMode,
        spec_info: SpecInfo | None,
        seq_lens_cpu: torch.Tensor | None,
        out_cache_loc: torch.Tensor | None = None,
    ) -> None:
        graph_mode = ForwardMode.DECODE if forward_mode.is_decode_or_idle else forward_mode
        plan = self.plans[graph_mode, bs]
        self.planner.update(plan, ForwardBatch(forward_mode, bs, req_pool_indices, seq_lens, spec_info=spec_info))
        self.show(plan)

    def show(self, plan: Plan) -> None:
        """Set ``forward_metadata``: fields are renamed, tensors stay the planner's, at their addresses."""
        self.forward_metadata = Metadata(**{NAMES.get(theirs, theirs): value for theirs, value in plan.items()})


class MyBackend:
    """The adapter of all steps. ``--oracle-backend`` names this class; it is called with these two arguments."""

    planner: type[Planner] = Planner

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        steps = range(config.speculative_num_steps)
        self.attn_backends: Sequence[Step] = [Step(self.planner(config, req_to_token, step)) for step in steps]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for step in self.attn_backends:
            step.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for step in self.attn_backends:
            step.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None:
        b = forward_batch
        for step in self.attn_backends:
            step.init_forward_metadata_capture_cuda_graph(
                b.batch_size, 0, b.req_pool_indices, b.seq_lens, None, b.forward_mode, b.spec_info
            )

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        b = forward_batch
        for step in self.attn_backends:
            step.init_forward_metadata_replay_cuda_graph(
                bs, b.req_pool_indices, b.seq_lens, None, None, b.forward_mode, b.spec_info, None
            )


class MyBrokenBackend(MyBackend):
    """The same adapter over the planner with the bug."""

    planner = ForgetfulPlanner
