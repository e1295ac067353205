"""The model around the attention layer: what its projections hand over, and what its caches must hold.

The host's side of it follows from the scenario alone, like ``harness.world``. Every key is known by the slot it lies
in and the forward pass that wrote it, so that a stale or misplaced one is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.content.content import Content
from nsa_oracle.harness.memory.poison import NAN_BYTE
from nsa_oracle.harness.scenarios.rng import Stream
from nsa_oracle.harness.scenarios.scenario import Setup
from nsa_oracle.harness.scenarios.world import Batch, World
from nsa_oracle.reference import kv_cache
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    BackendConfig,
    ForwardMode,
    KVCacheDtype,
)

# What cache memory that nobody wrote is made of, by run.
POISON_BYTES = (0xFF, 0x7F)  # NaN in every type; a huge finite bf16 and float32, and NaN in e4m3


@dataclass(frozen=True)
class Pass:
    """One forward pass of the layer: draft step ``step`` of one batch, its R rows in batch order, padding left out.

    requests, tokens: the request (its place in the batch) and draft token of each row. seqlens: KV length that each row
    sees, its own key included. positions: where its own key belongs, below 0 for a row that stands for no token.
    inputs: on the host.
    """

    step: int
    requests: tuple[int, ...]
    tokens: tuple[int, ...]
    seqlens: tuple[int, ...]
    positions: tuple[int, ...]
    inputs: AttentionInputs

    @property
    def rows(self) -> int:
        return len(self.requests)

    def of_requests(self, order: Sequence[int]) -> Pass:
        """The rows of some requests, in that order of requests, as a batch of those alone."""
        rows = [row for request in order for row in range(self.rows) if self.requests[row] == request]
        place = {request: number for number, request in enumerate(order)}
        return Pass(
            self.step,
            requests=tuple(place[self.requests[row]] for row in rows),
            tokens=tuple(self.tokens[row] for row in rows),
            seqlens=tuple(self.seqlens[row] for row in rows),
            positions=tuple(self.positions[row] for row in rows),
            inputs=map_tensors(self.inputs, lambda tensor: tensor[rows]),
        )


def map_tensors(inputs: AttentionInputs, change: Callable[[torch.Tensor], torch.Tensor]) -> AttentionInputs:
    """``inputs`` with every tensor replaced by ``change`` of it."""
    return AttentionInputs(**{name: change(tensor) for name, tensor in vars(inputs).items()})


def query_rows(batch: Batch, config: BackendConfig, step: int) -> Iterator[tuple[int, int, int, int]]:
    """(request, draft token, KV length seen, position of the own key) of each row of ``batch``, padding included.

    A draft step writes the token behind those that the step before wrote, whether or not its metadata shows them.
    """
    mode = batch.mode
    for request, seq_len in enumerate(batch.seq_lens):
        if mode.is_decode_or_idle:
            yield request, 0, seq_len + config.step_advance(mode, step), seq_len + step
            continue
        unverified = config.speculative_num_draft_tokens if mode is ForwardMode.TARGET_VERIFY else 0
        match mode:
            case ForwardMode.EXTEND:
                count = batch.extend_lens[request]
            case ForwardMode.DRAFT_EXTEND:
                count = batch.accept_lengths[request]
            case _:
                count = config.speculative_num_draft_tokens
        for token in range(count):
            position = seq_len + unverified - count + token
            yield request, token, max(position + 1, 0), position


class CacheState:
    """What the caches of the layer must hold, on ``device``, as forward passes and requests come and go.

    ``truth``: dense caches of all the setup's slots; whatever no running request has written is ``poison``.
    """

    def __init__(self, setup: Setup, seed: int, poison: int, device: torch.device) -> None:
        assert setup.layer is not None
        self.setup = setup
        self.config = setup.layer.attention_config()
        self.poison = poison
        self.content = Content(self.config, setup.layer.regime, seed)
        self.truth = new_caches(setup, self.config, setup.num_pages, device, poison)
        self._written: NDArray[np.bool_] = np.zeros(setup.num_pages * setup.page_size, dtype=np.bool_)
        self._version = 0
        self._random = Stream(seed, "candidates")

    def settle(self, world: World) -> None:
        """Before a forward pass: give every cached token that no pass has written a key, and poison what is free.

        Such tokens come from passes that the scenario leaves out: the prefill of a request that joins, for one.
        """
        page_size = self.setup.page_size
        pages = sorted({page for request in world.running for page in request.pages})
        held = (np.asarray(pages, dtype=np.int64)[:, None] * page_size + np.arange(page_size)).reshape(-1)
        freed = self._written.copy()
        freed[held] = False
        self._poison(np.flatnonzero(freed))
        self._written[freed] = False
        self._poison(np.arange(page_size))  # page 0: rows without a token write there

        live = [world.req_to_token[request.pool_row, : request.seq_len] for request in world.running]
        slots = np.unique(np.concatenate(live)) if live else np.empty(0, dtype=np.int64)
        missing = slots[~self._written[slots]].tolist()
        if missing:
            keys, index_keys = self.content.keys(missing, 0)
            where = torch.tensor(missing, dtype=torch.int64)
            self._store(keys, index_keys, where)
            self._written[missing] = True

    def passes(self, world: World, batch: Batch, config: BackendConfig) -> list[Pass]:
        """The forward passes of one replay or eager call of ``batch`` (not padded): one a step. New keys each time."""
        passes = []
        for step in range(config.speculative_num_steps):
            self._version += 1
            passes.append(self._pass(world, batch, config, step))
        return passes

    def apply(self, passes: Sequence[Pass]) -> None:
        """Write the keys of ``passes``, as the layer under judgement must have done."""
        for a_pass in passes:
            inputs = a_pass.inputs
            self._store(inputs.k, inputs.index_k, inputs.out_cache_loc)
            self._written[inputs.out_cache_loc.numpy()] = True
        self._written[: self.setup.page_size] = False

    def _pass(self, world: World, batch: Batch, config: BackendConfig, step: int) -> Pass:
        rows = list(query_rows(batch, config, step))
        pool_rows = [batch.pool_rows[request] for request, *_ in rows]
        slots = [
            int(world.req_to_token[pool_row, position]) if position >= 0 else 0
            for pool_row, (*_, position) in zip(pool_rows, rows, strict=True)
        ]
        candidates = [
            self._candidates(world.req_to_token[pool_row, :length], config.index_topk)
            for pool_row, (_, _, length, _) in zip(pool_rows, rows, strict=True)
        ]
        ids = [(pool_row, token) for pool_row, (_, token, _, _) in zip(pool_rows, rows, strict=True)]
        keys, index_keys = self.content.keys(slots, self._version)
        q, index_q, index_weights = self.content.queries(ids, self._version, candidates)
        requests, tokens, seqlens, positions = zip(*rows, strict=True) if rows else ((), (), (), ())
        out_cache_loc = torch.tensor(slots, dtype=torch.int64)
        inputs = AttentionInputs(q, keys, index_q, index_weights, index_keys, out_cache_loc)
        return Pass(step, requests, tokens, seqlens, positions, inputs)

    def _candidates(self, visible: NDArray[np.int32], index_topk: int) -> list[int]:
        """Slots that a row's heads may single out: all it selects for sure, or one that its index then must find."""
        slots = [int(slot) for slot in visible]
        return slots if len(slots) <= index_topk else [slots[self._random.integers(1, len(slots))[0]]]

    def _store(self, keys: torch.Tensor, index_keys: torch.Tensor, slots: torch.Tensor) -> None:
        device = self.truth.kv.device
        keys, index_keys, slots = keys.to(device), index_keys.to(device), slots.to(device)
        kv_cache.store_kv(self.config, self.truth.kv, keys, slots)
        kv_cache.store_index_k(self.config, self.truth.index_k, index_keys, slots)

    def _poison(self, slots: NDArray[np.int64]) -> None:
        if not len(slots):
            return
        where = torch.from_numpy(slots).to(self.truth.kv.device)
        as_bytes(self.truth.kv)[where] = self.poison
        pages, values, scales = _index_k_bytes(self.config, self.truth.index_k, where)
        self.truth.index_k[pages, values] = self.poison
        self.truth.index_k[pages, scales] = self.poison


def new_caches(
    setup: Setup, config: AttentionConfig, num_pages: int, device: torch.device, poison: int, band: int = 0
) -> AttentionCaches:
    """Dense caches full of poison: all slots of the setup, and ``num_pages`` pages of index keys.

    band: so many slots and pages more at either end of both.
    """
    slots = setup.num_pages * setup.page_size + 2 * band
    num_pages += 2 * band
    if config.kv_cache_dtype is KVCacheDtype.FP8:
        kv = torch.empty(slots, 1, config.kv_token_bytes, dtype=torch.uint8, device=device)
    else:
        kv = torch.empty(slots, 1, config.qk_head_dim, dtype=torch.bfloat16, device=device)
    index_k = torch.empty(num_pages, config.index_page_bytes(setup.page_size), dtype=torch.uint8, device=device)
    as_bytes(kv).fill_(poison)
    index_k.fill_(poison)
    return AttentionCaches(kv, index_k)


def with_one_nan(config: AttentionConfig, caches: AttentionCaches, slots: torch.Tensor) -> AttentionCaches:
    """A copy of dense ``caches`` in which every NaN in ``slots`` [n] has the same bits."""
    kv, index_k = caches.kv.clone(), caches.index_k.clone()
    tokens = as_bytes(kv[slots, 0])  # [n, bytes]
    if config.kv_cache_dtype is KVCacheDtype.FP8:
        scales_begin, rope_begin = config.kv_lora_rank, config.kv_token_bytes - 2 * config.qk_rope_head_dim
        parts = [
            _of_one_nan(tokens[:, :scales_begin], torch.float8_e4m3fn),
            _of_one_nan(tokens[:, scales_begin:rope_begin], torch.float32),
            _of_one_nan(tokens[:, rope_begin:], torch.bfloat16),
        ]
    else:
        parts = [_of_one_nan(tokens, torch.bfloat16)]
    as_bytes(kv)[slots, 0] = torch.cat(parts, dim=1)
    pages, values, scales = _index_k_bytes(config, index_k, slots)
    index_k[pages, values] = _of_one_nan(index_k[pages, values], torch.float8_e4m3fn)
    index_k[pages, scales] = _of_one_nan(index_k[pages, scales], torch.float32)
    return AttentionCaches(kv, index_k)


def _of_one_nan(content: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes ``content`` [n, bytes] of numbers, every NaN among them made NAN_BYTEs."""
    nan = content.clone(memory_format=torch.contiguous_format).view(dtype).float().isnan()
    return torch.where(nan.repeat_interleave(dtype.itemsize, dim=1), NAN_BYTE, content)


def _index_k_bytes(
    config: AttentionConfig, index_k: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where index keys of ``slots`` [n] lie: pages [n, 1], bytes of the values [n, dim], of the scales [n, 4]."""
    dim = config.index_head_dim
    page_size = index_k.shape[1] // config.index_page_bytes(1)
    pages, offsets = slots[:, None] // page_size, slots[:, None] % page_size
    columns = torch.arange(dim, device=slots.device)
    return pages, offsets * dim + columns, page_size * dim + offsets * 4 + columns[:4]


GAP = 16  # elements between rows of strided inputs: whole vectors of 16 bytes, as slices of something wider have


def unwritten(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strided: bool) -> torch.Tensor:
    """Memory of ``shape``, every byte 0xFF: NaN, or -1. strided: rows, and what they consist of, lie apart.

    The last dimension stays dense, unless it is the only one: that has every other element of its memory.
    """
    if not strided or not shape:
        whole = memory = torch.empty(*shape, dtype=dtype, device=device)
    elif len(shape) == 1:
        whole = torch.empty(*shape, 2, dtype=dtype, device=device)
        memory = whole[:, 0]
    else:
        whole = torch.empty(*shape[:-1], shape[-1] + GAP, dtype=dtype, device=device)
        memory = whole[..., : shape[-1]]
    as_bytes(whole.view(-1)).fill_(NAN_BYTE)
    return memory


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of ``tensor``: uint8, the last dimension as many times longer. A view."""
    return tensor.view(torch.uint8)
