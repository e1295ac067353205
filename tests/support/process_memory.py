"""How much memory this process has really been given."""

from __future__ import annotations

from pathlib import Path

import pytest


def resident() -> int:
    """Bytes of memory that this process has really been given."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


tells_memory = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is reported by /proc")
