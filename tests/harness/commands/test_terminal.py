"""Progress is shown on a terminal alone."""

from __future__ import annotations

import pytest

from nsa_oracle.harness.commands.terminal import progress_of


def test_progress_is_shown_on_a_terminal_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_of("surveying", 3) as show_progress:
        show_progress(2, "")
        show_progress(3, "shrinking [b]: 3 events so far, up to 60 s left")
    assert capfd.readouterr() == ("", "")
