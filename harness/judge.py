"""Judges one scenario: runs it twice, with different poison, and stops at the first disagreement."""

from __future__ import annotations

import functools
import itertools
import sysconfig
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nsa_oracle.harness.checks.declared import Declared
from nsa_oracle.harness.checks.frozen import frozen_value
from nsa_oracle.harness.checks.impossible import diagnosed
from nsa_oracle.harness.checks.layer import JudgedPass, StageJudge
from nsa_oracle.harness.checks.metadata import compare_metadata
from nsa_oracle.harness.checks.relations import Relation, Relations, differs, differs_among_many
from nsa_oracle.harness.checks.uncapturable import capture_finding
from nsa_oracle.harness.checks.variants import VariantCounter, VariantGrowth
from nsa_oracle.harness.checks.verdict import OracleFailure as OracleFailure  # what callers of ``judge`` import with it
from nsa_oracle.harness.checks.verdict import Verdict as Verdict
from nsa_oracle.harness.compiled import launcher, tier
from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.expected import expected_metadata
from nsa_oracle.harness.engine.far_memory import memory_for
from nsa_oracle.harness.engine.observations import Conditions, Feed, LayerObservation, Observation
from nsa_oracle.harness.engine.writes import modified_input, stray_write
from nsa_oracle.harness.errors import BackendError, CaptureError, CaseTimeout, ScenarioError, error_line
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.graphs.callers import defined_at, is_judged_code, judged_frames
from nsa_oracle.harness.interpreter import speed
from nsa_oracle.harness.interruptions import (
    ForkReturned,
    Interruptions,
    RefusedExits,
    exits_refused,
    interruptions_noted,
)
from nsa_oracle.harness.memory.poison import POISON_BYTES, SENTINELS
from nsa_oracle.harness.processes import time_limit
from nsa_oracle.harness.protocol import BackendFactory, LayerFactory
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.coverage import classes_of
from nsa_oracle.harness.scenarios.scenario import Eager, Scenario
from nsa_oracle.harness.scenarios.setup import Regime, Setup
from nsa_oracle.harness.subjects.arguments import backend_of, check_scenario, device_of, layer_of
from nsa_oracle.harness.subjects.default import optimized_backend, optimized_layer
from nsa_oracle.harness.subjects.global_state import (
    files_left_open,
    inference_mode_left_on,
    kept_global_state,
    open_files_at_first,
)
from nsa_oracle.harness.subjects.result_checks import WrongResult
from nsa_oracle.harness.subjects.subject import Subject
from nsa_oracle.harness.subjects.thread_errors import thread_errors_noted
from nsa_oracle.harness.subjects.warning_filters import shown_warnings
from nsa_oracle.reference.types import AttentionConfig, BackendConfig, Metadata
from nsa_oracle.starting import lacks_files, open_files_told

MOST_FRAMES = 5  # of an exception's stack, in a report
_HERE = Path(__file__).parent
_CALLS_THE_LAYER = ("layer_engine.py", "layer_driver.py", "isolated.py")  # of engine/; others call the backend
# Code that is not judged. ``_frames`` already leaves out libraries.
_NOT_JUDGED = (_HERE, _HERE.parent / "reference", Path(sysconfig.get_path("stdlib")))


def judge(
    scenario: Scenario,
    factory: BackendFactory | Callable[[BackendConfig, torch.Tensor], object],
    device: torch.device | str,
    verdict: Verdict | None = None,
    layer_factory: Callable[[BackendConfig, AttentionConfig], object] | None = None,
    graphs: bool = True,
) -> Verdict:
    """Run ``scenario`` and compare every observation. Raises OracleFailure at the first disagreement.

    factory: a callable of (config, req_to_token), or of these and the names of switches. layer_factory: one of (config,
    attention), for a case with a layer; by default the layer of ``optimized/``, whose stages also stand for those that
    a layer lacks. graphs: if False, replays run as eager calls. verdict: is added to and returned, if given.
    BackendError, ScenarioError and TypeError, in one line, are raised if not all that is given can be judged.
    """
    check_scenario(scenario)
    if not isinstance(verdict, Verdict | None):
        raise TypeError(f"verdict must be a Verdict; it is of type {type(verdict).__name__}")
    if not isinstance(graphs, bool):
        raise TypeError(f"graphs must be True or False; it is of type {type(graphs).__name__}")
    where, build, layer = device_of(device), backend_of(factory), layer_of(layer_factory, scenario)
    covered = _judged(scenario, build, where, layer, graphs)
    if scenario.calls and not covered.tally.cells:
        raise BackendError("no cell of any field was compared; declare fewer fields as unjudged or absent")
    return _added(covered, verdict)


@speed.deep_stack
def _judged(
    scenario: Scenario, factory: BackendFactory, device: torch.device, layer_factory: LayerFactory, graphs: bool
) -> Verdict:
    covered = Verdict(cases=1, boundary_classes=Counter(classes_of(scenario)))
    is_ours = factory is optimized_backend and layer_factory is optimized_layer
    tier.interpreted.clear()
    with (
        memory_for(scenario.setup, device),
        nullcontext() if is_ours else shown_warnings(),
        interruptions_noted() as interruptions,
        thread_errors_noted() as covered.thread_errors,
    ):
        try:
            with exits_refused() as exits, _left_open_told(scenario):
                _judge_twice(scenario, factory, device, covered, layer_factory, graphs, interruptions, exits)
            interruptions.check()
            if exits.first is not None:  # and nothing else noticed
                raise OracleFailure(scenario, _raised(exits.first), None)
        except OracleFailure as failure:
            _forget_locals(failure)
            interruptions.check()
            failure.finding = replace(failure.finding, thread_errors=tuple(covered.thread_errors))
            OracleFailure.raised += 1
            raise
    covered.interpreted.update(launcher.left_to_the_interpreter())
    return covered


def _added(covered: Verdict, verdict: Verdict | None) -> Verdict:
    total = verdict or Verdict()
    total.add(covered)
    return total


def judge_subject(
    subject: Subject,
    scenario: Scenario,
    device: torch.device,
    verdict: Verdict | None = None,
    graphs: bool = True,
) -> Verdict:
    """Judge the backend and the layer of ``subject``, which are loaded, as ``judge`` does, within its time limit.

    The layer is not judged on a case without one, as those of a run may be.
    """
    try:
        with time_limit(subject.case_timeout):
            return _added(_judged(scenario, subject.backend, device, subject.layer, graphs), verdict)
    except CaseTimeout as error:  # before or after a run of the case
        raise _too_slow(error) from None


def _too_slow(error: CaseTimeout) -> ScenarioError:
    return ScenarioError(f"the case is {error} in the harness, not in the judged code: allow it more")


@contextmanager
def _left_open_told(scenario: Scenario) -> Iterator[None]:
    """Raises OracleFailure if the harness can open no file any more because judged code has left some open.

    Raises ScenarioError if it has not.
    """
    open_files_at_first()
    with open_files_told(ScenarioError):
        try:
            yield
        except OSError as error:
            if lacks_files(error) and (left := files_left_open()) is not None:
                raise OracleFailure(scenario, left, None) from error
            raise


def _judge_twice(
    scenario: Scenario,
    factory: BackendFactory,
    device: torch.device,
    covered: Verdict,
    layer_factory: LayerFactory,
    graphs: bool,
    interruptions: Interruptions,
    exits: RefusedExits,
) -> None:
    run: _Run | None = None
    for sentinel, poison in zip(sentinels(scenario.setup), POISON_BYTES, strict=True):
        stress = run is not None  # in the second run

        def build(scenario: Scenario, sentinel: int = sentinel, poison: int = poison, stress: bool = stress) -> Engine:
            return Engine(scenario, factory, layer_factory, device, Conditions(sentinel, poison, graphs, stress))

        run = _Run(scenario, build, device, covered, run)
        with speed.without_warnings(), kept_global_state(partial(_left_changed, scenario), OracleFailure):
            run.judge(interruptions, exits)


def _left_changed(scenario: Scenario, finding: Finding, failure: BaseException | None) -> OracleFailure:
    """A failure at the event of ``failure``, which may be due to what ``finding`` says; without one, at the last."""
    return OracleFailure(scenario, finding, getattr(failure, "event", len(scenario.events) - 1))


def sentinels(setup: Setup) -> tuple[int, int]:
    """The values of unspecified integers in the first and in the second run.

    With a layer behind the metadata, each is a slot that exists and holds poison: a layer that reads such a cell then
    gives a wrong output and does not crash the process. The last two pages of the caches exist for this purpose.
    """
    if setup.layer is None:
        return SENTINELS
    slots = setup.num_slots
    return slots - 1, slots - 1 - setup.page_size


class _Run:
    """One of the two runs of a scenario. first: in the second run, the first one, which had other poison."""

    def __init__(
        self,
        scenario: Scenario,
        build: Callable[[Scenario], Engine],
        device: torch.device,
        verdict: Verdict,
        first: _Run | None,
    ) -> None:
        self.scenario = scenario
        self.build = build
        self.device = device
        self.verdict = verdict
        self.calls: list[list[JudgedPass]] = []  # results of the layer, by call and pass
        self._is_first = first is None
        self._counter, self._growth = VariantCounter(), VariantGrowth()
        self._first_calls = iter(first.calls if first is not None else ())

    def judge(self, interruptions: Interruptions, exits: RefusedExits) -> None:
        """Raises OracleFailure at the first disagreement, and KeyboardInterrupt if there was one of the user's."""
        number: int | None = None
        inference = torch.is_inference_mode_enabled()
        try:
            engine = self.build(self.scenario)
            exits.check_forks()
            if (modified := modified_input(engine)) is not None:  # by the constructor
                raise OracleFailure(self.scenario, modified, None)
            with self._counter.counting():
                for number, event in enumerate(self.scenario.events):
                    self._judge_event(engine, engine.run(event), number)
                    exits.check_forks()
                    if (left := inference_mode_left_on(inference)) is not None:
                        raise OracleFailure(self.scenario, left, number)
            finding = stray_write(engine) or modified_input(engine)  # a capture without a replay can write, too
            if self._is_first:
                finding = finding or self._growth.finding() or frozen_value(engine, self.scenario, self.build)
            exits.check_forks()
            self.verdict.audit.add(engine.audit)
            self.verdict.declared.count_stand_ins(engine.declarations)
            if engine.layer is not None:
                self.verdict.layers.count_calls(engine.layer.method_calls.counts)
            if finding is not None:
                raise OracleFailure(self.scenario, finding, number)
        except (OracleFailure, BackendError, ScenarioError) as error:
            if not _is_of_a_method(error):
                raise
            raise OracleFailure(self.scenario, _raised(error), number) from error
        except CaseTimeout as error:
            if not judged_frames(error.__traceback__) and not error.stack:
                raise _too_slow(error) from None
            finding = replace(_raised(error), kind=Kind.TIMEOUT, field="case", got=str(error), expected="an end")
            raise OracleFailure(self.scenario, finding, number) from error
        except WrongResult as error:
            raise OracleFailure(self.scenario, error.finding, number) from error
        except CaptureError as error:
            raise OracleFailure(self.scenario, capture_finding(error), number) from error
        except BaseException as error:  # judged code may raise anything, which is then not Python's or the user's
            interruptions.check()
            if self.device.type == "cuda" and _is_shortage(error):
                raise ScenarioError(
                    f"the GPU has too little memory left ({error_line(error)}): run fewer processes on it (-n)"
                ) from error
            if lacks_files(error) and not judged_frames(error.__traceback__):
                raise
            raise OracleFailure(self.scenario, _raised(error), number) from error

    def _judge_event(self, engine: Engine, observations: Iterator[Observation | LayerObservation], number: int) -> None:
        metadata: list[Metadata] = []
        batch: Batch | None = None
        event = self.scenario.events[number]
        for seen in observations:
            batch = seen.batch
            if (modified := modified_input(engine, event)) is not None:  # first: wrong values may come of it
                raise OracleFailure(self.scenario, modified, number)
            if isinstance(seen, Observation):
                table, steps = engine.world.req_to_token, engine.num_steps(seen.batch)
                metadata = expected_metadata(engine.config, table, seen.batch, seen.in_graph, steps)
                declared = Declared(engine.config, engine.declarations, self.verdict.declared)
                found = compare_metadata(seen, metadata, self.device, self.verdict.tally, declared)
                finding = diagnosed(found, engine.setup)
                if finding is not None and seen.again:
                    finding = replace(finding, how=Relation.REPEATED.value)
                if seen.in_graph:
                    self.verdict.replays += 1
                else:
                    self.verdict.eager_calls += 1
            else:
                finding = self._judge_layer(engine, seen, metadata)
            finding = finding or stray_write(engine)
            if finding is not None:
                raise OracleFailure(self.scenario, finding, number)
        if batch is None and (modified := modified_input(engine, event)) is not None:  # by a capture
            raise OracleFailure(self.scenario, modified, number)
        launched = self._counter.take()
        alone = not self.scenario.setup.neighbour_context_len  # another context length may select other variants
        if batch is not None and alone and isinstance(event, Eager):
            self._growth.note_eager(batch, launched)
        else:
            self._growth.note(launched)

    def _judge_layer(self, engine: Engine, seen: LayerObservation, metadata: list[Metadata]) -> Finding | None:
        """Compare each stage with the reference. Then check that the bits do not depend on poison, and one relation."""
        layers = self.verdict.layers
        if seen.again:
            layers.count(Relation.REPEATED)
            return _differing(self.calls[-1], seen, Relation.REPEATED)
        first_call = next(self._first_calls, None)
        stages = self._stages(engine)
        finding = stages.compare(seen, metadata, first_call or ())
        if finding is not None:
            return finding
        if seen.feed is Feed.GRAPH:
            layers.replays += 1
        if seen.many is not None:
            layers.count(Relation.MANY)
            finding = differs_among_many(seen, self.scenario.setup.page_size)
            if finding is not None:
                return finding

        self.calls.append(stages.judged)
        if first_call is not None:
            layers.count(Relation.POISONED)
            finding = _differing(first_call, seen, Relation.POISONED)
            if finding is not None:
                return finding
        if seen.feed is Feed.ISOLATED or stages.layer.content.regime is not Regime.RANDOM:
            return None  # exact content has one right answer, which it was compared with
        checked = self._relations.check(engine, seen)
        if checked is None:
            return None
        relation, finding = checked
        layers.count(relation)
        return finding

    def _stages(self, engine: Engine) -> StageJudge:
        assert engine.layer is not None
        return StageJudge(engine.layer.judged(), self.verdict.layers)

    @functools.cached_property
    def _relations(self) -> Relations:
        return Relations(self.scenario, self.build)


def _forget_locals(failure: BaseException | None) -> None:
    """Clear the locals of the frames of ``failure``, which would keep every engine of the case alive."""
    done: set[int] = set()
    while failure is not None and id(failure) not in done:  # the causes of a backend's exceptions may form a cycle
        done.add(id(failure))
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__context__ if failure.__cause__ is None else failure.__cause__


def _differing(first: Sequence[JudgedPass], second: LayerObservation, relation: Relation) -> Finding | None:
    """The first bit of a real row that differs between two calls of the same work, or None."""
    for step, (before, now) in enumerate(zip(first, second.steps, strict=True)):
        finding = differs(before.outputs, now.outputs, list(range(second.load.passes[step].rows)))
        if finding is not None:
            return replace(finding, step=step, how=relation.value)
    return None


def _is_shortage(error: BaseException) -> bool:
    """Whether the harness or the reference ran out of GPU memory, for which the judged code is not at fault."""
    text = error_line(error)
    refused = "out of memory" in text or "ALLOC_FAILED" in text
    return refused and all(any(Path(f.filename).is_relative_to(own) for own in _NOT_JUDGED) for f in _frames(error))


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames that the exception passed, without those of libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f for f in frames if "site-packages" not in f.filename or Path(f.filename).is_relative_to(_HERE)]


def _is_of_a_method(error: OracleFailure | BackendError | ScenarioError) -> bool:
    """Whether a method of judged code has raised an error of the harness, which only a factory may raise."""
    if not judged_frames(error.__traceback__):
        return False
    if isinstance(error, OracleFailure):
        return True
    return not error.of_factory and is_judged_code(_frames(error)[-1].filename)


def _raised(error: BaseException) -> Finding:
    """The finding that judged code raised ``error``, with the innermost line of that code that it passed.

    An exception in an interpreted kernel is shown as what the kernel's line raised.
    """
    error = _unwrapped(error)
    frames = [*_judged_frames(error)]
    in_layer = _came_through_the_layer(error)
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:  # without importing Triton
        error = error.__cause__
        frames += _judged_frames(error)
    calls = [frame for frame in _frames(error) if frame.line and not _only_notes(frame)]
    place = defined_at(error) or (f"the call {calls[-1].line}" if calls else "")
    if frames:
        place = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}"
    stack = tuple(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames[-MOST_FRAMES:])
    kind = Kind.LAYER_CRASH if in_layer else Kind.CRASH
    got = error_line(error, nothing=type(error).__name__)
    if (cause := error.__cause__) is not None:
        got += f" (from {type(cause).__name__}: {error_line(cause, 80)})"
    if isinstance(error, ForkReturned):
        got = "a child that leaves the judged code, too"
        return Finding(Kind.STATE, "os.fork()", got, "a child that ends within it", place=place, stack=stack)
    return Finding(kind, type(error).__name__, got, "no exception", place=place, stack=stack)


def _only_notes(frame: traceback.FrameSummary) -> bool:
    """Whether the frame passes a call on, which the frame before it shows."""
    return Path(frame.filename) == _HERE / "watching.py"


def _unwrapped(error: BaseException) -> BaseException:
    """``error``, or the StopIteration of judged code that a generator of the harness has made a RuntimeError of."""
    cause = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(cause, StopIteration) and not judged_frames(error.__traceback__):
        return cause
    return error


def _judged_frames(error: BaseException) -> Sequence[traceback.FrameSummary]:
    """The frames of judged code that the exception passed, or those that were running as it insisted on ending them."""
    return judged_frames(error.__traceback__) or (error.stack if isinstance(error, CaseTimeout | ForkReturned) else ())


def _came_through_the_layer(error: BaseException) -> bool:
    """Whether it was the layer, or its constructor, that the harness had called."""
    names = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = itertools.takewhile(lambda name: not is_judged_code(name), names)
    return any(Path(name).name in _CALLS_THE_LAYER and Path(name).is_relative_to(_HERE) for name in ours)
