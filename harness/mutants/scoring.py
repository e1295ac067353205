"""Judges mutants: which cases reach each, which of them kills it, by which check. One process a mutant.

Triton, torch and the harness are imported once, in a *nursery*, and each mutant is judged in a fork of it, which
imports ``optimized/`` with the mutant in it. So a mutant costs its judging, and may crash, hang or ask for any memory.
"""

from __future__ import annotations

import ast
import enum
import gc
import itertools
import math
import multiprocessing
import os
import re
import resource
import signal
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings

from nsa_oracle.harness.bugs.bug import Check
from nsa_oracle.harness.interpreter import speed
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.mutants.mutants import (
    PACKAGE,
    TREE,
    Mutant,
    import_replaced,
    is_of_kernels,
    probed,
    tree_sources,
)
from nsa_oracle.harness.protocol import optimized_backend
from nsa_oracle.harness.scenarios.files import BUG_CASES, corpus
from nsa_oracle.harness.scenarios.scenario import (
    Capture,
    Eager,
    Join,
    Layer,
    Replay,
    Scenario,
    Setup,
    from_json,
    to_json,
)
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.search.explore import SCALES, own_draws
from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import ForwardMode

REACH_PAYS_FROM = 20  # mutants: for fewer, finding out which cases reach them costs more than it saves
# Processor time that a mutant may take for a case: a multiple of what the clean tree takes, where that is known.
TIMES_SLOWER = 10
LEAST_SECONDS = 3.0
MOST_SECONDS = 120.0
MEMORY_BYTES = 6 << 30
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
CPU = torch.device("cpu")

Line = tuple[str, int]
"""A file, relative to ``optimized/``, and a line of it."""
ANY_LINE = 0  # stands for a file of compiled kernels of which one was launched


class ScoringError(ValueError):
    """Mutants that cannot be judged. One line that names the cause and the mend."""


class Fate(enum.Enum):
    """What became of a mutant."""

    KILLED = "killed"  # the oracle reported a failure
    IMPORT = "crash at import"  # it could not even be imported
    FAULT = "fault"  # the process died of it
    TIME_OUT = "time-out"
    SURVIVED = "survived"
    UNREACHED = "not reached"  # no case runs the changed line
    NOT_RUN = "needs a GPU"

    @property
    def is_alive(self) -> bool:
        """Whether cases might have killed it and did not."""
        return self in (Fate.SURVIVED, Fate.UNREACHED)


@dataclass(frozen=True)
class Case:
    """One case that mutants are judged on. seconds: of processor time that the clean tree takes; 0 if not known."""

    name: str
    text: str
    has_layer: bool
    seconds: float = 0.0
    reach: frozenset[Line] = frozenset()


@dataclass(frozen=True)
class Score:
    """How a mutant fared. case: what killed it, or was running when the process died. judged: cases that it took."""

    mutant: Mutant
    fate: Fate
    check: Check | None = None
    case: str = ""
    sentence: str = ""
    judged: int = 0
    seconds: float = 0.0


def gathered_cases(fresh: int, seed: int, device: torch.device = CPU) -> list[Case]:
    """The saved cases for ``device``, ``fresh`` new ones of metadata alone, and half as many with a layer.

    Those of the zoo are judged as ordinary cases: what makes one bug visible often shows another.
    """
    files = [*sorted(BUG_CASES.glob("*.json")), *corpus(device)]
    cases = [_case(f"{path.parent.name}/{path.stem}", from_json(path.read_text(), str(path))) for path in files]
    for kind, with_layer, count in (("metadata", False, fresh), ("layer", True, fresh // 2)):
        drawn = drawn_scenarios(with_layer, count, seed, device)
        cases += [_case(f"fresh/{kind}-{number}", scenario) for number, scenario in enumerate(drawn)]
    return cases


def _case(name: str, scenario: Scenario) -> Case:
    return Case(name, to_json(scenario), scenario.setup.layer is not None)


def drawn_scenarios(with_layer: bool, count: int, seed: int, device: torch.device = CPU) -> list[Scenario]:
    """``count`` scenarios as a run of the oracle on ``device`` draws them."""
    drawn: list[Scenario] = []

    def keep(scenario: Scenario) -> None:
        drawn.append(scenario)

    if not count:
        return drawn
    search = settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )(given(scenarios(SCALES[device.type, with_layer]))(keep))
    with own_draws():
        hypothesis.seed(seed)(search)()
    return drawn[:count]


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


def within(seconds: float, cases: Sequence[Case]) -> list[Case]:
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


# The processes.


@dataclass(frozen=True)
class _Order:
    """What a fork of the nursery does: judge ``cases`` with some files of ``optimized/`` replaced (path -> source)."""

    cases: tuple[Case, ...]
    sources: Mapping[str, str]


@dataclass(frozen=True)
class _Reply:
    """``judged`` cases were begun; the last of them is where it ended, unless nothing failed.

    reach: statements of ``optimized/`` that ran, where its source has probes, and lines of kernels that were compiled.
    exitcode: the fork's; negative: a signal.
    """

    judged: int
    failed: bool
    at_import: bool = False
    check: str = ""
    sentence: str = ""
    seconds: float = 0.0
    reach: frozenset[Line] = frozenset()
    exitcode: int | None = 0


def serve(orders: Connection, device_type: str) -> None:
    """The nursery: imports everything but ``optimized/``, then forks for each order until there is none left.

    It never touches a GPU, which a fork could not use any more.
    """
    speed.prepare_process(device_type)
    _warm_up()
    gc.freeze()  # forks collect what is their own, in no time, and share the rest
    with suppress(EOFError, BrokenPipeError):  # who gave the orders is gone
        while True:
            orders.send(_reply_of_a_fork(orders.recv(), torch.device(device_type)))
    gc.unfreeze()  # or some library finds its objects leaked


def _warm_up() -> None:
    """Let torch import the half of itself that it imports when used, by judging the reference."""
    decode, extend = Replay(mode=ForwardMode.DECODE), Eager(mode=ForwardMode.EXTEND)
    for layer in (None, Layer()):
        scenario = Scenario(
            setup=Setup(
                page_size=1, max_context_len=8, index_topk=4, num_steps=1, num_draft_tokens=1, pool_size=1, layer=layer
            ),
            events=(Capture(mode=ForwardMode.DECODE, buckets=(1,)), Join(seq_len=3), decode, extend),
        )
        graphs = layer is None  # the reference of a layer looks at lengths on the host
        judge(scenario, lambda config, pool, _: MultiStepBackend(config, pool), CPU, None, SparseAttention, graphs)


def _reply_of_a_fork(order: _Order, device: torch.device) -> _Reply:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_carry_out, args=(order, device, sender), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: numpy has idle ones
        child.start()
    sender.close()
    judged = 0
    while True:
        try:
            told = receiver.recv()
        except EOFError:
            child.join()
            return _Reply(judged, failed=True, at_import=not judged, exitcode=child.exitcode)
        if isinstance(told, _Reply):
            child.join()
            return told
        judged = told


def _carry_out(order: _Order, device: torch.device, sender: Connection) -> None:
    """In the fork. Tells the number of each case before it is judged, so that a sudden end can be told from others."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a mutant may upset libraries; none of what they say matters
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _end_after(MOST_SECONDS)
    reach: set[Line] = set()
    try:
        import_replaced(order.sources, lambda *line: reach.add(line))
    except Exception as error:
        sender.send(_Reply(0, failed=True, at_import=True, sentence=f"{type(error).__name__}: {error}"))
        return
    if device.type == "cuda":
        _note_kernels(reach)
    begun = time.process_time()
    for number, case in enumerate(order.cases, start=1):
        sender.send(number)
        _end_after(max(LEAST_SECONDS, TIMES_SLOWER * case.seconds) if case.seconds else MOST_SECONDS)
        scenario = from_json(case.text)
        gc.collect()  # engines are in cycles
        # What is far apart is addresses by the terabyte, of which hardly any become memory; as with all of a GPU's.
        spacious = scenario.setup.is_far or device.type == "cuda"
        resource.setrlimit(resource.RLIMIT_DATA, UNLIMITED if spacious else (MEMORY_BYTES, UNLIMITED[1]))
        try:
            judge(scenario, optimized_backend, device)
        except OracleFailure as failure:
            finding = failure.finding
            seconds = time.process_time() - begun
            sender.send(_Reply(number, True, False, Check.of(finding).value, finding.sentence(), seconds))
            return
    sender.send(_Reply(len(order.cases), False, seconds=time.process_time() - begun, reach=frozenset(reach)))


def _note_kernels(reach: set[Line]) -> None:
    """Have Triton add to ``reach`` what it runs from now on: files of kernels that it launches, lines of their code."""
    import triton  # late: importing Triton fixes how kernels run

    files = {
        node.name: file
        for file, source in tree_sources().items()
        if is_of_kernels(file)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }
    triton.knobs.runtime.launch_enter_hook.add(lambda launch: reach.add((files.get(launch.data["name"], ""), ANY_LINE)))
    triton.knobs.compilation.listener = lambda metadata_group, **_: reach.update(
        line for name, path in metadata_group.items() if name.endswith(".source") for line in compiled_lines(path)
    )


def compiled_lines(path: str | Path) -> set[Line]:
    """Lines of ``optimized/`` that went into a kernel, from the locations in the code that Triton made of it first.

    So a branch that was chosen while compiling counts, and the other does not.
    """
    named = re.compile(rf'loc\("{re.escape(str(TREE))}/([^"]+)":(\d+):')
    return {(file, int(line)) for file, line in named.findall(Path(path).read_text(encoding="utf-8"))}


def _end_after(seconds: float) -> None:
    """Let the process end by SIGPROF once it has used so much more processor time; a busy machine changes nothing."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


class Nurseries:
    """``jobs`` nurseries for ``device``, each busy with one order at a time. A context manager."""

    def __init__(self, jobs: int, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._idle: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, device.type))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.append(ours)
        self._all = list(self._idle)

    def __enter__(self) -> Nurseries:
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self._all:
            connection.close()
        for process in self._processes:
            if exception[0] is not None:
                process.terminate()
            process.join()

    def carry_out(self, orders: Iterable[tuple[Any, _Order]]) -> Iterator[tuple[Any, _Order, _Reply]]:
        """Each order with its key and reply, as they come. The next order is made when a nursery is free for it."""
        busy: dict[Connection, tuple[Any, _Order]] = {}
        waiting = iter(orders)
        idle = list(self._all)
        while True:
            while idle and (following := next(waiting, None)) is not None:
                connection = idle.pop()
                connection.send(following[1])
                busy[connection] = following
            if not busy:
                return
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                key, order = busy.pop(ready)
                idle.append(ready)
                yield key, order, ready.recv()


def measured(cases: Sequence[Case], nurseries: Nurseries, compiled: bool = False) -> list[Case]:
    """The cases with what they take and reach on the clean tree. Probes would change ``compiled`` code, which has none.

    Raises ScoringError if a case fails there.
    """
    found: dict[str, Case] = {}
    sources = {
        file: probed(file, source) for file, source in tree_sources().items() if not (compiled and is_of_kernels(file))
    }
    orders = ((case, _Order((case,), sources)) for case in sorted(cases, key=lambda case: not case.has_layer))
    for case, _, reply in nurseries.carry_out(orders):
        if reply.failed:
            told = reply.sentence or f"its process ended with {reply.exitcode}"
            raise ScoringError(f"case {case.name} fails on the clean tree; mend that first: {told}")
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
    """The score of each mutant on ``device``, as they come.

    A mutant is judged on the cases that run its changed line until one fails: on all cases where there are so few
    mutants that finding out does not pay. ``patience``: seconds of cases, as the clean tree runs them, after which it
    has survived. Raises ScoringError if a case fails on the clean tree.
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

        orders = (
            (mutant, _order(mutant, within(patience, deadliness.order(mutant.file, chosen[mutant.id]))))
            for mutant in judged
            if chosen[mutant.id]
        )
        for mutant, order, reply in nurseries.carry_out(orders):
            names = [case.name for case in order.cases[: reply.judged]]
            scored = _score(mutant, names, reply)
            deadliness.learn(mutant.file, names, scored.case or None)
            yield scored


def _order(mutant: Mutant, cases: Sequence[Case]) -> _Order:
    without_reach = (Case(case.name, case.text, case.has_layer, case.seconds) for case in cases)
    return _Order(tuple(without_reach), {mutant.file: mutant.source})


def _score(mutant: Mutant, names: Sequence[str], reply: _Reply) -> Score:
    if not reply.failed:
        return Score(mutant, Fate.SURVIVED, judged=len(names), seconds=reply.seconds)
    if reply.at_import and not reply.exitcode:
        return Score(mutant, Fate.IMPORT, sentence=reply.sentence)
    last = names[-1] if names else ""
    if reply.exitcode:
        fate = Fate.TIME_OUT if reply.exitcode == -signal.SIGPROF else Fate.FAULT
        return Score(mutant, fate, case=last, sentence=f"ended with {reply.exitcode}", judged=len(names))
    return Score(mutant, Fate.KILLED, Check(reply.check), last, reply.sentence, len(names), reply.seconds)
