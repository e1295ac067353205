"""What a layer is given must come back as it was: copies to compare with, and what a layer hands back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from harness import fields
from harness.layer import as_bytes
from reference.types import AttentionOutputs, Metadata


class Modified(NamedTuple):
    """An input that a layer has written to, and the pass in which it did."""

    step: int
    name: str


class Watched(NamedTuple):
    """A tensor that a layer is given, and what its first rows must still hold afterwards."""

    name: str
    given: torch.Tensor
    kept: torch.Tensor

    def is_modified(self) -> bool:
        return not same_bits(self.given[: len(self.kept)] if self.kept.dim() else self.given, self.kept)


def handed(name: str, tensor: torch.Tensor, device: torch.device) -> Watched:
    """A copy of ``tensor`` to give away."""
    return Watched(name, tensor.to(device, copy=True), tensor)


def first_modified(watched: Iterable[Watched]) -> str | None:
    """The name of the first that was written to, or None."""
    return next((one.name for one in watched if one.is_modified()), None)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes, wherever they are. NaN is like any other."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    a, b = (as_bytes(tensor.detach().contiguous().reshape(-1)) for tensor in (one, other))
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
        changed = (name for name, kept in self._scalars.items() if getattr(self.metadata, name, None) is not kept)
        return next(changed, None)


class WrongResult(Exception):
    """A stage of a layer gave something that is not what it should be at all."""

    def __init__(self, stage: str, got: object, expected: str) -> None:
        super().__init__(f"{stage} gave {told(got)}, not {expected}")
        self.stage = stage
        self.got = told(got)
        self.expected = expected


def told(thing: object) -> str:
    """What something is, for a report."""
    if thing is None:
        return "None"
    if isinstance(thing, torch.Tensor):
        return f"a tensor of shape {list(thing.shape)}"
    if isinstance(thing, tuple | list):
        return f"{type(thing).__name__} of {len(thing)}"
    return type(thing).__name__


def tensor_of(stage: str, result: Any) -> torch.Tensor:
    """The one tensor that a stage gave. Raises WrongResult."""
    if not isinstance(result, torch.Tensor):
        raise WrongResult(stage, result, "a tensor")
    return result


def out_and_lse_of(stage: str, result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention gave. Raises WrongResult."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise WrongResult(stage, result, "a tuple (out, lse)")
    return tensor_of(f"out of {stage}", result[0]), tensor_of(f"lse of {stage}", result[1])


def outputs_of(stage: str, result: Any) -> AttentionOutputs:
    """What a whole layer gave. Raises WrongResult."""
    names = ("logits", "indices", "out", "lse")
    if not all(hasattr(result, name) for name in names):
        raise WrongResult(stage, result, f"AttentionOutputs with {', '.join(names)}")
    return AttentionOutputs(**{name: tensor_of(f"{name} of {stage}", getattr(result, name)) for name in names})
