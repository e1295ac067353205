"""What is judged: a backend, a layer, and what both say they are made for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nsa_oracle.harness.errors import BackendError, ScenarioError, error_line
from nsa_oracle.harness.memory import far_apart
from nsa_oracle.harness.protocol import BackendFactory, LayerFactory
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
from nsa_oracle.harness.subjects.loading import limits_of_backend, load_backend, load_layer, try_out, try_out_layer

SCALES = {("cpu", False): SMALL, ("cpu", True): SMALL_LAYER, ("cuda", False): LARGE, ("cuda", True): LARGE_LAYER}


@dataclass(frozen=True)
class Subject:
    """What is judged, and what it says it is made for.

    layer_limits: of the layer, where there is one. switches: of the backend, to be drawn with each case.
    """

    backend: BackendFactory
    layer: LayerFactory = optimized_layer
    limits: Limits = EVERYTHING
    layer_limits: Limits = EVERYTHING
    switches: Switches = NO_SWITCHES

    @staticmethod
    def load(backend: str | None, layer: str | None, device: torch.device) -> Subject:
        """What ``module:attribute`` names, or ``optimized/``. Raises BackendError if it cannot be judged at all."""
        subject = optimized_subject()
        if backend is not None:
            subject = Subject(load_backend(backend), limits=limits_of_backend(backend))
        try_out(subject.backend, device, subject.limits)
        if layer is not None:
            layer_factory, layer_limits = load_layer(layer)
            layer_limits = try_out_layer(layer_factory, layer_limits, layer)
            return replace(subject, layer=layer_factory, layer_limits=layer_limits)
        return replace(subject, layer_limits=limits_of_optimized_layer())

    def misfit(self, scenario: Scenario) -> str | None:
        """What of ``scenario`` the backend, or the layer if there is one, is not made for; or None."""
        return self.all_limits(with_layer=scenario.setup.layer is not None).misfit(scenario)

    def check(self, scenario: Scenario, file: Path) -> None:
        """Raises BackendError or ScenarioError if ``scenario``, of a file, is not what the subject is made for."""
        self.check_switches(scenario, file)
        misfit = self.misfit(scenario)
        if misfit is not None:
            raise BackendError(f"{file}: {misfit} is not among the sizes and modes that are declared")

    def check_switches(self, scenario: Scenario, file: Path) -> None:
        """Raises ScenarioError if ``scenario``, of a file, names switches that the backend does not have."""
        try:
            self.switches.check(scenario.optimizations, scenario.setup.backend_config())
        except ValueError as error:
            raise ScenarioError(f"{file}: {error_line(error, 250)}") from None

    def all_limits(self, with_layer: bool) -> Limits:
        return self.limits & self.layer_limits if with_layer else self.limits

    def scale(self, device: torch.device, with_layer: bool) -> Scale:
        """What is drawn for it. Raises ValueError if nothing is."""
        return restricted(scale_of(device, with_layer), self.all_limits(with_layer))

    def not_judged(self, device: torch.device) -> list[str]:
        """What is left out of all that could be drawn."""
        alone = self.limits.excluded(scale_of(device, with_layer=False).drawn())
        behind = self.all_limits(with_layer=True).excluded(scale_of(device, with_layer=True).drawn())
        told = [*alone, *(f"{told} (with a layer)" for told in behind if told not in alone)]
        if _is_small(device):
            told.append(
                f"far_slots True, far_req_to_token True (the GPU has less than {far_apart.MOST_FAR_BYTES >> 30} GiB)"
            )
        return told


def optimized_subject(layer: LayerFactory = optimized_layer) -> Subject:
    """``optimized/`` with its switches."""
    return Subject(optimized_backend, layer, switches=OPTIMIZED_SWITCHES)


def scale_of(device: torch.device, with_layer: bool) -> Scale:
    """What is drawn on a device; on a GPU with little memory nothing that lies far apart."""
    scale = SCALES[device.type, with_layer]
    return replace(scale, far_slots=(False,), far_req_to_token=(False,)) if _is_small(device) else scale


def _is_small(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < far_apart.MOST_FAR_BYTES
