"""Compares the floating-point results of a layer: index logits, attention outputs and their logsumexp."""

from __future__ import annotations

from functools import partial

import torch

from nsa_oracle.harness.checks.bounds import attention_bound, fraction_used, logits_bound
from nsa_oracle.harness.checks.cells import picture_of, shown_number
from nsa_oracle.harness.checks.places import SlotLabels
from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.content.exactness import check_exact, check_exact_index
from nsa_oracle.harness.engine.expected import LayerRows
from nsa_oracle.harness.engine.judged_layer import JudgedLayer
from nsa_oracle.harness.engine.observations import LayerStep, Scored
from nsa_oracle.harness.engine.passes import Pass
from nsa_oracle.harness.findings import Finding, Kind, Neighbour, around
from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.harness.subjects.result_checks import wrong_shape_or_dtype
from nsa_oracle.reference import attention, indexer, kv_cache
from nsa_oracle.reference.types import AttentionConfig

MOST_CHECKED = 1 << 21  # elements of a row's keys, times heads; of larger rows, one per pass is checked for exactness


class FloatCheck:
    """Compares the numbers of one layer: by value if the content is exact, else within a bound.

    labels: names of rows and slots in reports.
    """

    def __init__(self, layer: JudgedLayer, labels: SlotLabels) -> None:
        self.layer = layer
        self.config = layer.config
        self.regime = layer.content.regime
        self.weaker = layer.weaker
        self.labels = labels

    def compare_logits(
        self, got: LayerStep, want: torch.Tensor, rows: LayerRows, a_pass: Pass, tally: LayerTally
    ) -> Finding | None:
        bound = torch.zeros_like(want, dtype=torch.float64) if self._is_bounded("logits") else None
        for row, length in enumerate(a_pass.seqlens):
            values, scales = _index_keys(self.config, rows, row, length)
            query, weights = rows.inputs.index_q[row], rows.inputs.index_weights[row]
            if bound is not None:
                bound[row, :length] = logits_bound(self.config, query[None], weights[None], values, scales)[0]
            if self.regime.is_exact and self._is_checked(a_pass, row, values.numel() * self.config.index_n_heads):
                check_exact_index(self.config, query, weights, values, scales)
        return self._compare_numbers("logits", got.outputs.logits[: a_pass.rows], want, bound, a_pass, "token", tally)

    def compare_attention(
        self, got: LayerStep, indices: torch.Tensor, rows: LayerRows, a_pass: Pass, tally: LayerTally
    ) -> Finding | None:
        """Compare out and lse. indices: [R, K], the slots that attention was given."""
        count, q, cache = a_pass.rows, rows.inputs.q, rows.caches.kv
        out, lse = attention.unrounded(self.config, q, cache, indices)
        out_bound, lse_bound = None, None
        if self._is_bounded("out") or self._is_bounded("lse"):
            keys = [kv_cache.load_kv(self.config, cache, row[row >= 0]) for row in indices]
            out_bound, lse_bound = attention_bound(self.config, q, keys)
        if self.regime.is_exact:
            self._check_exact(q, cache, indices, a_pass)
        if not self._is_bounded("out"):
            out, out_bound = out.to(torch.float32).to(torch.bfloat16), None
        if lse_bound is None or not self._is_bounded("lse"):
            # Weights and their sum are exact: only a logarithm, a product and a sum are rounded.
            counts = (indices >= 0).sum(1, keepdim=True).clamp(min=1)
            lse_bound = 2.0**-21 * (lse.abs() + 2 * counts.double().log() + 1)
        finding = self._compare_numbers("out", got.outputs.out[:count], out, out_bound, a_pass, "head", tally)
        return finding or self._compare_numbers("lse", got.outputs.lse[:count], lse, lse_bound, a_pass, "head", tally)

    def compare_edge_scores(self, seen: Scored, tally: LayerTally) -> Finding | None:
        """Compare the scores of edge-case index keys, within the bound. A key with NaN or an infinity scores NaN."""
        given, got = seen.given, seen.logits
        width, page_size = self.layer.setup.max_context_len, self.layer.setup.page_size
        finding = wrong_shape_or_dtype("logits", got, torch.float32, (len(given.index_q), width), self.layer.device)
        if finding is not None:
            return finding
        queries, cache = (given.index_q, given.index_weights), given.index_k_cache
        want = indexer.indexer_logits(
            self.config, *queries, cache, given.real_page_table, given.seqlens_expanded, width
        )
        slots = torch.arange(len(given.kinds)) + page_size
        values, scales = kv_cache.load_index_k(self.config, cache, slots)
        bound = torch.zeros_like(want, dtype=torch.float64)
        bound[:, : len(slots)] = logits_bound(self.config, *queries, values.to(torch.float8_e4m3fn), scales)
        got = got.cpu()
        wrong = ~(fraction_used(got, want, bound) <= 1)
        if bool(wrong.any()):
            row, token = (int(i) for i in wrong.nonzero()[0])
            seen_text, want_text = (f"{float(numbers[row, token]):.9g}" for numbers in (got, want))
            return Finding(
                Kind.BOUND, "logits", seen_text, want_text, place=given.name(row, token),
                differing=int(wrong.sum()), compared=want.numel(),
                picture=picture_of(got, want, wrong, "token", "row {}".format, shown=shown_number),
            )  # fmt: skip
        for kind in given.kinds:
            tally.scores[kind.value] = tally.scores.get(kind.value, 0) + 1
        return None

    def _compare_numbers(
        self,
        name: str,
        got: torch.Tensor,
        want: torch.Tensor,
        bound: torch.Tensor | None,
        a_pass: Pass,
        axis: str,
        tally: LayerTally,
    ) -> Finding | None:
        """Compare within ``bound``, or by value if it is None: then zeros of both signs are equal, and so are NaNs."""
        stage, declared = tally.stage(name), self.weaker.get(name)
        kind = Kind.VALUE
        if bound is not None:
            fraction = fraction_used(got, want, bound)
            wrong = ~(fraction <= 1)
            stage.worst = max(stage.worst, float(fraction[~wrong].max()) if bool((~wrong).any()) else 0.0)
            kind = Kind.BOUND
            if self.regime.is_exact and declared is Strictness.BOUND:
                stage.count_weaker(want.numel(), declared)
            else:
                stage.bounded += want.numel()
        elif declared is Strictness.ONE_STEP:
            wrong = _bf16_steps(got, want) > 1
            stage.count_weaker(want.numel(), declared)
        else:
            wrong = ~((got == want) | (got.isnan() & want.isnan()))
            stage.exact += want.numel()
        if not bool(wrong.any()):
            return None
        first = [int(i) for i in wrong.nonzero()[0]]
        at = f"{self.labels.row(a_pass, first[0])}, {axis} {first[1]}" + "".join(f", element {i}" for i in first[2:])
        got_text, want_text = (f"{float(tensor[tuple(first)]):.9g}" for tensor in (got, want))
        if name == "out" and self.regime is Regime.DOMINATING:
            got_text += self.labels.origin(got[first[0], first[1]])
            want_text += self.labels.origin(want[first[0], first[1]])
        row_name = partial(self.labels.row, a_pass)
        heads = self.config.num_heads
        label = row_name if len(first) == 2 else lambda n: f"{row_name(n // heads)}, {axis} {n % heads}"
        return Finding(
            kind, name, got_text, want_text, place=at, differing=int(wrong.sum()), compared=want.numel(),
            neighbours=tuple(_around(got, want, first, at)),
            picture=picture_of(got, want, wrong, axis if len(first) == 2 else "element", label, shown=shown_number),
        )  # fmt: skip

    def _check_exact(self, q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor, a_pass: Pass) -> None:
        """Check the premises of exact content on the inputs of the rows. Raises NotExact."""
        for row, slots in enumerate(indices):
            keys = slots[slots >= 0]
            if self._is_checked(a_pass, row, len(keys) * self.config.qk_head_dim * self.config.num_heads):
                check_exact(self.config, self.regime, q[row], kv_cache.load_kv(self.config, cache, keys))

    def _is_bounded(self, name: str) -> bool:
        """Whether the numbers of a stage are compared within the error bound."""
        return not self.regime.is_exact or self.weaker.get(name) is Strictness.BOUND

    def _is_checked(self, a_pass: Pass, row: int, numbers: int) -> bool:
        """Whether the premises of exactness are checked on this row. Of large rows, only the last of a pass is."""
        return numbers <= MOST_CHECKED or row == a_pass.rows - 1


def _around(got: torch.Tensor, want: torch.Tensor, first: list[int], at: str) -> list[Neighbour]:
    """Cells around the first wrong one, along the last axis."""
    *outer, inner = first
    place = at.rsplit(" ", 1)[0]
    cells = [(i, float(got[(*outer, i)]), float(want[(*outer, i)])) for i in around(inner, got.shape[-1])]
    return [Neighbour(f"{place} {i}", f"{a:.9g}", f"{b:.9g}") for i, a, b in cells]


def _index_keys(config: AttentionConfig, rows: LayerRows, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cached index keys of a row's visible tokens: [n, dim] e4m3, and their scales [n] float32."""
    slots = rows.page_table_1[row, :length]
    values, scales = kv_cache.load_index_k(config, rows.caches.index_k, slots)
    return values.to(torch.float8_e4m3fn), scales


def _bf16_steps(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Distance of two tensors in steps of bf16, elementwise, int32."""

    def ordinal(numbers: torch.Tensor) -> torch.Tensor:
        bits = numbers.to(torch.bfloat16).contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordinal(got) - ordinal(want)).abs()
