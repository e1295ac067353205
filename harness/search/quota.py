"""What a profile guarantees: the classes that the goals of its cases visit. A run that leaves one out has a gap."""

from __future__ import annotations

from collections.abc import Collection

import torch

from nsa_oracle.harness.scenarios.coverage import classes_of
from nsa_oracle.harness.scenarios.goals import PERIODS
from nsa_oracle.harness.search.drawing import SHARDS, Profile
from nsa_oracle.harness.search.stream import CaseStream
from nsa_oracle.harness.subjects.subject import Subject


def unvisited(
    visited: Collection[str],
    subject: Subject,
    device: torch.device,
    profile: Profile,
    with_layer: bool,
    seed: int,
    shards: Collection[int] = range(SHARDS),
) -> list[str]:
    """The classes that the cases of a run were to visit and that are not among those ``visited``, in report order.

    seed: from which the cases were drawn. shards: those that the run had. A class is only asked for if the case that
    was drawn for it visits it, so a run that has judged all of its cases has visited all.
    """
    stream = CaseStream(subject.scale(device, with_layer), subject.switches, seed)
    missing: list[str] = []
    for number in range(min(PERIODS[with_layer], profile.layer_cases if with_layer else profile.cases)):
        if number % SHARDS not in shards:
            continue
        wanted = [name for name in stream.goal(number).names if name not in visited and name not in missing]
        if wanted:  # drawn only if need be
            (drawn,) = stream.cases([number])
            reached = classes_of(drawn.scenario)
            missing += [name for name in wanted if name in reached]
    return missing
