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
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_oracle.harness.graphs.audit import Allocator, Audit, audit, driver_bindings
from nsa_oracle.harness.graphs.free_memory import spoil_free_blocks
from nsa_oracle.harness.graphs.host_values import NodeValues, of_call, of_nodes
from nsa_oracle.harness.graphs.nodes import DriverRefusal, GraphReader, Node

_HERE = Path(__file__).parent
_INTERNAL_FILES = {str(_HERE / "cuda.py"), str(_HERE / "simulated.py")}
_TORCH = Path(torch.__file__).parent
_THIRD_PARTY_FOLDERS = (f"{_TORCH}/", f"{_TORCH.parent / 'triton'}/")
_STANDARD_LIBRARY = f"{sysconfig.get_path('stdlib')}/"


class CaptureError(Exception):
    """A body did something that a graph cannot hold.

    `operation` names the call, `where` reads "file.py:123 in function", `reason` is one clause.
    """

    def __init__(self, operation: str, where: str, reason: str) -> None:
        super().__init__(operation, where, reason)
        self.operation = operation
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.operation} at {self.where}: {self.reason}"


class CapturedGraph(Protocol):
    """A capture that can be replayed. On CUDA, synchronising after `replay` is the caller's job."""

    def replay(self) -> None: ...

    def dangling_bytes(self) -> int:
        """Size of the memory that was there before the capture and that now nobody but this object keeps alive.

        A server's graph keeps nothing alive: to it such memory is free, and the next allocation may get it.
        """

    def audit(self) -> Audit:
        """What its nodes read and write, as it was right after the capture; nothing where there are no nodes."""

    def host_values(self) -> Sequence[NodeValues]:
        """The host values that the capture gave to its nodes, for a comparison with another capture."""

    def spoil(self, value: int) -> None:
        """Write ``value`` over free memory: what nobody holds, and scratch of this graph's own between two replays."""


class GraphRunner(Protocol):
    """Captures bodies.

    `host_tensors` are the host's own CPU tensors (mirrors such as `seq_lens_cpu`) that the body can reach. The
    simulated runner cannot tell them from device tensors otherwise; the CUDA runner needs no telling.
    """

    def capture(self, body: Callable[[], None], host_tensors: Sequence[torch.Tensor] = ()) -> CapturedGraph: ...


def graph_runner(device: torch.device) -> GraphRunner:
    """The runner for tensors on `device`."""
    if device.type == "cuda":
        return CudaGraphRunner(device)
    if device.type == "cpu":
        # Imported late: the simulation is built from this module's error and watch.
        from nsa_oracle.harness.graphs.simulated import SimulatedGraphRunner

        return SimulatedGraphRunner()
    raise ValueError(f"no graph runner for device {device}")


def calling_line(failure: TracebackType | None = None) -> str:
    """The innermost line outside torch, triton and the runners: of `failure`, or else of the running stack."""
    frames = traceback.extract_stack() if failure is None else traceback.extract_tb(failure)
    return _describe(_innermost_user_frame(frames))


def operation_name(func: Callable[..., Any]) -> str:
    """`aten.nonzero` for a dispatched operator, `torch.Tensor.item` for a Python-level function."""
    if isinstance(func, torch._ops.OpOverload):
        return str(func.overloadpacket)
    name: str = resolve_name(func) or getattr(func, "__name__", repr(func))
    return name


def _innermost_user_frame(frames: traceback.StackSummary) -> traceback.FrameSummary | None:
    return next((frame for frame in reversed(frames) if _is_user_code(frame.filename)), None)


def _is_user_code(filename: str) -> bool:
    if filename in _INTERNAL_FILES or filename.startswith(("<", *_THIRD_PARTY_FOLDERS)):
        return False
    # Installed packages may lie under the standard library's folder without being part of it.
    return not filename.startswith(_STANDARD_LIBRARY) or "-packages/" in filename


def _describe(frame: traceback.FrameSummary | None) -> str:
    if frame is None:
        return "unknown line"
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"


class StorageWatch:
    """Follows a body's operations: rejects moved storages, keeps found ones alive, remembers the first failure.

    Used as a context manager around the body, for the warm-up and again for the capture; what was made inside either
    is the body's own and may be moved freely.
    """

    def __init__(self) -> None:
        # Weak, so that watching does not lengthen the life of intermediates and so change which addresses are reused.
        self._made: set[StorageWeakRef] = set()
        # Strong: a graph holds raw addresses. Memory freed under it would be handed to an unrelated tensor, and the
        # stale graph would then corrupt a later case instead of failing its own.
        self.found: dict[int, torch.UntypedStorage] = {}
        self.calls: list[NodeValues] = []  # operators on CUDA tensors, if they are noted
        self._notes_calls = False
        self.failed_operation: str | None = None
        self.failed_where: str | None = None
        self._failure: Exception | None = None
        self._functions = _WatchFunctions(self)
        self._dispatch = _WatchDispatch(self)
        self._modes = ExitStack()

    def __enter__(self) -> StorageWatch:
        self._modes.enter_context(self._functions)
        self._modes.enter_context(self._dispatch)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._modes.close()

    def forget_failure(self) -> None:
        self.failed_operation = self.failed_where = self._failure = None

    @property
    def swallowed_refusal(self) -> Exception | None:
        """What an operation raised because of the capture, though the body caught it.

        Some refusals invalidate the capture and some do not, by version of torch; a body that needs one is at fault.
        """
        return self._failure if "captur" in str(self._failure) else None

    def existed(self, tensor: torch.Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) not in self._made  # type: ignore[no-untyped-call]

    def note_inputs(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            if self.existed(tensor):
                storage = tensor.untyped_storage()
                self.found.setdefault(storage._cdata, storage)

    def note_outputs(self, outputs: Sequence[torch.Tensor]) -> None:
        for output in outputs:
            storage = output.untyped_storage()
            if storage._cdata not in self.found:
                self._made.add(StorageWeakRef(storage))  # type: ignore[no-untyped-call]

    @contextmanager
    def noting_calls(self) -> Iterator[None]:
        """Note what host values every operator on CUDA tensors is given."""
        self._notes_calls = True
        try:
            yield
        finally:
            self._notes_calls = False

    def note_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Any]) -> None:
        if self._notes_calls and any(tensor.is_cuda for tensor in tensors):
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append(of_call(str(func), names, args, kwargs, lambda tensor: not tensor.is_cuda))

    def holds_host_memory(self, address: int) -> bool | None:
        """Whether anybody else holds the host memory at an address; None if no operator found any there."""
        for storage in self.found.values():
            begin = storage.data_ptr()
            if storage.device.type == "cpu" and begin <= address < begin + storage.nbytes():
                return use_count(storage) > 1
        return None

    def reject_move(self, func: Callable[..., Any], reason: str) -> NoReturn:
        raise CaptureError(operation_name(func), calling_line(), reason)

    @contextmanager
    def noting_failure(self, func: Callable[..., Any]) -> Iterator[None]:
        """Remember the first operation that raised, under the name that the body called it by."""
        try:
            yield
        except Exception as error:
            if self.failed_operation is None:
                # The traceback reaches into a custom operator's own body, the stack stops at the call to it.
                frame = _innermost_user_frame(traceback.extract_tb(error.__traceback__))
                self.failed_where = calling_line() if frame is None else _describe(frame)
                self.failed_operation, self._failure = operation_name(func), error
            elif error is self._failure and not isinstance(func, torch._ops.OpOverload):
                self.failed_operation = operation_name(func)
            raise


class _WatchFunctions(TorchFunctionMode):
    def __init__(self, watch: StorageWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # `.data = ...` never reaches the dispatcher.
        if func == torch.Tensor.data.__set__ and self.watch.existed(args[0]):  # type: ignore[attr-defined]
            raise CaptureError("torch.Tensor.data = ...", calling_line(), "rebinds an existing tensor to other memory")
        with self.watch.noting_failure(func):
            return func(*args, **(kwargs or {}))


class _WatchDispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, watch: StorageWatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        existing = [tensor for tensor in inputs if self.watch.existed(tensor)]
        self._reject_known_moves(func, args)
        self.watch.note_inputs(existing)
        before = [(tensor.untyped_storage(), tensor.untyped_storage().data_ptr()) for tensor in existing]
        with self.watch.noting_failure(func):
            result = func(*args, **kwargs)
        if any(storage.data_ptr() != address for storage, address in before):
            # An `out=` that was too small, say: seen only afterwards.
            self.watch.reject_move(func, "moved an existing tensor to other memory")
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.watch.note_outputs(outputs)
        self.watch.note_call(func, args, kwargs, inputs + outputs)
        return result

    def _reject_known_moves(self, func: Any, args: tuple[Any, ...]) -> None:
        """Reject before the harm is done, so that the caller's buffer stays where it was."""
        packet = func.overloadpacket
        if packet is torch.ops.aten.set_ and self.watch.existed(args[0]):
            self.watch.reject_move(func, "rebinds an existing tensor to other memory")
        if packet in (torch.ops.aten.resize_, torch.ops.aten.resize_as_) and self.watch.existed(args[0]):
            tensor, size = args[0], args[1]
            count = size.numel() if isinstance(size, torch.Tensor) else torch.Size(size).numel()
            needed = (tensor.storage_offset() + count) * tensor.element_size()
            held = tensor.untyped_storage().nbytes()
            if count and needed > held:
                self.watch.reject_move(func, f"grows an existing tensor from {held} to {needed} bytes, which moves it")


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


def use_count(storage: torch.UntypedStorage) -> int:
    """How many tensors and other holders `storage` has, all Python handles of the storage itself counted as one."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


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
    frame = _innermost_user_frame(traceback.extract_tb(failure.__traceback__))
    operation = (frame.line if frame is not None else None) or "capture"
    return CaptureError(operation, _describe(frame), reason)
