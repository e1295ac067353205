"""Bugs of graphs: frozen host values, memory of the graph, streams, compiled code. Most of them need a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from nsa_oracle.harness.bugs.bug import Bug, Group, by_mutation, by_wrapping
from nsa_oracle.harness.bugs.catalogue.targets import STEP, STEPS
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.bugs.wrappers import BackendWrapper, Moment
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.protocol import SingleStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch

LIMITED = (
    "dataclasses.replace(forward_batch, "
    "seq_lens=forward_batch.seq_lens.clamp(max=forward_batch.seq_lens_sum // forward_batch.batch_size + 250))"
)


class ClearsByTheMirror(BackendWrapper):
    """Each graph clears a workspace, which nothing reads, up to the longest length in the host mirror at capture."""

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment is Moment.CAPTURE:
            self.workspace = torch.zeros_like(self.pool[0])
        if moment is Moment.IN_GRAPH and batch.seq_lens_cpu is not None:
            self.workspace[: int(batch.seq_lens_cpu.max())].zero_()
        return batch


class OnAStream(BackendWrapper):
    """Prepares replays on its own stream. Contains no bug: it waits for the inputs, and the graph waits for it."""

    waits_before = True
    waits_after = True

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.stream = torch.cuda.Stream(req_to_token.device)  # type: ignore[no-untyped-call]
        for backend in (self.inner, *self.inner.attn_backends):
            replay = backend.init_forward_metadata_replay_cuda_graph
            backend.init_forward_metadata_replay_cuda_graph = self._elsewhere(replay)

    def _elsewhere(self, prepare: Callable[..., None]) -> Callable[..., None]:
        def prepare_elsewhere(*args: Any, **kwargs: Any) -> None:
            engine = torch.cuda.current_stream()
            if self.waits_before:
                self.stream.wait_stream(engine)
            with torch.cuda.stream(self.stream):
                prepare(*args, **kwargs)
            if self.waits_after:
                engine.wait_stream(self.stream)

        return prepare_elsewhere


class DoesNotWaitForInputs(OnAStream):
    """The preparation does not wait for the engine's stream."""

    waits_before = False


class IsNotWaitedFor(OnAStream):
    """The engine's stream does not wait for the preparation."""

    waits_after = False


class CopiesFromPinnedMemory(BackendWrapper):
    """Each call stages the lengths in new pinned memory; the graph copies from the memory of the capture."""

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment in (Moment.CAPTURE, Moment.REPLAY):
            self.staged = batch.seq_lens.cpu().pin_memory()
        if moment is Moment.CAPTURE:
            self.lengths = torch.empty(batch.batch_size, dtype=batch.seq_lens.dtype, device=batch.seq_lens.device)
        if moment is Moment.IN_GRAPH:
            self.lengths.copy_(self.staged, non_blocking=True)
            return dataclasses.replace(batch, seq_lens=self.lengths)
        return batch


class DropsScratch(BackendWrapper):
    """A kernel of the graph writes to scratch memory whose last reference is dropped when the capture ends."""

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        from nsa_oracle.harness.bugs.catalogue.graph_kernels import mark_kernel

        if moment is Moment.CAPTURE:
            self.scratch: torch.Tensor | None = torch.zeros(64, dtype=torch.int32, device=self.pool.device)
        if moment is Moment.IN_GRAPH and self.scratch is not None:
            mark_kernel[(1,)](self.scratch)
            if torch.cuda.is_current_stream_capturing() and step in (None, len(self.attn_backends) - 1):
                self.scratch = None
        return batch


class ListsAddresses(BackendWrapper):
    """The graph adds offsets, all 0, that it finds through a table of addresses. Only the table is kept alive."""

    keeps = False

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        from nsa_oracle.harness.bugs.catalogue.graph_kernels import add_listed_kernel

        if moment is Moment.CAPTURE:
            offsets = torch.zeros(batch.batch_size + 1, dtype=torch.int32, device=self.pool.device)
            self.addresses = torch.tensor([offsets.data_ptr()], dtype=torch.int64).to(self.pool.device)
            self.offsets = offsets if self.keeps else None
        if moment is Moment.IN_GRAPH:
            for index in self.steps(step):
                bounds = self.inner.attn_backends[index].forward_metadata.cu_seqlens_k
                add_listed_kernel[(1,)](self.addresses, bounds, len(bounds), BLOCK=64)
        return batch


class KeepsWhatItLists(ListsAddresses):
    """Contains no bug: the offsets are kept alive too."""

    keeps = True


class TurnsThroughScratch(BackendWrapper):
    """Copies the KV bounds to scratch memory and back, by different threads. Contains no bug: there is a barrier."""

    waits = True

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        from nsa_oracle.harness.bugs.catalogue.graph_kernels import TURN_LANES, turn_kernel

        bounds = backend.forward_metadata.cu_seqlens_k[:TURN_LANES]
        scratch = torch.full_like(bounds, -7)
        n = len(bounds)
        turn_kernel[(1,)](bounds, scratch, n, TURN_LANES // n, WAITS=self.waits, LANES=TURN_LANES, num_warps=8)


class LacksTheBarrier(TurnsThroughScratch):
    """There is no barrier between the stores and the loads."""

    waits = False


class CompilesTheWidth(BackendWrapper):
    """Eager page tables are copied onto themselves by a kernel that has their width as a compile-time constant."""

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        from nsa_oracle.harness.bugs.catalogue.graph_kernels import copy_rows_kernel

        table = backend.forward_metadata.page_table_1
        if moment is Moment.EAGER and len(table):
            copy_rows_kernel[(len(table),)](table, table.stride(0), WIDTH=table.shape[1], BLOCK=128)


BUGS = (
    Bug(
        name="limit-frozen-above-the-capture",
        group=Group.BUFFERS,
        sentence="Lengths are clamped to a limit that the host computed at capture, far above the captured lengths.",
        reference="TensorRT-LLM#17110",
        trigger="capture of a graph that records its preparation; in replays, only lengths beyond the limit",
        caught_by=frozenset({Check.CAPTURE, Check.METADATA}),
        plant=by_mutation(
            Mutation(
                f"{STEPS}.init_forward_metadata_in_graph",
                "self._refresh(forward_batch, bs)",
                f"self._refresh({LIMITED}, bs)",
            ),
            Mutation(
                f"{STEP}.init_forward_metadata_in_graph",
                "self.req_to_token, forward_batch,",
                f"self.req_to_token, {LIMITED},",
            ),
        ),
    ),
    Bug(
        name="workspace-cleared-by-the-mirror",
        group=Group.BUFFERS,
        sentence="The graph clears its workspace up to the longest length that the host mirror had at capture.",
        reference="kernel review",
        trigger="any capture; no replay, as long as nothing reads the workspace",
        caught_by=frozenset({Check.CAPTURE}),
        plant=by_wrapping(ClearsByTheMirror),
    ),
    Bug(
        name="prepares-on-an-unordered-stream",
        group=Group.TABLES,
        sentence="Replays are prepared on the backend's own stream, which does not wait for the engine's inputs.",
        reference="sglang#28034",
        trigger="inputs that arrive late",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(DoesNotWaitForInputs),
        gpu=True,
    ),
    Bug(
        name="replay-does-not-wait-for-its-plan",
        group=Group.TABLES,
        sentence="Replays are prepared on the backend's own stream, and the graph does not wait for it.",
        reference="sglang#28034",
        trigger="a stream that is busy when the preparation is queued on it",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(IsNotWaitedFor),
        gpu=True,
    ),
    Bug(
        name="captured-copy-from-pinned-memory",
        group=Group.BUFFERS,
        sentence="The graph copies the lengths from a pinned buffer, but every call allocates a new one.",
        reference="sglang#38663",
        trigger="any capture",
        caught_by=frozenset({Check.CAPTURE}),
        plant=by_wrapping(CopiesFromPinnedMemory),
        gpu=True,
    ),
    Bug(
        name="raw-kernel-uses-dropped-scratch",
        group=Group.BUFFERS,
        sentence="A kernel that is launched outside torch uses scratch memory that is freed when the capture ends.",
        reference="TensorRT-LLM#14297",
        trigger="any capture",
        caught_by=frozenset({Check.CAPTURE}),
        plant=by_wrapping(DropsScratch),
        gpu=True,
    ),
    Bug(
        name="address-table-outlives-its-buffers",
        group=Group.BUFFERS,
        sentence="A captured kernel finds its buffers through a table of addresses that outlives the buffers.",
        reference="TensorRT-LLM#14297",
        trigger="freed memory that is reused before a replay",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(ListsAddresses),
        gpu=True,
    ),
    Bug(
        name="no-barrier-between-store-and-load",
        group=Group.TABLES,
        sentence="A thread loads what another thread of its program has stored, without a barrier in between.",
        reference="kernel review",
        trigger="any batch, in compiled code",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(LacksTheBarrier),
        gpu=True,
    ),
    Bug(
        name="alignment-promised-of-any-row",
        group=Group.TABLES,
        sentence="The kernel that copies page tables is promised rows aligned to 16 bytes, which not all rows are.",
        reference="vllm#42135",
        trigger="an unaligned row longer than the chunk of a copy, in compiled code",
        caught_by=frozenset({Check.CRASH}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.metadata:_source_aligned",
                "return row_stride % buffers.WORDS_PER_VECTOR == 0 and table.data_ptr() % 16 == 0",
                "return True",
            )
        ),
        gpu=True,
        faults=True,
    ),
    Bug(
        name="scale-divided-approximately",
        group=Group.LAYER,
        sentence="The scale of a cached key is divided without correct rounding, as compiled code does by default.",
        reference="kernel review",
        trigger="any key in an FP8 cache or among the index keys, in compiled code",
        caught_by=frozenset({Check.STORE}),
        plant=by_mutation(
            Mutation("nsa_oracle.optimized.kernels.kv_cache:quantize", "tl.div_rn(amax, divisor)", "amax / divisor")
        ),
        layer=True,
        gpu=True,
    ),
    Bug(
        name="width-compiled-into-a-kernel",
        group=Group.TABLES,
        sentence="The width of an eager page table is a compile-time constant: every length compiles its own variant.",
        reference="sglang#36888",
        trigger="eager calls of many different lengths",
        caught_by=frozenset({Check.COMPILATION}),
        plant=by_wrapping(CompilesTheWidth),
        gpu=True,
        drawn=False,
    ),
)
