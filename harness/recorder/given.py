"""What a call of an engine gives to a backend, by whichever set of names. Reads nothing from the device."""

from __future__ import annotations

from collections.abc import Callable
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

    def add(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors[name] = value


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
        return _of(act, bs, lambda name: getattr(batch, name, None))
    names = _SEPARATE.get(name)
    if names is None or len(args) > len(names):
        raise ValueError(f"{name} was called with arguments of no protocol")
    given = dict(zip(names, args, strict=False)) | kwargs
    return _of("capture" if "capture" in name else "replay", given.get("bs"), given.get)


def _of(act: str, bs: Any, get: Callable[[str], Any]) -> Given:
    mode = get("forward_mode")
    name = getattr(mode, "name", None) or str(mode)
    size = get("batch_size") if bs is None else bs
    found = Given({"act": act, "mode": name, "bs": None if size is None else int(size)})
    mirror, total = get("seq_lens_cpu"), get("seq_lens_sum")
    if mirror is not None and act != "in_graph":
        if not isinstance(mirror, torch.Tensor):
            found.host["seq_lens_cpu"] = list(mirror)
        elif mirror.is_cpu:
            found.mirror = mirror
        else:
            found.tensors["seq_lens_cpu"] = mirror
    if total is not None:
        found.host["seq_lens_sum"] = int(total)
    spec_info = get("spec_info")
    accepted = None
    if spec_info is not None:
        accepted = getattr(spec_info, "accept_length", None)
        if accepted is None:
            accepted = getattr(spec_info, "num_accept_tokens", None)
    found.add("pool_rows", get("req_pool_indices"))
    found.add("seq_lens", get("seq_lens"))
    found.add("accept_lengths", accepted)
    if name == "EXTEND":
        new = get("extend_seq_lens_cpu")
        if new is None:
            found.add("extend_lens", get("extend_seq_lens"))
        else:
            found.host["extend_lens"] = new.clone() if isinstance(new, torch.Tensor) else list(new)
    return found
