"""What a run of an adapter on one case says about its declarations."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nsa_oracle.harness.checks.declared import DeclaredTally
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.forks import Tell, forked
from nsa_oracle.harness.report.declared import unneeded_declarations
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.search.backend_survey import BackendSurvey
from nsa_oracle.harness.subjects.subject import Subject


def surveyed(variable: str, folder: Path, backend: str, scenario: Scenario) -> tuple[list[str], DeclaredTally] | None:
    """Why a run of a backend fails: its broken rows, then other reasons. And how its declarations were met.

    None: it is not given the case. In a fork: the package in ``folder``, which the environment's ``variable`` names,
    is imported there.
    """

    def work(tell: Tell) -> tuple[list[str], DeclaredTally] | None:
        os.environ[variable] = str(folder)
        try:
            subject = Subject.load(backend, None, torch.device("cpu"))
            if subject.misfit(scenario) is not None:
                return None
            survey = BackendSurvey(subject, torch.device("cpu"))
            survey.survey(scenario)
        except BackendError as error:
            return [str(error)], DeclaredTally()
        found = survey.found
        return [*(key.name for key in found.broken), *unneeded_declarations(found.declared)], found.declared

    return forked(work)


def failures(variable: str, folder: Path, backend: str, scenario: Scenario) -> list[str]:
    """Why a run of a backend that is given the case fails."""
    found = surveyed(variable, folder, backend, scenario)
    assert found is not None
    return found[0]
