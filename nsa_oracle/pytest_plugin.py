"""The pytest plugin: its hooks, the marker and the fixture ``oracle``, and the closing report.

pytest loads it, by an entry point, in every run of an environment that has the package. So it imports nothing but
pytest until a test or an option uses it, and does nothing to other tests. ``harness/plugin/`` does the work.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nsa_oracle.caught import CAUGHT, caught_line, failures_raised
from nsa_oracle.plugin_options import add_options, has_options
from nsa_oracle.starting import (
    FILES_OF_PYTEST,
    FILES_OF_THE_HARNESS,
    check_open_files,
    ended_in_one_line,
    interruption_deferred,
    lacks_files,
    open_files_told,
    too_many_open_files,
)

if TYPE_CHECKING:
    from nsa_oracle.harness.plugin.fixture import Oracle
    from nsa_oracle.harness.plugin.session import Session

MARKER = "oracle"
BUG = "oracle_bug"  # property of a test report: the planted bug that its item had to kill
PROPERTY = "oracle"  # property of a test report: what its item covered, in a form that xdist workers can send
PART = "oracle_part"  # the parameter of a marked test: what one of its items judges
RANDOM_SEED = "oracle_random_seed"  # sent to workers of pytest-xdist, so that all draw from one seed
COUNTS = "oracle_counts"  # sent to them, too: the folder in which all processes count what they have judged

SESSION = pytest.StashKey["Session"]()
REFUSED = pytest.StashKey[list[str]]()  # what marked tests ask for and cannot have
STARTED = pytest.StashKey[float]()  # a value of time.time()
JUDGE = pytest.StashKey["Oracle"]()  # the fixture of a test
WORKER_INPUT = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None]:
    """Say in one line that a run of the oracle may open too few files, before pytest opens some for what is printed."""
    if has_options(early_config.known_args_namespace):
        check_open_files(FILES_OF_PYTEST, pytest.UsageError)
    return (yield)


class Interruption:
    """Notes whether Ctrl-C or SIGTERM ended the run; it is a plugin of its own because the hook gets no configuration.

    Registered in every run, because it is the workers of pytest-xdist that know whether a test uses the oracle.
    """

    arrived = False

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Pytest also calls this when it ends a run by itself, with a subclass."""
        self.arrived = excinfo.type is KeyboardInterrupt


INTERRUPTION = pytest.StashKey[Interruption]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """If the run is the oracle's, fix how kernels run before anything imports Triton, and check the options."""
    config.addinivalue_line(
        "markers", f"{MARKER}(backend, layer, profile, cases): judge a backend or a layer, as nsa_oracle.harness.judged"
    )
    config.stash[STARTED] = time.time()
    config.stash[REFUSED] = []
    config.stash[INTERRUPTION] = Interruption()
    config.pluginmanager.register(config.stash[INTERRUPTION])
    config.stash[WORKER_INPUT] = getattr(config, "workerinput", None) or {
        RANDOM_SEED: int.from_bytes(os.urandom(6), "big"),
        COUNTS: str(Path(tempfile.gettempdir()) / f"nsa-oracle-{os.getpid()}-{os.urandom(4).hex()}"),
    }
    if has_options(config.option) or config.getini("oracle_in_process"):
        leftover = None if is_worker(config) else _counts(config)
        with open_files_told(pytest.UsageError), ended_in_one_line(is_worker(config), leftover):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))  # of a worker, see pytest_sessionstart
            config.stash[SESSION] = _new_session(config)
            config.stash[SESSION].check()
        config.stash[SESSION].begin()


def session_of(config: pytest.Config) -> Session:
    """The oracle's settings in this run, made when something needs them first."""
    if SESSION not in config.stash:
        config.stash[SESSION] = _new_session(config)
        config.stash[SESSION].begin()
    return config.stash[SESSION]


def _new_session(config: pytest.Config) -> Session:
    check_open_files(FILES_OF_THE_HARNESS, pytest.UsageError)
    with open_files_told(pytest.UsageError), interruption_deferred():
        from nsa_oracle.harness.plugin.session import Session

    seed = config.stash[WORKER_INPUT][RANDOM_SEED]
    return Session.of(config, config.stash[STARTED], seed, _counts(config), is_worker(config))


def _counts(config: pytest.Config) -> Path:
    return Path(config.stash[WORKER_INPUT][COUNTS])


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is a worker of pytest-xdist."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart(session: pytest.Session) -> Generator[None]:
    """Workers of pytest-xdist are started in it: Ctrl-C waits until their plugin handles it."""
    if SESSION not in session.config.stash:
        return (yield)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        return (yield)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Send a worker of pytest-xdist what all workers share."""
    node.workerinput.update(node.config.stash[WORKER_INPUT])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any) -> None:
    """Once a worker has found that tests use the oracle, say how far they are, and handle SIGTERM."""
    if _counts(node.config).exists():
        session_of(node.config).show_progress()


@pytest.fixture
def oracle(request: pytest.FixtureRequest) -> Oracle:
    """Judges backends and layers within a test: ``oracle.judge(backend=...)``."""
    try:
        session = session_of(request.config)
        with open_files_told(pytest.UsageError), interruption_deferred():
            from nsa_oracle.harness.plugin.fixture import Oracle
    except pytest.UsageError as error:
        refusal = str(error)
    else:
        judge = Oracle(session, request.node)
        request.node.stash[JUDGE] = judge
        return judge
    pytest.fail(refusal, pytrace=False)  # here, where the error is not printed with it


@pytest.fixture
def _oracle_judges_this_test(request: pytest.FixtureRequest) -> None:
    """Of the methods of a marked class: fails those that are not judged, as ``judged`` makes functions fail."""
    if _part_of(request.node) is None:
        from nsa_oracle.harness.decorator import NOT_JUDGED

        pytest.fail(NOT_JUDGED, pytrace=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make the items of a marked test: one for each saved case, and one for each shard of the drawn ones."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is not None:
        try:
            session = session_of(metafunc.config)
            with open_files_told(pytest.UsageError), interruption_deferred():
                from nsa_oracle.harness.plugin.fixture import parts_of
            marks = [mark.name for mark in metafunc.definition.own_markers]
            if marks.count(MARKER) > 1:
                raise pytest.UsageError(
                    f"{metafunc.definition.nodeid}: it has two marks of judged, of which pytest sees the lower "
                    "one alone; write a test for each, or parametrize one that takes the fixture oracle"
                )
            parts = parts_of(session, **marker.kwargs)
        except pytest.UsageError as error:
            metafunc.config.stash[REFUSED].append(str(error))
            raise pytest.Collector.CollectError(str(error)) from None
        metafunc.fixturenames.append(PART)
        if not parts:
            why = f"no item of this test is in shard {metafunc.config.getoption('oracle_shard')}"
            metafunc.parametrize(PART, [pytest.param(None, marks=pytest.mark.skip(reason=why))], ids=["none"])
            return
        metafunc.parametrize(PART, list(parts.values()), ids=list(parts))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Mark the report of a module with a test that the oracle refuses; the mark survives the way from a worker.

    So is a module that imports the oracle, which may not open the files that it consists of.
    """
    refused = collector.config.stash[REFUSED]
    before = len(refused)
    report = yield
    call = getattr(report, "call", None)  # pytest's --lf makes a report of its own for modules that it skips
    if (
        call is not None
        and (failed := call.excinfo) is not None
        and lacks_files(failed.value)
        and _passes_the_oracle(failed)
    ):
        refused.append(too_many_open_files())
        report.longrepr = refused[-1]
    report.oracle_refused = len(refused) > before
    return report


def _passes_the_oracle(failed: pytest.ExceptionInfo[BaseException]) -> bool:
    """Whether the exception came through a file of this package, or through the attempt to open one."""
    names = [entry.path for entry in failed.traceback] + [getattr(failed.value, "filename", None) or ""]
    return any(Path(name).is_relative_to(Path(__file__).parent) for name in names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--oracle-replay`` nothing but the files that it names is judged."""
    if config.getoption("--oracle-replay"):
        kept = [item for item in items if (part := _part_of(item)) is not None and part.file is not None]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def _part_of(item: pytest.Item) -> Any:
    """What an item of a marked test judges, or None."""
    return item.callspec.params.get(PART) if hasattr(item, "callspec") else None


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Judge what an item of a marked test stands for, before its own body runs."""
    part = _part_of(pyfuncitem)
    if part is None:
        return (yield)
    from nsa_oracle.harness.decorator import judged_item
    from nsa_oracle.harness.plugin.fixture import Oracle

    if why := Oracle(session_of(pyfuncitem.config), pyfuncitem).judge_part(part):
        pytest.skip(why)
    with judged_item():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Report what cannot be judged, or was not, in one line, without a traceback. Note what the test has caught."""
    before = failures_raised()
    try:
        returned = yield
        oracle = item.stash.get(JUDGE, None)
        is_of_a_bug = BUG in dict(item.user_properties)  # which is planted to make judge fail
        if oracle is None and _part_of(item) is None and failures_raised() > before and not is_of_a_bug:
            item.user_properties.append((CAUGHT, failures_raised() - before))
        if oracle is not None and oracle.running:
            refusal = "not judged: a call of oracle.judge had not ended with the test; join its thread, or await it"
        elif oracle is not None and oracle.lost:
            refusal = oracle.lost
        elif oracle is None or oracle.has_judged or _part_of(item) is not None:
            return returned
        else:
            refusal = "not judged: the test takes the fixture oracle and never calls oracle.judge"
    except (pytest.skip.Exception, pytest.xfail.Exception):
        oracle = item.stash.get(JUDGE, None)
        if oracle is None or not oracle.lost:
            raise
        refusal = oracle.lost
    except (ValueError, pytest.UsageError) as error:
        if not _is_refusal(error, item):
            raise
        refusal = str(error)
    pytest.fail(refusal, pytrace=False)  # here, where the error is not printed with it


def _is_refusal(error: Exception, item: pytest.Item) -> bool:
    """Whether the error says that the oracle cannot judge what ``item`` names."""
    if "nsa_oracle.harness.errors" not in sys.modules:
        return False
    from nsa_oracle.harness.errors import BackendError, ScenarioError

    uses_it = _part_of(item) is not None or "oracle" in getattr(item, "fixturenames", ())
    return uses_it and isinstance(error, BackendError | ScenarioError | pytest.UsageError)


def pytest_report_header(config: pytest.Config) -> str | None:
    return config.stash[SESSION].header() if SESSION in config.stash else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Say how many cases the selected items draw, to whoever shows how far the run is."""
    if is_worker(session.config) and any("oracle" in getattr(item, "fixturenames", ()) for item in session.items):
        _counts(session.config).mkdir(exist_ok=True)  # by which the controller knows, before a test runs
    parts = [part for item in session.items if (part := _part_of(item)) is not None]
    if parts:
        session_of(session.config).expect(parts)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a session in which not everything was judged; end an interrupted one as shells expect."""
    terminalreporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if is_worker(session.config) or terminalreporter is None:
        return
    if _is_used(session.config):
        from nsa_oracle.harness.plugin.closing import exit_code

        session.exitstatus = exit_code(exitstatus, terminalreporter, session_of(session.config))
    errors = terminalreporter.stats.get("error", ())
    if errors and all(getattr(error, "oracle_refused", False) for error in errors):
        session.exitstatus = pytest.ExitCode.USAGE_ERROR


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    if _is_used(config):
        from nsa_oracle.harness.plugin.closing import write_report

        write_report(terminalreporter, session_of(config), exitstatus)
    if line := caught_line(terminalreporter.stats.get("passed", ()), config.get_verbosity() > 0):
        terminalreporter.write_line(line)


def _is_used(config: pytest.Config) -> bool:
    """Whether this process, or a worker of pytest-xdist, has judged anything."""
    return SESSION in config.stash or _counts(config).exists()


def pytest_unconfigure(config: pytest.Config) -> None:
    if SESSION in config.stash:
        config.stash[SESSION].close()
