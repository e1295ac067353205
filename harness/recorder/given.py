"""What a call of an engine gives to a backend, by whichever set of names. Reads nothing from the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

_BATCH_METHODS = {"init_forward_metadata", "init_forward_metadata_out_graph", "init_forward_metadata_in_graph"}
_SEPARATE = {  # positional arguments of the methods of a single step, by older names
    "init_forward_metadata_capture_cuda_graph": (
        *("bs", "num_tokens", "req_pool_indices", "seq_lens", "encoder_lens", "forward_mode", "spec_info"),
    ),
    "init_forward_metadata_replay_cuda_graph": (
        *("bs", "req_pool_indices", "seq_lens", "seq_lens_sum", "encoder_lens", "forward_mode", "spec_info"),
        *("seq_lens_cpu", "out_cache_loc"),
    ),
}


@dataclass(slots=True)
class Given:
    """host: what the record has of it at once. tensors: numbers that have to be copied first, by name in the record.

    mirror: of the lengths, in host memory, if it is a tensor; to be copied as well.
    """

    host: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    mirror: torch.Tensor | None = None


def given_to(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """The arguments of the method ``name``. Raises ValueError if they are not those of any protocol."""
    batch = args[0] if args else kwargs.get("forward_batch")
    if hasattr(batch, "seq_lens"):
        rest = args[1:]
        act = "eager"
        bs = None
        if name == "init_forward_metadata_out_graph":
            in_capture = rest[0] if rest else kwargs.get("in_capture", False)
            act = "capture" if in_capture else "replay"
        elif name not in _BATCH_METHODS:
            act = "capture" if "capture" in name else "replay"
            bs = rest[0] if rest else kwargs.get("bs")
        elif name == "init_forward_metadata_in_graph":
            act = "in_graph"
        return _of(act, bs, _Attributes(batch))
    names = _SEPARATE.get(name)
    if names is None or len(args) > len(names):
        raise ValueError(f"{name} was called with arguments of no protocol")
    given = dict(zip(names, args, strict=False)) | kwargs
    return _of("capture" if "capture" in name else "replay", given.get("bs"), given)


class _Attributes:
    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def get(self, name: str) -> Any:
        return getattr(self._batch, name, None)


def _of(act: str, bs: Any, given: Any) -> Given:
    mode = given.get("forward_mode")
    size = given.get("batch_size") if bs is None else bs
    mirror, total = given.get("seq_lens_cpu"), given.get("seq_lens_sum")
    found = Given({"act": act, "mode": getattr(mode, "name", str(mode)), "bs": None if size is None else int(size)})
    if mirror is not None and act != "in_graph":
        if isinstance(mirror, torch.Tensor):
            if mirror.is_cpu:
                found.mirror = mirror
            else:
                found.tensors["seq_lens_cpu"] = mirror
        else:
            found.host["seq_lens_cpu"] = _numbers(mirror)
    if total is not None:
        found.host["seq_lens_sum"] = int(total)
    new = given.get("extend_seq_lens_cpu") if found.host["mode"] == "EXTEND" else None
    if new is not None:
        found.host["extend_lens"] = _numbers(new)
    spec_info = given.get("spec_info")
    accepted = getattr(spec_info, "accept_length", None)
    if accepted is None:
        accepted = getattr(spec_info, "num_accept_tokens", None)
    tensors = [
        ("pool_rows", given.get("req_pool_indices")),
        ("seq_lens", given.get("seq_lens")),
        ("accept_lengths", accepted),
        ("extend_lens", given.get("extend_seq_lens") if found.host["mode"] == "EXTEND" and new is None else None),
    ]
    for key, value in tensors:
        if isinstance(value, torch.Tensor):
            found.tensors[key] = value
    return found


def _numbers(values: Any) -> Any:
    """A copy that the engine cannot change: a list, or a tensor of which the writer makes one."""
    return values.clone() if isinstance(values, torch.Tensor) else list(values)
