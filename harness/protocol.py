"""What the harness asks of a backend: the methods a serving engine calls on SGLang's NSA backend, by the same names.

A third-party backend stands behind these protocols with a thin adapter that renames its metadata fields to those of
``reference.types.Metadata``. Every field must be there, but for the schedules of a configuration that asks for none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

import torch

from reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo


class BackendError(ValueError):
    """A backend that cannot be judged at all. The message is one line and names the cause and the mend."""


@runtime_checkable
class SingleStepBackend(Protocol):
    """One draft step. After every call ``forward_metadata`` is what attention reads next."""

    forward_metadata: Metadata

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare ``forward_metadata`` for a forward pass outside any graph."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what graphs of up to ``max_bs`` requests and ``max_num_tokens`` rows share. Called once, first."""

    def init_forward_metadata_capture_cuda_graph(
        self,
        bs: int,
        num_tokens: int,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None,
        forward_mode: ForwardMode,
        spec_info: SpecInfo | None,
    ) -> None:
        """Bind ``forward_metadata`` to the buffers that the graph of this mode and bucket will read from now on.

        The tensors given here are the engine's static inputs: it refreshes them in place before each replay.
        """

    def init_forward_metadata_replay_cuda_graph(
        self,
        bs: int,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_sum: int | None,
        encoder_lens: torch.Tensor | None,
        forward_mode: ForwardMode,
        spec_info: SpecInfo | None,
        seq_lens_cpu: torch.Tensor | None,
        out_cache_loc: torch.Tensor | None = None,
    ) -> None:
        """Refresh those buffers, in place, just before the graph of this mode and bucket is replayed."""


@runtime_checkable
class MultiStepBackend(Protocol):
    """N single-step backends behind one set of calls."""

    @property
    def attn_backends(self) -> Sequence[SingleStepBackend]:
        """The single-step backends, in step order."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None: ...

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None: ...

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None: ...

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None: ...


@runtime_checkable
class PreparesInGraph(Protocol):
    """Optional, for either kind of backend: metadata preparation that is captured with the forward pass."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        """Record the preparation. Called inside capture, before anything reads the metadata."""


BackendFactory = Callable[[BackendConfig, torch.Tensor, tuple[str, ...]], MultiStepBackend]
"""Builds the backend to judge from its configuration, ``req_to_token`` and the scenario's optimisation names."""


def optimized_backend(
    config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]
) -> MultiStepBackend:
    """The implementation of this repository, with the switches the scenario names."""
    from optimized.multi_step import MultiStepBackend as Optimized  # late: importing Triton fixes how kernels run
    from optimized.optimizations import Optimizations

    return Optimized(config, req_to_token, Optimizations.from_names(optimizations))


def load_backend(spec: str) -> BackendFactory:
    """The factory behind ``module:attribute``, which is called with (config, req_to_token).

    Raises BackendError if there is no such thing to call.
    """
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        raise BackendError(f"backend '{spec}' is not of the form module:attribute")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise BackendError(f"backend '{spec}': cannot import {module_name}: {error}; is it on PYTHONPATH?") from error
    except AttributeError:
        raise BackendError(f"backend '{spec}': module {module_name} has no attribute {attribute}") from None
    except Exception as error:  # whatever the module does when imported
        reason = " ".join(str(error).split())
        raise BackendError(
            f"backend '{spec}': importing {module_name} raised {type(error).__name__}: {reason}"
        ) from error
    if not callable(found):
        raise BackendError(f"backend '{spec}' is not callable; name a class or function of (config, req_to_token)")
    build = cast("Callable[[BackendConfig, torch.Tensor], object]", found)

    def factory(config: BackendConfig, req_to_token: torch.Tensor, _: tuple[str, ...]) -> MultiStepBackend:
        return checked(build(config, req_to_token), spec)

    return factory


def checked(backend: object, spec: str) -> MultiStepBackend:
    """``backend``, if it has every method the engine calls. Raises BackendError naming the first it lacks."""
    steps: object = getattr(backend, "attn_backends", None)
    lacking = [f"{type(backend).__name__}.{name}" for name in _methods(MultiStepBackend) if not hasattr(backend, name)]
    for step in steps if isinstance(steps, Sequence) else ():
        lacking += [f"{type(step).__name__}.{name}" for name in _methods(SingleStepBackend) if not hasattr(step, name)]
    if lacking:
        raise BackendError(f"backend '{spec}' lacks {lacking[0]}; harness/protocol.py says what it must do")
    return cast(MultiStepBackend, backend)


def try_out(factory: BackendFactory, device: torch.device) -> None:
    """Build a tiny backend, so that one that lacks a method is refused before anything is judged.

    Whatever else goes wrong in building it is left for the judge to report, with a case that replays it.
    """
    config = BackendConfig(1, 8, 4, 1, 1)
    try:
        factory(config, torch.zeros(1, 8, dtype=torch.int32, device=device), ())
    except Exception as error:
        if isinstance(error, BackendError):
            raise


def _methods(protocol: type) -> list[str]:
    names = [name for name in vars(protocol) if name.startswith("init_")]
    return [*names, "attn_backends"] if protocol is MultiStepBackend else names
