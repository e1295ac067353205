"""Judging within a test: the items of marked tests, and the fixture ``oracle``."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from nsa_oracle.harness.checks.verdict import OracleFailure
from nsa_oracle.harness.errors import BackendError, error_line
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.plugin.parts import Part, kinds_of, parts, spec_of
from nsa_oracle.harness.plugin.session import Session, Unfit, name_of
from nsa_oracle.harness.processes import ChildDied
from nsa_oracle.harness.report.records import FailureRecord, ItemRecord
from nsa_oracle.harness.search.drawing import PROFILES
from nsa_oracle.harness.subjects.loading import line_of
from nsa_oracle.pytest_plugin import PROPERTY

Judged = str | Callable[..., object] | None
"""A backend or a layer that a test names: a callable, its name as ``module:attribute``, or None."""


def parts_of(
    session: Session,
    backend: Judged = None,
    layer: Judged = None,
    profile: str | None = None,
    cases: Sequence[str] | None = None,
) -> dict[str, Part]:
    """What a test judges, by the name of the item. The arguments are those of ``harness.decorator.judged``.

    Raises UsageError for an argument that cannot be used.
    """
    specs = (
        session.specs[0] if backend is None else spec_of(backend, "backend"),
        session.specs[1] if layer is None else spec_of(layer, "layer"),
    )
    named = {"backend": backend, "layer": layer, "profile": profile}
    options = tuple(name for name, value in named.items() if value is None)
    profile = session.profile if profile is None else profile
    if not isinstance(profile, str) or profile not in PROFILES:
        raise pytest.UsageError(f"profile: there is no '{profile}'; choose from {', '.join(PROFILES)}")
    kinds = kinds_of(cases, *specs, PROFILES[profile], replays=bool(session.replayed))
    if layer is not None and kinds == ("metadata",):
        raise pytest.UsageError("cases: 'metadata' has no layer, so the one given would not be judged; add 'layers'")
    files = session.replayed or (session.saved.files() if "saved" in kinds else ())
    without = f"no saved case: {session.saved.why_none()}" if "saved" in kinds and not files else ""
    if without and cases is not None and "saved" in ((cases,) if isinstance(cases, str) else cases):
        raise pytest.UsageError(f"cases: 'saved' is asked for, and there is {without}")
    items = parts(Part(*specs, profile, options=options), kinds, files, without)
    return items if session.shard is None else session.shard.of(items)


class Oracle:
    """Judges backends and layers within one test, and records for the closing report what that covered.

    has_judged: whether ``judge`` was called; a test that passes without a call has judged nothing, and fails. running:
    calls of ``judge`` that have not ended. lost: what a call of ``judge`` failed with, of which nobody else is told if
    the test swallows it, or has made the call in a thread; empty if none failed.
    """

    has_judged = False
    running = 0
    lost = ""

    def __init__(self, session: Session, node: pytest.Item) -> None:
        self._session = session
        self._node = node

    @property
    def device(self) -> torch.device:
        """Where backends run in this session."""
        return self._session.device

    def judge(
        self,
        backend: Judged = None,
        layer: Judged = None,
        profile: str | None = None,
        cases: Sequence[str] | None = None,
        *,
        expect_failure: bool = False,
    ) -> None:
        """Judge a backend or a layer on the repository's saved cases, and then on drawn ones.

        The arguments are those of ``harness.decorator.judged``, whose tests are spread over processes; this judges
        everything within one test. Fails the test, after everything has been judged, if anything failed, even if the
        test catches that. expect_failure: fails the test if nothing failed; what fails is not in the closing report.
        """
        self.has_judged = True
        self.running += 1
        try:
            self._judge(parts_of(self._session, backend, layer, profile, cases), expect_failure)
        except (Exception, pytest.fail.Exception) as error:
            where = "in a thread, which fails no test by itself"
            if threading.current_thread() is threading.main_thread():
                where = "and the test caught it; one that expects it calls oracle.judge(..., expect_failure=True)"
            self.lost = f"oracle.judge failed {where}: {error}"
            raise
        finally:
            self.running -= 1

    def _judge(self, parts: Mapping[str, Part], expect_failure: bool) -> None:
        said = []
        for part in parts.values():
            try:
                self.judge_part(part, expect_failure)
            except pytest.fail.Exception as failure:
                said.append(str(failure))
        if expect_failure and not said:
            pytest.fail("oracle.judge found no failure, and one was expected", pytrace=False)
        if said and not expect_failure:
            pytest.fail("\n".join(dict.fromkeys(said)), pytrace=False)

    def judge_part(self, part: Part, expect_failure: bool = False) -> str:
        """Judge a share of a test. Fails the test with one line. Returns why nothing was judged; empty if it was.

        expect_failure: leave a failure out of the closing report.
        Raises BackendError or ScenarioError for what cannot be judged, judged code that skips the test included.
        """
        specs = part.backend, part.layer
        if part.without:
            self._record(part, ItemRecord(backend=part.backend, layer=part.layer, without=part.without))
            return part.without
        name = hashlib.sha256(f"{self._node.nodeid} {part}".encode()).hexdigest()[:16]
        drawn_by = getattr(self._node, "originalname", self._node.name) if part.file is None else ""
        death: FailureRecord | None = None
        try:
            outcome = self._session.judge(part, name)
            left_out = self._session.judge_of(specs).left_out()
            missing = self._session.unvisited(part, outcome)
        except Unfit as unfit:
            assert part.file is not None
            self._record(part, ItemRecord(backend=part.backend, layer=part.layer, unfit=part.file.stem))
            return str(unfit)
        except (pytest.skip.Exception, pytest.xfail.Exception) as skipped:  # a verdict must not get lost by it
            reason = f"{type(skipped).__name__}: {error_line(skipped)}{line_of(skipped)}"
            raise BackendError(f"{name_of(specs)}: raised {reason}") from None
        except ChildDied as died:
            death = self._session.death(died, part)
        finally:
            self._session.output.show()
        if death is not None:
            self._record(part, ItemRecord(failures=(death,), backend=part.backend, layer=part.layer), expect_failure)
            pytest.fail(_told(death), pytrace=False)
        failures: tuple[FailureRecord, ...] = ()
        report = self._session.report_of(outcome, specs)
        if outcome.failure is not None and report is not None:
            command = self._session.replay_command(outcome, specs)
            failures = (FailureRecord.of(outcome.failure, command, report, outcome.saved),)
        seed = self._session.seed_of(part.profile) if drawn_by else None
        self._record(
            part,
            ItemRecord(
                outcome.verdict, failures, *specs, drawn_by, seed, part.with_layer, tuple(missing), tuple(left_out)
            ),
            expect_failure,
        )
        if expect_failure and outcome.failure is not None and _was_never_built(outcome.failure):
            never = "it was never built, which is not the failure that the test expects"
            raise BackendError(f"{name_of(specs)}: {outcome.failure.finding.sentence()}; {never}")
        if part.file is None and not outcome.verdict.cases and not failures:
            return "no case was judged: time was up"
        for failure in failures:  # the report of each different failure is printed once, at the end
            pytest.fail(_told(failure), pytrace=False)
        return ""

    def _record(self, part: Part, record: ItemRecord, expect_failure: bool = False) -> None:
        if expect_failure:
            record = dataclasses.replace(record, failures=(), expected=len(record.failures))
        record = dataclasses.replace(record, options=part.taken)
        self._node.user_properties.append((PROPERTY, record.to_json()))


def _was_never_built(failure: OracleFailure) -> bool:
    """Whether what was to be judged raised while it was built, before any event."""
    return failure.event is None and failure.finding.kind in (Kind.CRASH, Kind.LAYER_CRASH)


def _told(failure: FailureRecord) -> str:
    """The line of a failure, and the command that replays it if there is a case."""
    return f"{failure.sentence}\nreplay: {failure.command}" if failure.command else failure.sentence
