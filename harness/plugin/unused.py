"""Options that a run was given and no test took, because the tests name their own: such a run must not be green."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest

TAKEN = ("backend", "layer", "profile", "seed")
"""Options that stand for what a test does not name itself."""
DRAWN = ("profile", "seed")  # those of drawn cases, of which --oracle-replay has none
WITHOUT_A_TEST = "pytest --pyargs nsa_oracle.harness.suite"
LISTS = ("collectonly", "showfixtures", "show_fixtures_per_test", "setuponly", "setupplan")  # pytest's: no test runs


def unused_options(
    config: pytest.Config, exitstatus: int, taken: Sequence[Collection[str]], replays: bool
) -> list[str]:
    """One line for each option of the command line that no item took; none for a run that failed otherwise.

    An option of ``addopts`` is meant for many runs, and may go unused in some. taken: the options that the items of
    each backend and layer took. replays: whether the run judges named saved cases.
    """
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return []
    if any(config.getoption(name, default=False) for name in LISTS):
        return []
    words = [str(word).partition("=")[0] for word in config.invocation_params.args]
    lines = []
    for name in TAKEN:
        if f"--oracle-{name}" not in words or any(name in names for names in taken) or (replays and name in DRAWN):
            continue
        if not taken:
            why = "no test of this run uses the oracle"
        elif name == "seed":
            why = "no test of this run draws a case"
        else:
            why = f"no test of this run takes it; the tests name their own {name}"
        lines.append(f"NOT JUDGED: --oracle-{name} {config.getoption(f'oracle_{name}')}: {why}")
    if replays and not taken:
        files = " ".join(config.getoption("oracle_replay"))
        lines.append(f"NOT JUDGED: --oracle-replay {files}: no selected test judges saved cases; {WITHOUT_A_TEST} does")
    return lines
