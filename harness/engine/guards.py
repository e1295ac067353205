"""Checks the guard bands around the buffers that a backend and a layer allocate."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import ModuleType

import torch

from nsa_oracle.harness import fields
from nsa_oracle.harness.memory.poison import GuardedBuffer, overrun
from nsa_oracle.reference.types import Metadata

_MOST_OBJECTS = 1000  # that are searched for the holder of a buffer


class GuardWatch:
    """Checks buffers that the backend still holds repeatedly, and the buffers of a single call once."""

    def __init__(self) -> None:
        self._held: list[GuardedBuffer] = []
        self._overrun: GuardedBuffer | None = None  # the first buffer found with a changed band
        self._fields: dict[int, str] = {}  # of held buffers and of that one, by address

    def keep(self, buffers: Sequence[GuardedBuffer]) -> None:
        """Check ``buffers`` in each later call of ``overrun``."""
        self._held += buffers

    def check(self, buffers: Sequence[GuardedBuffer], metadata: Sequence[Metadata] = ()) -> None:
        """Check ``buffers`` once, now. metadata: may lie in them."""
        if self._overrun is None and (found := overrun(buffers)) is not None:
            self._overrun = found
            self._fields[found.address] = _fields_by_address(metadata).get(found.address, "")

    def check_and_keep(self, buffers: list[GuardedBuffer], metadata: Sequence[Metadata]) -> None:
        """Check ``buffers``, and keep checking those that ``metadata`` still uses. Empties the list."""
        self.check(buffers, metadata)
        used = _fields_by_address(metadata)
        self.keep([buffer for buffer in buffers if buffer.address in used])
        self._fields = {**used, **self._fields}
        buffers.clear()  # other buffers must live no longer than the backend holds them

    def overrun(self) -> GuardedBuffer | None:
        """A buffer with a changed guard band, or None."""
        return self._overrun or overrun(self._held)

    def owner(self, buffer: GuardedBuffer, holders: Sequence[object] = ()) -> str:
        """The fields that lie in a buffer which was found, or else the attribute of ``holders`` that has it, or ""."""
        return self._fields.get(buffer.address, "") or _attribute_of(buffer.address, holders)


def _fields_by_address(metadata: Sequence[Metadata]) -> dict[int, str]:
    """The names of the fields that lie in each storage, by its address."""
    names: dict[int, list[str]] = {}
    for step in metadata:
        for name, tensor in fields.tensors(step).items():
            there = names.setdefault(tensor.untyped_storage().data_ptr(), [])
            there += [name] if name not in there else []
    return {address: _listed(there) for address, there in names.items()}


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} other fields"


def _attribute_of(address: int, holders: Sequence[object]) -> str:
    """The attribute whose tensor has its memory at ``address``, such as "Mine.attn_backends[0].scratch", or ""."""
    waiting = deque((type(holder).__name__, holder) for holder in holders)
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_OBJECTS:
        name, found = waiting.popleft()
        if isinstance(found, torch.Tensor):
            if found.layout is torch.strided and found.untyped_storage().data_ptr() == address:
                return name
        elif id(found) not in seen:
            seen.add(id(found))
            waiting.extend((name + part, one) for part, one in _parts(found))
    return ""


def _parts(found: object) -> Iterator[tuple[str, object]]:
    """What an object refers to and how an expression gets at that, without a call of judged code."""
    if type(found) is list or type(found) is tuple:
        yield from ((f"[{number}]", element) for number, element in enumerate(found))
    elif type(found) is dict:
        yield from (("[...]", value) for value in found.values())
    elif not isinstance(found, type | ModuleType):
        with suppress(AttributeError):  # it has slots
            attributes: dict[str, object] = object.__getattribute__(found, "__dict__")
            yield from ((f".{name}", one) for name, one in attributes.items())
