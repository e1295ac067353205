"""Which cases a mutant is judged on, and in which order."""

from __future__ import annotations

import math

from nsa_oracle.harness.mutants.cases import (
    ANY_LINE,
    Case,
    Deadliness,
    affordable,
    cases_for,
    drawn_scenarios,
    importers_of,
)
from nsa_oracle.harness.mutants.mutants import mutants_of, tree_sources
from tests.support.mutants import a_mutant


def test_a_module_reaches_whoever_imports_it() -> None:
    sources = {
        "low.py": "",
        "middle.py": "from nsa_oracle.optimized.low import x",
        "high.py": "from nsa_oracle.optimized import middle",
        "other.py": "",
    }
    importers = importers_of(sources)
    assert importers["low.py"] == {"low.py", "middle.py", "high.py"}
    assert importers["other.py"] == {"other.py"}
    assert "kernels/topk.py" in importers_of(tree_sources())["kernels/fp8.py"]


def test_cases_that_reach_a_line_and_those_with_a_layer_only_if_they_must() -> None:
    here, elsewhere = frozenset({("m.py", 2)}), frozenset({("m.py", 3)})
    plain = Case("plain", "", False, reach=here)
    layer = Case("layer", "", True, reach=here)
    other = Case("other", "", False, reach=elsewhere)
    assert cases_for(a_mutant(), [plain, layer, other], {}) == [plain]
    assert cases_for(a_mutant(), [layer, other], {}) == [layer]
    assert cases_for(a_mutant(), [other], {}) == []


def test_compiled_kernels_are_judged_on_cases_that_launch_them() -> None:
    """A file that others use is reached where one of those is, if its line is in no compiled code."""
    source = "def kernel(n):\n    return n + 1\n"
    (mutant, *_) = mutants_of("kernels/shared.py", source)
    launches = Case("launches", "", True, reach=frozenset({("kernels/user.py", ANY_LINE)}))
    prepares = Case("prepares", "", False, reach=frozenset({("kernels/other.py", ANY_LINE), ("user.py", 3)}))
    importers = {"kernels/shared.py": frozenset({"kernels/shared.py", "kernels/user.py", "user.py"})}
    assert cases_for(mutant, [launches, prepares], importers, compiled=True) == [launches]
    (mutant, *_) = mutants_of("user.py", source)
    assert cases_for(mutant, [launches, prepares], {}, compiled=True) == []


def test_compiled_kernels_are_judged_on_cases_whose_code_has_the_line() -> None:
    (mutant, *_) = mutants_of("kernels/k.py", "def kernel(n):\n    return max(\n        n, 1)\n")
    launched, importers = ("kernels/k.py", ANY_LINE), {"kernels/k.py": frozenset({"kernels/k.py"})}
    inner = Case("inner", "", True, reach=frozenset({launched, ("kernels/k.py", 3)}))
    other = Case("other", "", True, reach=frozenset({launched, ("kernels/k.py", 4), ("kernels/l.py", 3)}))
    assert cases_for(mutant, [inner, other], importers, compiled=True) == [inner]
    assert cases_for(mutant, [other], importers, compiled=True) == [other]


def test_what_killed_the_last_mutants_goes_first() -> None:
    slow, quick, deadly = (Case(name, "", False, seconds) for name, seconds in (("s", 2), ("q", 0.1), ("d", 1)))
    deadliness = Deadliness()
    assert deadliness.order("m.py", [slow, deadly, quick]) == [quick, deadly, slow]
    for _ in range(20):
        deadliness.learn("m.py", ["q", "d"], "d")
    assert deadliness.order("m.py", [slow, deadly, quick])[0] == deadly
    assert deadliness.order("n.py", [slow, deadly, quick])[0] == quick


def test_patience_ends_between_two_cases_and_not_before_the_first() -> None:
    cases = [Case(name, "", False, seconds) for name, seconds in (("a", 1), ("b", 2), ("c", 3))]
    assert affordable(math.inf, cases) == cases
    assert affordable(5.5, cases) == cases[:2]
    assert affordable(0, cases) == cases[:1]


def test_fresh_cases_are_the_same_for_a_seed() -> None:
    drawn = drawn_scenarios(False, 3, 5)
    assert len(drawn) == 3
    assert drawn == drawn_scenarios(False, 3, 5)
    assert drawn != drawn_scenarios(False, 3, 6)
    assert all(scenario.setup.layer is not None for scenario in drawn_scenarios(True, 2, 5))
