"""Processes in which mutants are judged: each in a fork of a process that has imported everything else."""

from __future__ import annotations

import ast
import gc
import multiprocessing
import os
import re
import resource
import signal
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from nsa_oracle.harness import processes
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.mutants.cases import ANY_LINE, CPU, Case, Line
from nsa_oracle.harness.mutants.mutants import TREE, import_replaced, is_of_kernels, tree_sources
from nsa_oracle.harness.scenarios.files import from_json
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Join, Layer, Replay, Scenario, Setup
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import ForwardMode

# Processor time that a mutant may take for a case: a multiple of what the clean tree takes, where that is known.
TIMES_SLOWER = 10
LEAST_SECONDS = 3.0
MOST_SECONDS = 120.0
MEMORY_BYTES = 6 << 30
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


# The processes.


@dataclass(frozen=True)
class Task:
    """What a fork of the nursery does: judge ``cases`` with some files of ``optimized/`` replaced (path -> source)."""

    cases: tuple[Case, ...]
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Reply:
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


def serve(tasks: Connection, device_type: str) -> None:
    """The nursery: imports everything but ``optimized/``, then forks for each task until there is none left.

    It never touches a GPU, which a fork could not use any more.
    """
    processes.prepare_process(device_type)
    _warm_up()
    gc.freeze()  # forks collect what is their own, in no time, and share the rest
    with suppress(EOFError, BrokenPipeError):  # who gave the tasks is gone
        while True:
            tasks.send(_reply_of_a_fork(tasks.recv(), torch.device(device_type)))
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


def _reply_of_a_fork(task: Task, device: torch.device) -> Reply:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_carry_out, args=(task, device, sender), daemon=True)
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
            return Reply(judged, failed=True, at_import=not judged, exitcode=child.exitcode)
        if isinstance(told, Reply):
            child.join()
            return told
        judged = told


def _carry_out(task: Task, device: torch.device, sender: Connection) -> None:
    """In the fork. Tells the number of each case before it is judged, so that a sudden end can be told from others."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a mutant may upset libraries; none of what they say matters
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _end_after(MOST_SECONDS)
    reach: set[Line] = set()
    try:
        import_replaced(task.sources, lambda *line: reach.add(line))
    except Exception as error:
        sender.send(Reply(0, failed=True, at_import=True, sentence=f"{type(error).__name__}: {error}"))
        return
    if device.type == "cuda":
        _note_kernels(reach)
    begun = time.process_time()
    for number, case in enumerate(task.cases, start=1):
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
            sender.send(Reply(number, True, False, Check.of(finding).value, finding.sentence(), seconds))
            return
    sender.send(Reply(len(task.cases), False, seconds=time.process_time() - begun, reach=frozenset(reach)))


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
    """``jobs`` nurseries for ``device``, each busy with one task at a time. A context manager."""

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

    def carry_out(self, tasks: Iterable[tuple[Any, Task]]) -> Iterator[tuple[Any, Task, Reply]]:
        """Each task with its key and reply, as they come. The next task is made when a nursery is free for it."""
        busy: dict[Connection, tuple[Any, Task]] = {}
        waiting = iter(tasks)
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
                key, task = busy.pop(ready)
                idle.append(ready)
                yield key, task, ready.recv()
