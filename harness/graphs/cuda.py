"""Graph runners: capture a body once, replay what it did on the same storages.

A replayed graph does not run Python: it reads and writes the addresses, and uses the host values, of its capture.
That is the contract of `torch.cuda.CUDAGraph`; `harness.simulated_graph` keeps the same contract for CPU tensors.

Both runners run the body twice: a warm-up whose effects count (kernels compile, lazily made buffers get made), then
the capture, whose effects on tensors do not count. After `capture` an `x += 1` has been applied once; each `replay`
applies it once more.

Both refuse a body that moves a tensor which existed before (`resize_` that grows it, `set_`, `.data = ...`). A CUDA
capture would accept that, and every other holder of the buffer would then be bound to memory the graph never reads.
"""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from nsa_oracle.harness.graphs.allocator import Allocator
from nsa_oracle.harness.graphs.audit import Audit, audit, driver_bindings
from nsa_oracle.harness.graphs.callers import describe_frame, innermost_user_frame
from nsa_oracle.harness.graphs.capture import CaptureError
from nsa_oracle.harness.graphs.free_memory import spoil_free_blocks
from nsa_oracle.harness.graphs.host_values import NodeValues, of_nodes
from nsa_oracle.harness.graphs.nodes import DriverRefusal, GraphReader, Node
from nsa_oracle.harness.graphs.storages import StorageWatch, use_count


@dataclass(frozen=True)
class CudaContent:
    """What a CUDA graph was seen to be made of, right after its capture. pool: its private memory."""

    audit: Audit
    host_values: list[NodeValues]
    pool: tuple[int, int]


class CudaCapturedGraph:
    """A `torch.cuda.CUDAGraph` with the storages its operators found, kept alive as long as it is."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        device: torch.device,
        found: dict[int, torch.UntypedStorage],
        content: CudaContent,
    ) -> None:
        self.graph = graph
        self.device = device
        self._found = found
        self._content = content

    def replay(self) -> None:
        self.graph.replay()

    def dangling_bytes(self) -> int:
        # Host memory that Python looked at during the capture is found too, and not part of the graph.
        found = (storage for storage in self._found.values() if storage.device.type == "cuda")
        seen_by_torch = sum(storage.nbytes() for storage in found if use_count(storage) == 1)
        allocator = Allocator.now(self.device)
        if seen_by_torch or allocator is None:
            return seen_by_torch
        hit = allocator.dangling(self._content.audit.references)
        return 0 if hit is None else hit[1].size

    def audit(self) -> Audit:
        return self._content.audit

    def host_values(self) -> Sequence[NodeValues]:
        return self._content.host_values

    def spoil(self, value: int) -> None:
        allocator = Allocator.now(self.device)
        if allocator is not None:
            spoil_free_blocks(allocator, self._content.pool, self.device, value)


class CudaGraphRunner:
    """Captures bodies into real CUDA graphs, and reads the nodes of each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def capture(self, body: Callable[[], None], host_tensors: Sequence[torch.Tensor] = ()) -> CudaCapturedGraph:
        """Run `body` once for real, then record it.

        Raises CaptureError for what the capture refuses; whatever the warm-up raises is the body's own and passes
        unchanged. `host_tensors` is not needed here: the CUDA runtime knows pageable memory.
        """
        watch = StorageWatch()
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            # Work queued before capture must be done before the side stream runs, and the other way round after it.
            torch.cuda.synchronize()
            with torch.cuda.stream(stream), watch:
                body()
            torch.cuda.synchronize()
            return self._record(body, watch, stream)

    def _record(self, body: Callable[[], None], watch: StorageWatch, stream: torch.cuda.Stream) -> CudaCapturedGraph:
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # so that its nodes can be read
        # Named here because a graph that failed does not tell which pool it was given.
        pool = torch.cuda.graph_pool_handle()
        watch.forget_failure()  # What the warm-up caught and survived is no fault.
        failure: Exception | None = None
        ended = False
        with torch.cuda.stream(stream), _no_collection():
            # thread_local: another thread's allocation (a watchdog, a plug-in) is not this body's fault.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                with watch, watch.noting_calls():
                    body()
            except Exception as error:
                failure = error
            finally:
                try:
                    with _empty_is_legal():
                        graph.capture_end()
                        ended = True
                        graph.instantiate()
                except RuntimeError as error:
                    # The first failure is the cause; this one says only that the capture had been invalidated.
                    failure = failure or error
        failure = failure or watch.swallowed_refusal
        if failure is None:
            return CudaCapturedGraph(graph, self.device, watch.found, self._look_at(graph, watch, pool))
        self._recover(graph, pool, ended)
        if isinstance(failure, RuntimeError):
            raise _translate(failure, watch) from failure
        raise failure

    def _look_at(self, graph: torch.cuda.CUDAGraph, watch: StorageWatch, pool: tuple[int, int]) -> CudaContent:
        """Read the graph's nodes, before anything else is allocated."""
        driver = driver_bindings()
        if driver is None:
            return CudaContent(_not_audited("cuda-bindings is not installed"), watch.calls, pool)
        reader, allocator = GraphReader(driver), Allocator.now(self.device)
        try:
            nodes: list[Node] = reader.nodes(graph.raw_cuda_graph())
        except (DriverRefusal, RuntimeError) as refusal:
            return CudaContent(_not_audited(str(refusal)), watch.calls, pool)
        audited = audit(reader, nodes, allocator, watch.holds_host_memory)
        return CudaContent(audited, [*watch.calls, *of_nodes(reader, nodes, allocator)], pool)

    def _recover(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int], ended: bool) -> None:
        """Leave allocator, random generator and error state as before a failed capture."""
        with suppress(RuntimeError):
            graph.reset()
        if not ended:
            # Some versions of capture_end raise before they detach the allocator from the graph's private pool, and
            # then never give the pool back; the others refuse to do either twice.
            index = torch.cuda.current_device()
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(index, pool)
            with suppress(RuntimeError):
                torch._C._cuda_releasePool(index, pool)
        with suppress(RuntimeError):
            torch.cuda.synchronize()
        # The default generator still believes that it is being captured until a capture ends well.
        probe = torch.zeros(1, device=self.device)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        well_ended = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            well_ended.capture_begin(capture_error_mode="thread_local")
            probe.zero_()
            well_ended.capture_end()
        torch.cuda.synchronize()


def _not_audited(reason: str) -> Audit:
    found = Audit()
    found.tally.missed(f"whole graphs: {reason}")
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collected CUDA graph or event makes calls that are illegal during capture, and would invalidate it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _empty_is_legal() -> Iterator[None]:
    """Torch warns of a capture that recorded nothing; a body with nothing to do is no fault of anybody."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        yield


def _translate(failure: RuntimeError, watch: StorageWatch) -> CaptureError:
    """Name the operation and line behind a CUDA failure."""
    reason = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
    if watch.failed_operation is not None and watch.failed_where is not None:
        return CaptureError(watch.failed_operation, watch.failed_where, reason)
    # Not a torch call (a raw kernel launch, a synchronize): the source line is the best name there is.
    frame = innermost_user_frame(traceback.extract_tb(failure.__traceback__))
    operation = (frame.line if frame is not None else None) or "capture"
    return CaptureError(operation, describe_frame(frame), reason)
