"""What a layer is given must come back as it was: copies to compare it with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from nsa_oracle.harness import fields
from nsa_oracle.harness.engine.cache_state import as_bytes, unwritten
from nsa_oracle.reference.types import Metadata


class Modified(NamedTuple):
    """An input that a layer has written to, and the pass in which it did, if that is known."""

    step: int | None
    name: str


class Watched(NamedTuple):
    """A tensor that a layer is given, and what its first rows must still hold afterwards."""

    name: str
    given: torch.Tensor
    kept: torch.Tensor

    def is_modified(self) -> bool:
        return not same_bits(self.given[: len(self.kept)] if self.kept.dim() else self.given, self.kept)


def handed(name: str, tensor: torch.Tensor, device: torch.device, strided: bool = False) -> Watched:
    """A copy of ``tensor`` to give away, dense or with gaps between rows."""
    return Watched(name, unwritten(tensor.shape, tensor.dtype, device, strided).copy_(tensor), tensor)


def first_modified(watched: Iterable[Watched]) -> str | None:
    """The name of the first that was written to, or None."""
    return next((one.name for one in watched if one.is_modified()), None)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes, wherever they are. NaN is like any other."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    # Not ``contiguous``: what has at most one element counts as that, whatever its stride.
    a, b = (as_bytes(tensor.detach().clone(memory_format=torch.contiguous_format).view(-1)) for tensor in (one, other))
    return torch.equal(a.to(b.device), b)


class WatchedMetadata:
    """Metadata that a layer is given. It must neither write to it nor put other tensors or numbers in."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self._tensors = fields.tensors(metadata)
        self._kept = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._scalars = {name: getattr(metadata, name, None) for name in fields.HOST_SCALARS}

    def first_modified(self) -> str | None:
        """The name of the first field that is not as it was, or None."""
        now = fields.tensors(self.metadata)
        for name, kept in self._kept.items():
            if name not in now or not (same_bits(now[name], kept) and same_bits(self._tensors[name], kept)):
                return name
        changed = (name for name, kept in self._scalars.items() if getattr(self.metadata, name, None) != kept)
        return next(changed, None)
