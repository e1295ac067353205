"""Compares the results of a layer with the reference, stage by stage: caches, index logits, selected slots, attention.

Each stage is compared with what the reference computes from the stage's own inputs, which in a chain are those that the
layer computed. One bug is therefore one failure, at the stage that has it. Integers, cache bytes, and all numbers in an
exact regime must be equal. Ordinary numbers must stay within a bound derived from their operands (``checks.bounds``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nsa_oracle.harness.checks.caches import compare_caches, with_canonical_nans
from nsa_oracle.harness.checks.floats import FloatCheck
from nsa_oracle.harness.checks.places import SlotLabels
from nsa_oracle.harness.checks.selection import SelectedEntries, compare_edge_logits, compare_entries, scores_of
from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.engine.expected import LayerRows
from nsa_oracle.harness.engine.judged_layer import JudgedLayer
from nsa_oracle.harness.engine.observations import Feed, LayerObservation, LayerStep, Stored, dense_copy
from nsa_oracle.harness.engine.passes import Pass, map_tensors
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.memory.bits import same_bits
from nsa_oracle.harness.subjects.result_checks import wrong_shape_or_dtype
from nsa_oracle.reference import kv_cache
from nsa_oracle.reference.types import AttentionCaches, AttentionInputs, AttentionOutputs, ForwardMode, Metadata


@dataclass(frozen=True)
class JudgedPass:
    """The results of a pass that was compared, and the counts of that comparison."""

    outputs: AttentionOutputs
    positions: torch.Tensor | None
    ragged: torch.Tensor | None
    tally: LayerTally

    def is_repeated_by(self, step: LayerStep, rows: int) -> bool:
        """Whether ``step`` has the same bits in its first ``rows`` rows."""
        pairs = [(getattr(self.outputs, name), tensor) for name, tensor in vars(step.outputs).items()]
        pairs += [(self.positions, step.positions), (self.ragged, step.ragged)]
        return all(_same_rows(one, other, rows) for one, other in pairs)


def _same_rows(one: torch.Tensor | None, other: torch.Tensor | None, rows: int) -> bool:
    if one is None or other is None or not (one.dim() and other.dim()):
        return one is other
    return same_bits(one[:rows], other[:rows])


class StageJudge:
    """Compares the observations of one layer, stage by stage."""

    def __init__(self, layer: JudgedLayer, tally: LayerTally) -> None:
        self.layer = layer
        self.config = layer.config
        self.expected = layer.expected
        self.tally = tally
        self.labels = SlotLabels(layer.world, layer.setup.page_size, layer.content)
        self.floats = FloatCheck(layer, self.labels)
        self.judged: list[JudgedPass] = []  # passes of the last compared call, in order

    def compare(
        self, seen: LayerObservation, metadata: Sequence[Metadata], before: Sequence[JudgedPass] = ()
    ) -> Finding | None:
        """The first disagreement in step and stage order, or None.

        before: the passes of the same call in the scenario's first run. A pass that gives the same bits again is right:
        inputs, caches and metadata are the same in both runs, except for unspecified content.
        """
        self.judged = []
        if seen.modified is not None:
            step, name, write = seen.modified
            how = seen.feed.value
            if write is not None:
                return Finding(Kind.INPUT, name, write.shown, "no write", step, place=write.place, how=how)
            return Finding(Kind.INPUT, name, "changed content", "the content that it was given", step, how=how)

        caches = dense_copy(seen.load.caches)  # updated pass by pass to their expected content
        for step, (got, a_pass) in enumerate(zip(seen.steps, seen.load.passes, strict=True)):
            rows = self.expected.rows(a_pass, metadata[step], caches)
            known = before[step] if step < len(before) and before[step].is_repeated_by(got, a_pass.rows) else None
            finding = (
                self._compare_caches(
                    got.caches, caches, self.labels.slot, a_pass.inputs, partial(self.labels.row, a_pass)
                )
                or self._compare_pass(got, rows, a_pass, seen, known)
                or self._compare_unused_tail(got, seen, self._rows_of(seen, a_pass))
            )
            if finding is not None:
                return dataclasses.replace(finding, step=step, how=seen.feed.value)
        finding = None if seen.stored is None else self._compare_stored(seen.stored, caches)
        if finding is None and seen.scored is not None:
            finding = self.floats.compare_edge_scores(seen.scored, self.tally)
        if finding is None and seen.selected is not None:
            finding = compare_edge_logits(seen.selected, self.layer, self.tally)
        return finding if finding is None else dataclasses.replace(finding, how=Feed.ISOLATED.value)

    def _compare_stored(self, seen: Stored, caches: AttentionCaches) -> Finding | None:
        """Compare a store of edge-case keys. Stores them into ``caches``, too. Any NaN equals any other."""
        given = seen.given
        inputs = map_tensors(given.inputs, lambda tensor: tensor.to(caches.kv.device))
        kv_cache.store_cache(self.config, caches, inputs)

        def name(slot: int) -> str:
            kind = given.kind_in(slot)
            return self.labels.slot(slot) if kind is None else f"slot {slot} (a made-up key: {kind.value})"

        got, want = (with_canonical_nans(self.config, stored, inputs.out_cache_loc) for stored in (seen.caches, caches))
        finding = self._compare_caches(got, want, name, inputs, "row {} of the made-up keys".format)
        if finding is not None:
            return dataclasses.replace(finding, step=0)
        for kind in given.kinds:
            self.tally.keys[kind.value] = self.tally.keys.get(kind.value, 0) + 1
        return None

    def _compare_caches(
        self,
        seen: AttentionCaches,
        expected: AttentionCaches,
        slot_name: Callable[[int], str],
        inputs: AttentionInputs,
        row_name: Callable[[int], str],
    ) -> Finding | None:
        setup = self.layer.setup
        assert setup.layer is not None
        slot = setup.layer.padding_slot
        return compare_caches(
            self.config, setup.page_size, seen, expected, slot_name, self.tally, inputs, row_name, slot
        )

    def _compare_pass(
        self, got: LayerStep, rows: LayerRows, a_pass: Pass, seen: LayerObservation, known: JudgedPass | None
    ) -> Finding | None:
        """The first disagreement of a pass. known: an earlier pass with the same bits, which is not compared again."""
        feed = seen.feed
        total, self.tally = self.tally, LayerTally() if known is None else known.tally
        finding = None
        if known is None:
            want_logits = got.fed if got.fed is not None else self.expected.logits(rows)
            attended = got.outputs.indices[: a_pass.rows]
            if feed is Feed.ISOLATED:
                attended = self.expected.indices_with_holes(rows, want_logits)
            finding = (
                self._compare_shapes(got, rows, self._rows_of(seen, a_pass), feed)
                or self.floats.compare_logits(got, want_logits, rows, a_pass, self.tally)
                or self._compare_selection(got, want_logits, rows, a_pass, feed)
                or self.floats.compare_attention(got, attended, rows, a_pass, self.tally)
            )
        self.judged.append(JudgedPass(got.outputs, got.positions, got.ragged, self.tally))
        total.add(self.tally)
        self.tally = total
        return finding

    @property
    def _topk(self) -> int:
        return self.expected.reference.config.index_topk

    def _rows_of(self, seen: LayerObservation, a_pass: Pass) -> int:
        """Number of rows of a pass that the metadata has, in a graph including padding rows."""
        if seen.bucket is None:
            return a_pass.rows
        return seen.bucket * self.expected.reference.config.rows_per_request(seen.batch.mode)

    @property
    def _extra_rows(self) -> int:
        """Rows of each pass behind those of the metadata."""
        layer = self.layer.setup.layer
        return 0 if layer is None else layer.extra_rows

    def _compare_shapes(self, got: LayerStep, rows: LayerRows, count: int, feed: Feed) -> Finding | None:
        """count: number of rows of the metadata. A stage by itself has no others, but for the store."""
        extra = 0 if feed is Feed.ISOLATED else self._extra_rows
        for name, dtype, shape in (
            ("logits", torch.float32, (count, rows.page_table_1.shape[1])),
            ("indices", torch.int32, (count + extra, self._topk)),
            ("out", torch.bfloat16, (count + extra, self.config.num_heads, self.config.kv_lora_rank)),
            ("lse", torch.float32, (count + extra, self.config.num_heads)),
        ):
            finding = wrong_shape_or_dtype(name, getattr(got.outputs, name), dtype, shape, self.layer.device)
            if finding is not None:
                return finding
        return None

    def _compare_selection(
        self, got: LayerStep, want_logits: torch.Tensor, rows: LayerRows, a_pass: Pass, feed: Feed
    ) -> Finding | None:
        """Compare top-k, by itself and with each transform. In a chain it selects from the layer's own logits."""
        logits = want_logits if feed is Feed.ISOLATED else got.outputs.logits[: a_pass.rows]
        stages = [("indices", got.outputs.indices, self.expected.indices)]
        if got.positions is not None:
            stages.insert(0, ("topk_indices", got.positions, self.expected.positions))
        if got.ragged is not None:
            stages.append(("topk_ragged", got.ragged, self.expected.ragged))
        for name, seen, expect in stages:
            entries = SelectedEntries(
                name,
                seen[: a_pass.rows] if seen.dim() else seen,
                expect(rows, logits),
                scores=partial(scores_of, name, rows, logits),
                row_name=partial(self.labels.row, a_pass),
                entry_name=self._slot_of_row if name == "indices" else _entry_of_row,
            )
            finding = compare_entries(entries, self.layer.weaker.get(name), self.tally)
            if finding is not None:
                return finding
        return None

    def _compare_unused_tail(self, got: LayerStep, seen: LayerObservation, count: int) -> Finding | None:
        """Compare the tail of DRAFT_EXTEND in a graph. Its rows see no key: no slot, logits and lse -inf, out 0.

        It ends with the ``count`` rows of the metadata.
        """
        live = int(sum(seen.batch.accept_lengths)) if seen.batch.mode is ForwardMode.DRAFT_EXTEND else None
        if seen.feed is not Feed.GRAPH or live is None:
            return None
        for name, value in (("logits", -torch.inf), ("indices", -1), ("out", 0), ("lse", -torch.inf)):
            tensor = getattr(got.outputs, name)[live:count]
            self.tally.stage(name).exact += tensor.numel()
            wrong = tensor != value
            if bool(wrong.any()):
                first = tuple(int(i) for i in wrong.nonzero()[0])
                got_text, at = str(tensor[first].item()), f"row {live + first[0]} (unused tail)"
                return Finding(Kind.VALUE, name, got_text, str(value), None, at, int(wrong.sum()), wrong.numel())
        return None

    def _slot_of_row(self, row: int, slot: int) -> str:
        return self.labels.slot(slot)


def _entry_of_row(row: int, entry: int) -> str:
    return str(entry)
