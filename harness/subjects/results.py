"""What a layer hands back must be tensors of the right make before anything is made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.reference.types import AttentionOutputs


class WrongResult(Exception):
    """A backend or a stage of a layer gave something that nothing can be made of; the finding says what."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.sentence())
        self.finding = finding


@contextmanager
def locating_results(step: int, how: str) -> Iterator[None]:
    """Tell of a wrong result in which pass and in what run of the layer it shows."""
    try:
        yield
    except WrongResult as wrong:
        raise WrongResult(dataclasses.replace(wrong.finding, step=step, how=how)) from None


def described(thing: object) -> str:
    """What something is."""
    if thing is None:
        return "None"
    if isinstance(thing, torch.Tensor):
        return f"a tensor of shape {list(thing.shape)}"
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)}"
    return f"a {type(thing).__name__}"


def tensor_of(name: str, result: Any) -> torch.Tensor:
    """The one tensor that a stage gave. Raises WrongResult."""
    if not isinstance(result, torch.Tensor):
        raise WrongResult(Finding(Kind.RESULT, name, described(result), "a tensor"))
    return result


def out_and_lse_of(result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention gave. Raises WrongResult."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise WrongResult(Finding(Kind.RESULT, "sparse_mla", described(result), "a tuple (out, lse)"))
    return tensor_of("out", result[0]), tensor_of("lse", result[1])


def outputs_of(result: Any) -> AttentionOutputs:
    """What a whole layer gave. Raises WrongResult."""
    names = [field.name for field in dataclasses.fields(AttentionOutputs)]
    if not all(hasattr(result, name) for name in names):
        expected = f"AttentionOutputs: {', '.join(names)}"
        raise WrongResult(Finding(Kind.RESULT, "forward", described(result), expected))
    return AttentionOutputs(**{name: tensor_of(name, getattr(result, name)) for name in names})


def wrong_shape_or_dtype(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> Finding | None:
    """Another device, dtype or shape than it should have; more rows, the first dimension, are not wrong."""
    if tensor.device.type != device.type:
        return Finding(Kind.DEVICE, name, str(tensor.device), str(device))
    if tensor.dtype is not dtype:
        return Finding(Kind.DTYPE, name, str(tensor.dtype), str(dtype))
    seen = tuple(tensor.shape)
    if len(seen) != len(shape) or seen[1:] != shape[1:] or seen[0] < shape[0]:
        return Finding(Kind.SHAPE, name, str(list(seen)), str([max((shape[0], *seen[:1])), *shape[1:]]))
    return None


def checked_stages(layer: Any, index_topk: int) -> dict[str, Callable[..., Any]]:
    """Stages of ``layer`` that raise WrongResult for what nothing can be made of.

    Otherwise the next stage would read beyond their results.
    """

    def indexer_logits(index_q: torch.Tensor, *others: Any) -> torch.Tensor:
        logits = tensor_of("logits", layer.indexer_logits(index_q, *others))
        return _formed("logits", logits, torch.float32, (len(index_q), int(others[-1])), index_q.device)

    def topk_transform_paged(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        indices = tensor_of("indices", layer.topk_transform_paged(logits, *others))
        return _formed("indices", indices, torch.int32, (len(logits), index_topk), logits.device)

    def sparse_mla(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return out_and_lse_of(layer.sparse_mla(*inputs))

    return {stage.__name__: stage for stage in (indexer_logits, topk_transform_paged, sparse_mla)}


def _formed(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    finding = wrong_shape_or_dtype(name, tensor, dtype, shape, device)
    if finding is not None:
        raise WrongResult(finding)
    return tensor
