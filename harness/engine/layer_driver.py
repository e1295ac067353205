"""The layer under judgement on the device: its caches, static inputs, and the passes run through it."""

from __future__ import annotations

import torch

from nsa_oracle.harness.engine.caches import new_caches
from nsa_oracle.harness.engine.observations import Feed, LayerLoad, LayerStep, Modified, copied
from nsa_oracle.harness.engine.passes import Pass, map_tensors
from nsa_oracle.harness.engine.read_only import ReadOnlyMetadata, first_modified, handed_out
from nsa_oracle.harness.memory.bits import NAN_BYTE, as_bytes, same_bits, unwritten_memory
from nsa_oracle.harness.memory.far_apart import far_apart
from nsa_oracle.harness.memory.poison import GuardedAllocations, band
from nsa_oracle.harness.protocol import SparseAttention
from nsa_oracle.harness.scenarios.scenario import Setup
from nsa_oracle.harness.subjects.results import locating_results, outputs_of
from nsa_oracle.reference.types import AttentionCaches, AttentionConfig, AttentionInputs, Metadata

BAND = 16  # slots, pages or rows on either side: any multiple of 4 bytes times this keeps memory aligned to 64


class LayerDriver:
    """Owns what a captured graph of the layer reads and writes, at fixed addresses."""

    def __init__(
        self, setup: Setup, layer: SparseAttention, device: torch.device, poison: int, max_rows: int, num_steps: int
    ) -> None:
        assert setup.layer is not None
        self.layer = layer
        self.device = device
        self.setup = setup
        self.config = setup.layer.attention_config()
        # The poison of page tables is a slot that exists and holds poison: a layer that reads a dead cell shows it in
        # its output and does not take the process down. Taken for a page, that number has to exist as well.
        # (Far pages on a GPU are too dear for that: who takes it for one there has a fault.)
        far = setup.layer.far_slots
        num_pages = setup.num_pages * (1 if far and device.type == "cuda" else setup.page_size)
        beside = band(BAND)
        band_of_caches = 0 if far else beside  # far apart, everything has a band of its own
        banded = new_caches(setup, self.config, num_pages, device, poison, band_of_caches)
        dense = AttentionCaches(_between(banded.kv, band_of_caches), _between(banded.index_k, band_of_caches))
        self.caches = AttentionCaches(far_apart(dense.kv), far_apart(dense.index_k)) if far else dense
        self._poison = poison
        self._bands = {
            name: (cache[:band_of_caches], cache[len(cache) - band_of_caches :])
            for name, cache in (("kv_cache", banded.kv), ("index_k_cache", banded.index_k))
        }
        # Rows on either side that are nobody's: what is written to where they say shows in a page that nobody has.
        rows, last_slot = max_rows + 2 * beside, setup.num_pages * setup.page_size - 1
        strided = setup.inputs.strided
        self._banded = [_poisoned_inputs(self.config, rows, last_slot, device, strided) for _ in range(num_steps)]
        self._expected = [map_tensors(inputs, torch.clone) for inputs in self._banded]
        self._static, self._loaded = (
            [map_tensors(inputs, lambda tensor: _between(tensor, beside)) for inputs in banded_inputs]
            for banded_inputs in (self._banded, self._expected)
        )
        self._left: list[AttentionCaches] = []

    def is_strided(self, name: str) -> bool:
        """Whether rows of that input of the layer, or of a stage, lie apart. Lengths and offsets of rows are dense."""
        return self.setup.inputs.strided and name not in ("seqlens_expanded", "topk_indices_offset")

    def reserve(self) -> None:
        """Before a capture: memory for what each pass leaves in the caches, since a later one may write over it."""
        self._left = self._left or [self.cached() for _ in self._static]

    def load(self, load: LayerLoad) -> None:
        """Put the caches and the static inputs as the engine has them before a replay. Rows of padding are NaN."""
        self.load_caches(load.caches)
        for number, (static, loaded) in enumerate(zip(self._static, self._loaded, strict=True)):
            for name, tensor in vars(static).items():
                if name == "out_cache_loc":
                    tensor.zero_()
                else:
                    as_bytes(tensor).fill_(NAN_BYTE)
                if load.passes:  # a capture has none: padding alone
                    a_pass = load.passes[number]
                    tensor[: a_pass.rows].copy_(getattr(a_pass.inputs, name))
                getattr(loaded, name).copy_(tensor)

    def load_caches(self, caches: AttentionCaches) -> None:
        self.caches.kv.copy_(caches.kv)
        self.caches.index_k[: len(caches.index_k)].copy_(caches.index_k)

    def cached(self) -> AttentionCaches:
        """A dense copy of the caches, the setup's pages alone."""
        return AttentionCaches(self.caches.kv.contiguous().clone(), self.caches.index_k[: self.setup.num_pages].clone())

    def forward(self, step: int, metadata: Metadata, rows: int) -> LayerStep:
        """The pass of one step on the static inputs; inside capture, this is what the graph records.

        What it left in the caches lies in memory that all graphs share.
        """
        inputs = map_tensors(self._static[step], lambda tensor: tensor[:rows])
        with locating_results(step, Feed.GRAPH.value):
            outputs = outputs_of(self.layer.forward(inputs, self.caches, metadata))
        left = self._left[step]
        left.kv.copy_(self.caches.kv)
        left.index_k.copy_(self.caches.index_k[: self.setup.num_pages])
        return LayerStep(outputs, left)

    def forward_eagerly(
        self, a_pass: Pass, metadata: Metadata, guard: GuardedAllocations
    ) -> tuple[LayerStep, Modified | None]:
        """The pass on inputs of its own, between guard bands; and what the layer wrote to besides the caches."""
        watched_metadata = ReadOnlyMetadata(metadata)
        with guard, locating_results(a_pass.step, Feed.CHAIN.value):
            watched = [
                handed_out(name, tensor, self.device, self.is_strided(name))
                for name, tensor in vars(a_pass.inputs).items()
            ]
            inputs = AttentionInputs(**{one.name: one.given for one in watched})
            outputs = outputs_of(self.layer.forward(inputs, self.caches, metadata))
        name = first_modified(watched) or watched_metadata.first_modified()
        step = LayerStep(copied(outputs), self.cached())
        return step, None if name is None else Modified(a_pass.step, name)

    def modified_input(self) -> Modified | None:
        """What the layer has written to and must not: a static input, or memory around one or a cache."""
        for step, (banded, expected) in enumerate(zip(self._banded, self._expected, strict=True)):
            for name, tensor in vars(banded).items():
                if not same_bits(tensor, getattr(expected, name)):
                    return Modified(step, name)
        for name, bands in self._bands.items():
            for beside in bands:
                if bool((as_bytes(beside) != self._poison).any()):
                    return Modified(None, f"memory beside {name}")
        return None


def _between(tensor: torch.Tensor, beside: int) -> torch.Tensor:
    """What is left of ``tensor`` without ``beside`` rows at either end."""
    return tensor[beside : len(tensor) - beside]


def _poisoned_inputs(
    config: AttentionConfig, rows: int, slot: int, device: torch.device, strided: bool
) -> AttentionInputs:
    """Inputs of ``rows`` rows, all NaN, that write to ``slot``."""

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
