"""Loads a backend or a layer by ``module:attribute`` and rejects what cannot be judged."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from pydantic.fields import FieldInfo

from nsa_oracle.harness.errors import BackendError, CaseTimeout, ModuleMissing, error_line, meant, one_line
from nsa_oracle.harness.graphs.callers import judged_frames
from nsa_oracle.harness.protocol import (
    STAGES,
    BackendFactory,
    LayerFactory,
    MultiStepBackend,
    PreparesOutOfGraph,
    SingleStepBackend,
    SparseAttention,
    Strictness,
)
from nsa_oracle.harness.scenarios.limits import BACKEND_FIELDS, EVERYTHING, LAYER_FIELDS, Limits, declared
from nsa_oracle.harness.scenarios.setup import Layer, Setup
from nsa_oracle.harness.subjects.calls import MethodCalls
from nsa_oracle.harness.subjects.declarations import ASKS_THE_MOST, Declarations, read_declarations
from nsa_oracle.harness.subjects.default import limits_of_optimized_layer, optimized_layer
from nsa_oracle.harness.subjects.global_state import functions_put_back
from nsa_oracle.harness.subjects.misspelt import misspelt_declaration
from nsa_oracle.harness.subjects.names import (
    OLDER,
    TODAYS,
    begins_todays_names,
    methods_left,
    protocol_meant,
    todays_lacking,
)
from nsa_oracle.harness.subjects.result_checks import checked_stages
from nsa_oracle.harness.subjects.warning_filters import shown_warnings
from nsa_oracle.harness.watching import noted
from nsa_oracle.reference.types import AttentionConfig, BackendConfig

BACKEND_ARGUMENTS = "config, req_to_token"
LAYER_ARGUMENTS = "config, attention"


def load_backend(spec: str) -> LoadedBackend:
    """A factory that calls ``module:attribute`` with (config, req_to_token) and checks the methods of the result.

    Raises BackendError if ``spec`` does not name such a callable. The factory raises it if a method is missing.
    """
    found, shown = _found(spec, "backend", BACKEND_ARGUMENTS)
    try:
        if near := misspelt_declaration(found):
            raise ValueError(near)
        declarations = replace(read_declarations(found), owner=shown)
    except ValueError as error:
        raise BackendError(f"{shown}: {error}") from None
    except Exception as error:  # an attribute of an unforeseen type, or one that raises
        raise BackendError(f"{shown}: its declarations: {type(error).__name__}: {error_line(error)}") from error
    role = ", role" if declarations.roles[0].name is not None else ""
    check_signature(found, shown, BACKEND_ARGUMENTS + role)
    return LoadedBackend(found, spec, declarations)


@dataclass(frozen=True)
class LoadedBackend:
    """A factory for the backend that ``build`` makes, and its declarations."""

    build: Callable[..., object]
    spec: str
    declarations: Declarations

    def __call__(
        self, config: BackendConfig, req_to_token: torch.Tensor, _: tuple[str, ...], role: str | None = None
    ) -> MultiStepBackend:
        """The backend, or its instance for ``role``."""
        if role is None and self.declarations.roles[0].name is not None:
            role = self.declarations.roles[0].name  # any will do to try it out
        build = noted(self.build)
        built = build(config, req_to_token) if role is None else build(config, req_to_token, role)
        return checked(built, self.spec, single=self.declarations.roles != ASKS_THE_MOST.roles)


def limits_of_backend(spec: str) -> Limits:
    """The limits that the callable ``module:attribute`` declares in its attributes ``sizes`` and ``modes``.

    sizes: allowed values by name of a field of ``scenarios.setup.Setup`` or ``Inputs``. modes: supported forward
    modes. Raises BackendError if they are malformed, or if ``spec`` does not name such a callable.
    """
    found, shown = _found(spec, "backend", BACKEND_ARGUMENTS)
    return _declared(found, shown, BACKEND_FIELDS, "no backend")


def load_layer(spec: str) -> tuple[LayerFactory, Limits]:
    """A factory that calls ``module:attribute`` with (config, attention), and the limits that the callable declares.

    The callable may return any object with at least one method of ``SparseAttention``; missing methods are taken from
    ``optimized/``. Its attributes ``sizes`` and ``modes`` are like those of a backend; sizes may also name fields of
    ``scenarios.setup.Layer``. Raises BackendError if ``spec`` does not name such a callable.
    """
    found, shown = _found(spec, "layer", LAYER_ARGUMENTS)
    check_signature(found, shown, LAYER_ARGUMENTS)
    build = cast("Callable[[BackendConfig, AttentionConfig], object]", found)

    def factory(config: BackendConfig, attention: AttentionConfig) -> SparseAttention:
        return completed(noted(build)(config, attention), config, attention, spec)

    return factory, _declared(found, shown, LAYER_FIELDS, "neither a layer nor its setup")


def _declared(found: object, name: str, fields: Mapping[str, FieldInfo], no_owner: str) -> Limits:
    try:
        return declared(found, fields, no_owner)
    except ValueError as error:
        raise BackendError(f"{name}: {error}") from None


def completed(layer: object, config: BackendConfig, attention: AttentionConfig, spec: str) -> SparseAttention:
    """A complete layer: the methods of ``layer``, and those that it lacks from ``optimized/``.

    Raises BackendError if ``layer`` has no stage, a stage that is not callable, or a malformed ``weaker``.
    """
    shown = f"layer '{spec}'"
    _check_instance(layer, shown, "returned {kind}", "return the layer")
    names = stages()
    own = [name for name in names if hasattr(layer, name)]
    cutoff = 0.9 if own else 0.75  # the names of helpers may be like those of stages
    near = next((clause for name in names if name not in own and (clause := _misspelt(layer, name, cutoff))), "")
    if not own:
        raise BackendError(f"{shown}: {type(layer).__name__} has none of the methods {', '.join(names)}{near}")
    if near:  # it would be judged without the stage that its author means to bring
        raise BackendError(f"{shown}: {type(layer).__name__} has a misspelt stage{near}")
    if uncallable := [name for name in own if not callable(getattr(layer, name))]:
        raise BackendError(f"{shown}: {type(layer).__name__}.{uncallable[0]} is not a method")
    for name in own:
        _check_runs(layer, name, shown)
    check_weaker(getattr(layer, "weaker", {}), spec)
    whole = optimized_layer(config, attention)
    for name in (*own, "weaker"):
        if hasattr(layer, name) and not (name == "forward" and getattr(type(layer), name, None) is type(whole).forward):
            setattr(whole, name, getattr(layer, name))  # the forward of ``optimized/`` then calls the layer's stages
    for name, stage in checked_stages(layer, config.index_topk, attention.kv_lora_rank).items():
        if name in vars(whole):  # set above
            setattr(whole, name, stage)
    ours = type(whole)
    calls = MethodCalls([name for name in own if getattr(type(layer), name, None) is not getattr(ours, name)])
    for name in calls.names:
        setattr(whole, name, calls.counting(name, noted(getattr(whole, name), getattr(layer, name))))
    whole.method_calls = calls  # type: ignore[attr-defined]  # of a layer that is loaded alone
    return whole


def completed_if_partial(
    layer: object, config: BackendConfig, attention: AttentionConfig, spec: str
) -> SparseAttention:
    """``layer`` itself if it has all methods, else as by ``completed``. Raises BackendError as that does."""
    if layer is None or isinstance(layer, type) or not all(callable(getattr(layer, name, None)) for name in stages()):
        return completed(layer, config, attention, spec)
    check_weaker(getattr(layer, "weaker", {}), spec)
    return cast(SparseAttention, layer)


def check_weaker(weaker: object, spec: str) -> None:
    """Raises BackendError unless ``weaker`` maps stages to a ``Strictness`` that is defined for them."""
    if not isinstance(weaker, Mapping):
        raise BackendError(f"layer '{spec}': weaker must map stages to a Strictness; it is a {type(weaker).__name__}")
    for stage, strictness in weaker.items():
        if not isinstance(strictness, Strictness):
            raise BackendError(f"layer '{spec}': weaker: '{stage}' must be an nsa_oracle.harness.protocol.Strictness")
        if stage not in STAGES:
            near = meant(str(stage), STAGES)
            mend = f"did you mean {near}?" if near else f"choose from {', '.join(STAGES)}"
            raise BackendError(f"layer '{spec}': weaker: there is no stage '{one_line(str(stage))}'; {mend}")
        if stage not in strictness.stages:
            fitting = ", ".join(strictness.stages)
            raise BackendError(f"layer '{spec}': weaker: '{stage}' cannot be {strictness.name}; it fits {fitting}")


def _found(spec: str, what: str, arguments: str) -> tuple[Callable[..., object], str]:
    """The callable that ``spec`` names, and how messages name it."""
    shown = f"{what} '{one_line(spec)}'"
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        near = ":".join(spec.rsplit(".", 1)) if not colon and not spec.endswith(".py") else ""
        if near and _is_module(spec):
            near = f"{spec}:NAME"
        mend = f"; write {one_line(near)}?" if "." in spec and near else ", such as my_backend:MyBackend"
        raise BackendError(f"{shown} is not of the form module:attribute{mend}")
    if (name := _module_of(module_name)) != module_name:
        as_module = f"{name}:{attribute.strip()}"
        raise BackendError(f"{shown} names a file; write {one_line(as_module)} and have its folder on PYTHONPATH")
    module = _imported(module_name, shown)
    try:
        found = getattr(module, attribute)
    except AttributeError:
        near = meant(attribute, (name for name in vars(module) if not name.startswith("_")))
        mend = f"; did you mean {near}?" if near else ""
        raise BackendError(f"{shown}: module {module_name} has no attribute {one_line(attribute)}{mend}") from None
    except KeyboardInterrupt:  # perhaps the user's
        raise
    except BaseException as error:  # of the module's ``__getattr__``
        reason = f"{type(error).__name__}: {error_line(error)}{line_of(error)}"
        raise BackendError(f"{shown}: looking up {one_line(attribute)} in {module_name} raised {reason}") from error
    if not callable(found):
        kind = type(found).__name__
        mend = f"name a class or function of ({arguments}), not {_article(kind)} {kind}"
        raise BackendError(f"{shown} is not callable; {mend}")
    for function in (found, getattr(found, "__init__", None), inspect.getattr_static(type(found), "__call__")):
        _check_body_runs(function, shown)
    return cast("Callable[..., object]", found), shown


def check_signature(found: Callable[..., object], shown: str, arguments: str) -> None:
    """Raises BackendError if ``found`` cannot be called with ``arguments``."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return  # a callable without a known signature
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise BackendError(f"{shown} cannot be called with ({arguments}): {error}") from None


def _is_module(name: str) -> bool:
    """Whether ``name`` is that of a module that can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # of the packages in which it is, or a malformed name
        return False


def _module_of(name: str) -> str:
    """The module that was probably meant by ``name``, which may be a path: "../a/b.py" is "a.b"."""
    parts = [part for part in name.strip().removesuffix(".py").replace("\\", "/").split("/") if part.strip(".")]
    return ".".join(parts).lstrip(".")


def _imported(name: str, shown: str) -> object:
    try:
        with shown_warnings(), _own_modules_kept(shown, name):
            try:
                return importlib.import_module(name)
            finally:  # before anything is called: with another ``len``, Python's own modules may never end
                if (replaced := functions_put_back()) is not None:
                    raise BackendError(f"{shown}: importing {one_line(name)}: {replaced.sentence()}; leave it alone")
    except BackendError:
        raise
    except CaseTimeout as error:
        slow = f"{shown}: the import of {one_line(name)} did not end: {error}{line_of(error)}"
        raise BackendError(slow) from None
    except ModuleNotFoundError as error:
        missing = f"{shown}: cannot import {one_line(name)}: {error_line(error)}{line_of(error)}"
        raise ModuleMissing(f"{missing}; is it on PYTHONPATH?") from error
    except KeyboardInterrupt:  # perhaps the user's
        raise
    except BaseException as error:  # the module's code may do anything, such as skip a test
        reason = f"{type(error).__name__}: {error_line(error)}{line_of(error)}"
        raise BackendError(f"{shown}: importing {one_line(name)} raised {reason}") from error


@contextmanager
def _own_modules_kept(shown: str, name: str) -> Iterator[None]:
    """Put modules of the oracle that are removed or replaced back. Raises BackendError if any were."""
    before = {module: found for module, found in sys.modules.items() if module.partition(".")[0] == "nsa_oracle"}
    try:
        yield
    finally:
        lost = [module for module, found in before.items() if sys.modules.get(module) is not found]
        sys.modules.update(before)  # else no error of theirs can be told to another process
    if lost:
        raise BackendError(f"{shown}: importing {one_line(name)} removed {lost[0]} from sys.modules; leave it there")


def line_of(error: BaseException) -> str:
    """The innermost line of the imported code that ``error`` passed, in words."""
    frames = judged_frames(error.__traceback__)
    return f", at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _article(noun: str) -> str:
    return "an" if noun[:1].lower() in "aeiou" else "a"


def checked(backend: object, spec: str, single: bool = False) -> MultiStepBackend:
    """``backend``, if it has one set of names completely. Raises BackendError that names the first missing method.

    ``attn_backends`` must be a sequence whose elements have all methods, too. single: whether a backend without it,
    of a single step, will do.
    """
    shown = f"backend '{spec}'"
    _check_instance(backend, shown, "returned {kind}", "return the backend")
    alone = single and not hasattr(backend, "attn_backends")
    _check_methods(backend, protocol_meant(backend, SingleStepBackend if alone else MultiStepBackend), shown)
    if alone:
        return cast(MultiStepBackend, backend)
    steps: object = getattr(backend, "attn_backends", None)
    if not isinstance(steps, Sequence):
        kind = type(steps).__name__
        raise BackendError(f"{shown}: attn_backends must be a list of single-step backends, not {kind}")
    for number, step in enumerate(steps):
        _check_instance(
            step, shown, f"{type(backend).__name__}.attn_backends[{number}] is {{kind}}", "put a backend there"
        )
        _check_methods(step, protocol_meant(step, SingleStepBackend), shown)
    return cast(MultiStepBackend, backend)


def _check_instance(found: object, shown: str, told: str, mend: str) -> None:
    """Raises BackendError for None, for a coroutine, and for a class, which may have all the methods."""
    if inspect.iscoroutine(found):
        found.close()  # else Python warns that nothing awaited it
        raise BackendError(f"{shown}: {told.format(kind='a coroutine')}, which nothing awaits; {mend}")
    if found is None:
        raise BackendError(f"{shown}: {told.format(kind='None')}; {mend}")
    if isinstance(found, type):
        kind = f"the class {found.__name__}"
        raise BackendError(f"{shown}: {told.format(kind=kind)}, not an instance of it; {mend}")


def _check_methods(found: object, protocol: type, shown: str) -> None:
    """Raises BackendError for the first method of ``protocol`` that ``found`` lacks or that cannot be called."""
    kind = type(found).__name__
    _check_runs(found, "init_forward_metadata_in_graph", shown)  # optional in the older set
    if protocol is PreparesOutOfGraph and methods_left(found):
        for name in OLDER:
            if not hasattr(found, name) and (near := _misspelt(found, name, 0.9)):  # meant to be called by those names
                raise BackendError(f"{shown} lacks {kind}.{name}{near}")
    for name in _methods(protocol):
        if not hasattr(found, name):
            near = _misspelt(found, name)
            if protocol is not PreparesOutOfGraph and begins_todays_names(found):
                near += f", and of today's set {kind}.{', '.join(todays_lacking(found))}; complete one of the two sets"
            raise BackendError(
                f"{shown} lacks {kind}.{name}{near}; nsa_oracle/harness/protocol.py says what it must do"
            )
        method = getattr(found, name)
        if name != "attn_backends" and not callable(method):
            raise BackendError(f"{shown}: {kind}.{name} is not a method")
        _check_runs(found, name, shown)


def _check_runs(found: object, name: str, shown: str) -> None:
    """Raises BackendError if the method ``name`` of ``found`` is one whose body does not run when it is called."""
    _check_body_runs(getattr(found, name, None), f"{shown}: {type(found).__name__}.{name}")


def _check_body_runs(function: object, named: str) -> None:
    if inspect.iscoroutinefunction(function):
        raise BackendError(f"{named} is a coroutine, which nothing awaits; define it without async")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise BackendError(f"{named} is a generator, which nothing iterates over; define it without yield")


def _misspelt(found: object, name: str, cutoff: float = 0.75) -> str:
    """A clause about an attribute of ``found`` whose name is like ``name``, or ""."""
    known = {*_methods(MultiStepBackend), *TODAYS, *stages()}
    near = meant(name, (other for other in dir(found) if not other.startswith("_") and other not in known), cutoff)
    return f" (it has {near}: did you mean {name}?)" if near else ""


def stages() -> list[str]:
    """The names of a layer's methods."""
    return [name for name in vars(SparseAttention) if not name.startswith("_")]


def try_out(factory: BackendFactory, device: torch.device, limits: Limits = EVERYTHING) -> None:
    """Build a tiny backend, so that a missing method raises BackendError before anything is judged.

    Any other error of the construction, the end of a time limit included, is ignored: the judge reports it with a case
    that replays it.
    """
    config = _smallest(limits)
    pool = torch.zeros(1, config.max_context_len, dtype=torch.int32, device=device)
    with _left_to_the_judge():
        factory(config, pool, ())


def try_out_layer(factory: LayerFactory, limits: Limits, spec: str) -> Limits:
    """Build a tiny layer, for the same reason as in ``try_out``.

    Returns ``limits``; if the layer takes its ``sparse_mla`` from ``optimized/``, restricted to that one's limits.
    """
    layer = Layer(**{name: values[0] for name, values in limits.sizes.items() if name in Layer.model_fields})
    with _left_to_the_judge():
        built = factory(_smallest(limits), layer.attention_config())
        if "sparse_mla" not in vars(built):  # ``completed`` sets the layer's own sparse_mla on the instance
            return _with_default_limits(limits, spec)
    return limits


def _with_default_limits(limits: Limits, spec: str) -> Limits:
    default = limits_of_optimized_layer()
    both = limits & default
    for name, left in both.sizes.items():
        if not left:
            allowed, made_for = (", ".join(map(str, sizes[name])) for sizes in (limits.sizes, default.sizes))
            raise BackendError(
                f"layer '{spec}' has {name} {allowed} and no sparse_mla; that of optimized/ is made for {made_for}"
            )
    return both


def _smallest(limits: Limits) -> BackendConfig:
    """A small configuration within ``limits``."""
    sizes = {"page_size": 1, "max_context_len": 20, "index_topk": 4, "num_steps": 1, "num_draft_tokens": 1}
    allowed = {name: values[0] for name, values in limits.sizes.items() if name in Setup.model_fields}
    return Setup.model_construct(**{**sizes, **allowed}).backend_config()


@contextmanager
def _left_to_the_judge() -> Iterator[None]:
    try:
        yield
    except (BackendError, KeyboardInterrupt):  # which may be the user's
        raise
    except BaseException:
        pass


def _methods(protocol: type) -> list[str]:
    names = [name for name in vars(protocol) if name.startswith("init_")]
    return [*names, "attn_backends"] if protocol is MultiStepBackend else names
