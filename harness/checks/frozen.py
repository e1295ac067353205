"""Finds host values that a capture freezes into its graph, including those that no replay of the scenario exposes.

A bucket is captured again by a backend without history, with other values of all numbers that change between batches:
lengths, the host mirror and its sum, pool rows, accept lengths. The two graphs must do the same work. A host value that
differs between them, but not between two captures of the same batch, is frozen: every later replay repeats it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.graphs.audit import AuditTally
from nsa_oracle.harness.graphs.host_values import STRUCTURE, NodeValues, differences
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.reference.types import ForwardMode


def frozen_value(engine: Engine, scenario: Scenario, build: Callable[[Scenario], Engine]) -> Finding | None:
    """A host value that is frozen into one graph of ``engine``, or None. The scenario's seed chooses the graph.

    build: makes an engine without history. Undecidable cases are counted in ``engine.audit`` and not reported.
    """
    if not engine.graphs or scenario.setup.is_far:  # far memory takes gigabytes per engine
        return None
    (mode, bs), bound = sorted(engine.graphs.items(), key=_sort_key)[scenario.seed % len(engine.graphs)]
    batch = other_batch(scenario.setup, mode, bs)
    tally = engine.audit
    before = bound.graph.host_values()

    other = _captured(build, scenario, mode, bs, batch, tally)
    if other is None:
        return None
    tally.compared += 1
    differing = differences(before, other)
    if not differing:
        return None

    # The control: a difference between two captures of the same batch is no frozen value.
    again = _captured(build, scenario, mode, bs, None, tally)
    if again is None:
        return None
    unsteady = differences(before, again)
    if any(d.name in STRUCTURE for d in unsteady):
        tally.missed("graphs that differ between two captures of the same batch")
        return None
    places = {(d.node, d.name) for d in unsteady}
    frozen = next((d for d in differing if (d.node, d.name) not in places), None)
    if frozen is None:
        return None
    lengths = " ".join(map(str, batch.seq_lens[:4])) + (" ..." if bs > 4 else "")
    place = f"{frozen.what}, node {frozen.node} of the {mode.value} graph of bucket {bs}"
    return Finding(
        Kind.FROZEN,
        frozen.name,
        f"{frozen.second} when captured at lengths {lengths}",
        f"{frozen.first}, as when captured on padding",
        place=place,
    )


def other_batch(setup: Setup, mode: ForwardMode, bs: int) -> Batch:
    """A legal batch of ``bs`` requests that shares as little as possible with padding. Its mirror is wrong, too."""
    longest, drafts = setup.max_seq_len, setup.num_draft_tokens
    seq_lens = tuple(longest - request % longest for request in range(bs))
    mirror = tuple(max(2, length - 1) for length in seq_lens)
    pool_rows = tuple((setup.pool_size - 1 - request) % setup.pool_size for request in range(bs))
    accepts = tuple((drafts - 1 - request) % (drafts + 1) for request in range(bs))
    return Batch(mode, pool_rows, seq_lens, mirror, accepts)


def _captured(
    build: Callable[[Scenario], Engine],
    scenario: Scenario,
    mode: ForwardMode,
    bs: int,
    batch: Batch | None,
    tally: AuditTally,
) -> list[NodeValues] | None:
    """The host values of a new capture of ``batch``, or of padding if it is None; None if the capture fails."""
    engine = build(scenario)
    engine.place(_full_pool(scenario.setup))
    try:
        engine.capture(mode, bs, batch)
    except Exception as error:
        tally.missed(f"graphs that cannot be captured once more ({type(error).__name__})")
        return None
    return list(engine.graphs[mode, bs].graph.host_values())


def _full_pool(setup: Setup) -> np.ndarray:
    """A page mapping in which every token of every row has an existing slot: [pool_size, max_context_len] int32."""
    tokens = np.arange(setup.pool_size * setup.max_context_len, dtype=np.int64)
    first, count = setup.page_size, setup.pool_size * setup.pages_per_request * setup.page_size
    return (first + tokens % count).astype(np.int32).reshape(setup.pool_size, setup.max_context_len)


def _sort_key(item: tuple[tuple[ForwardMode, int], object]) -> tuple[str, int]:
    (mode, bs), _ = item
    return mode.value, bs
