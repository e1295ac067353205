"""The cases that mutants are judged on, and the order in which a mutant meets them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nsa_oracle.harness.mutants.mutants import PACKAGE, Mutant
from nsa_oracle.harness.scenarios.files import BUG_CASES, corpus, from_json, to_json
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.search.drawing import drawn
from nsa_oracle.harness.subjects.default import OPTIMIZED_SWITCHES
from nsa_oracle.harness.subjects.subject import SCALES

CPU = torch.device("cpu")

Line = tuple[str, int]
"""A file, relative to ``optimized/``, and a line of it."""
ANY_LINE = 0  # stands for a file of compiled kernels of which one was launched


@dataclass(frozen=True)
class Case:
    """One case that mutants are judged on. seconds: of processor time that the clean tree takes; 0 if not known."""

    name: str
    text: str
    has_layer: bool
    seconds: float = 0.0
    reach: frozenset[Line] = frozenset()


def gathered_cases(fresh: int, seed: int, device: torch.device = CPU) -> list[Case]:
    """The saved cases for ``device``, ``fresh`` new ones of metadata alone, and half as many with a layer.

    Those of the zoo are judged as ordinary cases: what makes one bug visible often shows another.
    """
    files = [*sorted(BUG_CASES.glob("*.json")), *corpus(device)]
    cases = [_case(f"{path.parent.name}/{path.stem}", from_json(path.read_text(), str(path))) for path in files]
    for kind, with_layer, count in (("metadata", False, fresh), ("layer", True, fresh // 2)):
        found = drawn_scenarios(with_layer, count, seed, device)
        cases += [_case(f"fresh/{kind}-{number}", scenario) for number, scenario in enumerate(found)]
    return cases


def _case(name: str, scenario: Scenario) -> Case:
    return Case(name, to_json(scenario), scenario.setup.layer is not None)


def drawn_scenarios(with_layer: bool, count: int, seed: int, device: torch.device = CPU) -> list[Scenario]:
    """``count`` scenarios as a run of the oracle on ``device`` draws them."""
    return drawn(scenarios(SCALES[device.type, with_layer], OPTIMIZED_SWITCHES), count, seed)


# The order of cases.


@dataclass
class Deadliness:
    """Learns which cases kill the mutants of which file: the next mutant of that file meets those first."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    trials: Counter[tuple[str, str]] = field(default_factory=Counter)

    def learn(self, file: str, judged: Sequence[str], killer: str | None) -> None:
        for case in judged:
            self.trials[file, case] += 1
        if killer is not None:
            self.kills[file, killer] += 1

    def order(self, file: str, cases: Iterable[Case]) -> list[Case]:
        """Most kills a second first. A case that was not tried yet is thought to kill one in five.

        So long as nothing is known, a layer is thought to take long.
        """

        def kills_a_second(case: Case) -> float:
            key = (file, case.name)
            seconds = case.seconds or (1.0 if case.has_layer else 0.1)
            return (self.kills[key] + 0.2) / (self.trials[key] + 1) / (seconds + 0.02)

        return sorted(cases, key=kills_a_second, reverse=True)


def affordable(seconds: float, cases: Sequence[Case]) -> list[Case]:
    """As many of ``cases`` as the clean tree runs in so much processor time; at least one."""
    ends = itertools.accumulate(case.seconds for case in cases)
    return [case for number, (case, end) in enumerate(zip(cases, ends, strict=True)) if not number or end <= seconds]


def cases_for(
    mutant: Mutant, cases: Sequence[Case], importers: Mapping[str, frozenset[str]], compiled: bool = False
) -> list[Case]:
    """The cases that run the changed code. Where metadata alone does, a layer behind it adds little: those without.

    importers: for each file, the files that hold something of it; what runs at import can show wherever one of them is
    used. A line that is in no compiled code, as what is computed while compiling, can show wherever one of them ran.
    """
    edit = mutant.edit
    lines = {(mutant.file, line) for line in range(edit.statement, (edit.node.end_lineno or edit.statement) + 1)}
    is_compiled = compiled and mutant.is_of_kernels
    is_in_compiled_code = is_compiled and any(not lines.isdisjoint(case.reach) for case in cases)

    def is_reached_by(case: Case) -> bool:
        if is_in_compiled_code:
            return not lines.isdisjoint(case.reach)
        if is_compiled:
            return any((file, ANY_LINE) in case.reach for file in importers[mutant.file])
        if edit.at_import:
            return any(file in importers[mutant.file] for file, _ in case.reach)
        return (mutant.file, edit.statement) in case.reach

    reaching = [case for case in cases if is_reached_by(case)]
    return [case for case in reaching if not case.has_layer] or reaching


def importers_of(files: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """For each file of a tree (path -> source), itself and all that import it, directly or not."""
    modules = {file: _module_words(file) for file in files}
    direct = {
        file: {other for other, source in files.items() if any(words in source for words in modules[file])}
        for file in files
    }
    found = {}
    for file in files:
        closure, new = {file}, {file}
        while new:
            new = {importer for known in new for importer in direct[known]} - closure
            closure |= new
        found[file] = frozenset(closure)
    return found


def _module_words(file: str) -> list[str]:
    """How a module that imports ``file`` spells that."""
    module = ".".join((PACKAGE, *Path(file).with_suffix("").parts))
    package, _, name = module.rpartition(".")
    return [f"from {module} import", f"import {module}", f"from {package} import {name}"]
