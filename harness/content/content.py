"""Content of the attention inputs: keys, queries and weights as a pure function of a seed, a regime and a place.

A key depends on the slot that it is written to and on the *version*, the number of the forward pass that writes it.
Rows that write one slot in one pass have the same key, and a key left over from an older pass is a different one. A
query depends on its id (pool row and draft token) and on the version. Neither depends on its place in the batch.

In the exact regimes (all but RANDOM) every intermediate result of the layer is representable, so the right answer has
one bit pattern for any order of summation, any tiles and any splits; ``content.exactness`` proves and checks this. A
key of these regimes, in the order of its elements:

- Latent part, which is also the value: multiples of 1/8. Each of the four quant tiles has one extreme element, +-7/8 m,
  with the tile's m drawn from 0 (the whole tile is zero, but never all four), 1, 2, 4; some *score elements* 0, 1/8 or
  2/8 (0 in a zero tile); and payload elements that encode (slot, version) in digits of three bits: {+-1..+-4}/8 m, each
  digit at least once in every tile, and repeated up to the end of the tile. The seed determines the positions within a
  tile.
- RoPE part: the bits of the slot as +-1 (scrambled by the seed, so that the codes of neighbouring slots differ in many
  elements), repeated to fill the part, then a constant 1.
- Index key: see ``index_keys.IndexKeys``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nsa_oracle.harness.content.exact import MAX_SLOTS, VERSIONS, ExactContent, Origin
from nsa_oracle.harness.content.ordinary import OrdinaryContent
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference.types import AttentionConfig


class Content:
    """The content of one layer's inputs. All tensors are on the CPU."""

    def __init__(self, attention: AttentionConfig, regime: Regime, seed: int) -> None:
        """Raises ValueError for sizes too small for the structure of an exact regime."""
        self.attention = attention
        self.regime = regime
        self._source: ExactContent | OrdinaryContent = (
            ExactContent(attention, regime, seed) if regime.is_exact else OrdinaryContent(attention, seed)
        )

    def keys(self, slots: Sequence[int], version: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys that pass ``version`` writes to ``slots``: k bf16 [n, qk_head_dim], index_k bf16 [n, index_head_dim].

        Raises ValueError for a slot outside 0..MAX_SLOTS - 1.
        """
        numbers = np.asarray(slots, dtype=np.int64).reshape(-1)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < MAX_SLOTS:
            raise ValueError(f"slots must lie in 0..{MAX_SLOTS - 1}")
        return self._source.keys(numbers, version % VERSIONS)

    def queries(
        self, ids: Sequence[tuple[int, int]], version: int, candidates: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of the rows with ``ids`` (pool row, draft token) in pass ``version``.

        candidates[i]: slots that row i certainly attends to; none if it attends to nothing, all of its visible slots,
        or exactly one if it sees more than index_topk. DOMINATING directs the row's heads at them, and gives the first
        one the highest index score, without a tie; the other regimes ignore them.

        Returns q bf16 [n, H, qk_head_dim], index_q float8_e4m3fn [n, IH, ID], index_weights float32 [n, IH]. Raises
        ValueError if the numbers of ids and candidates differ.
        """
        if len(ids) != len(candidates):
            raise ValueError(f"{len(ids)} ids, but candidates for {len(candidates)} rows")
        places = [((row << 32) | token, version % VERSIONS) for row, token in ids]
        return self._source.queries(places, candidates)

    def targets(self, row: tuple[int, int], version: int, candidates: Sequence[int]) -> list[int]:
        """DOMINATING: the slot that each head of a row attends to; see ``queries``. Raises ValueError in RANDOM."""
        if not isinstance(self._source, ExactContent):
            raise ValueError("random content has no targets")
        return [int(s) for s in self._source.targets([((row[0] << 32) | row[1], version % VERSIONS)], [candidates])[0]]

    def decode(self, value: torch.Tensor) -> Origin | None:
        """Slot and version of the key whose value is ``value`` [kv_lora_rank], an output of the DOMINATING regime.

        None unless every element is that of the key: for a value mixed from two keys, or changed in any way.
        """
        return self._source.decode(value) if isinstance(self._source, ExactContent) else None
