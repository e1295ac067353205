"""The one place that runs Hypothesis: how cases are drawn."""

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


@dataclass(frozen=True)
class Profile:
    """How much one run explores. ``fresh``: draw new cases in every run instead of the same ones.

    cases: of metadata alone. layer_cases: of metadata and the attention layer behind it.
    """

    cases: int
    layer_cases: int
    fresh: bool


PROFILES = {
    "dev": Profile(48, 24, False),
    "pr": Profile(200, 48, False),
    "nightly": Profile(10_000, 5_000, True),
}
SHARDS = 8  # one test item each, so that pytest-xdist can spread them and progress shows


class OutOfTime(BaseException):
    """Raised by a visitor to end ``draw``. Not an Exception: Hypothesis would take it for a failure of the case."""


class NotReproducible(Exception):
    """A case raised once and not when it was repeated: a race, or state that survives between backends."""


def draw(
    cases: SearchStrategy[Scenario],
    count: int,
    seed: int,
    visit: Callable[[Scenario], None],
    shrink: bool = False,
) -> None:
    """Give ``visit`` up to ``count`` cases drawn from ``seed``, until it raises; what it raises passes on.

    shrink: look for a smaller case that raises the same, by Hypothesis's own means, and end with that one.
    Raises NotReproducible if that case does not raise again, and BackendError if there is no case to draw.
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
        raise BackendError("no case that is drawn here has all of the sizes that are declared at once") from None


def drawn(cases: SearchStrategy[Scenario], count: int, seed: int) -> list[Scenario]:
    """The first ``count`` cases that ``draw`` gives for ``seed``."""
    found: list[Scenario] = []

    def keep(scenario: Scenario) -> None:
        found.append(scenario)

    if count:
        draw(cases, count, seed, keep)
    return found[:count]


@contextmanager
def _new_examples_only() -> Iterator[None]:
    """Keep Hypothesis from two habits that no setting of it turns off; a Hypothesis that lacks one is left as it is.

    It follows each example by up to five copies of it with one part repeated elsewhere. Scenarios are full of parts of
    one kind (joins, replays), so five in six cases would be such copies, each as costly to judge as a new case. And it
    takes one number in twenty from the constants of whatever modules of the project are loaded, so that one seed would
    give other cases alone than among other tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConjectureRunner, "generate_mutations_from", lambda runner, data: None, raising=False)
        patch.setattr(HypothesisProvider, "_maybe_draw_constant", lambda *_, **__: None, raising=False)
        yield
