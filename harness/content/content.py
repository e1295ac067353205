"""What is in the attention inputs: keys, queries and weights as a pure function of a seed, a regime and a place.

A key depends on the slot it is written to and on the *version*, the number of the forward pass that writes it: rows
that write one slot in one pass agree, and a key left over from an older pass is another one. A query depends on its id
(pool row and draft token) and the version. Neither depends on its place in the batch.

In the exact regimes (all but RANDOM) every intermediate of the layer is representable, so that the true answer has one
bit pattern whatever the order of summation, the tiles or the splits; ``harness.exactness`` proves and checks it. Their
key, in the order of its elements:

- Latent part, which is the value too: multiples of 1/8. Each of the four quant tiles has one extreme element, +-7/8 m
  with the tile's m drawn from 0 (the whole tile is zero, but never all four), 1, 2, 4; some *score elements* 0, 1/8 or
  2/8 (0 in a zero tile); and payload elements that spell (slot, version) in digits of three bits: {+-1..+-4}/8 m, each
  digit at least once in every tile, more often where the tile has room. Which element of a tile is what depends on the
  seed.
- RoPE part: the bits of the slot as +-1 (scrambled by the seed, so that neighbours differ in many), repeated to fill
  it, then a constant 1.
- Index key: see ``_IndexKeys``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nsa_oracle.harness.content.exact import MAX_SLOTS, VERSIONS, ExactContent, Origin
from nsa_oracle.harness.content.ordinary import OrdinaryContent
from nsa_oracle.harness.scenarios.regime import Regime
from nsa_oracle.reference.types import AttentionConfig


class Content:
    """The content of one layer's inputs. All tensors are on the CPU."""

    def __init__(self, attention: AttentionConfig, regime: Regime, seed: int) -> None:
        """Raises ValueError for sizes too small to hold the structure of an exact regime."""
        self.attention = attention
        self.regime = regime
        self._source: ExactContent | OrdinaryContent = (
            ExactContent(attention, regime, seed) if regime.is_exact else OrdinaryContent(attention, seed)
        )

    def keys(self, slots: Sequence[int], version: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys that pass ``version`` writes to ``slots``: k bf16 [n, qk_head_dim], index_k bf16 [n, index_head_dim]."""
        numbers = np.asarray(slots, dtype=np.int64).reshape(-1)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < MAX_SLOTS:
            raise ValueError(f"slots must lie in 0..{MAX_SLOTS - 1}")
        return self._source.keys(numbers, version % VERSIONS)

    def queries(
        self, ids: Sequence[tuple[int, int]], version: int, candidates: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of the rows named by ``ids`` (pool row, draft token) in pass ``version``.

        candidates[i]: slots that row i certainly attends to, none if it attends to nothing. All of its visible slots,
        or, if it sees more than index_topk, exactly one. DOMINATING directs its heads at them, and gives the first the
        uniquely highest index score; the other regimes ignore them.

        Returns q bf16 [n, H, qk_head_dim], index_q float8_e4m3fn [n, IH, ID], index_weights float32 [n, IH].
        """
        if len(ids) != len(candidates):
            raise ValueError(f"{len(ids)} ids, but candidates for {len(candidates)} rows")
        places = [((row << 32) | token, version % VERSIONS) for row, token in ids]
        return self._source.queries(places, candidates)

    def targets(self, row: tuple[int, int], version: int, candidates: Sequence[int]) -> list[int]:
        """DOMINATING: the slot that each head of a row attends to. See ``queries``."""
        if not isinstance(self._source, ExactContent):
            raise ValueError("random content has no targets")
        return [int(s) for s in self._source.targets([((row[0] << 32) | row[1], version % VERSIONS)], [candidates])[0]]

    def decode(self, value: torch.Tensor) -> Origin | None:
        """Where ``value`` [kv_lora_rank], an output of the DOMINATING regime, was written, or None.

        Every element must be what was written there: a value put together from two keys, or changed at all, is None.
        """
        return self._source.decode(value) if isinstance(self._source, ExactContent) else None
