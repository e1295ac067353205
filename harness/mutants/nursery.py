"""Processes in which mutants are judged: each mutant in a fork of a *nursery*, which has imported everything else."""

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
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Layer, Setup
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import ForwardMode

# Limits of processor time for a mutant on one case: a multiple of the clean tree's time if it is known.
TIMES_SLOWER = 10
LEAST_SECONDS = 3.0
MOST_SECONDS = 120.0
MEMORY_BYTES = 6 << 30
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


# The processes.


@dataclass(frozen=True)
class Task:
    """A task for a fork: judge ``cases`` with ``sources`` (path -> source) in place of some files of ``optimized/``."""

    cases: tuple[Case, ...]
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Reply:
    """The result of a task.

    judged: number of cases that were begun. failed: whether the last of these failed or ended the process, or, with
    ``at_import``, the import did. check, sentence: of the finding, or the sentence of the exception at import.
    seconds: processor time. reach: the statements that ran in files whose source has probes, and the lines of compiled
    kernels. exitcode: of the fork; negative for a signal.
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
    """The main function of a nursery: imports everything but ``optimized/``, then forks for each task.

    Returns when the other end of ``tasks`` is closed. The nursery itself never uses a GPU, because its forks could not
    use the GPU then.
    """
    processes.prepare_process(device_type)
    _warm_up()
    gc.freeze()  # the collector of a fork then skips inherited objects: it is fast, and their memory stays shared
    with suppress(EOFError, BrokenPipeError):  # the process that sends the tasks has ended
        while True:
            tasks.send(_reply_of_a_fork(tasks.recv(), torch.device(device_type)))
    gc.unfreeze()  # otherwise a library reports its objects as leaked


def _warm_up() -> None:
    """Judges the reference, so that torch imports the modules that it only imports on use."""
    decode, extend = Replay(mode=ForwardMode.DECODE), Eager(mode=ForwardMode.EXTEND)
    for layer in (None, Layer()):
        scenario = Scenario(
            setup=Setup(
                page_size=1, max_context_len=8, index_topk=4, num_steps=1, num_draft_tokens=1, pool_size=1, layer=layer
            ),
            events=(Capture(mode=ForwardMode.DECODE, buckets=(1,)), Join(seq_len=3), decode, extend),
        )
        graphs = layer is None  # the reference of a layer reads lengths on the host, which no graph allows
        judge(scenario, MultiStepBackend, CPU, None, None if layer is None else SparseAttention, graphs)


def _reply_of_a_fork(task: Task, device: torch.device) -> Reply:
    """Executes ``task`` in a fork, and waits for its reply or its end."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_carry_out, args=(task, device, sender), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking a process with threads: numpy has idle ones
        child.start()
    sender.close()
    judged = 0
    while True:
        try:
            message = receiver.recv()
        except EOFError:
            child.join()
            return Reply(judged, failed=True, at_import=not judged, exitcode=child.exitcode)
        if isinstance(message, Reply):
            child.join()
            return message
        judged = message


def _carry_out(task: Task, device: torch.device, sender: Connection) -> None:
    """The main function of a fork: sends a ``Reply`` at the end.

    Also sends the number of each case before it is judged, so that the nursery knows which case ended the process.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print because of a mutant does not matter
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
        gc.collect()  # engines are in reference cycles
        # Far tensors reserve terabytes of address space but use little memory, and so do processes with a GPU.
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
    """Makes Triton add to ``reach`` the files of kernels that it launches and the lines of code that it compiles."""
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
    """The lines of ``optimized/`` in a compiled kernel. path: Triton's first intermediate code, with locations.

    Of a branch that is decided at compile time, only the lines of the chosen side are included.
    """
    named = re.compile(rf'loc\("{re.escape(str(TREE))}/([^"]+)":(\d+):')
    return {(file, int(line)) for file, line in named.findall(Path(path).read_text(encoding="utf-8"))}


def _end_after(seconds: float) -> None:
    """Ends the process by SIGPROF after ``seconds`` more of processor time, which does not depend on other load."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


class Nurseries:
    """``jobs`` nurseries for ``device``. Each executes one task at a time. A context manager that ends them."""

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
        """Executes ``tasks``, pairs of a key and a task. Yields (key, task, reply) as they complete.

        The next pair is taken from ``tasks`` only when a nursery is free, so it may depend on the replies so far.
        """
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
