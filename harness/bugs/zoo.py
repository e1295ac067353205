"""All bugs, by name."""

from __future__ import annotations

from harness.bugs import accepts, buffers, graphs, layers, padding, tables
from harness.bugs.bug import Bug

MODULES = (buffers, padding, accepts, tables, layers, graphs)
ZOO: dict[str, Bug] = {bug.name: bug for module in MODULES for bug in module.BUGS}
