"""Checks that a layer's results are tensors of the right shape, dtype and device before they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.subjects.calls import calls_counted_as
from nsa_oracle.reference.types import AttentionOutputs

DENSE = "a tensor of layout torch.strided"


class WrongResult(Exception):
    """A backend or a stage of a layer returned something unusable. ``finding`` describes it."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.sentence())
        self.finding = finding


@contextmanager
def locating_results(step: int, how: str) -> Iterator[None]:
    """Add the draft step and the run of the layer (``how``) to the finding of a WrongResult; count calls as of it."""
    try:
        with calls_counted_as(how):
            yield
    except WrongResult as wrong:
        raise WrongResult(dataclasses.replace(wrong.finding, step=step, how=how)) from None


def described(value: object) -> str:
    """The type of ``value`` in words, with the shape of a tensor and the length of a tuple or list."""
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def shown_value(value: object) -> str:
    """A value of any type in one line: its ``repr``, if that is short, else its type."""
    try:
        text = repr(value)
    except Exception:  # of the judged code
        return described(value)
    return text if len(text) <= 60 and text.isprintable() else described(value)


def tensor_of(name: str, result: Any) -> torch.Tensor:
    """The result of a stage that returns one tensor. Raises WrongResult if it is not a tensor."""
    if not isinstance(result, torch.Tensor):
        raise WrongResult(Finding(Kind.RESULT, name, described(result), "a tensor"))
    if (layout := odd_layout(result)) is not None:
        raise WrongResult(Finding(Kind.RESULT, name, layout, DENSE))
    return result


def odd_layout(tensor: torch.Tensor) -> str | None:
    """The layout of a tensor in words if its cells do not lie at strides in one piece of memory, else None."""
    if tensor.is_nested:
        return "a nested tensor"
    return None if tensor.layout is torch.strided else f"a tensor of layout {tensor.layout}"


def unreadable_field(
    name: str, tensor: torch.Tensor, device: torch.device, is_judged: bool, step: int
) -> Finding | None:
    """A finding if the harness cannot read a field of the metadata, in or behind a graph on ``device``; else None.

    is_judged: whether it must be on ``device``; a field that is not judged must only have memory.
    """
    if (layout := odd_layout(tensor)) is not None:
        return Finding(Kind.RESULT, name, layout, DENSE, step)
    if tensor.is_meta or (is_judged and tensor.device.type != device.type):
        return Finding(Kind.DEVICE, name, str(tensor.device), str(device), step)
    if tensor.requires_grad:
        got, expected = f"a tensor of {tensor.dtype} that requires grad", "a tensor of torch.int32 without"
        return Finding(Kind.RESULT, name, got, expected, step)
    return None


def out_and_lse_of(result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair (out, lse) that attention returned. Raises WrongResult if it is not a pair of tensors."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise WrongResult(Finding(Kind.RESULT, "sparse_mla", described(result), "a tuple (out, lse)"))
    return tensor_of("out", result[0]), tensor_of("lse", result[1])


def outputs_of(result: Any) -> AttentionOutputs:
    """The outputs that a whole layer returned. Raises WrongResult if one is missing or is not a tensor."""
    names = [field.name for field in dataclasses.fields(AttentionOutputs)]
    if not all(hasattr(result, name) for name in names):
        expected = f"AttentionOutputs: {', '.join(names)}"
        raise WrongResult(Finding(Kind.RESULT, "forward", described(result), expected))
    return AttentionOutputs(**{name: tensor_of(name, getattr(result, name)) for name in names})


def wrong_shape_or_dtype(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> Finding | None:
    """A finding if the type of device, the dtype or the shape is wrong, else None.

    A first dimension (the rows) larger than expected is not wrong.
    """
    if tensor.device.type != device.type:
        return Finding(Kind.DEVICE, name, str(tensor.device), str(device))
    if tensor.dtype is not dtype:
        return Finding(Kind.DTYPE, name, str(tensor.dtype), str(dtype))
    seen = tuple(tensor.shape)
    if len(seen) != len(shape) or seen[1:] != shape[1:] or seen[0] < shape[0]:
        return Finding(Kind.SHAPE, name, str(list(seen)), str([max((shape[0], *seen[:1])), *shape[1:]]))
    return None


def checked_stages(layer: Any, index_topk: int, kv_lora_rank: int) -> dict[str, Callable[..., Any]]:
    """The stages of ``layer`` whose results are read, and ``forward``, raising WrongResult for unusable ones.

    Without the check the next stage could read beyond the end of a result.
    """

    def indexer_logits(index_q: torch.Tensor, *others: Any) -> torch.Tensor:
        logits = tensor_of("logits", layer.indexer_logits(index_q, *others))
        return _formed("logits", logits, torch.float32, (len(index_q), int(others[-1])), index_q.device)

    def topk_transform_paged(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        indices = tensor_of("indices", layer.topk_transform_paged(logits, *others))
        return _formed("indices", indices, torch.int32, (len(logits), index_topk), logits.device)

    def sparse_mla(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = out_and_lse_of(layer.sparse_mla(*inputs))
        q, heads = inputs[0], inputs[0].shape[1]
        _formed("out", out, torch.bfloat16, (len(q), heads, kv_lora_rank), q.device)
        return out, _formed("lse", lse, torch.float32, (len(q), heads), q.device)

    def forward(*inputs: Any) -> AttentionOutputs:
        return outputs_of(layer.forward(*inputs))

    stages = (indexer_logits, topk_transform_paged, sparse_mla, forward)
    return {stage.__name__: _naming(f"{type(layer).__name__}.{stage.__name__}", stage) for stage in stages}


def _naming(method: str, stage: Callable[..., Any]) -> Callable[..., Any]:
    """``stage``, whose findings name the judged ``method`` as their place."""

    def named(*inputs: Any) -> Any:
        try:
            return stage(*inputs)
        except WrongResult as wrong:
            place = wrong.finding.place or f"from {method}"
            raise WrongResult(dataclasses.replace(wrong.finding, place=place)) from None

    return named


def _formed(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    finding = wrong_shape_or_dtype(name, tensor, dtype, shape, device)
    if finding is not None:
        raise WrongResult(finding)
    return tensor
