"""The inputs of the layer's forward passes and the expected content of its caches.

Both are derived from the scenario alone, as the state in ``scenarios.world`` is. Each key is a function of its slot and
of the pass that writes it, so a stale or misplaced key shows as a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.content.content import Content
from nsa_oracle.harness.engine.allocation import new_caches
from nsa_oracle.harness.engine.passes import Pass
from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.rng import Stream
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.reference import kv_cache
from nsa_oracle.reference.types import AttentionInputs, BackendConfig, ForwardMode


class CacheState:
    """The expected content of the layer's caches, on ``device``, as passes run and requests join and finish.

    truth: dense caches with all slots of the setup. Slots that no running request has written hold ``poison``.
    """

    def __init__(self, setup: Setup, seed: int, poison: int, device: torch.device) -> None:
        assert setup.layer is not None
        self.setup = setup
        self.config = setup.layer.attention_config()
        self.poison = poison
        self.content = Content(self.config, setup.layer.regime, seed)
        self.truth = new_caches(setup, self.config, setup.num_pages, device, poison)
        self._written: NDArray[np.bool_] = np.zeros(setup.num_slots, dtype=np.bool_)
        self._version = 0
        self._padding_slot = setup.layer.padding_slot
        self._random = Stream(seed, "candidates")

    def settle(self, world: World) -> None:
        """Write a key for each cached token that no pass has written, and poison slots without a request.

        Called before a forward pass. Such tokens come from passes that the scenario leaves out, for example the
        prefill of a request that joins.
        """
        page_size = self.setup.page_size
        pages = sorted({page for request in world.running for page in request.pages})
        held = (np.asarray(pages, dtype=np.int64)[:, None] * page_size + np.arange(page_size)).reshape(-1)
        freed = self._written.copy()
        freed[held] = False
        self._poison(np.flatnonzero(freed))
        self._written[freed] = False
        self._poison(np.arange(page_size))  # page 0: rows that stand for no token write there

        live = [world.req_to_token[request.pool_row, : request.seq_len] for request in world.running]
        slots = np.unique(np.concatenate(live)) if live else np.empty(0, dtype=np.int64)
        missing = slots[~self._written[slots]].tolist()
        if missing:
            keys, index_keys = self.content.keys(missing, 0)
            where = torch.tensor(missing, dtype=torch.int64)
            self._store(keys, index_keys, where)
            self._written[missing] = True

    def passes(self, world: World, batch: Batch, config: BackendConfig, num_steps: int | None = None) -> list[Pass]:
        """One forward pass per step, for a replay or eager call of ``batch`` (not padded). Each call makes new keys.

        num_steps: None for all steps.
        """
        passes = []
        for step in range(config.speculative_num_steps if num_steps is None else num_steps):
            self._version += 1
            passes.append(self._pass(world, batch, config, step))
        return passes

    def apply(self, passes: Sequence[Pass]) -> None:
        """Write the keys of ``passes``, as the judged layer must have done."""
        for a_pass in passes:
            inputs = a_pass.inputs
            self._store(inputs.k, inputs.index_k, inputs.out_cache_loc)
            slots = inputs.out_cache_loc.numpy()
            self._written[slots[slots >= 0]] = True
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
        where = [self._padding_slot if position < 0 else slot for slot, position in zip(slots, positions, strict=True)]
        out_cache_loc = torch.tensor(where, dtype=torch.int64)
        inputs = AttentionInputs(q, keys, index_q, index_weights, index_keys, out_cache_loc)
        return Pass(step, requests, tokens, seqlens, positions, inputs)

    def _candidates(self, visible: NDArray[np.int32], index_topk: int) -> list[int]:
        """Slots that a row's heads may single out: all visible slots if the row selects all of them, else one of them.

        The indexer must then find that one slot.
        """
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
        pages, values, scales = kv_cache.index_k_bytes(self.config, self.truth.index_k, where)
        self.truth.index_k[pages, values] = self.poison
        self.truth.index_k[pages, scales] = self.poison


def query_rows(batch: Batch, config: BackendConfig, step: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (request, draft token, KV length seen, position of the row's own key) per row, padding included.

    A draft step writes its token after those of the earlier steps, whether or not its metadata shows them.
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
