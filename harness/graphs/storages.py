"""Tracks the storages that a body uses while it is captured."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nsa_oracle.harness.errors import CaptureError
from nsa_oracle.harness.graphs.callers import calling_line, describe_frame, innermost_user_frame, operation_name
from nsa_oracle.harness.graphs.dispatch import DispatchMode
from nsa_oracle.harness.graphs.host_values import NodeValues, of_call


@dataclass(frozen=True)
class FoundStorage:
    """A storage that existed before its first use in a body. use: which that was, in words."""

    storage: torch.UntypedStorage
    use: str


def in_words(released: Iterable[FoundStorage]) -> str | None:
    """How much memory ``released`` is, and the first use of the largest part; None if it is empty."""
    parts = sorted(released, key=lambda found: found.storage.nbytes())
    if not parts:
        return None
    return f"{sum(found.storage.nbytes() for found in parts)} bytes, first used by {parts[-1].use}"


class StorageWatch:
    """Tracks a body's operations: rejects moved storages, keeps existing ones alive, remembers the first failure.

    Used as a context manager around the body, for the warm-up and again for the capture. Storages that the body
    creates in either run are its own and may be moved.
    """

    def __init__(self) -> None:
        # Weak references: a strong one would lengthen the life of intermediates and change which addresses are reused.
        self._made: set[StorageWeakRef] = set()
        # Strong references: a graph holds raw addresses. Freed memory would go to an unrelated tensor, and the stale
        # graph would then corrupt a later case instead of failing its own.
        self.found: dict[int, FoundStorage] = {}
        # Device addresses of storages on memory of another owner, with their first use: from_dlpack, from_blob. The
        # number of holders says nothing of that memory, and a reference would keep its owner alive.
        self.borrowed: dict[int, str] = {}
        self.calls: list[NodeValues] = []  # operators on CUDA tensors, recorded inside `noting_calls`
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

    def forget_uses(self) -> None:
        self.found.clear()
        self.borrowed.clear()

    @property
    def swallowed_refusal(self) -> Exception | None:
        """The exception that an operation raised because of the capture, even if the body caught it.

        Which refusals invalidate the capture depends on the version of torch; a body that runs into one is at fault
        in any case.
        """
        return self._failure if "captur" in str(self._failure) else None

    def existed(self, tensor: torch.Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) not in self._made  # type: ignore[no-untyped-call]

    def note_inputs(self, tensors: Sequence[torch.Tensor], func: Callable[..., Any]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self.found or not self.existed(tensor):
                continue
            if storage.resizable():
                self.found[storage._cdata] = FoundStorage(storage, f"{operation_name(func)} at {calling_line()}")
            elif tensor.is_cuda and storage.data_ptr() not in self.borrowed:
                self.borrowed[storage.data_ptr()] = f"{operation_name(func)} at {calling_line()}"

    def note_outputs(self, outputs: Sequence[torch.Tensor]) -> None:
        for output in outputs:
            storage = output.untyped_storage()
            if storage._cdata not in self.found:
                self._made.add(StorageWeakRef(storage))  # type: ignore[no-untyped-call]

    @contextmanager
    def noting_calls(self) -> Iterator[None]:
        """Record the host values that each operator on CUDA tensors receives."""
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
        """Whether anything but this watch holds the host memory at an address; None if no operator used any there."""
        for storage in (found.storage for found in self.found.values()):
            begin = storage.data_ptr()
            if storage.device.type == "cpu" and begin <= address < begin + storage.nbytes():
                return use_count(storage) > 1
        return None

    def reject_move(self, func: Callable[..., Any], reason: str) -> NoReturn:
        raise CaptureError(operation_name(func), calling_line(), reason)

    @contextmanager
    def noting_failure(self, func: Callable[..., Any]) -> Iterator[None]:
        """Remember the first operation that raised, under the name that the body called."""
        try:
            yield
        except Exception as error:
            if self.failed_operation is None:
                # The traceback reaches into the body of a custom operator; the stack ends at the call of the operator.
                frame = innermost_user_frame(traceback.extract_tb(error.__traceback__))
                self.failed_where = calling_line() if frame is None else describe_frame(frame)
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
        # `.data = ...` does not reach the dispatcher.
        if func == torch.Tensor.data.__set__ and self.watch.existed(args[0]):  # type: ignore[attr-defined]
            raise CaptureError("torch.Tensor.data = ...", calling_line(), "rebinds an existing tensor to other memory")
        with self.watch.noting_failure(func):
            return func(*args, **(kwargs or {}))


class _WatchDispatch(DispatchMode):
    def __init__(self, watch: StorageWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        existing = [tensor for tensor in inputs if self.watch.existed(tensor)]
        self._reject_known_moves(func, args)
        self.watch.note_inputs(existing, func)
        before = [(tensor.untyped_storage(), tensor.untyped_storage().data_ptr()) for tensor in existing]
        with self.watch.noting_failure(func):
            result = func(*args, **kwargs)
        if any(storage.data_ptr() != address for storage, address in before):
            # For example an `out=` that was too small: this shows only after the call.
            self.watch.reject_move(func, "moved an existing tensor to other memory")
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.watch.note_outputs(outputs)
        self.watch.note_call(func, args, kwargs, inputs + outputs)
        return result

    def _reject_known_moves(self, func: Any, args: tuple[Any, ...]) -> None:
        """Reject before the operator runs, so that the caller's buffer stays at its address."""
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


def use_count(storage: torch.UntypedStorage) -> int:
    """Number of holders of `storage`, tensors included; all Python handles of the storage itself count as one."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count
