"""Changes that must not change one bit of a request's results, on any data.

After a call of the layer, the same batch is served again under one change: by a backend without history, in another
order, alone, with other padding, from other pages, without the graph. The batch comes from the middle of a scenario, so
each relation is checked after some history.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nsa_oracle.harness.checks.cells import picture_of, shown_number
from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.observations import Feed, LayerLoad, LayerObservation, LayerStep
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.scenario import Capture, Scenario, graph_mode
from nsa_oracle.harness.subjects.result_checks import wrong_shape_or_dtype
from nsa_oracle.reference.types import AttentionCaches, AttentionOutputs


class Relation(enum.StrEnum):
    """The change under which results must stay the same. Reports show the values."""

    COLD = "captured by a backend without history"
    TWICE = "replayed twice"
    REPEATED = "replayed again without a preparation"
    EAGER = "run without the graph"
    ALONE = "a request alone"
    PERMUTED = "requests in reverse order"
    PADDED = "another bucket"
    RELABELLED = "other pages"
    POISONED = "other content of unspecified memory"
    MANY = "rows many times over, a stage by itself"


@dataclass(frozen=True)
class Variation:
    """A changed repetition of the same work. order: its requests, as indices in the original batch."""

    batch: Batch
    order: tuple[int, ...]
    load: LayerLoad
    bucket: int | None
    req_to_token: np.ndarray
    original_slot: Callable[[torch.Tensor], torch.Tensor] = lambda slots: slots


EngineFactory = Callable[[Scenario], Engine]


class Relations:
    """Checks one relation after each call, in turn. build: makes an engine without history."""

    def __init__(self, scenario: Scenario, build: EngineFactory) -> None:
        self.scenario = scenario
        self.build = build
        self.turn = scenario.seed

    def check(self, engine: Engine, seen: LayerObservation) -> tuple[Relation, Finding | None] | None:
        """The next relation, and its violation by the layer, if any. None if no relation applies to this call."""
        fitting = list(self._fitting(engine, seen))
        if not fitting:
            return None
        relation, rerun = fitting[self.turn % len(fitting)]
        self.turn += 1
        return relation, rerun()

    def check_all(self, engine: Engine, seen: LayerObservation) -> Iterator[tuple[Relation, Finding | None]]:
        """Yields each relation that applies to this call, and its violation by the layer, if any."""
        for relation, rerun in self._fitting(engine, seen):
            yield relation, rerun()

    def _fitting(
        self, engine: Engine, seen: LayerObservation
    ) -> Iterator[tuple[Relation, Callable[[], Finding | None]]]:
        if not seen.raw_bs:
            return
        batch = seen.batch.of_requests(range(seen.raw_bs))
        everyone = tuple(range(seen.raw_bs))
        table = engine.world.req_to_token
        same = Variation(batch, everyone, seen.load, seen.bucket, table)

        def rerun(relation: Relation, variation: Variation) -> tuple[Relation, Callable[[], Finding | None]]:
            return relation, lambda: self._compare(relation, seen, variation, self._run(variation))

        if seen.bucket is not None:
            yield rerun(Relation.COLD, same)
            yield rerun(Relation.EAGER, replace(same, bucket=None))
            yield rerun(Relation.PADDED, replace(same, bucket=seen.bucket + 1))
            yield (
                Relation.TWICE,
                lambda: self._compare(
                    Relation.TWICE, seen, same, _last(engine.replay(seen.bucket or 0, batch, seen.load))
                ),
            )
        yield rerun(Relation.RELABELLED, self._relabelled(same))
        if seen.raw_bs > 1:
            yield rerun(Relation.PERMUTED, _of_requests(same, everyone[::-1]))
            alone = self.turn % seen.raw_bs
            if not _reads_what_others_write(seen, alone, table):
                yield rerun(Relation.ALONE, _of_requests(same, (alone,)))

    def _run(self, variation: Variation) -> LayerObservation:
        """Run ``variation`` in a new engine."""
        bucket, mode = variation.bucket, variation.batch.mode
        events = () if bucket is None else (Capture(mode=graph_mode(mode), buckets=(bucket,)),)
        engine = self.build(self.scenario.model_copy(update={"events": events}))
        engine.place(variation.req_to_token)
        if bucket is None:
            return _last(engine.call_eagerly(variation.batch, variation.load, [Feed.CHAIN]))
        engine.capture(graph_mode(mode), bucket)
        return _last(engine.replay(bucket, variation.batch, variation.load))

    def _relabelled(self, variation: Variation) -> Variation:
        """The same requests on other pages: the order of all pages that requests can hold is reversed."""
        setup = self.scenario.setup
        page_size, last = setup.page_size, setup.num_pages - 3
        pages = np.arange(setup.num_pages)
        pages[1 : last + 1] = pages[last:0:-1]
        slots = pages[:, None] * page_size + np.arange(page_size)
        new_slot = torch.from_numpy(slots.reshape(-1))  # its own inverse

        def moved(these: torch.Tensor) -> torch.Tensor:
            """New slots for original ones, and the reverse. What is no slot, as -1, stays."""
            known = (these >= 0) & (these < len(new_slot))
            there = new_slot.to(these.device)[these.clamp(0, len(new_slot) - 1)]
            return torch.where(known, there.to(these.dtype), these)

        caches = variation.load.caches
        device = caches.kv.device
        kv, index_k = torch.empty_like(caches.kv), torch.empty_like(caches.index_k)
        kv[new_slot.to(device)] = caches.kv
        index_k[torch.from_numpy(pages).to(device)] = caches.index_k
        passes = tuple(
            replace(p, inputs=replace(p.inputs, out_cache_loc=moved(p.inputs.out_cache_loc)))
            for p in variation.load.passes
        )

        table = new_slot.numpy()[variation.req_to_token].astype(np.int32)
        return replace(
            variation,
            load=LayerLoad(passes, AttentionCaches(kv, index_k)),
            req_to_token=table,
            original_slot=moved,
        )

    def _compare(
        self, relation: Relation, seen: LayerObservation, variation: Variation, again: LayerObservation
    ) -> Finding | None:
        for step, (first, second) in enumerate(zip(seen.steps, again.steps, strict=True)):
            a_pass = seen.load.passes[step]
            rows = [row for request in variation.order for row in range(a_pass.rows) if a_pass.requests[row] == request]
            finding = differs(first.outputs, second.outputs, rows, variation.original_slot)
            if finding is not None:
                return replace(finding, step=step, how=relation.value)
        return None


def differs(
    first: AttentionOutputs,
    second: AttentionOutputs,
    rows: Sequence[int],
    original_slot: Callable[[torch.Tensor], torch.Tensor] = lambda slots: slots,
) -> Finding | None:
    """The first stage whose bits differ between ``rows`` of ``first`` and the first rows of ``second``, or None.

    original_slot: maps the slots of ``second`` to those of ``first``.
    """
    for name in ("logits", "indices", "out", "lse"):
        want = getattr(first, name)[rows]
        got = getattr(second, name)[: len(rows)]
        if name == "indices":
            got = original_slot(got)
        if want.shape != got.shape:  # eager logits are only as wide as the longest request
            width = min(want.shape[-1], got.shape[-1])
            want, got = want[..., :width], got[..., :width]
        finding = _differing_bits(name, want, got, rows)
        if finding is not None:
            return finding
    return None


def differs_among_many(seen: LayerObservation, page_size: int) -> Finding | None:
    """The first stage by itself that gave a row other bits among many rows, or None. Page 0 is nobody's."""
    many = seen.many
    if many is None:
        return None
    again = torch.arange(many.count) % many.rows
    how = f"{Relation.MANY.value}: {many.count} rows, of which {many.rows} differ"
    once, result = seen.steps[many.step], many.result
    finding = _differing_bytes("kv_cache", "slot", once.caches.kv, result.caches.kv, page_size)
    finding = finding or _differing_bytes("index_k_cache", "page", once.caches.index_k, result.caches.index_k, 1)
    if finding is not None:
        how = f"{Relation.MANY.value}: {many.count} rows, of which all but the last {many.rows} stand for no token"
        return replace(finding, step=many.step, how=how)
    given = dict(_results(result))
    for name, want in _results(once):
        got = given[name]
        if want is None or got is None or not want.dim() or len(want) < many.rows:
            continue  # another finding says so
        shape = (many.count, *want.shape[1:])
        finding = wrong_shape_or_dtype(name, got, want.dtype, shape, want.device)
        finding = finding or _differing_bits(name, want[again.to(want.device)], got, range(many.count))
        if finding is not None:
            return replace(finding, step=many.step, how=how)
    return None


def _results(step: LayerStep) -> list[tuple[str, torch.Tensor | None]]:
    """What the stages behind the store gave, by the names of reports, in their order."""
    outputs = step.outputs
    selected = [("topk_indices", step.positions), ("indices", outputs.indices), ("topk_ragged", step.ragged)]
    return [("logits", outputs.logits), *selected, ("out", outputs.out), ("lse", outputs.lse)]


def _differing_bytes(name: str, unit: str, want: torch.Tensor, got: torch.Tensor, first: int) -> Finding | None:
    """The first byte of two caches that differs, from entry ``first`` on, or None. unit: what an entry is."""
    wrong = (as_bytes(want[first:]) != as_bytes(got[first:])).flatten(1)
    if not bool(wrong.any()):
        return None
    entry, byte = (int(i) for i in wrong.nonzero()[0])
    one, other = (int(as_bytes(cache[first + entry]).flatten()[byte]) for cache in (got, want))
    place = f"{unit} {first + entry}, byte {byte}"
    return Finding(Kind.RELATION, name, f"0x{one:02x}", f"0x{other:02x}", None, place, int(wrong.sum()), wrong.numel())


def _differing_bits(name: str, want: torch.Tensor, got: torch.Tensor, rows: Sequence[int]) -> Finding | None:
    """The first element of other bits, or None. rows: their names, by number."""
    wrong = _bits(want) != _bits(got)
    if not bool(wrong.any()):
        return None
    place = [int(i) for i in wrong.nonzero()[0]]
    return Finding(
        Kind.RELATION,
        name,
        str(got[tuple(place)].item()),
        str(want[tuple(place)].item()),
        place=f"row {rows[place[0]]}, element {place[1:]}",
        differing=int(wrong.sum()),
        compared=wrong.numel(),
        picture=picture_of(
            got,
            want,
            wrong,
            "element",
            _row_of(rows) if len(place) == 2 else _row_of(rows, heads=wrong.shape[1]),
            shown=shown_number,
        ),
    )


def _row_of(rows: Sequence[int], heads: int = 0) -> Callable[[int], str]:
    """Names of rows, or of heads of rows."""
    if heads:
        return lambda number: f"row {rows[number // heads]}, head {number % heads}"
    return lambda number: f"row {rows[number]}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def _of_requests(variation: Variation, order: tuple[int, ...]) -> Variation:
    passes = tuple(a_pass.of_requests(order) for a_pass in variation.load.passes)
    return replace(
        variation,
        batch=variation.batch.of_requests(order),
        order=order,
        load=LayerLoad(passes, variation.load.caches),
    )


def _reads_what_others_write(seen: LayerObservation, alone: int, table: np.ndarray) -> bool:
    """Whether request ``alone`` sees a key, in a shared prefix, that another request writes in the same call."""
    pool_row = seen.batch.pool_rows[alone]
    longest = max(
        (n for p in seen.load.passes for r, n in zip(p.requests, p.seqlens, strict=True) if r == alone), default=0
    )
    visible = set(table[pool_row, :longest].tolist())
    written = {
        int(slot)
        for p in seen.load.passes
        for r, slot in zip(p.requests, p.inputs.out_cache_loc.tolist(), strict=True)
        if r != alone
    }
    return bool(visible & written)


def _last(observations: Iterator[object]) -> LayerObservation:
    *_, last = observations
    assert isinstance(last, LayerObservation)
    return last
