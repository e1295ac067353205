"""Judges mutants: which cases reach each mutant, which case kills it, and by which check.

Triton, torch and the harness are imported once, in a *nursery*. Each mutant is judged in a fork of it, which imports
``optimized/`` with the mutant in place. A mutant therefore needs no other imports, and may crash, hang or request any
amount of memory.
"""

from __future__ import annotations

import math
import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.mutants.cases import CPU, Case, Deadliness, affordable, cases_for, importers_of
from nsa_oracle.harness.mutants.mutants import Mutant, is_of_kernels, probed, tree_sources
from nsa_oracle.harness.mutants.nursery import Nurseries, Reply, Task
from nsa_oracle.harness.mutants.score import Fate, Score, ScoringError
from nsa_oracle.harness.processes import how_it_ended

REACH_PAYS_FROM = 20  # number of mutants from which measuring the reach of cases costs less than it saves


def measured(cases: Sequence[Case], nurseries: Nurseries, compiled: bool = False) -> list[Case]:
    """``cases`` with ``seconds`` and ``reach`` measured on the clean tree. Raises ScoringError if a case fails there.

    compiled: kernels run as compiled code. Their files then get no probes, which would change that code.
    """
    found: dict[str, Case] = {}
    sources = {
        file: probed(file, source) for file, source in tree_sources().items() if not (compiled and is_of_kernels(file))
    }
    tasks = ((case, Task((case,), sources)) for case in sorted(cases, key=lambda case: not case.has_layer))
    for case, _, reply in nurseries.carry_out(tasks):
        if reply.failed:
            reason = reply.sentence or f"the process ended ({how_it_ended(reply.exitcode)})"
            raise ScoringError(f"case {case.name} fails on the clean tree; mend that first: {reason}")
        found[case.name] = Case(case.name, case.text, case.has_layer, reply.seconds, reply.reach)
    return [found[case.name] for case in cases]


def score(
    mutants: Sequence[Mutant],
    cases: Sequence[Case],
    jobs: int,
    patience: float = math.inf,
    reach_pays_from: int = REACH_PAYS_FROM,
    device: torch.device = CPU,
) -> Iterator[Score]:
    """Yields the score of each mutant on ``device``, in the order of completion.

    A mutant is judged, until one case fails, on the cases that run its changed line, or on all ``cases`` if there are
    fewer than ``reach_pays_from`` mutants to judge. patience: a mutant survives after cases that take the clean tree so
    many seconds of processor time. Raises ScoringError if a case fails on the clean tree while its reach is measured.
    """
    compiled = device.type == "cuda"
    yield from (Score(mutant, Fate.NOT_RUN) for mutant in mutants if mutant.needs_gpu and not compiled)
    judged = [mutant for mutant in mutants if compiled or not mutant.needs_gpu]
    if not judged:
        return
    deadliness = Deadliness()
    with Nurseries(min(jobs, len(judged)), device) as nurseries:
        chosen: Mapping[str, Sequence[Case]] = defaultdict(lambda: cases)
        if len(judged) >= reach_pays_from:
            known = measured(cases, nurseries, compiled)
            importers = importers_of(tree_sources())
            chosen = {mutant.id: cases_for(mutant, known, importers, compiled) for mutant in judged}
        yield from (Score(mutant, Fate.UNREACHED) for mutant in judged if not chosen[mutant.id])

        tasks = (
            (mutant, _task(mutant, affordable(patience, deadliness.order(mutant.file, chosen[mutant.id]))))
            for mutant in judged
            if chosen[mutant.id]
        )
        for mutant, task, reply in nurseries.carry_out(tasks):
            names = [case.name for case in task.cases[: reply.judged]]
            scored = _score(mutant, names, reply)
            deadliness.learn(mutant.file, names, scored.case or None)
            yield scored


def _task(mutant: Mutant, cases: Sequence[Case]) -> Task:
    without_reach = (Case(case.name, case.text, case.has_layer, case.seconds) for case in cases)
    return Task(tuple(without_reach), {mutant.file: mutant.source})


def _score(mutant: Mutant, names: Sequence[str], reply: Reply) -> Score:
    if not reply.failed:
        return Score(mutant, Fate.SURVIVED, judged=len(names), seconds=reply.seconds)
    if reply.at_import and not reply.exitcode:
        return Score(mutant, Fate.IMPORT, sentence=reply.sentence)
    last = names[-1] if names else ""
    if reply.exitcode:
        fate = Fate.TIME_OUT if reply.exitcode == -signal.SIGPROF else Fate.FAULT
        return Score(mutant, fate, case=last, sentence=f"ended with {reply.exitcode}", judged=len(names))
    return Score(mutant, Fate.KILLED, Check(reply.check), last, reply.sentence, len(names), reply.seconds)
