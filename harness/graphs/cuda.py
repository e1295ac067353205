"""The runner of real CUDA graphs: captures a body once and replays it on the same storages.

A replay runs no Python: it reads and writes the addresses, and uses the host values, of the capture. This is the
contract of `torch.cuda.CUDAGraph`; `graphs.simulated` implements the same contract for CPU tensors.

Both runners run the body twice: a warm-up whose effects remain (kernels compile, lazy buffers are allocated), then the
capture, whose effects on tensors do not remain. After `capture` an `x += 1` has been applied once; each `replay`
applies it once more.

Both refuse a body that moves a tensor which existed before (`resize_` that grows it, `set_`, `.data = ...`). A CUDA
capture would accept this, and every other holder of the tensor would keep memory that the graph does not read.
"""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from nsa_oracle.harness.errors import CaptureError
from nsa_oracle.harness.graphs.allocator import Allocator, Reference, in_free_block
from nsa_oracle.harness.graphs.audit import Audit, audit
from nsa_oracle.harness.graphs.callers import describe_frame, innermost_user_frame
from nsa_oracle.harness.graphs.driver import driver_bindings
from nsa_oracle.harness.graphs.free_memory import spoil_free_blocks
from nsa_oracle.harness.graphs.host_values import NodeValues, of_nodes
from nsa_oracle.harness.graphs.nodes import DriverRefusal, GraphReader, Node
from nsa_oracle.harness.graphs.storages import FoundStorage, StorageWatch, in_words, use_count


@dataclass(frozen=True)
class CudaContent:
    """What was read from a CUDA graph right after its capture. pool: id of its private memory pool."""

    audit: Audit
    host_values: list[NodeValues]
    pool: tuple[int, int]


class CudaCapturedGraph:
    """A `torch.cuda.CUDAGraph`; keeps alive the storages that its operators used and that existed before."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        device: torch.device,
        found: dict[int, FoundStorage],
        content: CudaContent,
    ) -> None:
        self.graph = graph
        self.device = device
        self._found = found
        self._content = content

    def replay(self) -> None:
        self.graph.replay()

    def released(self) -> str | None:
        # `_found` also has host memory that Python read during the capture, which is not part of the graph.
        on_device = (found for found in self._found.values() if found.storage.device.type == "cuda")
        if seen_by_torch := in_words(found for found in on_device if use_count(found.storage) == 1):
            return seen_by_torch
        allocator = Allocator.now(self.device)
        hit = None if allocator is None else allocator.dangling(self._content.audit.references)
        return None if hit is None else f"{hit[0].part}, {in_free_block(*hit)}"

    def audit(self) -> Audit:
        return self._content.audit

    def host_values(self) -> Sequence[NodeValues]:
        return self._content.host_values

    def spoil(self, value: int) -> None:
        allocator = Allocator.now(self.device)
        if allocator is not None:
            spoil_free_blocks(allocator, self._content.pool, self.device, value)


class CudaGraphRunner:
    """Captures bodies into real CUDA graphs, and reads their nodes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def capture(self, body: Callable[[], None], host_tensors: Sequence[torch.Tensor] = ()) -> CudaCapturedGraph:
        """Run `body` once for real, then record it.

        Raises CaptureError for what the capture refuses. Exceptions of the warm-up propagate unchanged. `host_tensors`
        is not used: the CUDA runtime recognises pageable memory.
        """
        watch = StorageWatch()
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            # The side stream must wait for the work queued before the capture, and later work for the side stream.
            torch.cuda.synchronize()
            with torch.cuda.stream(stream), watch:
                body()
            torch.cuda.synchronize()
            return self._record(body, watch, stream)

    def _record(self, body: Callable[[], None], watch: StorageWatch, stream: torch.cuda.Stream) -> CudaCapturedGraph:
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # so that its nodes can be read
        # Chosen here because a graph whose capture failed does not report its pool.
        pool = torch.cuda.graph_pool_handle()
        watch.forget_failure()  # An exception that the body caught in the warm-up is not a fault.
        watch.forget_uses()  # What only the warm-up used is no part of the graph.
        failure: Exception | None = None
        ended = False
        with torch.cuda.stream(stream), _no_collection():
            # thread_local: an allocation in another thread (a watchdog, a plug-in) must not fail this capture.
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
                    # The first failure is the cause; this one only says that the capture is invalid.
                    failure = failure or error
        failure = failure or watch.swallowed_refusal
        if failure is None:
            content = self._look_at(graph, watch, pool)
            content.audit.references += [Reference(use, address) for address, use in watch.borrowed.items()]
            return CudaCapturedGraph(graph, self.device, self._existed_before(watch.found, pool), content)
        self._recover(graph, pool, ended)
        if isinstance(failure, RuntimeError):
            raise _translate(failure, watch) from failure
        raise failure

    def _look_at(self, graph: torch.cuda.CUDAGraph, watch: StorageWatch, pool: tuple[int, int]) -> CudaContent:
        """Read and audit the graph's nodes, before anything else is allocated."""
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

    def _existed_before(self, found: dict[int, FoundStorage], pool: tuple[int, int]) -> dict[int, FoundStorage]:
        """``found`` without what the capture allocated behind torch's dispatcher, as some C++ extensions do."""
        allocator = Allocator.now(self.device)
        if allocator is None:
            return found
        blocks = {key: allocator.block_at(one.storage.data_ptr()) for key, one in found.items() if one.storage.nbytes()}
        own = {key for key, block in blocks.items() if block is not None and block.pool == pool}
        return {key: one for key, one in found.items() if key not in own}

    def _recover(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int], ended: bool) -> None:
        """Restore the allocator, random generator and error state after a failed capture."""
        with suppress(RuntimeError):
            graph.reset()
        if not ended:
            # Some versions of capture_end raise before they detach the allocator from the graph's private pool, and
            # then never release the pool. The other versions raise if either is done twice.
            index = torch.cuda.current_device()
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(index, pool)
            with suppress(RuntimeError):
                torch._C._cuda_releasePool(index, pool)
        with suppress(RuntimeError):
            torch.cuda.synchronize()
        # The default generator stays in its capturing state until a capture succeeds.
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
    """Disable garbage collection: destroying a CUDA graph or event makes calls that would invalidate the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _empty_is_legal() -> Iterator[None]:
    """Ignore torch's warning of a capture that recorded nothing: a body may have nothing to do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        yield


def _translate(failure: RuntimeError, watch: StorageWatch) -> CaptureError:
    """The CaptureError for a CUDA failure, with the operation and the line that caused it."""
    reason = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
    if watch.failed_operation is not None and watch.failed_where is not None:
        return CaptureError(watch.failed_operation, watch.failed_where, reason)
    # Not a torch call (a raw kernel launch, a synchronize): the source line is the best available name.
    frame = innermost_user_frame(traceback.extract_tb(failure.__traceback__))
    operation = (frame.line if frame is not None else None) or "capture"
    return CaptureError(operation, describe_frame(frame), reason)
