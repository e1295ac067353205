"""All bugs of the catalogue, by name."""

from __future__ import annotations

from nsa_oracle.harness.bugs.bug import Bug
from nsa_oracle.harness.bugs.catalogue import accepts, buffers, graphs, limits, padding, repeats, tables
from nsa_oracle.harness.bugs.catalogue import layer as layers

MODULES = (buffers, padding, accepts, tables, repeats, limits, layers, graphs)
ZOO: dict[str, Bug] = {bug.name: bug for module in MODULES for bug in module.BUGS}
