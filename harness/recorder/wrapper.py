"""Wraps a backend so that each call of the engine is noted and passed on. ``record`` is the whole interface."""

from __future__ import annotations

import enum
import itertools
import os
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast

import torch

from nsa_oracle.harness.protocol import PreparesOutOfGraph, SingleStepBackend
from nsa_oracle.harness.recorder.given import given_to
from nsa_oracle.harness.recorder.staging import Staging
from nsa_oracle.harness.recorder.writer import MAX_BYTES, VERSION, Writer
from nsa_oracle.reference.types import BackendConfig

Backend = TypeVar("Backend")
Tables = Literal["none", "digest", "whole"]
METHODS = tuple(
    name for kind in (SingleStepBackend, PreparesOutOfGraph) for name in vars(kind) if name.startswith("init_")
)
_STATE = "_nsa_oracle_recording"


def record(
    backend: Backend,
    file: str | os.PathLike[str],
    *,
    config: BackendConfig | Mapping[str, object] | None = None,
    req_to_token: torch.Tensor | None = None,
    tables: Tables = "none",
    max_bytes: int = MAX_BYTES,
) -> Backend:
    """``backend``, wrapped so that every call of an engine is appended to ``file``. Pass the result to the engine.

    The wrapper passes everything on unchanged, attributes too, and is an instance of the backend's class. It never
    synchronises with the device, and never raises: what goes wrong ends the recording with one warning of the logger
    "nsa_oracle.harness.recorder".

    config: the sizes of the backend, all or some fields of ``BackendConfig``; by default its attribute ``config``.
    req_to_token: by default the attribute of that name of the backend or of its first step. tables: of
    ``req_to_token``, nothing, a digest or the whole row of each request of each call; the last two launch kernels.
    file: has one recorder at a time, so each rank needs its own; a second one records nothing. max_bytes: size of the
    file and of the older one beside it (``file`` + ".1") together, which keep the last calls.

    Raises ValueError if ``tables`` or ``max_bytes`` is not among the allowed values.
    """
    if tables not in ("none", "digest", "whole"):
        raise ValueError(f"tables must be 'none', 'digest' or 'whole', not {tables!r}")
    if max_bytes < 1 << 12:
        raise ValueError(f"max_bytes must be at least 4,096, not {max_bytes!r}")
    writer = Writer(Path(file), max_bytes)
    recorder = Recorder(writer, None, tables)
    try:
        pool = req_to_token if req_to_token is not None else _attribute(backend, "req_to_token")
        recorder.pool = pool if isinstance(pool, torch.Tensor) and pool.dim() == 2 else None
        if tables != "none" and recorder.pool is None:
            raise ValueError("the backend has no req_to_token; give it to record(), or leave tables out")
        writer.begin(_head(backend, config, recorder))
    except Exception as error:
        writer.end(error)
    return cast(Backend, _Recorded(backend, recorder, None))


def flush(backend: object, timeout: float = 5.0) -> bool:
    """Wait until every call so far is in the file. Returns whether it is, within ``timeout`` seconds."""
    recorder: Recorder = object.__getattribute__(backend, _STATE)
    return recorder.writer.flush(timeout)


class Recorder:
    """Notes calls. pool: ``req_to_token``, if it is known."""

    def __init__(self, writer: Writer, pool: torch.Tensor | None, tables: Tables) -> None:
        self.writer = writer
        self.pool = pool
        self.tables = tables
        self._numbers = itertools.count()
        self._staging = Staging()
        weakref.finalize(self, writer.close).atexit = False

    def note(self, name: str, step: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note one call. Never raises an Exception."""
        if self.writer.ended or os.getpid() != self.writer.process:
            return
        try:
            line: dict[str, Any] = {"n": next(self._numbers), "t": round(time.time(), 3), "call": name}
            if step is not None:
                line["step"] = step
            if name == "init_cuda_graph_state":
                line["sizes"] = [int(size) for size in (*args, *kwargs.values())]
                self.writer.put(line)
                return
            given = given_to(name, args, kwargs)
            line |= given.host
            mirror = {} if given.mirror is None else {"seq_lens_cpu": given.mirror}
            on_device = strided = False
            for tensor in given.tensors.values():
                on_device, strided = on_device or tensor.is_cuda, strided or tensor.stride(0) > 1
            capturing = on_device and torch.cuda.is_current_stream_capturing()
            if capturing or name == "init_forward_metadata_in_graph":
                self.writer.put(line, self._staging.copies(mirror))  # no others: the graph would repeat them
                return
            tensors = mirror | given.tensors
            if self.tables != "none" and self.pool is not None and "pool_rows" in tensors:
                rows = self.pool.index_select(0, tensors["pool_rows"])  # [bs, W]
                if self.tables == "whole":
                    tensors["table"] = rows
                else:
                    tensors["digest"] = _digest(rows, tensors["seq_lens"])
            line["dtypes"] = {key: tensor.dtype for key, tensor in given.tensors.items()}
            line["strided"] = strided
            if not self.writer.has_room():
                self.writer.drop()
                return
            self.writer.put(line, self._staging.copies(tensors))
        except Exception as error:
            self.writer.end(error)


class _Recorded:
    """Stands for a backend: methods of an engine are noted first, everything else is the backend's own."""

    def __init__(self, backend: object, recorder: Recorder, step: int | None) -> None:
        own = object.__setattr__
        own(self, "_nsa_oracle_backend", backend)
        own(self, _STATE, recorder)
        own(self, "_nsa_oracle_step", step)
        own(self, "_nsa_oracle_steps", None)
        for name in dict.fromkeys(METHODS):  # on the instance: then isinstance of a protocol sees them, too
            if callable(getattr(backend, name, None)):
                own(self, name, _noted(backend, name, recorder, step))

    def __getattr__(self, name: str) -> Any:
        backend = object.__getattribute__(self, "_nsa_oracle_backend")  # its absence must not lead back here
        found = getattr(backend, name)
        return self._steps(found) if name == "attn_backends" else found

    def _steps(self, found: Any) -> Any:
        """The single-step backends, the first one wrapped: engines that call each of them give all the same."""
        if self._nsa_oracle_step is not None or not isinstance(found, list | tuple) or not found:
            return found
        kept = self._nsa_oracle_steps
        if kept is None or kept[0] is not found[0]:
            kept = found[0], _Recorded(found[0], object.__getattribute__(self, _STATE), 0)
            object.__setattr__(self, "_nsa_oracle_steps", kept)
        wrapped = (kept[1], *found[1:])
        return list(wrapped) if isinstance(found, list) else wrapped

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._nsa_oracle_backend, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._nsa_oracle_backend, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._nsa_oracle_backend)

    def __dir__(self) -> list[str]:
        return dir(self._nsa_oracle_backend)

    def __repr__(self) -> str:
        return repr(self._nsa_oracle_backend)

    def _no_copy(self, *_: object) -> NoReturn:
        """Two wrappers would number their calls alike in one file, and a file belongs to one process."""
        raise TypeError(
            "a recorded backend has no copy and no pickle: copy or pickle the backend, and record what comes of it"
        )

    __copy__ = __deepcopy__ = __reduce_ex__ = _no_copy


def _noted(backend: object, name: str, recorder: Recorder, step: int | None) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder.note(name, step, args, kwargs)
        return getattr(backend, name)(*args, **kwargs)

    return call


def _attribute(backend: object, name: str) -> Any:
    found = getattr(backend, name, None)
    if found is None:
        steps = getattr(backend, "attn_backends", None)
        found = getattr(steps[0], name, None) if steps else None
    return found


def _head(backend: object, config: BackendConfig | Mapping[str, object] | None, recorder: Recorder) -> dict[str, Any]:
    """The first line of a record."""
    pool = recorder.pool
    given: Any = config if config is not None else _attribute(backend, "config")
    if given is not None and not isinstance(given, Mapping):
        given = {name: getattr(given, name, None) for name in BackendConfig.__dataclass_fields__}
    values = {name: value.value if isinstance(value, enum.Enum) else value for name, value in (given or {}).items()}
    return {
        "nsa_oracle_record": VERSION,
        "session": f"{os.getpid()}-{time.time_ns()}",
        "backend": type(backend).__qualname__,
        "config": {name: value for name, value in values.items() if isinstance(value, int | str)},
        "pool": None if pool is None else [pool.shape[0], pool.shape[1]],
        "wide": pool is not None and pool.stride(0) > pool.shape[1],
        "tables": recorder.tables,
    }


def _digest(rows: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """Tells other content in the first ``seq_lens`` cells of each row of ``rows`` [bs, W]: int64 [bs]."""
    columns = torch.arange(rows.shape[1], device=rows.device)  # [W]
    weights = (2 * columns + 1) * 0x9E3779B1 * (columns < seq_lens.unsqueeze(1))  # [bs, W]
    return (rows * weights).sum(1)
