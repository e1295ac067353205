"""Kernels of these tests run in Triton's interpreter, also where other tests have them compiled."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from nsa_oracle.harness.compiled import tier
from nsa_oracle.harness.processes import prepare_process


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Launches pass by the compiled tier, if this process has it."""
    if torch.cuda.is_available():  # whoever needs the interpreter skips
        yield
        return
    prepare_process("cpu")
    from triton.runtime import interpreter

    if not tier.is_installed():
        yield
        return
    launch = interpreter.GridExecutor.__call__.__wrapped__
    with patch.object(interpreter.GridExecutor, "__call__", launch):
        yield
