"""Mutants of the tree: what they change, their names, samples of them, and probes for the lines that run."""

from __future__ import annotations

from nsa_oracle.harness.mutants.mutants import all_mutants, mutants_of, probed, sampled
from tests.support.mutants import STORE


def test_mutants_of_the_tree_are_python() -> None:
    for mutant in sampled(all_mutants(), 300, 0):
        changed = mutant.source
        compile(changed, mutant.file, "exec")
        assert changed != mutant.original
        assert changed.count("\n") == mutant.original.count("\n")
        assert mutant.before


def test_names_are_stable_and_one_of_a_kind() -> None:
    source = "def f(a, b):\n    return a < b, a < 3\n"
    names = [mutant.id for mutant in mutants_of("m.py", source)]
    assert "m.py:2:boundary-shifted:1" in names
    assert "m.py:2:boundary-shifted:2" in names
    assert len(set(names)) == len(names)
    assert names == [mutant.id for mutant in mutants_of("m.py", source)]
    assert (
        names
        == [mutant.id for mutant in mutants_of("m.py", source + "\n\ndef g(a):\n    return a + 1\n")][: len(names)]
    )
    everything = [mutant.id for mutant in all_mutants()]
    assert len(set(everything)) == len(everything)


def test_a_sample_is_the_same_for_a_seed() -> None:
    mutants = all_mutants(STORE)
    assert sampled(mutants, 5, 1) == sampled(mutants, 5, 1)
    assert sampled(mutants, 5, 1) != sampled(mutants, 5, 2)
    assert sampled(mutants, len(mutants) + 1, 0) == mutants


def test_probes_report_the_lines_that_run() -> None:
    source = "def f(a):\n    '''Doc.'''\n    if a:\n        b = 1\n    else:\n        b = 2\n    return b\n"
    seen: list[tuple[str, int]] = []
    space = {"_reached": lambda *line: seen.append(line)}
    exec(compile(probed("m.py", source), "m.py", "exec"), space)
    assert space["f"](0) == 2  # type: ignore[operator]
    assert [line for _, line in seen] == [2, 3, 6, 7]
