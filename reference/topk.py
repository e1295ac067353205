"""Which tokens a query token attends to: those with the best indexer scores, as positions, then as cache indices."""

from __future__ import annotations

import torch


def topk_indices(logits: torch.Tensor, seqlens_expanded: torch.Tensor, index_topk: int) -> torch.Tensor:
    """Positions of the ``index_topk`` largest of each row's first seqlens_expanded logits: int32 [R, index_topk].

    Positions ascend, then -1. Ties go to the lower position, and 0.0 ties with -0.0. NaN counts as -inf. A row of at
    most ``index_topk`` tokens selects all of them, whatever their logits.

    logits [R, W] float32, where columns at and beyond seqlens_expanded [R] are ignored.
    """
    positions = torch.full((logits.shape[0], index_topk), -1, dtype=torch.int32, device=logits.device)
    for row, seq_len in enumerate(seqlens_expanded.tolist()):
        scores = logits[row, :seq_len]  # [S]
        scores = torch.where(scores.isnan(), -torch.inf, scores)
        scores = scores + 0.0  # turns -0.0 into 0.0, which a sort that compares bits would distinguish
        # A stable sort keeps equal scores in order of position.
        best_first = torch.sort(scores, descending=True, stable=True).indices  # [S]
        selected = best_first[:index_topk].sort().values  # [min(S, K)]
        positions[row, : selected.shape[0]] = selected
    return positions


def transform_paged(positions: torch.Tensor, page_table_1: torch.Tensor) -> torch.Tensor:
    """Slot of each position: page_table_1[row, position], int32 [R, K]; -1 stays. One table row per query token."""
    if page_table_1.shape[1] == 0:  # no row has a token, and gather needs a column even for a -1
        return positions.clone()
    columns = positions.clamp(min=0).to(torch.int64)  # [R, K]
    return torch.where(positions < 0, -1, page_table_1.gather(1, columns))


def transform_ragged(positions: torch.Tensor, topk_indices_offset: torch.Tensor) -> torch.Tensor:
    """Place of each position in the batch's concatenated KV: position + offset of the row, int32 [R, K]; -1 stays."""
    return torch.where(positions < 0, -1, positions + topk_indices_offset.unsqueeze(1))


def topk_transform_paged(
    logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor, index_topk: int
) -> torch.Tensor:
    """Slots of the selected tokens, int32 [R, index_topk]: ``topk_indices``, then ``transform_paged``."""
    return transform_paged(topk_indices(logits, seqlens_expanded, index_topk), page_table_1)


def topk_transform_ragged(
    logits: torch.Tensor, seqlens_expanded: torch.Tensor, topk_indices_offset: torch.Tensor, index_topk: int
) -> torch.Tensor:
    """The selected tokens in the concatenated KV: ``topk_indices``, then ``transform_ragged``."""
    return transform_ragged(topk_indices(logits, seqlens_expanded, index_topk), topk_indices_offset)
