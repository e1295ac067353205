"""Draws cases with Hypothesis. This is the only module that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky, Unsatisfiable
from hypothesis.internal.conjecture.engine import ConjectureRunner
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.strategies import SearchStrategy

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.scenarios.scenario import Scenario

Cases = SearchStrategy[Scenario]


@dataclass(frozen=True)
class Profile:
    """How much one run explores.

    cases: number of cases of metadata alone. layer_cases: number of cases of metadata and the attention layer behind
    it. fresh: draw new cases in every run instead of the same ones. saved: judge saved cases too, unless a test says
    otherwise.
    """

    cases: int
    layer_cases: int
    fresh: bool
    saved: bool = True

    def share(self, shard: int, with_layer: bool) -> range:
        """The numbers of the stream's cases that belong to ``shard``."""
        return range(shard, self.layer_cases if with_layer else self.cases, SHARDS)


PROFILES = {  # smoke takes about 20 seconds on two cores
    "smoke": Profile(16, 6, False, saved=False),
    "dev": Profile(48, 17, False),
    "pr": Profile(200, 40, False),
    "nightly": Profile(10_000, 5_000, True),
}
SHARDS = 8  # one test item each, so that pytest-xdist can distribute them and progress is visible


class OutOfTime(BaseException):
    """Raised by a visitor to end ``draw``. Not an Exception, which Hypothesis would treat as a failure of the case."""


class NotReproducible(Exception):
    """A case raised once and did not when it was repeated: a race, or state that survives between backends."""


def draw(
    cases: Cases,
    count: int,
    seed: int | str,
    visit: Callable[[Scenario], None],
    shrink: bool = False,
) -> None:
    """Call ``visit`` on up to ``count`` cases drawn from ``seed``, until it raises. Its exceptions propagate.

    OutOfTime ends the drawing and does not propagate. shrink: let Hypothesis look for a smaller case that raises the
    same exception, and raise that one's. Raises NotReproducible if that case does not raise again, and BackendError if
    no case can be drawn.
    """
    search = settings(
        max_examples=count,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )(given(cases)(visit))
    try:
        with _new_examples_only():
            hypothesis.seed(seed)(search)()
    except OutOfTime:
        pass
    except Flaky:
        raise NotReproducible from None
    except Unsatisfiable:
        raise BackendError("no case drawn on this device has all of the declared sizes at once") from None


def drawn(cases: Cases, count: int, seed: int) -> list[Scenario]:
    """The first ``count`` cases that ``draw`` visits for ``seed``."""
    found: list[Scenario] = []

    def keep(scenario: Scenario) -> None:
        found.append(scenario)

    if count:
        draw(cases, count, seed, keep)
    return found[:count]


@contextmanager
def _new_examples_only() -> Iterator[None]:
    """Turn off two features of Hypothesis that have no setting. A version without one of them is left as it is.

    Hypothesis follows each example by up to five copies with one part repeated elsewhere. Scenarios have many parts of
    one kind (joins, replays), so five in six cases would be such copies, each as expensive to judge as a new case. It
    also takes one number in twenty from the constants in the project's loaded modules, so the same seed would give
    other cases when run alone than among other tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConjectureRunner, "generate_mutations_from", lambda runner, data: None, raising=False)
        patch.setattr(HypothesisProvider, "_maybe_draw_constant", lambda *_, **__: None, raising=False)
        yield
