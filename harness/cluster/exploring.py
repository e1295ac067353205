"""A run over the workers of a pool: hands out chunks, takes back what they found, and tells each finding once."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nsa_oracle.harness.cluster.pool import Pool, WorkersDied
from nsa_oracle.harness.cluster.state import KnownFinding, RunState, as_ranges, numbers_in
from nsa_oracle.harness.cluster.work import (
    Chunk,
    ClusterTask,
    JudgedChunk,
    Smaller,
    drawn_case,
    judge_chunk,
    make_smaller,
)
from nsa_oracle.harness.judge import OracleFailure, Verdict
from nsa_oracle.harness.scenarios.files import FailureFiles
from nsa_oracle.harness.scenarios.scenario import Scenario

MOST_DEATHS = 3  # of processes that judged a case: then the case is a finding
CASES_OF_A_CHUNK = {False: 8, True: 2}  # by whether they have a layer: a few seconds' work
CHUNKS_OF_A_WORKER = 2  # one that it judges, and one that waits
SECONDS_BETWEEN_STATES = 2.0
CRASH = "crash"


@dataclass
class ClusterFinding:
    """One finding. cases: how many failed like this. saved: file of the smallest. died: how the processes ended.

    failure: of the smallest case; None if it ended its processes: then scenario is the case. depends: a fresh process
    did not show it. known: what an earlier run has found, of which no more is known.
    """

    files: FailureFiles
    saved: Path
    failure: OracleFailure | None = None
    scenario: Scenario | None = None
    died: str = ""
    depends: bool = False
    cases: int = 1
    known: KnownFinding | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Findings with the same key are one."""
        if self.known is not None:
            return self.known.kind, self.known.field
        if self.failure is None:
            return CRASH, self.died
        return self.failure.finding.kind.value, self.failure.finding.field

    @property
    def sentence(self) -> str:
        if self.known is not None:
            return self.known.sentence
        return self.died if self.failure is None else self.failure.finding.sentence()

    @property
    def count(self) -> int:
        """How many cases failed like this, in earlier runs too."""
        return self.cases + (0 if self.known is None else self.known.cases)

    def for_state(self) -> KnownFinding:
        kind, field_ = self.key
        return KnownFinding(kind=kind, field=field_, sentence=self.sentence, saved=self.saved.name, cases=self.count)


def chunks_of(wanted: Mapping[bool, int], done: Mapping[bool, Collection[int]]) -> Iterator[Chunk]:
    """The cases of both streams, by whether they have a layer, but for those that are done: some of each in turn."""

    def of_stream(with_layer: bool) -> Iterator[Chunk]:
        left = (number for number in range(wanted[with_layer]) if number not in done[with_layer])
        while numbers := tuple(itertools.islice(left, CASES_OF_A_CHUNK[with_layer])):
            yield Chunk(with_layer, numbers)

    for both in itertools.zip_longest(of_stream(False), of_stream(True)):
        yield from filter(None, both)


class Exploring:
    """One run of ``cases`` cases of metadata and ``layer_cases`` with a layer. Failing cases are saved in ``folder``.

    known: saved cases, which are judged first and not counted. share: is called with each failing case that is small.
    verdict: of what passed. found: the findings, in the order in which they were met.
    """

    def __init__(
        self,
        task: ClusterTask,
        pool: Pool,
        cases: int,
        layer_cases: int,
        folder: Path,
        state: RunState | None = None,
        known: Sequence[Scenario] = (),
        share: Callable[[Scenario], None] = lambda scenario: None,
    ) -> None:
        self.task = task
        self.pool = pool
        self.folder = folder
        self.wanted = {False: cases, True: layer_cases}
        self.verdict = Verdict()
        self.found: list[ClusterFinding] = []
        self.unsaved = ""  # why cases, or the state, could not be saved
        self._before = state or RunState(
            version=1, backend=task.spec.backend, layer=task.spec.layer, device=task.device, seed=task.seed
        )
        self._done = {False: numbers_in(self._before.metadata), True: numbers_in(self._before.layers)}
        self._share = share
        self._deaths: Counter[tuple[bool, int, bool]] = Counter()
        self._fresh = chunks_of(self.wanted, self._done)
        whole = Chunk.of_saved(known)
        size = CASES_OF_A_CHUNK[True]
        # What is to be judged before anything fresh: saved cases, and the rest of what was not judged to its end.
        self._first = deque(whole.cut(begin, begin + size) for begin in range(0, len(known), size))
        # Calls that are out: chunks to judge, findings to make smaller; how a case killed that is drawn for its file.
        self._out: dict[object, Chunk | ClusterFinding] = {}
        self._drawing: dict[object, str] = {}
        self._next_state = 0.0
        for earlier in self._before.findings:
            self.found.append(ClusterFinding(FailureFiles(folder), folder / earlier.saved, cases=0, known=earlier))

    @property
    def expected(self) -> int:
        return sum(self.wanted.values())

    @property
    def judged(self) -> int:
        """Cases that were judged, in earlier runs too."""
        return sum(len(done & set(range(self.wanted[which]))) for which, done in self._done.items())

    @property
    def shrinking(self) -> int:
        """How many failing cases workers are making smaller."""
        return sum(isinstance(out, ClusterFinding) for out in self._out.values())

    @property
    def replays(self) -> int:
        return self._before.replays + self.verdict.replays

    def run(self, deadline: float = math.inf, report: Callable[[], None] = lambda: None) -> None:
        """Judge all cases that an earlier run has not, until ``deadline``, a value of ``time.monotonic()``.

        report: is called again and again. Raises PoolLost, and BackendError or ScenarioError if the subject cannot be
        judged. Whatever ends the run, what was found is kept, and the state is written.
        """
        try:
            while True:
                self._hand_out(deadline)
                if not self._out and not self._drawing:
                    return
                if (answer := self.pool.next(0.5)) is not None:
                    self._take(*answer)
                self._write_state()
                report()
        finally:
            self.pool.cancel()
            self._write_state(now=True)

    def _hand_out(self, deadline: float) -> None:
        """Give each worker something to do. Behind the deadline nothing is begun."""
        if time.monotonic() > deadline:
            self._out = {key: out for key, out in self._out.items() if isinstance(out, ClusterFinding)}
            return
        while len(self._out) < CHUNKS_OF_A_WORKER * max(1, self.pool.size()):
            chunk = self._first.popleft() if self._first else next(self._fresh, None)
            if chunk is None:
                return
            self._out[self.pool.submit(judge_chunk, self.task, chunk)] = chunk

    def _take(self, key: object, answer: object) -> None:
        if key in self._drawing:
            self._keep_death(self._drawing.pop(key), answer if isinstance(answer, Scenario) else None)
            return
        out = self._out.pop(key, None)
        if isinstance(out, ClusterFinding):
            if isinstance(answer, Smaller):  # or else it stays as it was found
                self._keep_smaller(out, answer)
            return
        if isinstance(answer, WorkersDied):
            answer = JudgedChunk(died=str(answer))
        if isinstance(answer, Exception):
            raise answer
        if isinstance(out, Chunk) and isinstance(answer, JudgedChunk):
            self._keep(out, answer)

    def _keep(self, chunk: Chunk, judged: JudgedChunk) -> None:
        if judged.died:
            self._judge_again(chunk, judged.died)
            return
        self.verdict.add(judged.verdict)
        over = judged.passed + (judged.failure is not None)
        self._note_done(chunk.cut(0, over))
        if judged.failure is not None:
            self._keep_failure(judged.failure)
        if chunk.numbers[over:]:
            self._first.append(chunk.cut(over))

    def _note_done(self, chunk: Chunk) -> None:
        if not chunk.saved:
            self._done[chunk.with_layer].update(chunk.numbers)

    def _judge_again(self, chunk: Chunk, died: str) -> None:
        """Judge each case of ``chunk`` by itself, elsewhere if there is another worker. One that kills is a finding."""
        if len(chunk.numbers) > 1:
            self._first.extend(chunk.cut(place, place + 1) for place in range(len(chunk.numbers)))
            return
        case = chunk.with_layer, chunk.numbers[0], bool(chunk.saved)
        self._deaths[case] += 1
        if self._deaths[case] < MOST_DEATHS:
            self._first.append(chunk)
            return
        self._note_done(chunk)
        self._drawing[self.pool.submit(drawn_case, self.task, chunk, urgent=True)] = died

    def _keep_failure(self, failure: OracleFailure) -> None:
        found = ClusterFinding(FailureFiles(self.folder), self.folder, failure)
        earlier = self._like(found)
        if earlier is not None:  # its case is not made smaller once more
            earlier.cases += 1
            return
        self.found.append(found)
        self._save(found, failure.scenario, smaller=False)
        self._out[self.pool.submit(make_smaller, self.task, failure, urgent=True)] = found

    def _keep_smaller(self, found: ClusterFinding, smaller: Smaller) -> None:
        found.failure, found.depends = smaller.failure, smaller.depends
        if not smaller.depends:
            self._save(found, smaller.failure.scenario, smaller=True)
            self._share(smaller.failure.scenario)

    def _keep_death(self, died: str, scenario: Scenario | None) -> None:
        sentence = f"{died}, {MOST_DEATHS} times"
        found = ClusterFinding(FailureFiles(self.folder), self.folder, None, scenario, sentence)
        earlier = self._like(found)
        if earlier is not None:
            earlier.cases += 1
            return
        self.found.append(found)
        if scenario is not None:
            self._save(found, scenario, smaller=False)

    def _like(self, found: ClusterFinding) -> ClusterFinding | None:
        return next((other for other in self.found if other.key == found.key), None)

    def _save(self, found: ClusterFinding, scenario: Scenario, smaller: bool) -> None:
        try:
            found.files.record(scenario, found.sentence, smaller=smaller)
        except OSError as error:
            self.unsaved = f"{self.folder}: {error.strerror or error}"
            return
        found.saved = found.files.minimal if smaller else found.files.raw
        self._write_state(now=True)

    def _write_state(self, now: bool = False) -> None:
        if not now and time.monotonic() < self._next_state:
            return
        self._next_state = time.monotonic() + SECONDS_BETWEEN_STATES
        state = self._before.model_copy(
            update={
                "metadata": as_ranges(self._done[False]),
                "layers": as_ranges(self._done[True]),
                "cases": self._before.cases + self.verdict.cases,
                "replays": self.replays,
                "findings": [found.for_state() for found in self.found],
            }
        )
        try:
            state.write(self.folder)
        except OSError as error:
            self.unsaved = f"{self.folder}: {error.strerror or error}"
