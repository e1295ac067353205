"""What all tests share: the device of the session, and explanations of failed assertions in tests/support/."""

from __future__ import annotations

import os

import pytest
import torch

from nsa_oracle.pytest_plugin import session_of

pytest.register_assert_rewrite(*(f"tests.support.{name}" for name in ("captures", "command_line", "literals")))

os.environ["COLUMNS"] = "120"  # reports are as wide as the terminal; tests compare those of a log


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where backends run in this session."""
    return session_of(pytestconfig).device
