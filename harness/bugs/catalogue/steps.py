"""Bugs of backends that take the number of draft steps for fixed."""

from __future__ import annotations

import dataclasses

import torch

from nsa_oracle.harness import fields
from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, by_wrapping
from nsa_oracle.harness.bugs.wrappers import BackendWrapper, KeepsFields, Moment
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.protocol import SingleStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, StepSemantics


class CountsSteps(BackendWrapper):
    """A draft step sees as many tokens more as calls were made since a multiple of N."""

    calls = 0

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        advances = self.config.step_semantics is StepSemantics.ADVANCING and batch.forward_mode.is_decode_or_idle
        if step is None or not advances or moment not in (Moment.EAGER, Moment.REPLAY):
            return batch
        counted = self.calls % self.config.speculative_num_steps
        self.calls += 1
        return dataclasses.replace(batch, seq_lens=batch.seq_lens + (counted - step))


class WaitsForTheLastStep(KeepsFields):
    """Page tables of all steps are written when the last of the N steps is asked for."""

    names = ("page_table_1", "real_page_table")

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.computed: dict[int, dict[str, torch.Tensor]] = {}

    def finish(self, batch: ForwardBatch, moment: Moment, step: int | None) -> None:
        if moment is not Moment.REPLAY or step is not None:  # else all steps are asked for at once
            super().finish(batch, moment, step)

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        if moment is Moment.REPLAY:
            tensors = fields.tensors(backend.forward_metadata)
            self.computed[index] = {name: tensors[name].clone() for name in self.names}
        super().done(backend, batch, moment, index)
        if moment is Moment.REPLAY and index == self.config.speculative_num_steps - 1:
            for step, computed in self.computed.items():
                tensors = fields.tensors(self.bound[self._key(step, batch)])
                for name, content in computed.items():
                    tensors[name].copy_(content)


class SharedCopyLeavesSchedules(KeepsFields):
    """One copy serves the first three of four draft steps or more, and leaves out the paged MQA schedule."""

    names = ("paged_mqa_schedule_metadata",)

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        shared = self.config.speculative_num_steps > 3 and index < 3 and batch.forward_mode.is_decode_or_idle
        if shared or moment is not Moment.REPLAY:
            super().done(backend, batch, moment, index)


BUGS = (
    Bug(
        name="schedule-left-out-of-the-shared-copy",
        group=Group.BUFFERS,
        sentence="One copy refreshes the first three of four draft steps or more, all but the paged MQA schedule.",
        reference=REVIEW,  # of SGLang 0.5.23: docs/upstream.md
        trigger="a DECODE replay with four draft steps, a schedule, and lengths whose segments differ from capture's",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(SharedCopyLeavesSchedules),
    ),
    Bug(
        name="steps-told-apart-by-counting",
        group=Group.BUFFERS,
        sentence="Calls are counted modulo N to tell draft steps apart; after a cycle of fewer steps the count is off.",
        reference="vllm#47014",
        trigger="fewer draft steps than N, then any number, eagerly or prepared outside the graph; advancing steps",
        caught_by=frozenset({Check.METADATA, Check.SHAPE, Check.CRASH}),
        plant=by_wrapping(CountsSteps),
    ),
    Bug(
        name="tables-written-with-the-last-step",
        group=Group.BUFFERS,
        sentence="Page tables of all draft steps are written with the last of N; a cycle of fewer steps has old ones.",
        reference="vllm#57053",
        trigger="a replay of fewer draft steps than N, prepared outside the graph, after another batch",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(WaitsForTheLastStep),
    ),
)
