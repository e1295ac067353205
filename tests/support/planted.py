"""Backends with one planted bug each, and clean ones that use a freedom the contract leaves them.

All derive from the reference, so that nothing but the plant can be wrong. Each is a factory of (config, req_to_token),
as ``--oracle-backend planted:NAME`` wants it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

import torch

from nsa_oracle.reference.lengths import cu_seqlens
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.multi_step import MultiStepBackend, SingleStepBackend, copy_into
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo


class Step(SingleStepBackend):
    """The reference's step with seams: ``alter`` what was computed, or how buffers are ``refresh``ed."""

    seq_lens_cpu: torch.Tensor | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self.alter(self.forward_metadata, forward_batch)

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
        key = ForwardMode.DECODE if forward_mode.is_decode_or_idle else forward_mode
        self.forward_metadata = self._captured[key, bs]
        self.refresh(
            self.forward_metadata,
            ForwardBatch(forward_mode, bs, req_pool_indices, seq_lens, seq_lens_cpu, spec_info=spec_info),
        )

    def _compute_in_graph(self, batch: ForwardBatch) -> Metadata:
        metadata = super()._compute_in_graph(batch)
        self.alter(metadata, batch)
        return metadata

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        """Change freshly computed metadata: at capture, before a replay and eagerly."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        """Bring the buffers of a graph up to date before its replay."""
        copy_into(buffers, self._compute_in_graph(batch))


class OfSteps(MultiStepBackend):
    """A multi-step backend of steps of another class."""

    step: type[SingleStepBackend] = Step

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        self.attn_backends = [self.step(config, req_to_token, number) for number in range(config.speculative_num_steps)]


def backend_of(step: type[SingleStepBackend]) -> type[OfSteps]:
    """Decorates a step: the name then stands for the backend made of such steps."""
    return type(step.__name__, (OfSteps,), {"step": step, "__doc__": step.__doc__})


def copy_all_but(fields: Iterable[str], buffers: Metadata, values: Metadata) -> None:
    kept = {name: getattr(buffers, name) for name in fields}
    copy_into(dataclasses.replace(buffers, **dict.fromkeys(kept)), values)


def all_but(*fields: str) -> type[OfSteps]:
    """A backend whose replays leave ``fields`` as the capture wrote them."""

    class Stale(Step):
        def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
            copy_all_but(fields, buffers, self._compute_in_graph(batch))

    return backend_of(Stale)


Clean = MultiStepBackend

# Replay buffers

KeepsPageTable = all_but("page_table_1", "real_page_table")
KeepsRealPageTable = all_but("real_page_table")
KeepsPagedMqaSchedule = all_but("paged_mqa_schedule_metadata")
KeepsFlashMlaSchedule = all_but("flashmla_metadata", "flashmla_num_splits")
KeepsCuSeqlensK = all_but("nsa_cu_seqlens_k")


@backend_of
class LeavesLastBound(Step):
    """Replay stages a field in fresh memory, where its values happen to lie, and leaves out the last."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        bounds = values.nsa_cu_seqlens_k
        assert bounds is not None
        bounds.clone()  # given back at once: the next to ask for as much gets it
        staged = torch.empty_like(bounds)
        staged[:-1] = bounds[:-1]
        copy_into(buffers, dataclasses.replace(values, nsa_cu_seqlens_k=staged))


@backend_of
class RebuildsMetadata(Step):
    """Replay binds new tensors; the graph reads the old ones."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        self.forward_metadata = self._compute_in_graph(batch)


@backend_of
class RebuildsOneField(Step):
    """All is copied in place, but one attribute is bound to a new tensor of the right content."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        copy_into(buffers, values)
        self.forward_metadata = dataclasses.replace(buffers, nsa_cu_seqlens_k=values.nsa_cu_seqlens_k)


@backend_of
class DropsFieldAtReplay(Step):
    """One attribute is gone after a replay."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        self.forward_metadata = dataclasses.replace(buffers, nsa_cu_seqlens_k=None)  # type: ignore[arg-type]


@backend_of
class UpdatesTwin(Step):
    """Replay writes a twin of the buffers that the graph is bound to."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        self.twin = self._compute_in_graph(batch)


@backend_of
class MixesBuckets(Step):
    """Every replay refreshes the buffers of the bucket captured last."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        last = list(self._captured.values())[-1]
        values = self._compute_in_graph(batch)
        if last.cache_seqlens_int32.shape == values.cache_seqlens_int32.shape:
            copy_into(last, values)


class SkipsLastStep(MultiStepBackend):
    """The loop over the steps ends one early."""

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        steps, self.attn_backends = self.attn_backends, self.attn_backends[:-1]
        super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
        self.attn_backends = steps


class LastStepForAll(MultiStepBackend):
    """All steps see the lengths of the last one."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)
        for step in self.attn_backends:
            step.speculative_step_id = config.speculative_num_steps - 1


class OneStepTooFew(MultiStepBackend):
    """Has N - 1 steps."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)
        self.attn_backends.pop()


# Lengths


@backend_of
class ReadsMirror(Step):
    """Trusts the host's copy of the lengths."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        assert batch.seq_lens_cpu is not None, "no host mirror to read"
        super().refresh(buffers, dataclasses.replace(batch, seq_lens=batch.seq_lens_cpu.to(batch.seq_lens.device)))


@backend_of
class VerifyForgetsDrafts(Step):
    """TARGET_VERIFY counts only what is committed."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.TARGET_VERIFY:
            metadata.cache_seqlens_int32.sub_(self.config.speculative_num_draft_tokens)


@backend_of
class WindowOffByOne(Step):
    """Each draft-extend token sees one token too few."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.DRAFT_EXTEND:
            expanded = metadata.seqlens_expanded
            expanded.sub_((expanded > 0).to(torch.int32))


class _WithAccept(Step):
    """Computes with other accept lengths than it was given."""

    def accepts(self, given: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        if batch.spec_info is not None:
            batch = dataclasses.replace(batch, spec_info=SpecInfo(self.accepts(batch.spec_info.accept_length)))
        super().refresh(buffers, batch)


@backend_of
class IgnoresAccept(_WithAccept):
    """Takes every draft for accepted."""

    def accepts(self, given: torch.Tensor) -> torch.Tensor:
        return torch.full_like(given, self.config.speculative_num_draft_tokens)


@backend_of
class ReusesLastAccept(_WithAccept):
    """Each replay uses the accept lengths of the replay before it."""

    last: torch.Tensor | None = None

    def accepts(self, given: torch.Tensor) -> torch.Tensor:
        used = given if self.last is None else self.last
        self.last = given.clone()
        return used


@backend_of
class SkipsPaddingRows(Step):
    """Writes only the requests that look real, and leaves padding as the last replay left it."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        real = int((batch.seq_lens > 1).sum())
        copy_all_but(("cache_seqlens_int32",), buffers, values)
        buffers.cache_seqlens_int32[:real] = values.cache_seqlens_int32[:real]


@backend_of
class NegativeLengths(Step):
    """Does not clamp the window of a request shorter than its drafts."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.DRAFT_EXTEND_V2:
            drafts = self.config.speculative_num_draft_tokens
            ends = metadata.cache_seqlens_int32[:, None]
            window = torch.arange(1 - drafts, 1, dtype=torch.int32, device=ends.device)
            metadata.seqlens_expanded.copy_((ends + window).flatten())


@backend_of
class KeepsTail(Step):
    """Leaves rows beyond the accepted tokens as the last replay left them."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        copy_all_but(("seqlens_expanded",), buffers, values)
        live = int((values.seqlens_expanded > 0).sum())
        buffers.seqlens_expanded[:live] = values.seqlens_expanded[:live]


@backend_of
class TailFallsToZero(Step):
    """The cumulative lengths restart at 0 behind the live rows."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.nsa_cu_seqlens_k[1:][metadata.seqlens_expanded == 0] = 0


@backend_of
class ForgetsTopK(Step):
    """Does not limit what attention reads to the indexer's choice."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.nsa_cache_seqlens_int32.copy_(metadata.seqlens_expanded)


# Page tables


@backend_of
class NarrowTable(Step):
    """The table lacks the columns that drafts overshoot into."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        width = self.config.max_context_len - self.config.speculative_num_draft_tokens
        metadata.page_table_1 = metadata.page_table_1[:, :width].contiguous()


@backend_of
class NarrowFill(Step):
    """The table is wide enough, but only its committed columns are written."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        copy_all_but(("page_table_1",), buffers, values)
        width = self.config.max_context_len - self.config.speculative_num_draft_tokens
        buffers.page_table_1[:, :width] = values.page_table_1[:, :width]


@backend_of
class SortsPages(Step):
    """Takes pages for ordered by number."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        for row, kv_len in zip(metadata.real_page_table, metadata.seqlens_expanded.tolist(), strict=True):
            live = row[: -(-kv_len // self.config.page_size)]
            live.copy_(live.sort().values)


@backend_of
class ReadsRawPoolRow(Step):
    """Uses a request's place in the batch as its row of the pool."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        place = torch.arange(batch.batch_size, device=batch.req_pool_indices.device)
        super().refresh(buffers, dataclasses.replace(batch, req_pool_indices=place))


# Form of the output


@backend_of
class Int64Lengths(Step):
    """Hands out 64-bit lengths."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.cache_seqlens_int32 = metadata.cache_seqlens_int32.to(torch.int64)


@backend_of
class OneRowTooMany(Step):
    """The per-token lengths have a spare row."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.seqlens_expanded = torch.cat([metadata.seqlens_expanded, metadata.seqlens_expanded.new_zeros(1)])


@backend_of
class LacksQueryBounds(Step):
    """Never computes one of the fields."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.nsa_cu_seqlens_q = None  # type: ignore[assignment]


@backend_of
class LacksPageTable(Step):
    """Never computes the page table."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.page_table_1 = None  # type: ignore[assignment]


@backend_of
class LacksExpandedLengths(Step):
    """Never computes the length of each query token."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.seqlens_expanded = None  # type: ignore[assignment]


@backend_of
class OffersPrefillField(Step):
    """Offers a field that only prefill has."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.topk_indices_offset = torch.zeros_like(metadata.seqlens_expanded)


@backend_of
class WrongHostScalar(Step):
    """Reports the queries of a whole verify as the longest query."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.max_seq_len_q = self.config.speculative_num_draft_tokens


# Memory that is not the backend's to write


@backend_of
class WritesOneRowBeyond(Step):
    """The last row is written once more, behind the table."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        table = buffers.page_table_1
        rows, width = table.shape
        beyond = table.as_strided((1, width), (width, 1), table.storage_offset() + rows * width)
        beyond[:, :32] = 7


@backend_of
class ReadsBehindSeqLens(Step):
    """Takes the length of the last request from one request further on than the engine has memory for."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        memory, stride = batch.seq_lens.untyped_storage(), batch.seq_lens.stride(0)
        whole = torch.empty(0, dtype=batch.seq_lens.dtype, device=batch.seq_lens.device).set_(memory)
        capacity = self.req_to_token.shape[0]
        buffers.cache_seqlens_int32[-1:].copy_(whole[batch.seq_lens.storage_offset() + capacity * stride])


@backend_of
class ReadsBehindThePool(Step):
    """Takes the first slot of the last row from one row further on than there are."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        pool = self.req_to_token
        behind = pool.storage_offset() + pool.shape[0] * pool.stride(0)
        whole = torch.empty(0, dtype=pool.dtype, device=pool.device).set_(pool.untyped_storage())
        buffers.page_table_1[-1, :1].copy_(whole[behind])


@backend_of
class WritesReqToToken(Step):
    """Parks a value in a cell of the pool that no request uses."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        self.req_to_token[-1, -1] = 7


@backend_of
class WritesBesideReqToToken(Step):
    """Writes behind the columns of the pool that it was given."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        pool = self.req_to_token
        pool.as_strided((1,), (1,), pool.storage_offset() + pool.shape[1]).fill_(7)


class WritesSeqLens(MultiStepBackend):
    """When all is prepared, adds the drafts to the engine's own lengths."""

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
        forward_batch.seq_lens.add_(1)


# Captured graphs


class _InGraph(Step):
    """Writes the lengths inside the graph, everything else before the replay."""

    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        verifies = batch.forward_mode is ForwardMode.TARGET_VERIFY
        return batch.seq_lens + self.config.speculative_num_draft_tokens if verifies else batch.seq_lens

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        copy_all_but(("cache_seqlens_int32",), buffers, self._compute_in_graph(batch))

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        self.forward_metadata.cache_seqlens_int32.copy_(self.lengths(forward_batch))


class _InGraphBackend(OfSteps):
    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        for step in self.attn_backends:
            step.init_forward_metadata_in_graph(forward_batch, bs)  # type: ignore[attr-defined]


class PreparesInGraph(_InGraphBackend):
    """Clean: device to device, at fixed addresses."""

    step = _InGraph


class _Syncs(_InGraph):
    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        return batch.seq_lens.clamp(max=batch.seq_lens.max().item())


class SyncsInCapture(_InGraphBackend):
    """Asks the device for a number while it is being captured."""

    step = _Syncs


class _Freezes(_InGraph):
    def init_forward_metadata_capture_cuda_graph(self, *args: object, **kwargs: object) -> None:
        super().init_forward_metadata_capture_cuda_graph(*args, **kwargs)  # type: ignore[arg-type]
        self.longest = int(self.forward_metadata.cache_seqlens_int32.max())

    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        return batch.seq_lens.clamp(max=self.longest)


class FreezesLength(_InGraphBackend):
    """Freezes the longest length of the capture into the graph."""

    step = _Freezes


class _FreezesLimit(_Freezes):
    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        return batch.seq_lens.clamp(max=self.longest + 100)


class FreezesLimit(_InGraphBackend):
    """Freezes a limit above the longest length of the capture: replays of moderate lengths are right."""

    step = _FreezesLimit


class _ClearsByTheMirror(_InGraph):
    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.workspace = torch.zeros_like(self.req_to_token[0])

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        super().init_forward_metadata_in_graph(forward_batch, bs)
        assert forward_batch.seq_lens_cpu is not None
        self.workspace[: int(forward_batch.seq_lens_cpu.max())].zero_()


class ClearsByTheMirror(_InGraphBackend):
    """Clears as much of a workspace as the host's lengths say at capture; no output depends on it."""

    step = _ClearsByTheMirror


class _ChoosesByBucket(_InGraph):
    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        in_two = batch.batch_size > 1  # as an implementation chooses a tile or a number of splits
        return torch.cat([super().lengths(batch)[:1], super().lengths(batch)[1:]]) if in_two else super().lengths(batch)


class ChoosesByBucket(_InGraphBackend):
    """Clean: what is launched depends on the bucket, and on nothing else."""

    step = _ChoosesByBucket


class _Accumulates(_InGraph):
    """Every preparation starts the lengths at 0; the graph adds to what is there."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        buffers.cache_seqlens_int32.zero_()

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        self.forward_metadata.cache_seqlens_int32.add_(self.lengths(forward_batch))


class AccumulatesInGraph(_InGraphBackend):
    """Right once per preparation: a second replay adds the lengths to themselves."""

    step = _Accumulates


class _KeepsFirst(_InGraph):
    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        lengths = self.forward_metadata.cache_seqlens_int32
        remembered = torch.empty_like(lengths)
        lengths.copy_(torch.where(remembered == -1, self.lengths(forward_batch).to(torch.int32), remembered))
        remembered.copy_(lengths)


class KeepsTheFirstLengths(_InGraphBackend):
    """Remembers the lengths of its first replay in memory that the graph made and nobody holds."""

    step = _KeepsFirst


class _DropsScratch(_InGraph):
    def init_forward_metadata_capture_cuda_graph(self, *args: object, **kwargs: object) -> None:
        super().init_forward_metadata_capture_cuda_graph(*args, **kwargs)  # type: ignore[arg-type]
        self.scratch = torch.empty_like(self.forward_metadata.cache_seqlens_int32)

    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        return self.scratch.copy_(super().lengths(batch))


class DropsScratch(_InGraphBackend):
    """Each capture makes scratch memory of its own and forgets that of the capture before."""

    step = _DropsScratch


# Exceptions


class RaisesWhenBuilt(MultiStepBackend):
    """Cannot be built."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        raise RuntimeError("no such\n  device")


@backend_of
class RaisesAtReplay(Step):
    """Fails in the middle of a replay."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        raise IndexError("row 3 of 2")


@backend_of
class FaultsOnTheGpu(Step):
    """Looks up a row that is not there: an exception on a CPU, a fault that costs the process its GPU on a GPU."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        behind = torch.full((1,), self.req_to_token.shape[0], device=self.req_to_token.device)
        buffers.page_table_1[:1].copy_(self.req_to_token[behind])


@backend_of
class EndsTheProcess(Step):
    """Takes its process down, as a fault in native code does."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        os._exit(9)


class LacksMethod:
    """Is no backend."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        self.attn_backends: list[SingleStepBackend] = []


# Freedoms: clean


@backend_of
class FillsDeadCells(Step):
    """Leaves anything in cells beyond a row's length."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.EXTEND:
            return
        lengths = metadata.seqlens_expanded[:, None]  # [R, 1]
        page_size = self.config.page_size
        for table, live in (
            (metadata.page_table_1, lengths),
            (metadata.real_page_table, (lengths + page_size - 1) // page_size),
        ):
            columns = torch.arange(table.shape[1], device=table.device)
            table.masked_fill_(columns >= live, -1)


@backend_of
class LeavesScheduleColumn(Step):
    """Leaves the padding column of FlashMLA's schedule as it was."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if metadata.flashmla_metadata is not None:
            metadata.flashmla_metadata[:, 7] = 77


WritesArangeAtCapture = all_but("cu_seqlens_q", "nsa_cu_seqlens_q")
"""What never changes is written once: ``arange`` of all rows."""


@backend_of
class AliasesFields(Step):
    """One tensor behind several names, where their contents agree: SGLang's habit."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode.is_decode_or_idle:
            metadata.seqlens_expanded = metadata.cache_seqlens_int32
        if batch.forward_mode is not ForwardMode.EXTEND:
            metadata.nsa_cu_seqlens_q = metadata.cu_seqlens_q
        if self.config.page_size == 1:
            metadata.real_page_table = metadata.page_table_1


@backend_of
class RecomputesTwice(Step):
    """Prepares the same replay twice."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        super().refresh(buffers, batch)


# Plants that need eager calls


@backend_of
class EagerReadsPadding(Step):
    """The eager table is as wide as a graph's."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        if forward_batch.forward_mode is not ForwardMode.EXTEND:
            wide = compute_metadata(self.config, self.req_to_token, forward_batch, self.speculative_step_id, True)
            self.forward_metadata.page_table_1 = wide.page_table_1


@backend_of
class PrefillForgetsPrefix(Step):
    """Prefill places the queries at the start of the request instead of behind its cached prefix."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.EXTEND:
            assert batch.extend_seq_lens_cpu is not None
            windows = [torch.arange(1, new + 1, dtype=torch.int32) for new in batch.extend_seq_lens_cpu]
            metadata.seqlens_expanded = torch.cat(windows).to(batch.seq_lens.device)


@backend_of
class PrefillSwapsTables(Step):
    """Prefill gives every request the table of the first."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.EXTEND:
            metadata.page_table_1 = metadata.page_table_1[:1].repeat(batch.batch_size, 1)


@backend_of
class CuSeqlensAreLengths(Step):
    """Hands out lengths where bounds are asked for, shifted by the leading 0."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        bounds = cu_seqlens(metadata.cache_seqlens_int32)
        bounds[1:] = metadata.cache_seqlens_int32
        metadata.cu_seqlens_k = bounds
