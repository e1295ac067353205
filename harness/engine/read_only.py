"""Detects writes of a layer to its inputs and metadata, by comparison with copies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from nsa_oracle.harness import fields
from nsa_oracle.harness.memory.bits import same_bits, unwritten_memory
from nsa_oracle.reference.types import Metadata


class ReadOnly(NamedTuple):
    """A tensor given to a layer, and the content that its first rows must still have afterwards."""

    name: str
    given: torch.Tensor
    kept: torch.Tensor

    def is_modified(self) -> bool:
        return not same_bits(self.given[: len(self.kept)] if self.kept.dim() else self.given, self.kept)


def handed_out(name: str, tensor: torch.Tensor, device: torch.device, strided: bool = False) -> ReadOnly:
    """A copy of ``tensor`` on ``device`` to give to a layer: dense, or with gaps between rows."""
    return ReadOnly(name, unwritten_memory(tensor.shape, tensor.dtype, device, strided).copy_(tensor), tensor)


def first_modified(watched: Iterable[ReadOnly]) -> str | None:
    """The name of the first modified tensor, or None."""
    return next((read_only.name for read_only in watched if read_only.is_modified()), None)


class ReadOnlyMetadata:
    """Metadata given to a layer, which must neither write to its tensors nor replace tensors or host scalars."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self._tensors = fields.tensors(metadata)
        self._kept = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._scalars = {name: getattr(metadata, name, None) for name in fields.HOST_SCALARS}

    def first_modified(self) -> str | None:
        """The name of the first field that has changed, or None."""
        now = fields.tensors(self.metadata)
        for name, kept in self._kept.items():
            if name not in now or not (same_bits(now[name], kept) and same_bits(self._tensors[name], kept)):
                return name
        changed = (name for name, kept in self._scalars.items() if getattr(self.metadata, name, None) != kept)
        return next(changed, None)
