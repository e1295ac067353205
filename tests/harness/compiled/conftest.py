"""Kernels of these tests run as compiled C."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from nsa_oracle.harness.compiled import launcher
from nsa_oracle.harness.processes import prepare_process


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of this run's libraries."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSA_ORACLE_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def compiled() -> Iterator[dict[str, str]]:
    """Kernels run as C. Yields why kernels were left to the interpreter.

    Without the fixture ``monkeypatch``, which would be undone later than this one: a launch that a test replaced would
    be put back, and with it the tier, for all tests that follow in the process.
    """
    if torch.cuda.is_available():
        pytest.skip("this process compiles kernels for a GPU")
    prepare_process("cpu")
    left: dict[str, str] = {}
    with patch.object(launcher, "interpreted", left), launcher.installed():
        yield left


@pytest.fixture
def all_are_compiled(compiled: dict[str, str]) -> Iterator[None]:
    """Fails a test of which a kernel was left to the interpreter."""
    yield
    assert compiled == {}
