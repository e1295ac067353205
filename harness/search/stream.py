"""The stream of cases that a run judges: case number i of a seed is the same in every profile, shard and hunt.

Each case has a goal (``scenarios/goals.py``), in rotation, so that the first cases of a seed visit all classes that the
subject can reach. Cases do not depend on each other: shards divide them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.scenarios.coverage import classes_of
from nsa_oracle.harness.scenarios.goal import ANYTHING, Goal
from nsa_oracle.harness.scenarios.goals import PERIODS, goals
from nsa_oracle.harness.scenarios.scales import Scale
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.strategies import but_the_simplest, narrowed_to, scenarios
from nsa_oracle.harness.scenarios.switches import Switches
from nsa_oracle.harness.search.drawing import Cases, OutOfTime, draw

ATTEMPTS = 9  # cases drawn for one goal before the best of them is taken; below 10 Hypothesis draws no small ones first


@dataclass(frozen=True)
class Drawn:
    """One case of a stream. cases, seed: draw it again, as one of the first ``ATTEMPTS``, to shrink it."""

    number: int
    scenario: Scenario
    goal: Goal
    cases: Cases
    seed: str


class CaseStream:
    """The cases that one seed gives for a subject: its ``scale``, with or without a layer, and its ``switches``."""

    def __init__(self, scale: Scale, switches: Switches, seed: int) -> None:
        self.scale = scale
        self.switches = switches
        self.seed = seed
        self._goals: dict[int, list[Goal]] = {}  # by round

    def cases(self, numbers: Iterable[int]) -> Iterator[Drawn]:
        """The cases with these numbers, each drawn when it is asked for.

        Raises BackendError if the limits of the scale leave nothing to draw.
        """
        return map(self._case, numbers)

    def _case(self, number: int) -> Drawn:
        goal = self.goal(number)
        seed = f"{self.seed}/{'layer' if self.scale.layers else 'metadata'}/{number}"
        # If the limits allow each of the goal's wants but not all of them at once, fewer are kept.
        for wanted in (goal, Goal(goal.names[:1], goal.pins), ANYTHING):
            try:
                narrowed_to(self.scale, wanted)
            except ValueError:
                continue
            cases = but_the_simplest(scenarios(self.scale, self.switches, wanted))
            found = _best(cases, seed, wanted.names)
            if found is not None:
                return Drawn(number, found, wanted, cases, seed)
        raise BackendError("no case drawn on this device has all of the declared sizes at once")

    def goal(self, number: int) -> Goal:
        """What case ``number`` is built to visit."""
        round_, place = divmod(number, PERIODS[bool(self.scale.layers)])
        if round_ not in self._goals:
            self._goals[round_] = goals(self.scale, self.switches, round_)
        return self._goals[round_][place]


def _best(cases: Cases, seed: str, names: Iterable[str]) -> Scenario | None:
    """The first case that visits all of the classes ``names``, or the one of ``ATTEMPTS`` that visits most of them."""
    wanted = set(names)
    best: tuple[int, Scenario] | None = None

    def visit(scenario: Scenario) -> None:
        nonlocal best
        missing = len(wanted - classes_of(scenario))
        if best is None or missing < best[0]:
            best = missing, scenario
        if not missing:
            raise OutOfTime

    try:
        draw(cases, ATTEMPTS, seed, visit)
    except BackendError:
        return None
    return None if best is None else best[1]
