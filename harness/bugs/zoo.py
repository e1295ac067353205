"""All bugs of the catalogue, by name."""

from __future__ import annotations

from nsa_oracle.harness.bugs.bug import Bug
from nsa_oracle.harness.bugs.catalogue import (
    accepts,
    attention,
    buffers,
    caches,
    graphs,
    layer,
    limits,
    padding,
    prefills,
    repeats,
    selection,
    steps,
    tables,
)

MODULES = (
    buffers, steps, padding, accepts, tables, repeats, limits, caches, selection, attention, layer, prefills, graphs
)  # fmt: skip
ZOO: dict[str, Bug] = {bug.name: bug for module in MODULES for bug in module.BUGS}
