"""Edge-case index keys for the indexer called by itself, behind queries of two rows. Reports: *made-up index keys*.

The keys are those of ``edge_keys``, stored in a cache of their own. Queries and weights are small, and no weight is
below 0: every score is a number that float32 has, NaN, or 0, whatever the order of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nsa_oracle.harness.content.conversions import as_e4m3
from nsa_oracle.harness.content.key_kinds import KeyKind
from nsa_oracle.harness.scenarios.rng import Stream
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.reference.kv_cache import store_index_k
from nsa_oracle.reference.types import AttentionConfig

_EXACT = (KeyKind.NAN, KeyKind.INFINITE, KeyKind.ZEROS, KeyKind.LARGEST)  # at most one element that counts
_ROWS = 2
_E4M3_NAN = 0x7F


@dataclass(frozen=True)
class EdgeScores:
    """What the indexer is given. All tensors are on the CPU.

    kinds: of each token, by position. index_q: [2, IH, ID] e4m3. index_weights: [2, IH] float32. index_k_cache: [pages,
    index_page_bytes] uint8, with NaN in page 0 and behind the last token. real_page_table: [2, ceil(W / P)] int32, with
    page 0 in dead cells. seqlens_expanded: [2] int32: all tokens, and all but the last.
    """

    kinds: tuple[KeyKind, ...]
    index_q: torch.Tensor
    index_weights: torch.Tensor
    index_k_cache: torch.Tensor
    real_page_table: torch.Tensor
    seqlens_expanded: torch.Tensor

    def name(self, row: int, token: int) -> str:
        """How reports name one score."""
        kind = f"a made-up index key: {self.kinds[token].value}" if token < len(self.kinds) else "behind the last one"
        return f"row {row}, token {token} ({kind})"


def edge_scores(
    kinds: tuple[KeyKind, ...],
    index_k: torch.Tensor,
    setup: Setup,
    config: AttentionConfig,
    seed: int,
    run: int,
    call: int,
) -> EdgeScores:
    """Index keys of these kinds, [n, ID] bf16, as tokens of one request, with queries for call ``call`` of run ``run``.

    In an exact regime they are keys whose scores have one right value in any arithmetic that the contract allows.
    """
    assert setup.layer is not None
    wanted = _EXACT if setup.layer.regime.is_exact else tuple(KeyKind)
    chosen = [row for row, kind in enumerate(kinds) if kind in wanted][: setup.max_context_len]
    pages = -(-len(chosen) // setup.page_size)
    cache = torch.full((1 + pages, config.index_page_bytes(setup.page_size)), 0xFF, dtype=torch.uint8)
    store_index_k(config, cache, index_k[chosen], torch.arange(len(chosen)) + setup.page_size)
    _make_nans_alike(cache, setup.page_size * config.index_head_dim)
    table = torch.zeros(_ROWS, -(-setup.max_context_len // setup.page_size), dtype=torch.int32)
    table[:, :pages] = torch.arange(1, 1 + pages)
    heads, dim = config.index_n_heads, config.index_head_dim
    random = Stream(seed, f"made-up queries {run}").halves_at([(call, row) for row in range(_ROWS)], heads * (dim + 1))
    weights = np.ldexp(np.float32(1), -12 + random[:, :heads].astype(np.int32) % 2)
    signs = 1 - 2 * (random[:, heads:] & 1).astype(np.float32)
    queries = (signs * (1 + (random[:, heads:] >> 1) % 2)).reshape(_ROWS, heads, dim)
    return EdgeScores(
        tuple(kinds[row] for row in chosen),
        as_e4m3(queries.astype(np.float32)),
        torch.from_numpy(weights.astype(np.float32)),
        cache,
        table,
        torch.tensor([len(chosen), max(0, len(chosen) - 1)], dtype=torch.int32),
    )


def _make_nans_alike(cache: torch.Tensor, key_bytes: int) -> None:
    """Give each NaN of a cache the same bits, in place: those that arithmetic makes differ between processors."""
    keys, scales = cache[:, :key_bytes], cache[:, key_bytes:].contiguous().view(torch.float32)
    keys[(keys & _E4M3_NAN) == _E4M3_NAN] = _E4M3_NAN
    scales[scales.isnan()] = torch.nan
    cache[:, key_bytes:] = scales.view(torch.uint8)
