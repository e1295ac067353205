"""Failed assertions of what tests share are explained like those of the tests themselves."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(*(f"tests.support.{name}" for name in ("captures", "command_line", "literals")))
