"""Surveys a layer in a fork, so that a case that ends its process costs that case only."""

from __future__ import annotations

from collections.abc import Callable

from nsa_oracle.harness.commands.app import Device, torch_device
from nsa_oracle.harness.commands.terminal import ended_by_a_signal
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.forks import Tell, forked
from nsa_oracle.harness.processes import ChildDied
from nsa_oracle.harness.search.spec import SubjectSpec
from nsa_oracle.harness.search.survey import Survey, SurveyFound


def surveyed(
    layer: str, device: Device, cases: int, seed: int, deadline: float | None, report_progress: Callable[[int], None]
) -> tuple[SurveyFound, list[str], bool]:
    """What a survey of ``layer`` finds, what the layer's limits exclude, and whether the survey was interrupted.

    Raises BackendError or ValueError if the layer cannot be surveyed. The other arguments are those of ``Survey.run``.
    """
    found, left_out, has_begun = SurveyFound(), list[str](), False

    def hear(message: tuple[SurveyFound, list[str]]) -> None:
        nonlocal found, left_out, has_begun
        (found, left_out), has_begun = message, True
        report_progress(found.cases)

    def work(tell: Tell) -> tuple[SurveyFound, bool]:
        where = torch_device(device)
        survey = Survey(SubjectSpec(None, layer).build(where), where, found)
        tell((found, survey.left_out))
        try:
            with ended_by_a_signal():
                survey.run(cases, seed, deadline, lambda _: tell((survey.found, survey.left_out)))
        except KeyboardInterrupt:
            return survey.found, True
        return survey.found, False

    while found.cases < cases:
        has_begun = False
        try:
            found, interrupted = forked(work, hear)
        except ChildDied as died:
            if not has_begun:
                raise BackendError(f"layer '{layer}': {died} while it was loaded") from None
            found.add_lost(str(died))
        else:
            return found, left_out, interrupted
    return found, left_out, False
