"""Bugs of the buffers that a captured graph reads: moved, stale, refreshed elsewhere, shared by mistake, frozen."""

from __future__ import annotations

import torch

from nsa_oracle.harness.bugs.bug import Bug, Group, by_mutation, by_wrapping
from nsa_oracle.harness.bugs.catalogue.targets import STEP, STEPS
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.bugs.wrappers import BackendWrapper, HostNumbers, KeepsFields, Moment, MovesFields, OwnInputs
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.protocol import SingleStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode

FROZEN = (
    "dataclasses.replace(forward_batch, "
    "seq_lens=torch.full_like(forward_batch.seq_lens, forward_batch.seq_lens_sum // forward_batch.batch_size))"
)


class MovesFlashMlaSchedule(MovesFields):
    names = ("flashmla_metadata",)


class MovesOutput(MovesFields):
    names = ("real_page_table",)


class MovesScratch(MovesFields):
    names = ("nsa_cu_seqlens_k",)


class UpdatesTwin(KeepsFields):
    names = ("cu_seqlens_k",)


class StridesBySteps(BackendWrapper):
    """Query bounds of requests in verify are N + 1 apart, although each request has nd tokens."""

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        if batch.forward_mode is ForwardMode.TARGET_VERIFY and batch.batch_size > 1:
            drafts, stride = self.config.speculative_num_draft_tokens, self.config.speculative_num_steps + 1
            rows = torch.arange(batch.batch_size * drafts + 1, device=batch.seq_lens.device)
            backend.forward_metadata.cu_seqlens_q.copy_(rows // drafts * stride + rows % drafts)


class ReusesVerifyFactors(OwnInputs):
    """The tokens that verify adds to a length are stored, and added in later DECODE and IDLE replays as well."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.extra: dict[int | None, int] = {}

    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        if moment is not Moment.REPLAY:
            return numbers
        if batch.forward_mode is ForwardMode.TARGET_VERIFY:
            self.extra[step] = self.config.speculative_num_draft_tokens
        elif batch.forward_mode.is_decode_or_idle:
            numbers.seq_lens = [length + self.extra.get(step, 0) for length in numbers.seq_lens]
        return numbers


BUGS = (
    Bug(
        name="replay-rebinds-buffers",
        group=Group.BUFFERS,
        sentence="A replay allocates new buffers for its bucket instead of refilling those bound at capture.",
        reference="sglang#26019",
        trigger="any replay",
        caught_by=frozenset({Check.ADDRESS, Check.METADATA}),  # the graph reads what its capture has left
        plant=by_mutation(
            Mutation(
                f"{STEPS}.init_forward_metadata_replay_cuda_graph",
                "backend.select(forward_batch.forward_mode, bs)",
                "backend._buffers._captured.clear(); backend.bind(forward_batch.forward_mode, bs)",
            ),
            Mutation(
                f"{STEP}.init_forward_metadata_replay_cuda_graph",
                "self.select(forward_mode, bs)",
                "self._buffers._captured.clear(); self.bind(forward_mode, bs)",
            ),
        ),
    ),
    Bug(
        name="in-graph-upgrade-allocates",
        group=Group.BUFFERS,
        sentence="Preparation inside the graph allocates new metadata, but its readers are bound to the old buffers.",
        reference="sglang#27664",
        trigger="a replay of a graph that records its preparation",
        caught_by=frozenset({Check.ADDRESS}),
        plant=by_mutation(
            Mutation(
                f"{STEPS}.init_forward_metadata_in_graph",
                "self._refresh(forward_batch, bs)",
                "self._buffers._captured.clear(); "
                "[backend.bind(forward_batch.forward_mode, bs) for backend in self.attn_backends]; "
                "self._refresh(forward_batch, bs)",
            ),
            Mutation(
                f"{STEP}.init_forward_metadata_in_graph",
                "target = self.select(forward_batch.forward_mode, bs)",
                "self._buffers._captured.clear(); self.bind(forward_batch.forward_mode, bs); "
                "target = self.select(forward_batch.forward_mode, bs)",
            ),
        ),
    ),
    Bug(
        name="schedule-bypasses-its-buffer",
        group=Group.BUFFERS,
        sentence="A replay provides the FlashMLA schedule in a new tensor instead of the persistent buffer.",
        reference="vllm#35175",
        trigger="any replay with a FlashMLA schedule",
        caught_by=frozenset({Check.ADDRESS}),
        plant=by_wrapping(MovesFlashMlaSchedule),
    ),
    Bug(
        name="output-allocated-per-replay",
        group=Group.BUFFERS,
        sentence="The page table that the graph reads is reallocated for every replay.",
        reference="TensorRT-LLM#16290",
        trigger="any replay",
        caught_by=frozenset({Check.ADDRESS}),
        plant=by_wrapping(MovesOutput),
    ),
    Bug(
        name="scratch-allocated-per-replay",
        group=Group.BUFFERS,
        sentence="A running sum that a captured kernel reads is in scratch memory that is allocated for one call.",
        reference="TensorRT-LLM#14297",
        trigger="any replay",
        caught_by=frozenset({Check.ADDRESS}),
        plant=by_wrapping(MovesScratch),
    ),
    Bug(
        name="eager-twin-updated",
        group=Group.BUFFERS,
        sentence="A replay updates an eager copy of the KV bounds; the buffer that the graph reads stays as it was.",
        reference="sglang#37975",
        trigger="lengths that differ from those of the previous replay",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(UpdatesTwin),
    ),
    Bug(
        name="query-bounds-stride-by-steps",
        group=Group.BUFFERS,
        sentence="Query bounds of requests are num_steps + 1 apart although each request has num_draft_tokens queries.",
        reference="sglang#27545",
        trigger="verify of several requests, num_draft_tokens other than num_steps + 1",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(StridesBySteps),
    ),
    Bug(
        name="later-capture-overwrites-views",
        group=Group.BUFFERS,
        sentence="At capture, building the metadata views of one graph overwrites those of another.",
        reference="vllm#48261",
        trigger="a replay of a graph that was not captured last",
        caught_by=frozenset({Check.ADDRESS, Check.SHAPE, Check.METADATA}),
        plant=by_mutation(
            Mutation(
                f"{STEP}.select",
                "self.forward_metadata = target.metadata[0]",
                "self.forward_metadata = list(self._captured.values())[-1].metadata[0]",
            )
        ),
    ),
    Bug(
        name="verify-factors-reused-in-draft",
        group=Group.BUFFERS,
        sentence="What verify adds to a length is cached and added again in the draft steps that follow.",
        reference="TensorRT-LLM#14891",
        trigger="DECODE after TARGET_VERIFY",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(ReusesVerifyFactors),
    ),
    Bug(
        name="draft-steps-do-not-advance",
        group=Group.BUFFERS,
        sentence="Position-dependent state is not advanced from one draft step to the next.",
        reference="vllm#41162",
        trigger="DECODE with several advancing steps",
        caught_by=frozenset({Check.METADATA, Check.SHAPE}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.lengths:extra_tokens",
                "config.step_advance(mode, step)",
                "config.step_advance(mode, 0)",
            ),
            Mutation("nsa_oracle.optimized.kernels.lengths:expand_seqlens_kernel", "extra + pid", "extra"),
            Mutation("nsa_oracle.optimized.kernels.metadata:fill_metadata_kernel", "extra + step", "extra"),
        ),
    ),
    Bug(
        name="steps-share-a-length-buffer",
        group=Group.BUFFERS,
        sentence="All draft steps keep their lengths in one buffer; the last one to write wins.",
        reference="vllm-ascend#10878",
        trigger="several advancing steps, in buffers of one stack",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation("nsa_oracle.optimized.buffers:build", "layout, packed[step],", "layout, packed[-1],")
        ),
    ),
    Bug(
        name="item-inside-capture",
        group=Group.BUFFERS,
        sentence="The captured preparation reads a device value to decide whether there is anything to do.",
        reference="tokenspeed#348",
        trigger="capture of a graph that records its preparation",
        caught_by=frozenset({Check.CAPTURE}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.metadata:fill",
                "mode = batch.forward_mode\n",
                "mode = batch.forward_mode\n"
                "    if batch.batch_size and batch.seq_lens[: batch.batch_size].max().item() == 0:\n"
                "        return\n",
            )
        ),
    ),
    Bug(
        name="host-length-frozen-at-capture",
        group=Group.BUFFERS,
        sentence="A length known to the host at capture is written into the graph as a constant.",
        reference="TensorRT-LLM#17110",
        trigger="capture of a graph that records its preparation; in replays, lengths other than those of the capture",
        caught_by=frozenset({Check.CAPTURE, Check.METADATA}),
        plant=by_mutation(
            Mutation(
                f"{STEPS}.init_forward_metadata_in_graph",
                "self._refresh(forward_batch, bs)",
                f"self._refresh({FROZEN}, bs)",
            ),
            Mutation(
                f"{STEP}.init_forward_metadata_in_graph",
                "self.req_to_token, forward_batch,",
                f"self.req_to_token, {FROZEN},",
            ),
        ),
    ),
    Bug(
        name="captured-copy-from-host",
        group=Group.BUFFERS,
        sentence="The graph contains a copy from a host buffer that is not kept alive until the replay.",
        reference="sglang#38663",
        trigger="capture of a graph that records its preparation",
        caught_by=frozenset({Check.CAPTURE}),
        plant=by_mutation(
            Mutation(
                f"{STEPS}.init_forward_metadata_in_graph",
                "self._refresh(forward_batch, bs)",
                "self._refresh(dataclasses.replace(forward_batch, seq_lens=torch.empty_like("
                "forward_batch.seq_lens).copy_(forward_batch.seq_lens_cpu, non_blocking=True)), bs)",
            ),
            Mutation(
                f"{STEP}.init_forward_metadata_in_graph",
                "self.req_to_token, forward_batch, self",
                "self.req_to_token, dataclasses.replace(forward_batch, seq_lens=torch.empty_like("
                "forward_batch.seq_lens).copy_(forward_batch.seq_lens_cpu, non_blocking=True)), self",
            ),
        ),
    ),
    Bug(
        name="workspace-kept-for-another-size",
        group=Group.BUFFERS,
        sentence="A cached index tensor is reused for a page table of another width.",
        reference="TensorRT-LLM#15783",
        trigger="tables of two widths, the index cache enabled, pages of several tokens",
        caught_by=frozenset({Check.SHAPE, Check.CRASH}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.page_table:StridedIndices.columns", "key = (device, width)", "key = (device, 0)"
            )
        ),
    ),
)
