"""Memory in which programs of a launch may write in any order, because its content is unspecified.

Everywhere else two accesses of different programs to one address are a race if one of them writes, unless

- both are atomic;
- the later one writes the value that memory holds already, as programs do that all compute the same thing;
- the earlier one wrote the value that memory held, and the later one reads;
- the program that reads has itself written the same values before;
- both programs update one address by atomic operations that are not relaxed, the first one after its access, the
  second one before its own.

Programs run one after another, so what "later" means is their order here; on a GPU there is none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch

from nsa_oracle.harness.interpreter.bounds import Extent, extent_of

_unordered: list[tuple[weakref.ref[torch.Tensor], Extent]] = []


def leave_unordered(part: torch.Tensor, memory: torch.Tensor) -> None:
    """From now on no race is reported from the first cell of ``part``, a view of ``memory``, to its last.

    It holds for as long as the object ``memory`` lives, and has no effect on a GPU.
    """
    if memory.device.type == "cpu":
        entry = (weakref.ref(memory, lambda gone: _forget(gone)), extent_of(part))
        _unordered.append(entry)


def _forget(gone: weakref.ref[torch.Tensor]) -> None:
    _unordered[:] = [entry for entry in _unordered if entry[0] is not gone]


def unordered() -> Iterator[Extent]:
    for memory, extent in _unordered:
        if memory() is not None:
            yield extent
