"""The judged layer on the device: its caches, its static inputs, and the passes that run through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nsa_oracle.harness.compiled.races import leave_unordered
from nsa_oracle.harness.engine.allocation import new_caches
from nsa_oracle.harness.engine.observations import Feed, LayerLoad, LayerStep, Modified, copied
from nsa_oracle.harness.engine.passes import Pass, map_tensors, with_extra_rows
from nsa_oracle.harness.engine.read_only import ReadOnly, ReadOnlyMetadata, first_modified, handed_out
from nsa_oracle.harness.engine.recycled import Recycled
from nsa_oracle.harness.graphs.written_inputs import WrittenInputs
from nsa_oracle.harness.memory.bits import as_bytes, same_bits, unwritten_memory
from nsa_oracle.harness.memory.far_apart import far_apart
from nsa_oracle.harness.memory.poison import GuardedAllocations, band
from nsa_oracle.harness.protocol import SparseAttention
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.harness.subjects.result_checks import locating_results, outputs_of, tensor_of
from nsa_oracle.reference.types import AttentionCaches, AttentionConfig, AttentionInputs, Metadata

BAND = 16  # slots, pages or rows at either end. 16 times a multiple of 4 bytes keeps memory aligned to 64 bytes


class LayerDriver:
    """Owns the memory that captured graphs of the layer read and write, at fixed addresses."""

    def __init__(
        self, setup: Setup, layer: SparseAttention, device: torch.device, poison: int, max_rows: int, num_steps: int
    ) -> None:
        assert setup.layer is not None
        self.layer = layer
        self.device = device
        self.setup = setup
        self.config = setup.layer.attention_config()
        # Dead cells of page tables hold a slot that exists and contains poison: a layer that reads such a cell gives a
        # wrong output and does not crash the process. The number must be valid as a page, too, so there is a page for
        # each slot. On a GPU far pages take too much memory for that: a layer that uses the number as a page faults.
        far = setup.layer.far_slots
        num_pages = setup.num_pages * (1 if far and device.type == "cuda" else setup.page_size)
        margin = band(BAND)
        cache_margin = 0 if far else margin  # rows that are far apart need no band
        banded = new_caches(setup, self.config, num_pages, device, poison, cache_margin)
        dense = AttentionCaches(_inner(banded.kv, cache_margin), _inner(banded.index_k, cache_margin))
        self.caches = AttentionCaches(far_apart(dense.kv), far_apart(dense.index_k)) if far else dense
        # Rows that stand for no token may all store their keys in slot 0.
        leave_unordered(self.caches.kv[: setup.page_size], self.caches.kv)
        leave_unordered(self.caches.index_k[:1], self.caches.index_k)
        self._padding_slot = setup.layer.padding_slot
        self._extra_rows = setup.layer.extra_rows
        self._poison = poison
        self._bands = {
            name: (cache[:cache_margin], cache[len(cache) - cache_margin :])
            for name, cache in (("kv_cache", banded.kv), ("index_k_cache", banded.index_k))
        }
        # Extra rows at either end belong to no request. Their keys go to a page that no request holds, so that a key
        # which the layer stores for such a row is detected there.
        rows, last_slot = max_rows + self._extra_rows + 2 * margin, setup.num_slots - 1
        strided = setup.inputs.strided
        self._banded = [_poisoned_inputs(self.config, rows, last_slot, device, strided) for _ in range(num_steps)]
        self._expected = [map_tensors(inputs, torch.clone) for inputs in self._banded]
        self._static, self._loaded = (
            [map_tensors(inputs, lambda tensor: _inner(tensor, margin)) for inputs in banded_inputs]
            for banded_inputs in (self._banded, self._expected)
        )
        # The slots of all steps behind each other: those of step i of a graph of r rows begin at i * r.
        self._by_step = setup.layer.slots_by_step
        count = num_steps * (max_rows + self._extra_rows) if self._by_step else 0
        self._slots = torch.full((count + 2 * margin,), last_slot, dtype=torch.int64, device=device)
        self._expected_slots = self._slots.clone()
        self._cache_copies: list[AttentionCaches] = []
        self._recycled = Recycled()

    def is_strided(self, name: str) -> bool:
        """Whether the rows of this input of the layer or of a stage have gaps. Lengths and offsets are dense."""
        return self.setup.inputs.strided and name not in ("seqlens_expanded", "topk_indices_offset")

    def with_extra_rows(self, inputs: AttentionInputs) -> AttentionInputs:
        """``inputs`` of an eager call, with the setup's rows behind those of the metadata."""
        return with_extra_rows(inputs, self._extra_rows, self._padding_slot, self._poison)

    def reserve(self) -> None:
        """Allocate memory for copies of the caches after each pass, since a later pass may overwrite them.

        Called before a capture.
        """
        self._cache_copies = self._cache_copies or [self.cached() for _ in self._static]

    def load(self, load: LayerLoad, rows: int) -> None:
        """Set the caches and static inputs to the engine's state before a replay. Padding rows hold the run's poison.

        rows: of the metadata of the graph.
        """
        self.load_caches(load.caches)
        self._slots.fill_(self.setup.num_slots - 1)
        for number, (static, loaded) in enumerate(zip(self._static, self._loaded, strict=True)):
            for name, tensor in vars(static).items():
                if name == "out_cache_loc":
                    tensor.fill_(self._padding_slot)
                else:
                    as_bytes(tensor).fill_(self._poison)
                if number < len(load.passes):  # none for a capture, which runs on padding alone
                    a_pass = load.passes[number]
                    tensor[: a_pass.rows].copy_(getattr(a_pass.inputs, name))
                getattr(loaded, name).copy_(tensor)
            if self._by_step:
                self._slots_of(number, rows).copy_(static.out_cache_loc[: rows + self._extra_rows])
        self._expected_slots.copy_(self._slots)

    def _slots_of(self, step: int, rows: int) -> torch.Tensor:
        """The slots of a pass of ``rows`` rows of the metadata, among those of all steps."""
        count = rows + self._extra_rows
        return self._slots[band(BAND) + step * count :][:count]

    def load_caches(self, caches: AttentionCaches) -> None:
        self.caches.kv.copy_(caches.kv)
        self.caches.index_k[: len(caches.index_k)].copy_(caches.index_k)

    def cached(self) -> AttentionCaches:
        """A dense copy of the caches, limited to the setup's pages."""
        return AttentionCaches(self.caches.kv.contiguous().clone(), self.caches.index_k[: self.setup.num_pages].clone())

    def graph_inputs(self, step: int, rows: int) -> AttentionInputs:
        """The static inputs of the pass of one step in a graph. rows: of the metadata."""
        inputs = map_tensors(self._static[step], lambda tensor: tensor[: rows + self._extra_rows])
        return replace(inputs, out_cache_loc=self._slots_of(step, rows)) if self._by_step else inputs

    def forward(self, step: int, metadata: Metadata, rows: int) -> LayerStep:
        """Run the pass of one step on the static inputs. Inside capture, this is what the graph records.

        rows: of the metadata. The copy of the caches in the result lies in memory that all graphs share.
        """
        inputs = self.graph_inputs(step, rows)
        with locating_results(step, Feed.GRAPH.value):
            outputs = outputs_of(self.layer.forward(inputs, self.caches, metadata))
        cache_copy = self._cache_copies[step]
        cache_copy.kv.copy_(self.caches.kv)
        cache_copy.index_k.copy_(self.caches.index_k[: self.setup.num_pages])
        return LayerStep(outputs, cache_copy)

    def positions(self, step: int, logits: torch.Tensor, metadata: Metadata) -> torch.Tensor | None:
        """Select by ``topk_indices`` from the logits of a pass; None if the layer brings no such method.

        The chain takes a transform in its place, so that nothing else would show whether it can be captured.
        """
        calls = getattr(self.layer, "method_calls", None)
        if calls is None or "topk_indices" not in calls.names:
            return None
        lengths = metadata.seqlens_expanded
        with locating_results(step, Feed.GRAPH.value):
            return tensor_of("topk_indices", self.layer.topk_indices(logits[: len(lengths)], lengths))

    def forward_eagerly(
        self, a_pass: Pass, metadata: Metadata, guard: GuardedAllocations
    ) -> tuple[LayerStep, Modified | None]:
        """Run the pass on copies of its inputs, between guard bands. Also returns an input that the layer modified."""
        watched_metadata = ReadOnlyMetadata(metadata)
        with guard, locating_results(a_pass.step, Feed.CHAIN.value):
            watched = [
                self._handed_out(name, tensor, a_pass.step)
                for name, tensor in vars(self.with_extra_rows(a_pass.inputs)).items()
            ]
            inputs = self.given_inputs(watched)
            written = WrittenInputs(lambda: vars(inputs).items())
            with written.watching():
                outputs = outputs_of(self.layer.forward(inputs, self.caches, metadata))
        name = first_modified(watched) or watched_metadata.first_modified()
        step = LayerStep(copied(outputs), self.cached())
        return step, modified_by(a_pass.step, name, written)

    def given_inputs(self, watched: Sequence[ReadOnly]) -> AttentionInputs:
        """The tensors that a layer is given, in an object that it may have been given before (``engine.recycled``)."""
        return self._recycled.instance(AttentionInputs(**{read_only.name: read_only.given for read_only in watched}))

    def _handed_out(self, name: str, tensor: torch.Tensor, step: int) -> ReadOnly:
        """A copy of an input of an eager pass; of slots, behind those of the steps before if they lie together."""
        if name != "out_cache_loc" or not self._by_step:
            return handed_out(name, tensor, self.device, self.is_strided(name))
        memory = torch.full((self.setup.num_steps, len(tensor)), self.setup.num_slots - 1, device=self.device)
        return ReadOnly(name, memory[step].copy_(tensor), tensor)

    def modified_input(self) -> Modified | None:
        """A static input that the layer has modified, or memory around an input or a cache; None if there is none."""
        for step, (banded, expected) in enumerate(zip(self._banded, self._expected, strict=True)):
            for name, tensor in vars(banded).items():
                if not same_bits(tensor, getattr(expected, name)):
                    return Modified(step, name)
        if not same_bits(self._slots, self._expected_slots):
            return Modified(None, "out_cache_loc")
        for name, bands in self._bands.items():
            for memory in bands:
                if bool((as_bytes(memory) != self._poison).any()):
                    return Modified(None, f"memory beside {name}")
        return None


def modified_by(step: int, changed: str | None, written: WrittenInputs) -> Modified | None:
    """What a call has done to an input, of which ``changed`` has another content now; None if nothing."""
    if changed is not None:
        return Modified(step, changed)
    return None if written.first is None else Modified(step, written.first.name, written.first)


def _inner(tensor: torch.Tensor, margin: int) -> torch.Tensor:
    """``tensor`` without ``margin`` rows at either end."""
    return tensor[margin : len(tensor) - margin]


def _poisoned_inputs(
    config: AttentionConfig, rows: int, slot: int, device: torch.device, strided: bool
) -> AttentionInputs:
    """Inputs of ``rows`` rows, all NaN, whose keys go to ``slot``."""

    def nan(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return unwritten_memory(shape, dtype, device, strided)

    return AttentionInputs(
        q=nan(rows, config.num_heads, config.qk_head_dim, dtype=torch.bfloat16),
        k=nan(rows, config.qk_head_dim, dtype=torch.bfloat16),
        index_q=nan(rows, config.index_n_heads, config.index_head_dim, dtype=torch.float8_e4m3fn),
        index_weights=nan(rows, config.index_n_heads, dtype=torch.float32),
        index_k=nan(rows, config.index_head_dim, dtype=torch.bfloat16),
        out_cache_loc=unwritten_memory((rows,), torch.int64, device, strided).fill_(slot),
    )
