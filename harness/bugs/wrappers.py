"""Wrappers around the backend of ``optimized/``, for bugs that a change of its source cannot express.

The classes of this module contain no bug: subclasses in ``bugs.catalogue`` add one. Each class is a backend factory of
(config, req_to_token, optimisations).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsa_oracle.harness import fields
from nsa_oracle.harness.protocol import SingleStepBackend
from nsa_oracle.harness.scenarios.batch import PAD_REQ_POOL_INDEX, PAD_SEQ_LEN
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo

DRAFT_EXTENDS = (ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2)


class Moment(enum.Enum):
    """The kind of call that the engine makes."""

    EAGER = "eager"
    CAPTURE = "capture"  # binding to a bucket, just before the graph is captured
    IN_GRAPH = "in graph"  # preparation recorded inside the capture
    REPLAY = "replay"


class BackendWrapper:
    """Forwards every call to the wrapped backend. Hooks may change the batch before a call and the metadata after it.

    The engine either makes all its calls on the N-step object or all of them on the single steps. Hooks therefore get
    ``step``: the index of the step, or None for a call on the N-step object. A hook that stores state must store it per
    ``step``.
    """

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        self.config = config
        self.pool = req_to_token
        self.inner: Any = optimized_backend(config, self.pool_for(req_to_token), optimizations)
        self.attn_backends = [_Step(self, backend, step) for step, backend in enumerate(self.inner.attn_backends)]

    # The hooks.

    def pool_for(self, req_to_token: torch.Tensor) -> torch.Tensor:
        """The ``req_to_token`` that the wrapped backend gets. [pool_size, max_context_len] int32."""
        return req_to_token

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        """The batch that the wrapped backend gets instead of ``batch``. Called before every call."""
        return batch

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        """Called after each call except ``Moment.IN_GRAPH``, once per step that the call was for.

        May change the metadata that ``backend``, which is step ``index``, has prepared. batch: the engine's, as it was
        before ``given``.
        """

    # The calls.

    def steps(self, step: int | None) -> list[int]:
        """The indices of the steps that a call is for."""
        return list(range(len(self.attn_backends))) if step is None else [step]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.inner.init_forward_metadata(self.given(forward_batch, Moment.EAGER, None))
        self.finish(forward_batch, Moment.EAGER, None)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.inner.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None:
        self.inner.init_forward_metadata_capture_cuda_graph(self.given(forward_batch, Moment.CAPTURE, None))
        self.finish(forward_batch, Moment.CAPTURE, None)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        self.inner.init_forward_metadata_in_graph(self.given(forward_batch, Moment.IN_GRAPH, None), bs)

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        batch = self.given(forward_batch, Moment.REPLAY, None)
        self.inner.init_forward_metadata_replay_cuda_graph(batch, batch.batch_size)
        self.finish(forward_batch, Moment.REPLAY, None)

    def finish(self, batch: ForwardBatch, moment: Moment, step: int | None) -> None:
        """Calls ``done`` for each step that the call was for."""
        for index in self.steps(step):
            self.done(self.attn_backends[index], batch, moment, index)


class _Step:
    """One step of a ``BackendWrapper``, for an engine that drives single steps: forwards calls and runs the hooks."""

    def __init__(self, whole: BackendWrapper, inner: Any, step: int) -> None:
        self.whole = whole
        self.inner = inner
        self.step = step

    @property
    def forward_metadata(self) -> Metadata:
        metadata: Metadata = self.inner.forward_metadata
        return metadata

    @forward_metadata.setter
    def forward_metadata(self, metadata: Metadata) -> None:
        self.inner.forward_metadata = metadata

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.inner.init_forward_metadata(self.whole.given(forward_batch, Moment.EAGER, self.step))
        self.whole.finish(forward_batch, Moment.EAGER, self.step)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.inner.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_capture_cuda_graph(
        self,
        bs: int,
        num_tokens: int,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None,
        forward_mode: ForwardMode,
        spec_info: SpecInfo | None,
    ) -> None:
        batch = ForwardBatch(forward_mode, bs, req_pool_indices, seq_lens, spec_info=spec_info)
        given = self.whole.given(batch, Moment.CAPTURE, self.step)
        self.inner.init_forward_metadata_capture_cuda_graph(
            given.batch_size, num_tokens, given.req_pool_indices, given.seq_lens, encoder_lens, forward_mode,
            given.spec_info,
        )  # fmt: skip
        self.whole.finish(batch, Moment.CAPTURE, self.step)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        self.inner.init_forward_metadata_in_graph(self.whole.given(forward_batch, Moment.IN_GRAPH, self.step), bs)

    def init_forward_metadata_replay_cuda_graph(
        self,
        bs: int,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_sum: int | None,
        encoder_lens: torch.Tensor | None,
        forward_mode: ForwardMode,
        spec_info: SpecInfo | None,
        seq_lens_cpu: torch.Tensor | None,
        out_cache_loc: torch.Tensor | None = None,
    ) -> None:
        batch = ForwardBatch(
            forward_mode, bs, req_pool_indices, seq_lens, seq_lens_cpu, seq_lens_sum, spec_info=spec_info
        )
        given = self.whole.given(batch, Moment.REPLAY, self.step)
        self.inner.init_forward_metadata_replay_cuda_graph(
            given.batch_size, given.req_pool_indices, given.seq_lens, given.seq_lens_sum, encoder_lens, forward_mode,
            given.spec_info, given.seq_lens_cpu, out_cache_loc,
        )  # fmt: skip
        self.whole.finish(batch, Moment.REPLAY, self.step)


@dataclass
class HostNumbers:
    """The numbers of a batch on the host, one list entry per request. A bug may change or shorten the lists."""

    seq_lens: list[int]
    pool_rows: list[int]
    accept_lengths: list[int]  # empty outside the draft-extend modes

    @classmethod
    def of(cls, batch: ForwardBatch) -> HostNumbers:
        """Reads ``batch`` back from the device."""
        accepts = [] if batch.spec_info is None else batch.spec_info.accept_length.tolist()
        return cls(batch.seq_lens.tolist(), batch.req_pool_indices.tolist(), accepts)

    @property
    def raw_bs(self) -> int:
        """The number of requests before the padding. A last request that looks like padding counts as padding."""
        count = len(self.seq_lens)
        while count and self.seq_lens[count - 1] <= PAD_SEQ_LEN and self.pool_rows[count - 1] == PAD_REQ_POOL_INDEX:
            count -= 1
        return count


class OwnInputs(BackendWrapper):
    """A graph runner with its own static inputs, filled from the engine's inputs. ``load`` may fill them wrongly.

    A graph that records its preparation reads these inputs too. As in a serving engine, all graphs share them, and a
    smaller batch leaves the entries behind it unchanged. Eager calls use the engine's inputs.
    """

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.inputs: dict[tuple[int | None, str], torch.Tensor] = {}

    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        """The numbers to write to the static inputs. ``numbers``: those of the engine; may be changed in place."""
        return numbers

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment is Moment.EAGER:
            return batch
        if moment is not Moment.IN_GRAPH:
            numbers = self.load(HostNumbers.of(batch), batch, moment, step)
            self._write(step, "seq_lens", batch.seq_lens, numbers.seq_lens)
            self._write(step, "req_pool_indices", batch.req_pool_indices, numbers.pool_rows)
            if batch.spec_info is not None:
                self._write(step, "accept_length", batch.spec_info.accept_length, numbers.accept_lengths)
        bs = batch.batch_size
        spec_info = None if batch.spec_info is None else SpecInfo(self.inputs[step, "accept_length"][:bs])
        return dataclasses.replace(
            batch,
            req_pool_indices=self.inputs[step, "req_pool_indices"][:bs],
            seq_lens=self.inputs[step, "seq_lens"][:bs],
            spec_info=spec_info,
        )

    def _write(self, step: int | None, name: str, like: torch.Tensor, numbers: Sequence[int]) -> None:
        key = (step, name)
        if key not in self.inputs:
            capacity = max(len(like), self.pool.shape[0])
            self.inputs[key] = torch.zeros(capacity, dtype=like.dtype, device=like.device)
        self.inputs[key][: len(numbers)] = torch.tensor(list(numbers), dtype=like.dtype)


class OwnPool(BackendWrapper):
    """A page mapping owned by the backend, copied from the engine's before each call. ``mapped`` may corrupt it."""

    def pool_for(self, req_to_token: torch.Tensor) -> torch.Tensor:
        self.copy = req_to_token.contiguous().clone()
        return self.copy

    def mapped(self, mapping: torch.Tensor, batch: ForwardBatch, moment: Moment) -> None:
        """May change ``mapping``, a fresh copy of the engine's, in place. [pool_size, max_context_len] int32."""

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment is not Moment.IN_GRAPH:
            self.copy.copy_(self.pool)
            self.mapped(self.copy, batch, moment)
        return batch


class KeepsFields(BackendWrapper):
    """Replays leave the fields ``names`` of the bound buffers unchanged.

    A graph that records its preparation still fills them.
    """

    names: tuple[str, ...] = ()

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.bound: dict[tuple[int, ForwardMode, int], Metadata] = {}
        self.kept: dict[int, dict[str, torch.Tensor]] = {}

    def keeps(self, batch: ForwardBatch) -> bool:
        """Whether a replay of ``batch`` leaves the fields unchanged."""
        return True

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment is Moment.REPLAY:
            for index in self.steps(step):
                tensors = fields.tensors(self.bound[self._key(index, batch)])
                self.kept[index] = {name: tensor.clone() for name, tensor in tensors.items() if name in self.names}
        return batch

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        if moment is Moment.CAPTURE:
            self.bound[self._key(index, batch)] = backend.forward_metadata
        elif moment is Moment.REPLAY and self.keeps(batch):
            tensors = fields.tensors(backend.forward_metadata)
            for name, content in self.kept[index].items():
                tensors[name].copy_(content)

    def _key(self, index: int, batch: ForwardBatch) -> tuple[int, ForwardMode, int]:
        mode = ForwardMode.DECODE if batch.forward_mode.is_decode_or_idle else batch.forward_mode
        return index, mode, batch.batch_size


class MovesFields(BackendWrapper):
    """Replays rebind the fields ``names`` to new tensors with the right content; the graph reads the bound tensors."""

    names: tuple[str, ...] = ()

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        if moment is Moment.REPLAY:
            metadata = backend.forward_metadata
            old = ((name, getattr(metadata, name)) for name in self.names)
            fresh: dict[str, Any] = {name: tensor.clone() for name, tensor in old if tensor is not None}
            backend.forward_metadata = dataclasses.replace(metadata, **fresh)
