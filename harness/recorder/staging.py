"""Copies of tensors to the host that nobody waits for: into pinned memory, with an event behind them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import torch

SLOT = 1 << 12  # numbers of one slot: of a batch of 1,024 requests, its rows, lengths and accept lengths
Copies = tuple[Callable[[], bool], Callable[[], dict[str, torch.Tensor]]]
"""Whether the copies are done; and what was copied, by name, which may be asked once."""


class Staging:
    """A ring of pinned buffers. What does not fit gets pinned memory of its own, such as whole tables."""

    def __init__(self) -> None:
        self._free: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def copies(self, tensors: Mapping[str, torch.Tensor]) -> Copies:
        """Begin to copy ``tensors``, on the current stream of their device; those of the host are copied at once."""
        on_host = {name: tensor.clone() for name, tensor in tensors.items() if not tensor.is_cuda}
        on_device = {name: tensor for name, tensor in tensors.items() if tensor.is_cuda}
        if not on_device:
            return _done, lambda: on_host
        staged: dict[str, torch.Tensor] = {}
        slot, event = self._free.popleft() if self._free else _new_slot()
        start = 0
        for name, tensor in on_device.items():
            size = tensor.numel() * (2 if tensor.dtype is torch.int64 else 1)
            if tensor.dtype not in (torch.int32, torch.int64) or start + size > SLOT:
                target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            else:
                target = slot[start : start + size].view(tensor.dtype).view(tensor.shape)
                start += size + size % 2  # int64 lies on whole words
            staged[name] = target.copy_(tensor, non_blocking=True)
        event.record(torch.cuda.current_stream(next(iter(on_device.values())).device))

        def numbers() -> dict[str, torch.Tensor]:
            found = on_host | {name: tensor.clone() for name, tensor in staged.items()}
            self._free.append((slot, event))
            return found

        return event.query, numbers


def _new_slot() -> tuple[torch.Tensor, torch.cuda.Event]:
    """Pinning is slow, but soon there are as many slots as calls are on their way."""
    return torch.empty(SLOT, dtype=torch.int32, pin_memory=True), torch.cuda.Event()  # type: ignore[no-untyped-call]


def _done() -> bool:
    return True
