"""Judging within a test: the items of marked tests, and the fixture ``oracle``."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from nsa_oracle.harness.plugin.parts import Part, kinds_of, parts, spec_of
from nsa_oracle.harness.plugin.session import Session, Unfit
from nsa_oracle.harness.processes import ChildDied
from nsa_oracle.harness.report.records import FailureRecord, ItemRecord
from nsa_oracle.harness.search.drawing import PROFILES
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
    if profile not in PROFILES:
        raise pytest.UsageError(f"profile: there is no '{profile}'; choose from {', '.join(PROFILES)}")
    kinds = kinds_of(cases, *specs, PROFILES[profile], replays=bool(session.replayed))
    files = session.replayed or (session.saved.files() if "saved" in kinds else ())
    without = f"no saved case: {session.saved.why_none()}" if "saved" in kinds and not files else ""
    if without and cases is not None and "saved" in ((cases,) if isinstance(cases, str) else cases):
        raise pytest.UsageError(f"cases: 'saved' is asked for, and there is {without}")
    return parts(Part(*specs, profile, options=options), kinds, files, without)


class Oracle:
    """Judges backends and layers within one test, and records for the closing report what that covered.

    has_judged: whether ``judge`` was called; a test that passes without a call has judged nothing, and fails.
    lost: what ``judge`` failed with in a thread that the test has started, of which nobody else is told.
    """

    has_judged = False
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
    ) -> None:
        """Judge a backend or a layer on the repository's saved cases, and then on drawn ones.

        The arguments are those of ``harness.decorator.judged``, whose tests are spread over processes; this judges
        everything within one test. Fails the test, after everything has been judged, if anything failed.
        """
        self.has_judged = True
        said = []
        for part in parts_of(self._session, backend, layer, profile, cases).values():
            try:
                self.judge_part(part)
            except pytest.skip.Exception:
                pass
            except pytest.fail.Exception as failure:
                said.append(str(failure))
        if said:
            told = "\n".join(dict.fromkeys(said))
            if threading.current_thread() is not threading.main_thread():
                self.lost = told
            pytest.fail(told, pytrace=False)

    def judge_part(self, part: Part) -> None:
        """Judge a share of a test. Fails the test with one line, and skips it if the saved case does not fit.

        Raises BackendError or ScenarioError for what cannot be judged.
        """
        specs = part.backend, part.layer
        if part.without:
            self._record(part, ItemRecord(backend=part.backend, layer=part.layer, without=part.without))
            pytest.skip(part.without)
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
            pytest.skip(str(unfit))
        except ChildDied as died:
            death = self._session.death(died, part)
        finally:
            self._session.output.show()
        if death is not None:
            self._record(part, ItemRecord(failures=(death,), backend=part.backend, layer=part.layer))
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
        )
        if part.file is None and not outcome.verdict.cases and not failures:
            pytest.skip("no case was judged: time was up")
        for failure in failures:  # the report of each different failure is printed once, at the end
            pytest.fail(_told(failure), pytrace=False)

    def _record(self, part: Part, record: ItemRecord) -> None:
        record = dataclasses.replace(record, options=part.taken)
        self._node.user_properties.append((PROPERTY, record.to_json()))


def _told(failure: FailureRecord) -> str:
    """The line of a failure, and the command that replays it if there is a case."""
    return f"{failure.sentence}\nreplay: {failure.command}" if failure.command else failure.sentence
