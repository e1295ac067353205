"""What all tests share: the device of the session, and explanations of failed assertions in tests/support/."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.pytest_plugin import session_of

pytest.register_assert_rewrite(*(f"tests.support.{name}" for name in ("captures", "command_line", "literals")))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where backends run in this session."""
    return session_of(pytestconfig).device
