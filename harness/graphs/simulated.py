"""A graph for CPU tensors that follows the contract of a CUDA graph: recorded operations, replayed on fixed storages.

On a CPU every tensor has the same device, so the simulation decides which side a tensor would be on:

* *host*: the tensors in `host_tensors`, tensors made from host data (`torch.tensor`, `from_numpy`), factories called
  without a device or with the string "cpu", and results computed from host tensors alone;
* *device*: everything else. A `torch.device` object always names the device, the string "cpu" always the host.

Operations on host tensors alone run once, at capture, as in eager Python; their results are frozen. Operations on
device tensors are recorded. The capture refuses copies between the two sides and reads of a device value on the host.

The recorder sees the operations that a device would execute. For a `torch.library` operator written in Python these
are its inner operations and kernel launches, so a replay does not run the operator's Python again.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _device as default_device
from torch.utils._pytree import tree_leaves, tree_map_only

from nsa_oracle.harness.errors import CaptureError
from nsa_oracle.harness.graphs.callers import calling_line, operation_name
from nsa_oracle.harness.graphs.dispatch import DispatchMode
from nsa_oracle.harness.graphs.operators import (
    CHANGES_SHAPE_ONLY,
    CHECKS_ON_CPU_ONLY,
    CPU_KEYS,
    EMPTY_FACTORIES,
    FROM_HOST_DATA,
    LIKE_FACTORIES,
    MASK_INDEXING,
    NEEDS_DEVICE_OPERANDS,
    SYNC_FUNCTIONS,
    SYNC_OPERATORS,
    aten,
    has_mask,
    names_host,
    schema_arguments,
    tensors_in,
    written_arguments,
)
from nsa_oracle.harness.graphs.recording import Launch, Operation, SimulatedCapturedGraph
from nsa_oracle.harness.graphs.storages import FoundStorage, StorageWatch

_HUGE = 1 << 28  # bytes

_HOST_COPY = "copies from host memory (a mirror, host data, or a factory without device=), which a capture refuses"
_HOST_READ = "reads host memory (a mirror, host data, or a factory without device=) from the device"
_SYNC = "needs a device value on the host, which synchronises"


class SimulatedGraphRunner:
    """Captures bodies on CPU tensors. The module docstring says which tensors count as host tensors."""

    def capture(self, body: Callable[[], None], host_tensors: Sequence[torch.Tensor] = ()) -> SimulatedCapturedGraph:
        """Run `body` once for real, then record it and undo the effects of the recording run on tensors.

        Raises CaptureError for what a CUDA capture refuses. Other exceptions of the body propagate unchanged.
        """
        watch = StorageWatch()
        with watch:
            body()
        recorder = _Recorder(host_tensors)
        random_state = torch.get_rng_state()
        try:
            with watch, recorder.active(), recorder.hooked_launches():
                body()
            if recorder.fault is not None:
                # The body swallowed the exception; a CUDA capture stays invalidated and fails at its end.
                raise recorder.fault
        finally:
            recorder.undo()
            torch.set_rng_state(random_state)
        return recorder.finish(watch.found)


class _Recorder:
    """State of one recording run: its nodes, the host storages, the new storages, and the contents to restore."""

    def __init__(self, host_tensors: Sequence[torch.Tensor]) -> None:
        self.fault: CaptureError | None = None
        self.paused = False
        self.function: Callable[..., Any] | None = None  # the Python-level function being called
        self.factories_on_host: bool | None = None  # side of a factory's tensor; None: the side of its operands
        self.nodes: list[Operation | Launch] = []
        # Both keep their storages alive: a reused address could belong to the other side.
        self._host: dict[int, torch.UntypedStorage] = {}
        self._made: dict[int, torch.UntypedStorage] = {}
        self._host_scalars: set[int] = set()  # storages of the copies that nodes hold
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._functions = _RecordFunctions(self)
        self._operators = _RecordOperators(self)
        for tensor in host_tensors:
            self.mark_host(tensor)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Push both modes on top of the active ones; entered again for the body of a custom operator."""
        with self._functions, self._operators:
            yield

    @contextmanager
    def pausing(self, paused: bool = True) -> Iterator[None]:
        before, self.paused = self.paused, paused
        try:
            yield
        finally:
            self.paused = before

    @contextmanager
    def calling(self, func: Callable[..., Any] | None, factories_on_host: bool | None) -> Iterator[None]:
        before = self.function, self.factories_on_host
        self.function, self.factories_on_host = func, factories_on_host
        try:
            yield
        finally:
            self.function, self.factories_on_host = before

    def reject(self, func: Callable[..., Any] | str, reason: str) -> NoReturn:
        """Raise CaptureError under the name that the body called, and remember the first such error."""
        name = func if isinstance(func, str) else operation_name(self.function or func)
        error = CaptureError(name, calling_line(), reason)
        self.fault = self.fault or error
        raise error

    # Sides and storages.

    def mark_host(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._host[_address(storage)] = storage

    def is_host(self, tensor: torch.Tensor) -> bool:
        return _address(tensor.untyped_storage()) in self._host

    def note_made(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._made[storage._cdata] = storage

    def note_write(self, tensor: torch.Tensor) -> None:
        """Save the content of the storage before this recording first writes to it; `undo` restores it."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._made and storage._cdata not in self._saved:
            with self.pausing():
                self._saved[storage._cdata] = _whole(tensor), _whole(tensor).clone()

    def freeze(self, tree: Any) -> Any:
        """Alias the device tensors, because the body may still reshape its own in place, and copy the host scalars."""
        with self.pausing():
            return tree_map_only(torch.Tensor, self._own, tree)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.is_host(tensor):
            return tensor.detach()
        own = tensor.clone()
        self._host_scalars.add(own.untyped_storage()._cdata)
        return own

    # Triton launches outside of any operator.

    @contextmanager
    def hooked_launches(self) -> Iterator[None]:
        """Record launches of Triton's interpreter, if it is loaded: a dispatch mode does not see them."""
        interpreter = sys.modules.get("triton.runtime.interpreter")
        if interpreter is None:
            yield
            return
        executor_class = interpreter.GridExecutor
        launch = executor_class.__call__

        def record_launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._record_launch(launch, executor, args, kwargs)

        executor_class.__call__ = record_launch
        try:
            yield
        finally:
            executor_class.__call__ = launch

    def _record_launch(
        self, launch: Callable[..., None], executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        for tensor in tensors_in((args, kwargs)):
            if self.is_host(tensor):
                self.reject(f"triton kernel {executor.fn.__name__}", _HOST_READ)
            # A launch does not declare which of its pointers it writes.
            self.note_write(tensor)
        resolved = copy.copy(executor)
        resolved_grid: list[Any] = []

        def resolve(meta: dict[str, Any]) -> Any:
            # The grid is computed once, at capture; reading a device value there is a synchronisation.
            with self.pausing(False):
                resolved_grid.append(executor.grid(meta))
            return resolved_grid[-1]

        if callable(executor.grid):
            resolved.grid = resolve
        with self.pausing():
            launch(resolved, *args, **kwargs)
        if resolved_grid:
            resolved.grid = resolved_grid[-1]
        self.nodes.append(Launch(resolved, self.freeze(args), self.freeze(kwargs)))

    # The end of a recording.

    def undo(self) -> None:
        """Restore the content of every storage: a capture runs nothing on the device."""
        with torch.inference_mode():  # in which alone what judged code has made in that mode can be written
            for memory, saved in self._saved.values():
                memory.copy_(saved)
        self._saved.clear()  # releases the storages: the recorder lives until its reference cycles are collected

    def finish(self, found: dict[int, FoundStorage]) -> SimulatedCapturedGraph:
        for storage in self._made.values():
            # No replay has filled these yet: a read before the first replay must not find a right value by chance.
            storage.fill_(0xFF)  # type: ignore[attr-defined]
        made = tuple(self._made.values())
        self._made = {}  # these handles would count as holders until the recorder is collected
        return SimulatedCapturedGraph(self.nodes, made, found, frozenset(self._host_scalars))


class _RecordFunctions(TorchFunctionMode):
    """Sees calls as the body wrote them, including those that never reach the dispatcher."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if recorder.paused or isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        with recorder.calling(func, self._factories_on_host(args, kwargs)):
            if func in FROM_HOST_DATA or func is torch.Tensor.new_tensor:
                return self._from_host_data(func, args, kwargs)
            tensors = tensors_in((args, kwargs))
            if func in SYNC_FUNCTIONS and any(not recorder.is_host(tensor) for tensor in tensors):
                recorder.reject(func, _SYNC)
            if func is torch.nn.functional.one_hot and kwargs.get("num_classes", args[1] if len(args) > 1 else -1) < 0:
                recorder.reject(func, f"{_SYNC}: give it num_classes")
            if func is torch.Tensor.to:
                self._check_move(func, args[0], _destination(recorder, (args[1:], kwargs)))
            return func(*args, **kwargs)

    def _factories_on_host(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | None:
        """Side of a tensor that this call creates: the named device's, None for that of its operands, else the host."""
        named = names_host(kwargs.get("device"))
        if named is not None:
            return named
        if tensors_in((args, kwargs)) or default_device.CURRENT_DEVICE is not None:
            return None
        return True

    def _from_host_data(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """`torch.tensor` and similar functions: host data may stay on the host; a copy to the device is refused."""
        recorder = self.recorder
        template = args[0] if func is torch.Tensor.new_tensor else None
        data = kwargs.get("data", args[template is not None] if len(args) > (template is not None) else None)
        on_host = names_host(kwargs.get("device"))
        if on_host is None:
            on_host = recorder.is_host(template) if template is not None else default_device.CURRENT_DEVICE is None
        if isinstance(data, torch.Tensor):
            if kwargs.get("device") is None and template is None:
                on_host = recorder.is_host(data)
            self._check_move(func, data, on_host)
            moved: torch.Tensor = func(*args, **kwargs)
            return moved
        if any(not recorder.is_host(tensor) for tensor in tensors_in(data)):
            recorder.reject(func, _SYNC)
        with recorder.pausing():
            made: torch.Tensor = func(*args, **kwargs)
        if on_host:
            recorder.mark_host(made)
        elif made.numel():
            recorder.reject(func, _HOST_COPY)
        return made

    def _check_move(self, func: Callable[..., Any], tensor: torch.Tensor, to_host: bool | None) -> None:
        from_host = self.recorder.is_host(tensor)
        if to_host is not None and to_host != from_host:
            self.recorder.reject(func, _HOST_COPY if from_host else _SYNC)


class _RecordOperators(DispatchMode):
    """Sees the operators that a device would execute, below autograd and composite functions."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if recorder.paused:
            return func(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        if self._is_host_work(func, tensors):
            result = func(*args, **kwargs)
            for tensor in tensors_in(result):
                recorder.mark_host(tensor)
            return result
        self._reject_synchronisation(func, args, kwargs)
        self._reject_host_operands(func, args, tensors)
        for tensor in written_arguments(func, args, kwargs):
            recorder.note_write(tensor)
        if func.namespace not in ("aten", "prims"):
            return self._run_custom(func, args, kwargs)
        result = func(*args, **kwargs)
        self._record(func, args, kwargs, result)
        return result

    def _is_host_work(self, func: Any, tensors: list[torch.Tensor]) -> bool:
        packet, recorder = func.overloadpacket, self.recorder
        if packet is aten.lift_fresh:
            return True  # torch applies it only to tensors just made from Python data
        if (packet in LIKE_FACTORIES or not tensors) and recorder.factories_on_host is not None:
            return recorder.factories_on_host
        return bool(tensors) and all(recorder.is_host(tensor) for tensor in tensors)

    def _reject_synchronisation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        packet, recorder = func.overloadpacket, self.recorder
        only_checks = packet is aten._local_scalar_dense and recorder.function in CHECKS_ON_CPU_ONLY
        if packet in SYNC_OPERATORS and not only_checks:
            recorder.reject(func, _SYNC)
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            recorder.reject(func, f"{_SYNC}: give it output_size")
        if packet in MASK_INDEXING and has_mask(args[1]) and not self._fills_mask(packet, args):
            recorder.reject(func, f"{_SYNC}: the length of a boolean mask's selection")

    def _reject_host_operands(self, func: Any, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
        """Reject host operands of a device operation, except scalars, which a launch freezes; others need a copy."""
        packet, recorder = func.overloadpacket, self.recorder
        host = [tensor for tensor in tensors if recorder.is_host(tensor)]
        if not host:
            return
        if packet is aten.copy_ and recorder.is_host(args[0]):
            recorder.reject(func, _SYNC)
        if packet in NEEDS_DEVICE_OPERANDS and not self._fills_mask(packet, args):
            recorder.reject(func, _HOST_COPY)
        if any(tensor.dim() for tensor in host):
            recorder.reject(func, _HOST_READ)

    def _fills_mask(self, packet: Any, args: tuple[Any, ...]) -> bool:
        """Whether this is `x[mask] = 5.0`, a masked_fill on a GPU: a host scalar as value, a mask as the only index."""
        if packet is not aten.index_put_:
            return False
        indices = [index for index in args[1] if index is not None]
        value = args[2]
        return len(indices) == 1 and has_mask(indices) and value.dim() == 0 and self.recorder.is_host(value)

    def _run_custom(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the operations inside a Python operator; record the operator itself if none are visible."""
        recorder = self.recorder
        recorded = len(recorder.nodes)
        if not any(func.has_kernel_for_dispatch_key(key) for key in CPU_KEYS):
            result = func(*args, **kwargs)
        else:
            with recorder.active(), recorder.calling(None, None):
                # Calls the kernel itself: calling the operator would recurse into this mode.
                result = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if len(recorder.nodes) == recorded:
            self._record(func, args, kwargs, result)
        return result

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        recorder = self.recorder
        held = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        results = tree_leaves(result)
        fresh = [isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in held for leaf in results]
        for leaf, is_fresh in zip(results, fresh, strict=True):
            if is_fresh:
                recorder.note_made(leaf)
        writes = any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in schema_arguments(func)
        )
        reshapes = func.overloadpacket in CHANGES_SHAPE_ONLY or torch.Tag.inplace_view in func.tags
        if reshapes or func.overloadpacket in EMPTY_FACTORIES or not (writes or any(fresh)):
            return  # A change of shape, uninitialised memory, or a view: nothing for a device to execute.
        outputs = tuple(
            recorder.freeze(leaf) if is_fresh else None for leaf, is_fresh in zip(results, fresh, strict=True)
        )
        recorder.nodes.append(Operation(func, recorder.freeze(args), recorder.freeze(kwargs), outputs))


def _address(storage: torch.UntypedStorage) -> int:
    """Address of the storage's memory; for an empty storage the negated address of its object, as it has no memory."""
    return storage.data_ptr() or -storage._cdata


def _destination(recorder: _Recorder, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> bool | None:
    """Whether `Tensor.to(*args, **kwargs)` names the host (True) or the device (False); None if it names neither."""
    args, kwargs = arguments
    for argument in (*args, kwargs.get("device"), kwargs.get("other")):
        if isinstance(argument, torch.Tensor):
            return recorder.is_host(argument)
        if isinstance(argument, str | torch.device):
            return names_host(argument)
    return None


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Alias of all bytes of the tensor's storage; of a huge storage, of the tensor alone: the rest is not written."""
    storage = tensor.untyped_storage()
    if storage.nbytes() > _HUGE:
        return tensor.detach()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
