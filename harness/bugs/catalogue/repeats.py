"""Bugs of what a backend keeps from one call to the next, or shares with another backend."""

from __future__ import annotations

import torch

from nsa_oracle.harness import fields
from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, by_mutation, by_wrapping
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.bugs.wrappers import HostNumbers, KeepsFields, Moment, OwnPool
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.reference.types import BackendConfig, ForwardBatch


class SkipsTheSameBatch(KeepsFields):
    """A replay of a batch with the lengths, pool rows and accept lengths of the graph's last one changes nothing."""

    names = tuple(field.name for field in fields.FIELDS)

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.last: dict[object, HostNumbers] = {}

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment is Moment.REPLAY:
            key, numbers = (step, self._key(0, batch)), HostNumbers.of(batch)
            self.same = self.last.get(key) == numbers
            self.last[key] = numbers
        return super().given(batch, moment, step)

    def keeps(self, batch: ForwardBatch) -> bool:
        return self.same


class AppendsToRows(OwnPool):
    """A row of a replay's page table gets the columns behind its last length; shorter rows are copied anew."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.rows: dict[int, torch.Tensor] = {}

    def mapped(self, mapping: torch.Tensor, batch: ForwardBatch, moment: Moment) -> None:
        if moment is Moment.REPLAY:
            numbers = HostNumbers.of(batch)
            for row, length in zip(numbers.pool_rows, numbers.seq_lens, strict=True):
                before = self.rows.get(row)
                if before is not None and len(before) <= length:
                    mapping[row, : len(before)] = before
                self.rows[row] = mapping[row, :length].clone()


BUGS = (
    Bug(
        name="refresh-skipped-for-the-same-lengths",
        group=Group.TABLES,
        sentence="A replay is not prepared if lengths, pool rows and accept lengths are those of the last replay.",
        reference=REVIEW,
        trigger="the same batch on other pages",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(SkipsTheSameBatch),
    ),
    Bug(
        name="table-rows-appended-by-pool-row",
        group=Group.TABLES,
        sentence="Of a row of the page table only the columns behind the pool row's last length are copied.",
        reference=REVIEW,
        trigger="a pool row that grows on other pages",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(AppendsToRows),
    ),
    Bug(
        name="length-loaded-past-the-batch",
        group=Group.TABLES,
        sentence="A kernel also loads the entry behind the last length, and does not use it.",
        reference=REVIEW,
        trigger="any call",
        caught_by=frozenset({Check.CRASH}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.lengths:load_lengths",
                "mask=valid, other=0).to(tl.int32) + extra",
                "mask=requests <= tl.max(tl.where(valid, requests, -1), 0) + 1, other=0).to(tl.int32) + extra",
            )
        ),
    ),
)
