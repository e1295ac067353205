"""The cases that mutants are judged on: which cases a mutant needs, and in which order."""

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
from nsa_oracle.harness.search.stream import CaseStream
from nsa_oracle.harness.subjects.default import OPTIMIZED_SWITCHES
from nsa_oracle.harness.subjects.subject import SCALES

CPU = torch.device("cpu")

Line = tuple[str, int]
"""(path of a file relative to ``optimized/``, line number)."""
ANY_LINE = 0  # line number of the entry for a file of kernels from which a compiled kernel was launched


@dataclass(frozen=True)
class Case:
    """One case that mutants are judged on.

    text: JSON of the scenario. seconds: processor time that the clean tree takes; 0 if not known. reach: lines of
    ``optimized/`` that the case runs.
    """

    name: str
    text: str
    has_layer: bool
    seconds: float = 0.0
    reach: frozenset[Line] = frozenset()


def gathered_cases(fresh: int, seed: int, device: torch.device = CPU) -> list[Case]:
    """The saved cases for ``device``, ``fresh`` new cases of metadata alone, and half as many with a layer.

    The saved cases of the zoo serve as ordinary cases: a case that shows one bug often shows another.
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
    """``count`` scenarios, drawn as in a run of the oracle on ``device``."""
    stream = CaseStream(SCALES[device.type, with_layer], OPTIMIZED_SWITCHES, seed)
    return [drawn.scenario for drawn in stream.cases(range(count))]


# The order of cases.


@dataclass
class Deadliness:
    """Learns which cases kill the mutants of each file, so that these cases come first for its next mutants."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    trials: Counter[tuple[str, str]] = field(default_factory=Counter)

    def learn(self, file: str, judged: Sequence[str], killer: str | None) -> None:
        """Counts one mutant of ``file``. judged: names of its cases. killer: the case that killed it, if one did."""
        for case in judged:
            self.trials[file, case] += 1
        if killer is not None:
            self.kills[file, killer] += 1

    def order(self, file: str, cases: Iterable[Case]) -> list[Case]:
        """``cases`` by descending kills per second.

        A case that was not tried yet is assumed to kill one mutant in five. A case of unknown duration is assumed to
        take 1 s with a layer and 0.1 s without one.
        """

        def kills_per_second(case: Case) -> float:
            key = (file, case.name)
            seconds = case.seconds or (1.0 if case.has_layer else 0.1)
            return (self.kills[key] + 0.2) / (self.trials[key] + 1) / (seconds + 0.02)

        return sorted(cases, key=kills_per_second, reverse=True)


def affordable(seconds: float, cases: Sequence[Case]) -> list[Case]:
    """The first of ``cases`` that the clean tree runs in ``seconds`` of processor time in total; at least one."""
    ends = itertools.accumulate(case.seconds for case in cases)
    return [case for number, (case, end) in enumerate(zip(cases, ends, strict=True)) if not number or end <= seconds]


def cases_for(
    mutant: Mutant, cases: Sequence[Case], importers: Mapping[str, frozenset[str]], compiled: bool = False
) -> list[Case]:
    """The cases that run the changed code; of these only the cases without a layer, if there are any.

    A layer behind the metadata adds little if metadata alone runs the code.

    importers: for each file, itself and the files that import it (``importers_of``). A change of code that runs at
    import can show in any case that runs one of them.
    compiled: kernels run as compiled code. A changed line of a kernel file that is in no compiled code, such as one
    that is evaluated at compile time, can show in any case that launches a kernel of one of these files.
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
    """For each file of a tree (path -> source): itself and all files that import it, directly or indirectly."""
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
    """The texts of which one occurs in every module that imports ``file``."""
    module = ".".join((PACKAGE, *Path(file).with_suffix("").parts))
    package, _, name = module.rpartition(".")
    return [f"from {module} import", f"import {module}", f"from {package} import {name}"]
