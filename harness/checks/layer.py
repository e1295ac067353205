"""Judges what a layer computed, stage by stage: caches, index logits, selected slots, attention.

Each stage is compared with what the reference makes of the stage's own inputs, in a chain those that the backend
computed: one bug is one failure, at the stage that has it. Integers, cache bytes, and all numbers in an exact regime
must have the same value; ordinary numbers must stay within a bound derived from their operands (``harness.bounds``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from nsa_oracle.harness.checks.bounds import attention_bound, fraction_used, logits_bound
from nsa_oracle.harness.checks.selection import Entries, entries_of, scores_of
from nsa_oracle.harness.content.content import Regime
from nsa_oracle.harness.content.edge_logits import Selection
from nsa_oracle.harness.content.exactness import check_exact, check_exact_index
from nsa_oracle.harness.engine.cache_state import Pass, as_bytes, map_tensors, with_one_nan
from nsa_oracle.harness.engine.engine import Engine, LayerObservation
from nsa_oracle.harness.engine.expected import LayerRows
from nsa_oracle.harness.engine.isolated import Selected, Stored
from nsa_oracle.harness.engine.layer_driver import Feed, LayerStep, dense_copy
from nsa_oracle.harness.engine.read_only import same_bits
from nsa_oracle.harness.findings import Finding, Kind, Neighbour
from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.harness.subjects.results import wrong_form
from nsa_oracle.reference import attention, kv_cache
from nsa_oracle.reference.topk import topk_indices, transform_paged, transform_ragged
from nsa_oracle.reference.types import AttentionCaches, AttentionOutputs, ForwardMode, KVCacheDtype, Metadata

NEIGHBOURS = 3  # cells shown on either side of the first difference
MOST_CHECKED = 1 << 21  # numbers of a row's keys times heads, beyond which one row a pass is checked for exactness


@dataclass
class StageTally:
    """How many numbers of a stage were compared, and how. worst: largest fraction of the error bound that was used.

    declared: the value of the ``Strictness`` in which the ``weaker`` ones were compared.
    """

    exact: int = 0
    bounded: int = 0
    weaker: int = 0
    worst: float = 0.0
    declared: str = ""

    def count_weaker(self, count: int, declared: Strictness) -> None:
        self.weaker += count
        self.declared = declared.value

    def add(self, other: StageTally) -> None:
        self.exact += other.exact
        self.bounded += other.bounded
        self.weaker += other.weaker
        self.worst = max(self.worst, other.worst)
        self.declared = self.declared or other.declared


@dataclass
class LayerTally:
    """What was compared of layers, by stage; how often each relation was tried; how many replays had a layer.

    selections, keys: how many rows of made-up logits top-k was given, and of made-up keys the store, by kind.
    """

    stages: dict[str, StageTally] = field(default_factory=dict)
    relations: dict[str, int] = field(default_factory=dict)
    replays: int = 0
    selections: dict[str, int] = field(default_factory=dict)
    keys: dict[str, int] = field(default_factory=dict)

    def stage(self, name: str) -> StageTally:
        return self.stages.setdefault(name, StageTally())

    def count(self, relation: str) -> None:
        self.relations[relation] = self.relations.get(relation, 0) + 1

    def add(self, other: LayerTally) -> None:
        for name, tally in other.stages.items():
            self.stage(name).add(tally)
        for mine, theirs in (
            (self.relations, other.relations),
            (self.selections, other.selections),
            (self.keys, other.keys),
        ):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        self.replays += other.replays


@dataclass(frozen=True)
class Judged:
    """A pass of the layer that is right, and what was counted of it."""

    outputs: AttentionOutputs
    positions: torch.Tensor | None
    ragged: torch.Tensor | None
    tally: LayerTally

    def is_repeated_by(self, step: LayerStep, rows: int) -> bool:
        """Whether ``step`` gave the same bits in all of its ``rows``."""
        pairs = [(getattr(self.outputs, name), tensor) for name, tensor in vars(step.outputs).items()]
        pairs += [(self.positions, step.positions), (self.ragged, step.ragged)]
        return all(_same_rows(one, other, rows) for one, other in pairs)


def _same_rows(one: torch.Tensor | None, other: torch.Tensor | None, rows: int) -> bool:
    if one is None or other is None or not (one.dim() and other.dim()):
        return one is other
    return same_bits(one[:rows], other[:rows])


class StageJudge:
    """Compares what one engine's layer showed. ``weaker``: what the layer declares, by stage."""

    def __init__(self, engine: Engine, weaker: Mapping[str, Strictness], tally: LayerTally) -> None:
        assert engine.layer is not None
        self.engine = engine
        self.config = engine.layer.config
        self.expected = engine.expected_layer
        self.content = engine.cache_state.content
        self.weaker = weaker
        self.tally = tally
        self.judged: list[Judged] = []  # the passes of the call that was compared last, as far as they are right

    def compare(
        self, seen: LayerObservation, metadata: Sequence[Metadata], before: Sequence[Judged] = ()
    ) -> Finding | None:
        """The first disagreement in stage and step order, or None.

        before: the passes of the same call in the scenario's other run. One that gave the same bits is as right now:
        inputs, caches and metadata are the same where anything may look at them.
        """
        self.judged = []
        if seen.modified is not None:
            step, name = seen.modified
            how = seen.feed.value
            return Finding(Kind.INPUT, name, "changed content", "the content that it was given", step, how=how)

        caches = dense_copy(seen.load.caches)  # as each pass in turn must leave them
        for step, (got, a_pass) in enumerate(zip(seen.steps, seen.load.passes, strict=True)):
            rows = self.expected.rows(a_pass, metadata[step], caches)
            known = before[step] if step < len(before) and before[step].is_repeated_by(got, a_pass.rows) else None
            finding = (
                self._compare_caches(got.caches, caches)
                or self._compare_pass(got, rows, a_pass, seen, known)
                or self._compare_unused(got, seen)
            )
            if finding is not None:
                return dataclasses.replace(finding, step=step, how=seen.feed.value)
        finding = None if seen.stored is None else self._compare_stored(seen.stored, caches)
        return finding or (None if seen.selected is None else self._compare_selected(seen.selected))

    def _compare_stored(self, seen: Stored, caches: AttentionCaches) -> Finding | None:
        """Made-up keys, stored into ``caches``. One NaN is like any other."""
        given = seen.given
        inputs = map_tensors(given.inputs, lambda tensor: tensor.to(caches.kv.device))
        kv_cache.store_cache(self.config, caches, inputs)

        def name(slot: int) -> str:
            kind = given.kind_in(slot)
            return self._slot(slot) if kind is None else f"slot {slot} (a made-up key: {kind.value})"

        got, want = (with_one_nan(self.config, stored, inputs.out_cache_loc) for stored in (seen.caches, caches))
        finding = self._compare_caches(got, want, name)
        if finding is not None:
            return dataclasses.replace(finding, step=0, how=Feed.ISOLATED.value)
        for kind in given.kinds:
            self.tally.keys[kind.value] = self.tally.keys.get(kind.value, 0) + 1
        return None

    def _compare_caches(
        self, seen: AttentionCaches, expected: AttentionCaches, slot_name: Callable[[int], str] | None = None
    ) -> Finding | None:
        """Every byte but those of the dummy page: that what was to be written is there, and nothing else."""
        page_size = self.engine.setup.page_size
        for name, got, want, skipped in (
            ("kv_cache", seen.kv.flatten(1), expected.kv.flatten(1), page_size),
            ("index_k_cache", seen.index_k, expected.index_k, 1),
        ):
            got_bytes, want_bytes = as_bytes(got)[skipped:], as_bytes(want)[skipped:]
            self.tally.stage(name).exact += want_bytes.numel()
            wrong = got_bytes != want_bytes
            if not bool(wrong.any()):
                continue
            unit, byte = (int(i) for i in wrong.nonzero()[0])
            slot, part = self._cache_place(name, unit + skipped, byte)
            return Finding(
                Kind.VALUE,
                name,
                f"byte {int(got_bytes[unit, byte]):#04x}",
                f"byte {int(want_bytes[unit, byte]):#04x}",
                place=f"{(slot_name or self._slot)(slot)}, {part}",
                differing=int(wrong.sum()),
                compared=want_bytes.numel(),
            )
        return None

    def _cache_place(self, name: str, unit: int, byte: int) -> tuple[int, str]:
        """The slot, and the part of its token, that a byte of a cache belongs to."""
        config = self.config
        if name == "index_k_cache":
            page_size = self.engine.setup.page_size
            keys = page_size * config.index_head_dim
            if byte < keys:
                return unit * page_size + byte // config.index_head_dim, f"key element {byte % config.index_head_dim}"
            return unit * page_size + (byte - keys) // 4, "scale"
        if config.kv_cache_dtype is KVCacheDtype.BF16:
            element = byte // 2
            latent = element < config.kv_lora_rank
            return unit, f"latent element {element}" if latent else f"RoPE element {element - config.kv_lora_rank}"
        if byte < config.kv_lora_rank:
            return unit, f"latent element {byte}"
        rope = config.kv_token_bytes - 2 * config.qk_rope_head_dim
        if byte < rope:
            return unit, f"scale {(byte - config.kv_lora_rank) // 4}"
        return unit, f"RoPE element {(byte - rope) // 2}"

    def _compare_pass(
        self, got: LayerStep, rows: LayerRows, a_pass: Pass, seen: LayerObservation, known: Judged | None
    ) -> Finding | None:
        """The first stage of a pass that is wrong, given the stage before it."""
        feed = seen.feed
        total, self.tally = self.tally, LayerTally() if known is None else known.tally
        finding = None
        if known is None:
            want_logits = got.fed if got.fed is not None else self.expected.logits(rows)
            finding = (
                self._compare_shapes(got, rows, self._rows_of(seen, a_pass))
                or self._compare_logits(got, want_logits, rows, a_pass)
                or self._compare_selection(got, want_logits, rows, a_pass, feed)
                or self._compare_attention(got, want_logits, rows, a_pass, feed)
            )
        self.judged.append(Judged(got.outputs, got.positions, got.ragged, self.tally))
        total.add(self.tally)
        self.tally = total
        return finding

    def _rows_of(self, seen: LayerObservation, a_pass: Pass) -> int:
        """How many rows a pass has, in a graph those of padding included."""
        if seen.bucket is None:
            return a_pass.rows
        return seen.bucket * self.engine.config.rows_per_request(seen.batch.mode)

    def _compare_shapes(self, got: LayerStep, rows: LayerRows, count: int) -> Finding | None:
        topk = self.expected.reference.config.index_topk
        for name, dtype, shape in (
            ("logits", torch.float32, (rows.page_table_1.shape[1],)),
            ("indices", torch.int32, (topk,)),
            ("out", torch.bfloat16, (self.config.num_heads, self.config.kv_lora_rank)),
            ("lse", torch.float32, (self.config.num_heads,)),
        ):
            finding = wrong_form(name, getattr(got.outputs, name), dtype, (count, *shape), self.engine.device)
            if finding is not None:
                return finding
        return None

    def _compare_logits(self, got: LayerStep, want: torch.Tensor, rows: LayerRows, a_pass: Pass) -> Finding | None:
        bound = torch.zeros_like(want, dtype=torch.float64) if self._is_bounded("logits") else None
        for row, length in enumerate(a_pass.seqlens):
            values, scales = self._index_keys(rows, row, length)
            query, weights = rows.inputs.index_q[row], rows.inputs.index_weights[row]
            if bound is not None:
                bound[row, :length] = logits_bound(self.config, query[None], weights[None], values, scales)[0]
            if self.content.regime.is_exact and self._is_checked(
                a_pass, row, values.numel() * self.config.index_n_heads
            ):
                check_exact_index(self.config, query, weights, values, scales)
        return self._compare_numbers("logits", got.outputs.logits[: a_pass.rows], want, bound, a_pass, "token")

    def _compare_selection(
        self, got: LayerStep, want_logits: torch.Tensor, rows: LayerRows, a_pass: Pass, feed: Feed
    ) -> Finding | None:
        """Top-k, by itself and with each transform. In a chain it selects by the layer's own logits."""
        logits = want_logits if feed is Feed.ISOLATED else got.outputs.logits[: a_pass.rows]
        stages = [("indices", got.outputs.indices, self.expected.indices)]
        if got.positions is not None:
            stages.insert(0, ("topk_indices", got.positions, self.expected.positions))
        if got.ragged is not None:
            stages.append(("topk_ragged", got.ragged, self.expected.ragged))
        for name, seen, expect in stages:
            finding = self._compare_entries(
                Entries(
                    name,
                    seen[: a_pass.rows] if seen.dim() else seen,
                    expect(rows, logits),
                    scores=partial(scores_of, name, rows, logits),
                    row_name=partial(self._row, a_pass),
                    entry_name=self._slot_of_row if name == "indices" else _number_of_row,
                )
            )
            if finding is not None:
                return finding
        return None

    def _compare_selected(self, seen: Selected) -> Finding | None:
        """Top-k by itself, of made-up logits."""
        given, topk = seen.given, self.expected.reference.config.index_topk
        logits, lengths, offset = given.logits, given.seqlens_expanded, given.topk_indices_offset
        positions = topk_indices(logits, lengths, topk)
        for name, got, want in (
            ("topk_indices", seen.positions, positions),
            ("indices", seen.indices, transform_paged(positions, given.page_table_1)),
            ("topk_ragged", seen.ragged, transform_ragged(positions, offset)),
        ):
            if got is None:
                continue
            finding = self._compare_entries(
                Entries(
                    name,
                    got,
                    want.to(self.engine.device),
                    scores=partial(scores_of, name, given, logits),
                    row_name=partial(_row_of_selection, given),
                    entry_name=partial(_entry_of_selection, name, given),
                )
            )
            if finding is not None:
                return dataclasses.replace(finding, how=Feed.ISOLATED.value)
        for kind in given.kinds:
            self.tally.selections[kind.value] = self.tally.selections.get(kind.value, 0) + 1
        return None

    def _compare_entries(self, entries: Entries) -> Finding | None:
        """Bit by bit, or as the layer declares."""
        finding = entries.wrong_form()
        if finding is not None:
            return finding
        tally, declared = self.tally.stage(entries.name), self.weaker.get(entries.name)
        if declared is Strictness.SAME_SET:
            tally.count_weaker(entries.want.numel(), declared)
        else:
            tally.exact += entries.want.numel()
        return entries.first_wrong(as_sets=declared is Strictness.SAME_SET)

    def _compare_attention(
        self, got: LayerStep, want_logits: torch.Tensor, rows: LayerRows, a_pass: Pass, feed: Feed
    ) -> Finding | None:
        count, q, cache = a_pass.rows, rows.inputs.q, rows.caches.kv
        indices = got.outputs.indices[:count]
        if feed is Feed.ISOLATED:
            indices = self.expected.indices_with_holes(rows, want_logits)
        out, lse = attention.unrounded(self.config, q, cache, indices)
        out_bound, lse_bound = None, None
        if self._is_bounded("out") or self._is_bounded("lse"):
            keys = [kv_cache.load_kv(self.config, cache, row[row >= 0]) for row in indices]
            out_bound, lse_bound = attention_bound(self.config, q, keys)
        if self.content.regime.is_exact:
            self._check_exact(q, cache, indices, a_pass)
        if not self._is_bounded("out"):
            out, out_bound = out.to(torch.float32).to(torch.bfloat16), None
        if lse_bound is None or not self._is_bounded("lse"):
            # Weights and their sum are exact: what is left is a logarithm, a product and a sum.
            counts = (indices >= 0).sum(1, keepdim=True).clamp(min=1)
            lse_bound = 2.0**-21 * (lse.abs() + 2 * counts.double().log() + 1)
        finding = self._compare_numbers("out", got.outputs.out[:count], out, out_bound, a_pass, "head")
        return finding or self._compare_numbers("lse", got.outputs.lse[:count], lse, lse_bound, a_pass, "head")

    def _check_exact(self, q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor, a_pass: Pass) -> None:
        """That the content of the rows is as exact as it is meant to be."""
        for row, slots in enumerate(indices):
            keys = slots[slots >= 0]
            if self._is_checked(a_pass, row, len(keys) * self.config.qk_head_dim * self.config.num_heads):
                check_exact(self.config, self.content.regime, q[row], kv_cache.load_kv(self.config, cache, keys))

    def _is_bounded(self, name: str) -> bool:
        """Whether the numbers of a stage need only stay within the error bound of ordinary ones."""
        return not self.content.regime.is_exact or self.weaker.get(name) is Strictness.BOUND

    def _is_checked(self, a_pass: Pass, row: int, numbers: int) -> bool:
        """Whether a row's inputs are checked against the premises of exactness. All are, unless that takes long."""
        return numbers <= MOST_CHECKED or row == a_pass.rows - 1

    def _compare_numbers(
        self,
        name: str,
        got: torch.Tensor,
        want: torch.Tensor,
        bound: torch.Tensor | None,
        a_pass: Pass,
        axis: str,
    ) -> Finding | None:
        """By value if there is no bound: zeros of either sign are equal, and so are NaN."""
        tally, declared = self.tally.stage(name), self.weaker.get(name)
        kind = Kind.VALUE
        if bound is not None:
            fraction = fraction_used(got, want, bound)
            wrong = ~(fraction <= 1)
            tally.worst = max(tally.worst, float(fraction[~wrong].max()) if bool((~wrong).any()) else 0.0)
            kind = Kind.BOUND
            if self.content.regime.is_exact and declared is Strictness.BOUND:
                tally.count_weaker(want.numel(), declared)
            else:
                tally.bounded += want.numel()
        elif declared is Strictness.ONE_STEP:
            wrong = _bf16_steps(got, want) > 1
            tally.count_weaker(want.numel(), declared)
        else:
            wrong = ~((got == want) | (got.isnan() & want.isnan()))
            tally.exact += want.numel()
        if not bool(wrong.any()):
            return None
        first = [int(i) for i in wrong.nonzero()[0]]
        at = f"{self._row(a_pass, first[0])}, {axis} {first[1]}" + "".join(f", element {i}" for i in first[2:])
        got_text, want_text = (f"{float(tensor[tuple(first)]):.9g}" for tensor in (got, want))
        if name == "out" and self.content.regime is Regime.DOMINATING:
            got_text += self._origin(got[first[0], first[1]])
            want_text += self._origin(want[first[0], first[1]])
        return Finding(
            kind, name, got_text, want_text, place=at, differing=int(wrong.sum()), compared=want.numel(),
            neighbours=tuple(self._around(got, want, first, at)),
        )  # fmt: skip

    def _around(self, got: torch.Tensor, want: torch.Tensor, first: list[int], at: str) -> list[Neighbour]:
        *outer, inner = first
        place = at.rsplit(" ", 1)[0]
        near = range(max(0, inner - NEIGHBOURS), min(got.shape[-1], inner + NEIGHBOURS + 1))
        cells = [(i, float(got[(*outer, i)]), float(want[(*outer, i)])) for i in near]
        return [Neighbour(f"{place} {i}", f"{a:.9g}", f"{b:.9g}") for i, a, b in cells]

    def _compare_unused(self, got: LayerStep, seen: LayerObservation) -> Finding | None:
        """Rows that a graph reserves and the batch does not use see no key: no slot, output 0, lse -inf."""
        live = int(sum(seen.batch.accept_lengths)) if seen.batch.mode is ForwardMode.DRAFT_EXTEND else None
        if seen.feed is not Feed.GRAPH or live is None:
            return None
        for name, value in (("logits", -torch.inf), ("indices", -1), ("out", 0), ("lse", -torch.inf)):
            tensor = getattr(got.outputs, name)[live:]
            self.tally.stage(name).exact += tensor.numel()
            wrong = tensor != value
            if bool(wrong.any()):
                first = tuple(int(i) for i in wrong.nonzero()[0])
                got_text, at = str(tensor[first].item()), f"row {live + first[0]} (unused tail)"
                return Finding(Kind.VALUE, name, got_text, str(value), None, at, int(wrong.sum()), wrong.numel())
        return None

    # Names for a person.

    def _row(self, a_pass: Pass, row: int) -> str:
        return f"row {row} (request {a_pass.requests[row]}, draft token {a_pass.tokens[row]})"

    def _slot(self, slot: int) -> str:
        """A slot, and whose token lies there."""
        if slot < 0:
            return str(slot)
        world, page_size = self.engine.world, self.engine.setup.page_size
        for number, request in enumerate(world.running):
            if slot // page_size in request.pages:
                position = request.pages.index(slot // page_size) * page_size + slot % page_size
                return f"slot {slot} (running request {number}, position {position})"
        return f"slot {slot} (nobody's)"

    def _slot_of_row(self, row: int, slot: int) -> str:
        return self._slot(slot)

    def _origin(self, value: torch.Tensor) -> str:
        """Which slot an output was read from, where one key has all the weight."""
        origin = self.content.decode(value)
        return " (no one key's value)" if origin is None else f" (the value of {self._slot(origin.slot)})"

    def _index_keys(self, rows: LayerRows, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Index keys of a row's visible tokens as cached: e4m3 [n, dim], and their scales [n]."""
        slots = rows.page_table_1[row, :length]
        values, scales = kv_cache.load_index_k(self.config, rows.caches.index_k, slots)
        return values.to(torch.float8_e4m3fn), scales


def _number_of_row(row: int, entry: int) -> str:
    return str(entry)


def _row_of_selection(given: Selection, row: int) -> str:
    return f"row {row} (made-up logits: {given.kinds[row].value}, length {int(given.seqlens_expanded[row])})"


def _entry_of_selection(name: str, given: Selection, row: int, entry: int) -> str:
    """An entry, and the logit that it was selected for."""
    entries = entries_of(name, given, row)
    if entry not in entries:
        return str(entry)
    position = entries.index(entry)
    at = "" if name == "topk_indices" else f"position {position}, "
    return f"{entry} ({at}logit {float(given.logits[row, position]):.9g})"


def _bf16_steps(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """How many bf16 numbers lie from one to the other."""

    def place(numbers: torch.Tensor) -> torch.Tensor:
        bits = numbers.to(torch.bfloat16).contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(got) - place(want)).abs()
