"""Checks what is given to ``judge``: a mistake of its caller must be neither a finding nor a case that passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from nsa_oracle.harness.errors import BackendError, ScenarioError, error_line, one_line
from nsa_oracle.harness.protocol import BackendFactory, LayerFactory, SparseAttention
from nsa_oracle.harness.scenarios.scenario import Capture, Scenario
from nsa_oracle.harness.subjects.declarations import read_declarations
from nsa_oracle.harness.subjects.default import optimized_backend, optimized_layer
from nsa_oracle.harness.subjects.loading import (
    BACKEND_ARGUMENTS,
    LAYER_ARGUMENTS,
    LoadedBackend,
    check_signature,
    checked,
    completed_if_partial,
    stages,
)
from nsa_oracle.harness.watching import noted
from nsa_oracle.reference.types import AttentionConfig, BackendConfig

_SWITCHES = ", optimizations"


def check_scenario(given: object) -> None:
    """Raises TypeError unless a ``Scenario`` is given, and ScenarioError for one in which nothing would be judged."""
    if isinstance(given, str | Path):
        raise TypeError(f"scenario is a path, {one_line(str(given), 100)}; give nsa_oracle.harness.load(path)")
    if not isinstance(given, Scenario):
        raise TypeError(f"scenario is {_described(given)}; give a nsa_oracle.harness.Scenario")
    if not given.calls and not any(isinstance(event, Capture) for event in given.events):
        raise ScenarioError("scenario: it has no capture, no replay and no eager call, so nothing would be judged")


def device_of(given: object) -> torch.device:
    """The device that is given, by its name too. Raises TypeError or BackendError if nothing can be judged there."""
    if isinstance(given, str):
        name = given
        try:
            given = torch.device(name)
        except RuntimeError:
            raise BackendError(f"device: there is no '{one_line(name)}'; use 'cpu' or 'cuda'") from None
    if not isinstance(given, torch.device):
        raise TypeError(f"device is {_described(given)}; give a torch.device, or 'cpu' or 'cuda'")
    if given.type not in ("cpu", "cuda"):
        raise BackendError(f"device {given}: nothing can be judged there; use cpu or cuda")
    if given.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(f"device {given}: torch sees no CUDA device here; use cpu")
        if (given.index or 0) >= torch.cuda.device_count():
            raise BackendError(f"device {given}: torch sees only {torch.cuda.device_count()} here; use another one")
    return given


def backend_of(given: object) -> BackendFactory:
    """What builds the backend that is given: a callable of (config, req_to_token), or of these and of switches.

    One of (config, req_to_token) comes with its declarations. Raises TypeError or BackendError, in one line, for what
    builds no backend; so does the result.
    """
    if given is optimized_backend or hasattr(given, "declarations"):  # it is loaded
        return cast(BackendFactory, given)
    build = _callable("factory", given, BACKEND_ARGUMENTS, "init_forward_metadata")
    name, shown = _name(build), f"backend '{_name(build)}'"
    try:
        declarations = read_declarations(build)
    except ValueError as error:
        raise BackendError(f"{shown}: {error_line(error)}") from None
    if declarations.roles[0].name is not None:
        check_signature(build, shown, f"{BACKEND_ARGUMENTS}, role")
    elif _takes(build, BACKEND_ARGUMENTS + _SWITCHES):  # or nobody knows

        def with_switches(config: BackendConfig, req_to_token: torch.Tensor, switches: tuple[str, ...]) -> Any:
            return checked(noted(build)(config, req_to_token, switches), name)

        return with_switches
    else:
        check_signature(build, shown, BACKEND_ARGUMENTS)
    return LoadedBackend(build, name, declarations)


def layer_of(given: object, scenario: Scenario) -> LayerFactory:
    """What builds the layer that is given, None for that of ``optimized/``, whose stages stand for those it lacks.

    Raises TypeError or BackendError, in one line, for what builds no layer, and for one that ``scenario`` would not
    judge; so does the result.
    """
    if given is None:
        return optimized_layer
    build = _callable("layer_factory", given, LAYER_ARGUMENTS, *stages())
    name, shown = _name(build), f"layer '{_name(build)}'"
    if scenario.setup.layer is None:
        mend = "give a case with one, or leave layer_factory out"
        raise BackendError(f"{shown}: the case has no layer, so it would not be judged; {mend}")
    if build is optimized_layer:
        return optimized_layer
    check_signature(build, shown, LAYER_ARGUMENTS)

    def whole(config: BackendConfig, attention: AttentionConfig) -> SparseAttention:
        return completed_if_partial(noted(build)(config, attention), config, attention, name)

    return whole


def _callable(argument: str, given: object, arguments: str, *methods: str) -> Callable[..., Any]:
    """What is ``given`` for ``argument`` if it can build something. methods: of what it is to build."""
    mend = f"give a callable of ({arguments}), such as a class"
    if isinstance(given, str):
        raise TypeError(f"{argument} is the name '{one_line(given)}'; {mend}: names are for judged and oracle.judge")
    built = not isinstance(given, type) and any(hasattr(given, name) for name in methods)
    if built or not callable(given):
        raise TypeError(f"{argument} is {_described(given)}; {mend}")
    return given


def _takes(build: Callable[..., Any], arguments: str) -> bool:
    """Whether ``build`` can be called with ``arguments``; one without a known signature can."""
    try:
        check_signature(build, "", arguments)
    except BackendError:
        return False
    return True


def _name(build: Callable[..., Any]) -> str:
    return one_line(getattr(build, "__qualname__", type(build).__name__))


def _described(given: object) -> str:
    if given is None:
        return "None"
    if isinstance(given, type):
        return f"the class {given.__name__}"
    return f"the module {given.__name__}" if inspect.ismodule(given) else f"an object of class {type(given).__name__}"
