"""What the harness asks of a backend: the methods a serving engine calls on SGLang's NSA backend, by the same names.

A third-party backend stands behind these protocols with a thin adapter that renames its metadata fields to those of
``reference.types.Metadata``. Every field must be there, but for the schedules of a configuration that asks for none.
"""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, cast, runtime_checkable

import torch
from pydantic.fields import FieldInfo

from nsa_oracle.harness.scenarios.limits import BACKEND_FIELDS, EVERYTHING, LAYER_FIELDS, Limits, declared
from nsa_oracle.harness.scenarios.scenario import Layer, Setup
from nsa_oracle.harness.subjects.results import checked_stages
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    AttentionOutputs,
    BackendConfig,
    ForwardBatch,
    ForwardMode,
    Metadata,
    SpecInfo,
)


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


@runtime_checkable
class SparseAttention(Protocol):
    """One sparse attention layer. Its stages can be judged one by one; ``forward`` is all of them, in a graph too.

    Shapes and dtypes are those of ``reference.types``; the page tables given to stages have a row per query token.
    """

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        """Quantise and write the rows' own keys."""

    def indexer_logits(
        self,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        index_k_cache: torch.Tensor,
        real_page_table: torch.Tensor,
        seqlens_expanded: torch.Tensor,
        max_seq_len_k: int,
    ) -> torch.Tensor:
        """Score of every cached token for every row: float32 [R, max_seq_len_k]."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        """Positions of the best tokens of each row: int32 [R, index_topk]."""

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        """Slots of the best tokens of each row: int32 [R, index_topk]."""

    def topk_transform_ragged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, topk_indices_offset: torch.Tensor
    ) -> torch.Tensor:
        """Places of the best tokens of each row in the batch's concatenated KV: int32 [R, index_topk]."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the slots ``indices`` names: out bf16 [R, heads, kv_lora_rank], lse float32 [R, heads]."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        """One forward pass of the R rows that ``metadata`` describes."""


STAGES = ("kv_cache", "index_k_cache", "logits", "topk_indices", "indices", "topk_ragged", "out", "lse")
"""What is compared of a layer, in order."""


class Strictness(enum.Enum):
    """How a stage of a layer is compared. A layer that cannot be bit-exact declares a weaker way, by stage.

    It does so in an attribute ``weaker``, a mapping of stage names (``STAGES``) to these; the report
    names every stage that was compared so.
    """

    EXACT = "bit-exact"
    BOUND = "within the error bound"  # of ordinary numbers, on exact content too
    SAME_SET = "the same tokens in any order, ties forgiven"
    ONE_STEP = "within one step of bf16"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that can be compared so."""
        match self:
            case Strictness.SAME_SET:
                return "topk_indices", "indices", "topk_ragged"
            case Strictness.ONE_STEP:
                return ("out",)
            case Strictness.BOUND:
                return "logits", "out", "lse"
            case Strictness.EXACT:
                return STAGES


LayerFactory = Callable[[BackendConfig, AttentionConfig], SparseAttention]
"""Builds the layer to judge."""

BackendFactory = Callable[[BackendConfig, torch.Tensor, tuple[str, ...]], MultiStepBackend]
"""Builds the backend to judge from its configuration, ``req_to_token`` and the scenario's optimisation names."""


def optimized_backend(
    config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]
) -> MultiStepBackend:
    """The implementation of this repository, with the switches the scenario names."""
    from nsa_oracle.optimized.multi_step import (
        MultiStepBackend as Optimized,  # late: importing Triton fixes how kernels run
    )
    from nsa_oracle.optimized.optimizations import Optimizations

    return Optimized(config, req_to_token, Optimizations.from_names(optimizations))


def optimized_layer(config: BackendConfig, attention: AttentionConfig) -> SparseAttention:
    """The layer of this repository."""
    from nsa_oracle.optimized.layer import SparseAttention as Optimized  # late: importing Triton fixes how kernels run

    return Optimized(config, attention)


def limits_of_optimized_layer() -> Limits:
    """What ``optimized/``'s layer is made for."""
    from nsa_oracle.optimized.layer import SparseAttention as Optimized  # late: likewise

    return declared(Optimized, LAYER_FIELDS, "no layer")


def load_backend(spec: str) -> BackendFactory:
    """The factory behind ``module:attribute``, which is called with (config, req_to_token).

    Raises BackendError if there is no such thing to call.
    """
    build = cast("Callable[[BackendConfig, torch.Tensor], object]", _load(spec, "backend", "config, req_to_token"))

    def factory(config: BackendConfig, req_to_token: torch.Tensor, _: tuple[str, ...]) -> MultiStepBackend:
        return checked(build(config, req_to_token), spec)

    return factory


def limits_of_backend(spec: str) -> Limits:
    """What the callable behind ``module:attribute`` is made for, by its attributes ``sizes`` and ``modes``.

    sizes: fields of ``harness.scenario.Setup`` and ``Inputs`` -> allowed values. modes: forward modes that it knows.
    Raises BackendError if they are malformed, or there is no such callable.
    """
    return _declared(_load(spec, "backend", "config, req_to_token"), f"backend '{spec}'", BACKEND_FIELDS, "no backend")


def load_layer(spec: str) -> tuple[LayerFactory, Limits]:
    """The factory behind ``module:attribute``, which is called with (config, attention), and what it is made for.

    It may build any object with one or more of the methods of ``SparseAttention``; those that it lacks are taken from
    ``optimized/``. Attributes ``sizes`` and ``modes`` of the callable are as those of a backend; sizes may also name
    fields of ``harness.scenario.Layer``. Raises BackendError if there is no such thing to call.
    """
    found = _load(spec, "layer", "config, attention")
    build = cast("Callable[[BackendConfig, AttentionConfig], object]", found)

    def factory(config: BackendConfig, attention: AttentionConfig) -> SparseAttention:
        return completed(build(config, attention), config, attention, spec)

    return factory, _declared(found, f"layer '{spec}'", LAYER_FIELDS, "neither a layer nor its setup")


def _declared(found: object, who: str, fields: Mapping[str, FieldInfo], nobody: str) -> Limits:
    try:
        return declared(found, fields, nobody)
    except ValueError as error:
        raise BackendError(f"{who}: {error}") from None


def completed(layer: object, config: BackendConfig, attention: AttentionConfig, spec: str) -> SparseAttention:
    """``layer`` with what it lacks taken from ``optimized/``.

    Raises BackendError if it has no stage at all, or one that cannot be called, or declares what cannot be.
    """
    names = [name for name in vars(SparseAttention) if not name.startswith("_")]
    own = [name for name in names if hasattr(layer, name)]
    if not own:
        raise BackendError(f"layer '{spec}': {type(layer).__name__} has none of the methods {', '.join(names)}")
    if useless := [name for name in own if not callable(getattr(layer, name))]:
        raise BackendError(f"layer '{spec}': {type(layer).__name__}.{useless[0]} is no method")
    check_weaker(getattr(layer, "weaker", {}), spec)
    whole = optimized_layer(config, attention)
    for name in (*own, "weaker"):
        if hasattr(layer, name) and not (name == "forward" and getattr(type(layer), name, None) is type(whole).forward):
            setattr(whole, name, getattr(layer, name))  # forward of ours then calls stages of theirs
    for name, stage in checked_stages(layer, config.index_topk).items():
        if name in own:
            setattr(whole, name, stage)
    return whole


def check_weaker(weaker: object, spec: str) -> None:
    """Raises BackendError if ``weaker`` is not a mapping of stages to a strictness that they can be compared in."""
    if not isinstance(weaker, Mapping):
        raise BackendError(f"layer '{spec}': weaker must map stages to a Strictness; it is a {type(weaker).__name__}")
    for stage, strictness in weaker.items():
        if not isinstance(strictness, Strictness):
            raise BackendError(f"layer '{spec}': weaker: '{stage}' must be a harness.protocol.Strictness")
        if stage not in strictness.stages:
            fitting = ", ".join(strictness.stages)
            raise BackendError(f"layer '{spec}': weaker: '{stage}' cannot be {strictness.name}; it fits {fitting}")


def _load(spec: str, what: str, arguments: str) -> Callable[..., object]:
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        raise BackendError(f"{what} '{spec}' is not of the form module:attribute")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise BackendError(f"{what} '{spec}': cannot import {module_name}: {error}; is it on PYTHONPATH?") from error
    except (Exception, SystemExit) as error:  # whatever the module does when imported
        reason = " ".join(str(error).split())
        raise BackendError(
            f"{what} '{spec}': importing {module_name} raised {type(error).__name__}: {reason}"
        ) from error
    try:
        found = getattr(module, attribute)
    except AttributeError:
        raise BackendError(f"{what} '{spec}': module {module_name} has no attribute {attribute}") from None
    if not callable(found):
        raise BackendError(f"{what} '{spec}' is not callable; name a class or function of ({arguments})")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return cast("Callable[..., object]", found)  # it does not say what it takes
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise BackendError(f"{what} '{spec}' cannot be called with ({arguments}): {error}") from None
    return cast("Callable[..., object]", found)


def checked(backend: object, spec: str) -> MultiStepBackend:
    """``backend``, if it has every method the engine calls. Raises BackendError naming the first it lacks."""
    lacking = [f"{type(backend).__name__}.{name}" for name in _methods(MultiStepBackend) if not hasattr(backend, name)]
    steps: object = getattr(backend, "attn_backends", ())
    if not isinstance(steps, Sequence):
        kind = type(steps).__name__
        raise BackendError(f"backend '{spec}': attn_backends must be a list of single-step backends, not {kind}")
    for step in steps:
        lacking += [f"{type(step).__name__}.{name}" for name in _methods(SingleStepBackend) if not hasattr(step, name)]
    if lacking:
        raise BackendError(f"backend '{spec}' lacks {lacking[0]}; harness/protocol.py says what it must do")
    return cast(MultiStepBackend, backend)


def try_out(factory: BackendFactory, device: torch.device, limits: Limits = EVERYTHING) -> None:
    """Build a tiny backend, so that one that lacks a method is refused before anything is judged.

    Whatever else goes wrong in building it is left for the judge to report, with a case that replays it.
    """
    config = _smallest(limits)
    pool = torch.zeros(1, config.max_context_len, dtype=torch.int32, device=device)
    with _left_to_the_judge():
        factory(config, pool, ())


def try_out_layer(factory: LayerFactory, limits: Limits, spec: str) -> Limits:
    """Build a tiny layer, likewise. Returns ``limits``, and those of ``optimized/`` if its attention is taken."""
    layer = Layer(**{name: values[0] for name, values in limits.sizes.items() if name in Layer.model_fields})
    with _left_to_the_judge():
        built = factory(_smallest(limits), layer.attention_config())
        if "sparse_mla" not in vars(built):  # else theirs is set there, by ``completed``
            return _with_ours(limits, spec)
    return limits


def _with_ours(limits: Limits, spec: str) -> Limits:
    ours = limits_of_optimized_layer()
    both = limits & ours
    for name, left in both.sizes.items():
        if not left:
            allowed, made_for = (", ".join(map(str, sizes[name])) for sizes in (limits.sizes, ours.sizes))
            raise BackendError(
                f"layer '{spec}' has {name} {allowed} and no sparse_mla; that of optimized/ is made for {made_for}"
            )
    return both


def _smallest(limits: Limits) -> BackendConfig:
    """A configuration within ``limits``."""
    sizes = {"page_size": 1, "max_context_len": 20, "index_topk": 4, "num_steps": 1, "num_draft_tokens": 1}
    allowed = {name: values[0] for name, values in limits.sizes.items() if name in Setup.model_fields}
    return Setup.model_construct(**{**sizes, **allowed}).backend_config()


@contextmanager
def _left_to_the_judge() -> Iterator[None]:
    try:
        yield
    except BackendError:
        raise
    except (Exception, SystemExit):
        pass


def _methods(protocol: type) -> list[str]:
    names = [name for name in vars(protocol) if name.startswith("init_")]
    return [*names, "attn_backends"] if protocol is MultiStepBackend else names
