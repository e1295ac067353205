"""All bugs, by name."""

from __future__ import annotations

from harness.bugs import accepts, buffers, layers, padding, tables
from harness.bugs.bug import Bug

ZOO: dict[str, Bug] = {bug.name: bug for module in (buffers, padding, accepts, tables, layers) for bug in module.BUGS}
