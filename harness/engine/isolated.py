"""Runs each stage of a layer by itself, on the reference's result of the stage before.

The store, the indexer and top-k also run on edge-case keys, index keys and logits (``content.edge_keys``,
``content.edge_scores``, ``content.edge_logits``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nsa_oracle.harness.compiled import tier
from nsa_oracle.harness.content.edge_keys import EdgeKeys
from nsa_oracle.harness.content.edge_logits import EdgeLogits
from nsa_oracle.harness.content.edge_scores import EdgeScores
from nsa_oracle.harness.engine.expected import ExpectedLayer, LayerRows
from nsa_oracle.harness.engine.layer_driver import LayerDriver, modified_by
from nsa_oracle.harness.engine.observations import (
    Feed,
    LayerLoad,
    LayerStep,
    ManyRows,
    Modified,
    Scored,
    Selected,
    Stored,
    copied,
    dense_copy,
)
from nsa_oracle.harness.engine.passes import map_tensors
from nsa_oracle.harness.engine.read_only import ReadOnly, first_modified, handed_out
from nsa_oracle.harness.graphs.written_inputs import WrittenInputs
from nsa_oracle.harness.interpreter import speed
from nsa_oracle.harness.memory.far_apart import far_apart
from nsa_oracle.harness.memory.poison import GuardedAllocations
from nsa_oracle.harness.subjects.result_checks import locating_results, out_and_lse_of, tensor_of
from nsa_oracle.reference.types import AttentionCaches, AttentionInputs, AttentionOutputs, Metadata

# More than four for each multiprocessor of an H100, whatever tiles a kernel makes of rows, and no round number.
MANY_ROWS = 601
_MOST_PRODUCTS = 1 << 28  # on a host, of one call of a stage: half a second
_RESULT_NAMES = {
    "indexer_logits": "logits",
    "topk_transform_paged": "indices",
    "topk_transform_ragged": "topk_ragged",
}
_CACHES = ("kv_cache", "index_k_cache")  # judged by their content: a store may write to them


class IsolatedStages:
    """Runs the stages of one layer on copies of their inputs, with guard bands around all allocations."""

    def __init__(self, driver: LayerDriver, expected: ExpectedLayer, sentinel: int, repeats: bool = False) -> None:
        """repeats: run the stages of the first pass that has rows on ``MANY_ROWS`` rows as well."""
        self.driver = driver
        self.expected = expected
        self.guard = GuardedAllocations(sentinel, driver.device)
        self.modified: Modified | None = None
        self.many: ManyRows | None = None
        self._repeats = repeats
        self._step = 0
        # On a GPU each row would take 2 MiB, or the gaps between many rows gigabytes.
        self._far = driver.setup.layer is not None and driver.setup.layer.far_slots and driver.device.type == "cpu"

    def run(self, load: LayerLoad, metadata: Sequence[Metadata]) -> tuple[LayerStep, ...]:
        """Run every stage of every pass."""
        # 1. The store, for all passes.
        self.driver.load_caches(load.caches)
        stored = []
        for step, a_pass in enumerate(load.passes):
            with locating_results(step, Feed.ISOLATED.value):
                stored.append(self._store(step, self.driver.with_extra_rows(a_pass.inputs)))

        behind_others = self._store_behind_others(load) if self._repeats and self._is_compiled() else None

        # 2. The other stages, on caches that the reference has written.
        truth = dense_copy(load.caches)
        steps = []
        for step, (a_pass, step_metadata) in enumerate(zip(load.passes, metadata, strict=True)):
            self._step = step
            rows = self.expected.rows(a_pass, step_metadata, truth)
            self.driver.load_caches(truth)
            fed = self.expected.logits(rows)
            attended = self.expected.indices_with_holes(rows, fed)
            with locating_results(step, Feed.ISOLATED.value):
                before = tier.gluon_programs
                steps.append(self._compute(rows, fed, attended, stored[step]))
                is_slow = tier.gluon_programs > before  # ten seconds on many rows
                if self._repeats and self.many is None and a_pass.rows and not is_slow and self._can_repeat(rows):
                    again = torch.arange(MANY_ROWS, device=fed.device) % a_pass.rows
                    caches = stored[step] if step or behind_others is None else behind_others
                    result = self._compute(rows.at(again), fed[again], attended[again], caches)
                    self.many = ManyRows(step, a_pass.rows, MANY_ROWS, result)
        return tuple(steps)

    def store(self, given: EdgeKeys) -> Stored:
        """Run the store on edge-case keys, into the caches as the last pass left them."""
        with speed.without_warnings(), locating_results(0, Feed.ISOLATED.value):
            return Stored(given, self._store(0, given.inputs))

    def score(self, given: EdgeScores) -> Scored:
        """Run the indexer on edge-case index keys."""
        self._step = 0
        with speed.without_warnings(), locating_results(0, Feed.ISOLATED.value):
            logits = self._tensor(
                "indexer_logits",
                self._rows("index_q", given.index_q),
                self._rows("index_weights", given.index_weights),
                self._read_only("index_k_cache", given.index_k_cache),
                self._rows("real_page_table", given.real_page_table),
                self._read_only("seqlens_expanded", given.seqlens_expanded),
                self.driver.setup.max_context_len,
            )
        return Scored(given, logits)

    def select(self, given: EdgeLogits, paged: bool, ragged: bool) -> Selected:
        """Run top-k and its paged and ragged transform, as asked for, on edge-case logits."""
        self._step = 0
        with locating_results(0, Feed.ISOLATED.value):
            return self._select(given, paged, ragged)

    def _select(self, given: EdgeLogits, paged: bool, ragged: bool) -> Selected:
        logits = self._rows("logits", given.logits)
        lengths = self._read_only("seqlens_expanded", given.seqlens_expanded)
        positions = self._tensor("topk_indices", logits, lengths)
        indices = places = None
        if paged:
            table = self._rows("page_table_1", given.page_table_1)
            indices = self._tensor("topk_transform_paged", logits, lengths, table)
        if ragged:
            offset = self._read_only("topk_indices_offset", given.topk_indices_offset)
            places = self._tensor("topk_transform_ragged", logits, lengths, offset)
        return Selected(given, positions, indices, places)

    def _store(self, step: int, inputs: AttentionInputs) -> AttentionCaches:
        self._step = step
        watched = [self._read_only(name, tensor) for name, tensor in vars(inputs).items()]
        self._call("store_cache", self.driver.caches, self.driver.given_inputs(watched), watched=watched)
        return self.driver.cached()

    def _compute(
        self, rows: LayerRows, fed: torch.Tensor, attended: torch.Tensor, stored: AttentionCaches
    ) -> LayerStep:
        """Run the stages behind the store. fed: logits for top-k. attended: slots for attention."""
        inputs = rows.inputs
        lengths = self._read_only("seqlens_expanded", rows.seqlens_expanded)
        logits = self._tensor(
            "indexer_logits",
            self._rows("index_q", inputs.index_q),
            self._rows("index_weights", inputs.index_weights),
            ReadOnly("index_k_cache", self.driver.caches.index_k, rows.caches.index_k),
            self._rows("real_page_table", rows.real_page_table),
            lengths,
            rows.page_table_1.shape[1],
        )
        scores = self._rows("logits", fed)
        positions = self._tensor("topk_indices", scores, lengths)
        table = self._rows("page_table_1", rows.page_table_1)
        indices = self._tensor("topk_transform_paged", scores, lengths, table)
        ragged = None
        if rows.topk_indices_offset is not None:
            offset = self._read_only("topk_indices_offset", rows.topk_indices_offset)
            ragged = self._tensor("topk_transform_ragged", scores, lengths, offset)
        attention = self._call(
            "sparse_mla",
            self._rows("q", inputs.q),
            ReadOnly("kv_cache", self.driver.caches.kv, rows.caches.kv),
            self._rows("indices", attended),
        )
        out, lse = out_and_lse_of(attention)
        return LayerStep(copied(AttentionOutputs(logits, indices, out, lse)), stored, positions, ragged, fed)

    def _can_repeat(self, rows: LayerRows) -> bool:
        """Whether the stages of ``MANY_ROWS`` rows take little time."""
        if self.driver.device.type != "cpu":
            return True
        config, topk = self.driver.config, self.expected.reference.config.index_topk
        scored = rows.page_table_1.shape[1] * config.index_n_heads * config.index_head_dim
        attended = topk * config.num_heads * config.qk_head_dim
        little = MANY_ROWS * max(scored, attended) <= _MOST_PRODUCTS
        return little and self._is_compiled()

    def _is_compiled(self) -> bool:
        """Whether no kernel is interpreted, which takes minutes on many rows."""
        return self.driver.device.type != "cpu" or (tier.is_installed() and not tier.interpreted)

    def _store_behind_others(self, load: LayerLoad) -> AttentionCaches | None:
        """The caches after a store of the first pass, behind so many rows without a token that its own come late."""
        first = load.passes[0]
        if not first.rows:
            return None
        others = torch.arange(max(0, MANY_ROWS - first.rows)) % first.rows
        inputs = map_tensors(first.inputs, lambda tensor: torch.cat((tensor[others.to(tensor.device)], tensor)))
        assert self.driver.setup.layer is not None
        inputs.out_cache_loc[: len(others)] = self.driver.setup.layer.padding_slot
        self.driver.load_caches(load.caches)
        with locating_results(0, Feed.ISOLATED.value):
            return self._store(0, inputs)

    def _read_only(self, name: str, tensor: torch.Tensor) -> ReadOnly:
        with self.guard:
            return handed_out(name, tensor, self.driver.device, self.driver.is_strided(name))

    def _rows(self, name: str, tensor: torch.Tensor) -> ReadOnly:
        """An input whose rows may lie apart; far apart in a case of far slots, as the rows of a long prefill do."""
        if self._far and len(tensor):
            return ReadOnly(name, far_apart(tensor.to(self.driver.device)), tensor)
        return self._read_only(name, tensor)

    def _tensor(self, stage: str, *arguments: Any) -> torch.Tensor:
        """Call a stage and copy its result, because the next call may reuse the memory."""
        return tensor_of(_RESULT_NAMES.get(stage, stage), self._call(stage, *arguments)).clone()

    def _call(self, stage: str, *arguments: Any, watched: Sequence[ReadOnly] = ()) -> Any:
        read_only = [*watched, *(argument for argument in arguments if isinstance(argument, ReadOnly))]
        written = WrittenInputs(lambda: [(one.name, one.given) for one in read_only if one.name not in _CACHES])
        with self.guard, written.watching():
            result = getattr(self.driver.layer, stage)(
                *(argument.given if isinstance(argument, ReadOnly) else argument for argument in arguments)
            )
        self.modified = self.modified or modified_by(self._step, first_modified(read_only), written)
        return result
