"""Backends that differ from the contract as shipped ones do, with or without declaring it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from nsa_oracle.harness.fields import Axis
from nsa_oracle.harness.scenarios.batch import Padding
from nsa_oracle.harness.subjects.declarations import Call, OwnField, Waiver, behind_last_token
from nsa_oracle.optimized.multi_step import MultiStepBackend as OptimizedSteps
from nsa_oracle.optimized.optimizations import Optimizations
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.multi_step import MultiStepBackend, SingleStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata
from tests.support.backends.seams import OfSteps, Step, all_but, backend_of


class TodaysStep:
    """A step by today's names alone."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def forward_metadata(self) -> Metadata:
        found: Metadata = self.inner.forward_metadata
        return found

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.inner.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.inner.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        self.inner.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        self.inner.init_forward_metadata_in_graph(forward_batch)


class Todays(TodaysStep):
    """The reference by today's names alone."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(self.build(config, req_to_token))
        self.attn_backends = [TodaysStep(step) for step in self.inner.attn_backends]

    def build(self, config: BackendConfig, req_to_token: torch.Tensor) -> Any:
        return MultiStepBackend(config, req_to_token)


class TodaysOptimized(Todays):
    def build(self, config: BackendConfig, req_to_token: torch.Tensor) -> Any:
        return OptimizedSteps(config, req_to_token)


class TodaysInGraph(Todays):
    def build(self, config: BackendConfig, req_to_token: torch.Tensor) -> Any:
        return OptimizedSteps(config, req_to_token, Optimizations.from_names(("one_launch", "in_graph")))


class TodaysForgets(Todays):
    """Leaves everything as captured."""

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        if in_capture:
            super().init_forward_metadata_out_graph(forward_batch, in_capture=True)


class TodaysHalf:
    """Begins today's set of names and does not finish it."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        self.attn_backends: list[object] = []

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None: ...

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None: ...

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None: ...


class OneStepLess(MultiStepBackend):
    """N - 1 step backends."""

    step_backends = "N-1"

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)
        self.attn_backends.pop()


class Roles:
    """One instance per role, each of which fails in every mode that is not its own; verify is a single step."""

    roles: ClassVar = {"draft": ("DECODE", "IDLE"), "verify": ("TARGET_VERIFY",), "extend": ("EXTEND", "DRAFT_EXTEND")}
    modes = ("DECODE", "IDLE", "TARGET_VERIFY", "EXTEND", "DRAFT_EXTEND")
    step_backends: ClassVar = {"verify": "1", "extend": "1"}

    def __new__(cls, config: BackendConfig, req_to_token: torch.Tensor, role: str) -> Any:  # type: ignore[misc]
        modes = {ForwardMode[mode] for mode in cls.roles[role]}

        class OfRole(SingleStepBackend):
            def _compute_in_graph(self, batch: ForwardBatch) -> Metadata:
                assert batch.forward_mode in modes, f"{role} is asked for {batch.forward_mode}"
                return super()._compute_in_graph(batch)

            def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
                assert forward_batch.forward_mode in modes, f"{role} is asked for {forward_batch.forward_mode}"
                super().init_forward_metadata(forward_batch)

        if role == "draft":
            return type("Draft", (OfSteps,), {"step": OfRole})(config, req_to_token)
        return OfRole(config, req_to_token)


TAIL_FIELDS = ("seqlens_expanded", "nsa_cache_seqlens_int32", "nsa_cu_seqlens_k")


class LeavesTail(Step):
    """Leaves the rows behind the last token of DRAFT_EXTEND as the capture wrote them: lengths of one."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        before = {name: getattr(buffers, name).clone() for name in TAIL_FIELDS}
        super().refresh(buffers, batch)
        if batch.forward_mode is ForwardMode.DRAFT_EXTEND:
            assert batch.spec_info is not None
            rows = int(batch.spec_info.accept_length.sum())
            for name, old in before.items():
                first = rows + (name == "nsa_cu_seqlens_k")
                getattr(buffers, name)[first:] = old[first:]


class TailUndeclared(OfSteps):
    step = LeavesTail
    padding: ClassVar = {"DRAFT_EXTEND": Padding(accept_length="all")}


class TailDeclared(TailUndeclared):
    waivers = tuple(Waiver("DRAFT_EXTEND", name, "nothing reads them", behind_last_token, True) for name in TAIL_FIELDS)


class TailDeclaredWrongly(TailDeclared):
    """The lengths themselves are wrong as well, in front of the tail."""

    class step(LeavesTail):  # noqa: N801
        def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
            super().refresh(buffers, batch)
            buffers.seqlens_expanded[0] += 1


class WaivesForNothing(MultiStepBackend):
    waivers = (Waiver("DECODE", "cache_seqlens_int32", "it might be wrong one day"),)


class WithoutSchedule(Step):
    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.paged_mqa_schedule_metadata = None


class LeavesScheduleToTheIndexer(OfSteps):
    step = WithoutSchedule
    absent: ClassVar = {"*": ("paged_mqa_schedule_metadata",)}


class DeclaresAbsentForNothing(MultiStepBackend):
    absent: ClassVar = {"DECODE": ("paged_mqa_schedule_metadata",)}


def doubled(expected: Metadata, call: Call) -> torch.Tensor:
    return expected.cache_seqlens_int32 * 2


class HasAnotherField(Step):
    factor = 2

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.doubled_lengths = metadata.cache_seqlens_int32 * self.factor  # type: ignore[attr-defined]

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        fresh = compute_metadata(self.config, self.req_to_token, batch, self.speculative_step_id, in_graph=True)
        buffers.doubled_lengths.copy_(fresh.cache_seqlens_int32 * self.factor)  # type: ignore[attr-defined]


class OwnRight(OfSteps):
    step = HasAnotherField
    own_fields = (OwnField("doubled_lengths", doubled, axes=(Axis.REQUEST,)),)


class OwnWrong(OwnRight):
    class step(HasAnotherField):  # noqa: N801
        factor = 3


StaleTable = all_but("real_page_table", "cu_seqlens_k")


@backend_of
class FailsToVerify(Step):
    """Raises in TARGET_VERIFY, and has a stale bound in every other mode."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        assert batch.forward_mode is not ForwardMode.TARGET_VERIFY, "cannot verify"
        kept = buffers.cu_seqlens_k.clone()
        super().refresh(buffers, batch)
        buffers.cu_seqlens_k.copy_(kept)


class WrongOnceInAWhile(MultiStepBackend):
    """Wrong in one call of its process, whatever case that belongs to."""

    calls: ClassVar[int] = 0

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        WrongOnceInAWhile.calls += 1
        if WrongOnceInAWhile.calls == 12:
            for step in self.attn_backends:
                step.forward_metadata.cache_seqlens_int32.add_(1)
