"""Objects that an engine hands out again once nobody else has them, as if a new one lay where the old one lay.

In a server the batch of a call is gone after it, and a later one, of other content, may get its address and so its
``id``. Whether it does is chance; here it does. An object that something else still refers to, weakly too, is left as
it is: no code can tell what is handed out here from a new object, but by an ``id`` of one that is gone.
"""

from __future__ import annotations

import sys
import weakref
from typing import TypeVar

import torch

_T = TypeVar("_T")


class Recycled:
    """The objects of one class that were handed out: dataclass instances without slots, or tensors on the host."""

    def __init__(self) -> None:
        self._given: list[object] = []

    def release(self) -> None:
        """Take their attributes from instances that nobody else has: what those alone refer to is free then, too."""
        for number in range(len(self._given)):
            if _is_free(self._given, number):
                object.__setattr__(self._given[number], "__dict__", {})  # frozen ones as well

    def instance(self, new: _T) -> _T:
        """``new``, or an earlier instance with the attributes of ``new``."""
        earlier = self._free(type(new))
        if earlier is None:
            self._given.append(new)
            return new
        object.__setattr__(earlier, "__dict__", dict(vars(new)))
        return earlier

    def tensor(self, new: torch.Tensor) -> torch.Tensor:
        """``new``, or an earlier tensor object that from now on stands for the memory of ``new``."""
        earlier = self._free(torch.Tensor)
        if earlier is None or earlier.is_inference() is not new.is_inference():
            self._given.append(new)
            return new
        vars(earlier).clear()
        earlier.data = new
        return earlier

    def _free(self, kind: type[_T]) -> _T | None:
        """One of the objects, all of class ``kind``, that nobody else has."""
        for number in range(len(self._given)):
            if _is_free(self._given, number):
                found = self._given[number]
                assert isinstance(found, kind)
                return found
        return None


def _is_free(given: list[object], number: int) -> bool:
    """Whether nothing but ``given`` refers to its element ``number``."""
    return _references(given, number) <= _OF_THE_LIST and not weakref.getweakrefcount(given[number])


def _references(given: list[object], number: int) -> int:
    return sys.getrefcount(given[number])


_OF_THE_LIST = _references([object()], 0)  # it depends on the interpreter what is counted beside the list
