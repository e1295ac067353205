"""The subject of a run: a backend, a layer, and the limits that both declare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from nsa_oracle.harness.errors import BackendError, CaseTimeout, ScenarioError, error_line, one_line
from nsa_oracle.harness.findings import Finding
from nsa_oracle.harness.memory import far_apart
from nsa_oracle.harness.processes import time_limit
from nsa_oracle.harness.protocol import BackendFactory, LayerFactory
from nsa_oracle.harness.scenarios.files import MAX_PATH
from nsa_oracle.harness.scenarios.limits import EVERYTHING, Limits
from nsa_oracle.harness.scenarios.scales import LARGE, LARGE_LAYER, SMALL, SMALL_LAYER, Scale, restricted
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.switches import NO_SWITCHES, Switches
from nsa_oracle.harness.subjects.default import (
    OPTIMIZED_SWITCHES,
    limits_of_optimized_layer,
    optimized_backend,
    optimized_layer,
)
from nsa_oracle.harness.subjects.global_state import kept_global_state
from nsa_oracle.harness.subjects.loading import limits_of_backend, load_backend, load_layer, try_out, try_out_layer

SCALES = {("cpu", False): SMALL, ("cpu", True): SMALL_LAYER, ("cuda", False): LARGE, ("cuda", True): LARGE_LAYER}


@dataclass(frozen=True)
class Subject:
    """The backend and the layer to judge, with their declared limits.

    limits: of the backend. layer_limits: of the layer, for cases that have one. switches: of the backend, drawn with
    each case. case_timeout: seconds after which a case that is still running in judged code has failed; None: never.
    """

    backend: BackendFactory
    layer: LayerFactory = optimized_layer
    limits: Limits = EVERYTHING
    layer_limits: Limits = EVERYTHING
    switches: Switches = NO_SWITCHES
    case_timeout: float | None = None

    @staticmethod
    def load(
        backend: str | None,
        layer: str | None,
        device: torch.device,
        case_timeout: float | None = None,
        loading_timeout: float | None = None,
    ) -> Subject:
        """The subject named by two ``module:attribute``; None stands for ``optimized/``.

        loading_timeout: of the imports, in seconds, if ``case_timeout`` is None.
        Raises BackendError if it cannot be judged at all.
        """
        with kept_global_state(partial(_left_changed, backend, layer), ()):
            return Subject._load(backend, layer, device, case_timeout, case_timeout or loading_timeout)

    @staticmethod
    def _load(
        backend: str | None, layer: str | None, device: torch.device, case_timeout: float | None, limit: float | None
    ) -> Subject:
        subject = optimized_subject()
        if backend is not None:
            with _loading(f"backend '{one_line(backend)}'"), time_limit(limit):
                subject = Subject(load_backend(backend), limits=limits_of_backend(backend))
        subject = replace(subject, case_timeout=case_timeout)
        with suppress(CaseTimeout), time_limit(case_timeout):
            try_out(subject.backend, device, subject.limits)
        if layer is not None:
            with _loading(f"layer '{one_line(layer)}'"), time_limit(limit):
                layer_factory, layer_limits = load_layer(layer)
            with suppress(CaseTimeout), time_limit(case_timeout):
                layer_limits = try_out_layer(layer_factory, layer_limits, layer)
            return replace(subject, layer=layer_factory, layer_limits=layer_limits)
        return replace(subject, layer_limits=limits_of_optimized_layer())

    def misfit(self, scenario: Scenario) -> str | None:
        """The first thing in ``scenario`` outside the limits of the backend, or of the layer if it has one; or None."""
        return self.all_limits(with_layer=scenario.setup.layer is not None).misfit(scenario)

    def check(self, scenario: Scenario, file: Path) -> None:
        """Raises BackendError if ``scenario`` from ``file`` is outside the limits.

        Raises ScenarioError for wrong switches, or if the case makes no call, so that nothing would be judged.
        """
        self.check_switches(scenario, file)
        if not scenario.calls:
            raise ScenarioError(
                f"{one_line(str(file), MAX_PATH)}: it has no replay and no eager call, so nothing would be judged"
            )
        misfit = self.misfit(scenario)
        if misfit is not None:
            raise BackendError(
                f"{one_line(str(file), MAX_PATH)}: {misfit} is not among the sizes and modes that are declared"
            )

    def check_switches(self, scenario: Scenario, file: Path) -> None:
        """Raises ScenarioError if ``scenario`` from ``file`` names unknown or incompatible switches of the backend."""
        try:
            self.switches.check(scenario.optimizations, scenario.setup.backend_config())
        except ValueError as error:
            raise ScenarioError(f"{one_line(str(file), MAX_PATH)}: {error_line(error, 250)}") from None

    def all_limits(self, with_layer: bool) -> Limits:
        return self.limits & self.layer_limits if with_layer else self.limits

    def scale(self, device: torch.device, with_layer: bool) -> Scale:
        """The ranges to draw from for this subject. Raises BackendError if nothing is left to draw."""
        try:
            return restricted(scale_of(device, with_layer), self.all_limits(with_layer))
        except ValueError as error:
            raise BackendError(str(error)) from None

    def not_judged(self, device: torch.device) -> list[str]:
        """The values and modes that could be drawn on ``device`` but are excluded, one string per field."""
        alone = self.limits.excluded(scale_of(device, with_layer=False).drawn())
        behind = self.all_limits(with_layer=True).excluded(scale_of(device, with_layer=True).drawn())
        left_out = [*alone, *(f"{excluded} (with a layer)" for excluded in behind if excluded not in alone)]
        if _is_small(device):
            left_out.append(
                f"far_slots True, far_req_to_token True (the GPU has less than {far_apart.MOST_FAR_BYTES >> 30} GiB)"
            )
        return left_out


@contextmanager
def _loading(shown: str) -> Iterator[None]:
    """Raises BackendError in place of the CaseTimeout of a time limit inside."""
    try:
        yield
    except CaseTimeout as error:
        raise BackendError(f"{shown}: loading it did not end: {error}") from None


def _left_changed(backend: str | None, layer: str | None, finding: Finding, _: BaseException | None) -> BackendError:
    named = " and ".join(f"{what} '{spec}'" for what, spec in (("backend", backend), ("layer", layer)) if spec)
    return BackendError(f"{named}: importing or building it: {finding.sentence()}; put it back, or use a context")


def optimized_subject(layer: LayerFactory = optimized_layer) -> Subject:
    """``optimized/`` with its switches."""
    return Subject(optimized_backend, layer, switches=OPTIMIZED_SWITCHES)


def scale_of(device: torch.device, with_layer: bool) -> Scale:
    """The ranges to draw from on ``device``. On a GPU with little memory nothing is far apart."""
    scale = SCALES[device.type, with_layer]
    return replace(scale, far_slots=(False,), far_req_to_token=(False,)) if _is_small(device) else scale


def _is_small(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < far_apart.MOST_FAR_BYTES
