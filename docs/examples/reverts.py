"""Two optimisations that were reverted in production, in the ways an engineer could have wired them.

Both were reverted for an unknown reason: the vectorisation of ``seqlens_expanded`` (no Python loop over requests), and
a kernel that copies all fields into the buffers of all draft steps at once. docs/reverts.md says what the oracle found
in each wiring below. Each class is a backend of (config, req_to_token):

    nsa-oracle replay FILE --backend docs.examples.reverts:VectorisedHostMirror

All derive from the reference, so that only the wiring can be wrong.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from nsa_oracle.reference.lengths import cu_seqlens
from nsa_oracle.reference.multi_step import MultiStepBackend, SingleStepBackend, copy_into
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo

DRAFT_MODES = (ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2)


def verify(cache_seqlens: torch.Tensor, qo_len: int) -> torch.Tensor:
    """The vectorised code for TARGET_VERIFY, line by line as it was reverted: [bs * qo_len]."""
    bs, device = cache_seqlens.shape[0], cache_seqlens.device
    kv_lens = cache_seqlens
    base = torch.arange(qo_len, dtype=torch.int32, device=device)
    base_repeated = base.unsqueeze(0).expand(bs, -1).contiguous().view(-1)
    start_vals = kv_lens - qo_len + 1
    start_vals_repeated = torch.repeat_interleave(start_vals, qo_len)
    return start_vals_repeated + base_repeated


def extend(kv_lens: torch.Tensor, qo_lens: torch.Tensor, num_rows: int | None = None) -> torch.Tensor:
    """The same idea for ragged accepts: each request's last ``qo_lens[i]`` lengths. [sum(qo_lens)], or [num_rows]."""
    begins = (torch.cumsum(qo_lens, 0) - qo_lens).to(kv_lens.dtype)  # a sum of int32 is int64
    starts = torch.repeat_interleave(kv_lens - qo_lens + 1 - begins, qo_lens, output_size=num_rows)
    return starts + torch.arange(starts.shape[0], dtype=starts.dtype, device=starts.device)


def without_lengths(buffers: Metadata) -> Metadata:
    """``buffers`` without the fields that the vectorised code computes."""
    none: dict[str, Any] = dict.fromkeys(("seqlens_expanded", "nsa_cache_seqlens_int32", "nsa_cu_seqlens_k"))
    return dataclasses.replace(buffers, **none)


class Step(SingleStepBackend):
    """The reference's step with lengths per query token from the vectorised code. Wirings override its methods."""

    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        """KV lengths of the requests, before verification's drafts are added: [bs]."""
        return batch.seq_lens.to(torch.int32)

    def accepted(self, batch: ForwardBatch) -> torch.Tensor:
        """Query tokens of each request in the draft-extend modes: [bs]."""
        if batch.forward_mode is ForwardMode.DRAFT_EXTEND_V2:
            return torch.full_like(self.lengths(batch), self.config.speculative_num_draft_tokens)
        assert batch.spec_info is not None
        return batch.spec_info.accept_length[: batch.batch_size].to(torch.int32)

    def expanded(self, batch: ForwardBatch) -> torch.Tensor:
        """Lengths that the vectorised code gives for ``batch``: a row for each query token, [R]."""
        if batch.forward_mode is ForwardMode.TARGET_VERIFY:
            drafts = self.config.speculative_num_draft_tokens
            return verify(self.lengths(batch) + drafts, drafts)
        return self.clamped(extend(self.lengths(batch), self.accepted(batch)))

    def clamped(self, expanded: torch.Tensor) -> torch.Tensor:
        return expanded.clamp(min=0)

    def vectorised(self, metadata: Metadata, batch: ForwardBatch) -> Metadata:
        """``metadata`` with the vectorised lengths in place of the loop's, with as many rows as these have."""
        if batch.forward_mode not in DRAFT_MODES:
            return metadata
        expanded = self.expanded(batch)
        clipped = expanded.clamp(max=self.config.index_topk)
        return dataclasses.replace(
            metadata,
            seqlens_expanded=expanded,
            nsa_cache_seqlens_int32=clipped,
            nsa_cu_seqlens_k=cu_seqlens(clipped),
        )

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self.forward_metadata = self.vectorised(self.forward_metadata, forward_batch)

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
        batch = ForwardBatch(forward_mode, bs, req_pool_indices, seq_lens, seq_lens_cpu, spec_info=spec_info)
        self.refresh(self.forward_metadata, batch)

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        """Before a replay: compute, and write into the buffers as many rows as were computed."""
        values = self.vectorised(self._compute_in_graph(batch), batch)
        lengths = (values.seqlens_expanded, values.nsa_cache_seqlens_int32, values.nsa_cu_seqlens_k)
        kept = (buffers.seqlens_expanded, buffers.nsa_cache_seqlens_int32, buffers.nsa_cu_seqlens_k)
        copy_into(without_lengths(buffers), values)
        for buffer, value in zip(kept, lengths, strict=True):
            buffer[: value.shape[0]].copy_(value)


class OfSteps(MultiStepBackend):
    """N of such steps."""

    step: type[SingleStepBackend] = Step

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        self.attn_backends = [self.step(config, req_to_token, number) for number in range(config.speculative_num_steps)]


def backend_of(step: type[SingleStepBackend]) -> type[OfSteps]:
    """Class decorator: replaces a step by the backend made of such steps, under the step's name."""
    return type(step.__name__, (OfSteps,), {"step": step, "__doc__": step.__doc__, "__module__": step.__module__})


# The vectorisation.


@backend_of
class VectorisedAsShown(Step):
    """Computed before the replay from the device's int32 lengths, written to the first rows of the buffers."""


class _FillsTail(Step):
    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self.vectorised(self._compute_in_graph(batch), batch)
        rows = buffers.seqlens_expanded.shape[0]
        missing = rows - values.seqlens_expanded.shape[0]
        if missing:
            total = values.nsa_cu_seqlens_k[-1:].expand(missing)
            zeros = total.new_zeros(missing)
            values = dataclasses.replace(
                values,
                seqlens_expanded=torch.cat([values.seqlens_expanded, zeros]),
                nsa_cache_seqlens_int32=torch.cat([values.nsa_cache_seqlens_int32, zeros]),
                nsa_cu_seqlens_k=torch.cat([values.nsa_cu_seqlens_k, total]),
            )
        copy_into(buffers, values)


@backend_of
class VectorisedTailFilled(_FillsTail):
    """The same, and the rows that the batch does not use are written too: length 0."""


@backend_of
class VectorisedUnclamped(_FillsTail):
    """The same without the clamp: neither the loop nor what replaced it had one."""

    def clamped(self, expanded: torch.Tensor) -> torch.Tensor:
        return expanded


@backend_of
class VectorisedInt64(_FillsTail):
    """From the engine's int64 lengths, without a cast."""

    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        return batch.seq_lens.to(torch.int64)


@backend_of
class VectorisedHostMirror(_FillsTail):
    """From ``seq_lens_cpu``, as the loop read them."""

    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        mirror = batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu
        return mirror.to(device=batch.seq_lens.device, dtype=torch.int32)


@backend_of
class VectorisedMirrorOnly(_FillsTail):
    """From ``seq_lens_cpu`` alone, which an engine that never synchronises does not provide."""

    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        return batch.seq_lens_cpu.to(device=batch.seq_lens.device, dtype=torch.int32)  # type: ignore[union-attr]


@backend_of
class VectorisedRebound(Step):
    """The result becomes the metadata's tensor, as in the eager path: nothing is copied."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        copy_into(buffers, values)
        self.forward_metadata = self.vectorised(buffers, batch)


@backend_of
class VectorisedRawBatch(_FillsTail):
    """Computed for the requests that look real, those of a length above the fill value."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        real = int((batch.seq_lens > 1).sum())
        values = self.vectorised(self._compute_in_graph(batch), batch)
        rows = min(real * self.config.rows_per_request(batch.forward_mode), values.seqlens_expanded.shape[0])
        copy_into(without_lengths(buffers), values)
        buffers.seqlens_expanded[:rows].copy_(values.seqlens_expanded[:rows])
        buffers.nsa_cache_seqlens_int32[:rows].copy_(values.nsa_cache_seqlens_int32[:rows])
        buffers.nsa_cu_seqlens_k[: rows + 1].copy_(values.nsa_cu_seqlens_k[: rows + 1])


class _InGraph(_FillsTail):
    """The lengths are computed by the graph itself; everything else before the replay."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        if forward_batch.forward_mode in DRAFT_MODES:
            self.in_graph(self.forward_metadata, forward_batch)

    def in_graph(self, buffers: Metadata, batch: ForwardBatch) -> None:
        expanded = self.expanded_in_graph(batch)
        rows = expanded.shape[0]
        clipped = expanded.clamp(max=self.config.index_topk)
        buffers.seqlens_expanded[:rows].copy_(expanded)
        buffers.nsa_cache_seqlens_int32[:rows].copy_(clipped)
        buffers.nsa_cu_seqlens_k[1 : rows + 1].copy_(torch.cumsum(clipped, 0))

    def expanded_in_graph(self, batch: ForwardBatch) -> torch.Tensor:
        return self.expanded(batch)

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        if batch.forward_mode in DRAFT_MODES:
            buffers = without_lengths(buffers)
        copy_into(buffers, values)


class _OfGraphSteps(OfSteps):
    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        for step in self.attn_backends:
            assert isinstance(step, _InGraph)
            step.init_forward_metadata_in_graph(forward_batch, bs)


class VectorisedInCapture(_OfGraphSteps):
    """Captured with the forward pass; ragged accepts through ``repeat_interleave`` with a tensor of counts."""

    class step(_InGraph):  # noqa: N801
        """Counts on the device determine the number of rows."""


class VectorisedInCaptureSized(_OfGraphSteps):
    """The same with the number of rows at capture, so that ``repeat_interleave`` need not read it from the device."""

    class step(_InGraph):  # noqa: N801
        """The rows are counted once, when the graph is captured."""

        def expanded_in_graph(self, batch: ForwardBatch) -> torch.Tensor:
            if batch.forward_mode is ForwardMode.TARGET_VERIFY:
                return self.expanded(batch)
            rows = batch.batch_size * self.config.speculative_num_draft_tokens
            accepted = self.accepted(batch)
            spare = rows - accepted.sum(dtype=torch.int32).reshape(1)
            lengths = self.lengths(batch)
            padded = extend(torch.cat([lengths, lengths[-1:]]), torch.cat([accepted, spare]), rows)
            return self.clamped(padded)


class VectorisedWorking(_OfGraphSteps):
    """What works inside a graph: a row looks up its own request, and rows beyond the last one are 0."""

    class step(_InGraph):  # noqa: N801
        """No number of rows, no list and no length reaches the host."""

        def expanded_in_graph(self, batch: ForwardBatch) -> torch.Tensor:
            if batch.forward_mode is ForwardMode.TARGET_VERIFY:
                return self.expanded(batch)
            accepted = self.accepted(batch)
            ends = torch.cumsum(accepted, 0)
            rows = torch.arange(batch.batch_size * self.config.speculative_num_draft_tokens, device=ends.device)
            request = torch.searchsorted(ends, rows, right=True).clamp(max=batch.batch_size - 1)
            lengths = self.lengths(batch)[request] - (ends[request] - 1 - rows)
            return torch.where(rows < ends[-1], self.clamped(lengths), 0).to(torch.int32)


# The batched copy: compute once, then one operation that copies all fields into the buffers of all steps.


class BatchedCopy(OfSteps):
    """Copies every field of each step's values, each to its full length: what works."""

    step = SingleStepBackend

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        key = ForwardMode.DECODE if forward_batch.forward_mode.is_decode_or_idle else forward_batch.forward_mode
        values = self.values(forward_batch, bs)
        for step in self.attn_backends:
            step.forward_metadata = step._captured[key, bs]
            self.copy(step.forward_metadata, values[step.speculative_step_id])

    def values(self, batch: ForwardBatch, bs: int) -> list[Metadata]:
        """What each step gets."""
        return [step._compute_in_graph(batch) for step in self.attn_backends]

    def copy(self, buffers: Metadata, values: Metadata) -> None:
        copy_into(buffers, values)


class BatchedCopyOfOneStep(BatchedCopy):
    """The first step's values go to all steps: right as long as all steps see the same."""

    def values(self, batch: ForwardBatch, bs: int) -> list[Metadata]:
        return [self.attn_backends[0]._compute_in_graph(batch)] * len(self.attn_backends)


class BatchedCopyDecodeFields(BatchedCopy):
    """The kernel's list of fields is that of DECODE and lacks the lengths per query token of other modes."""

    def copy(self, buffers: Metadata, values: Metadata) -> None:
        copy_into(dataclasses.replace(buffers, seqlens_expanded=None), values)  # type: ignore[arg-type]


class BatchedCopyHostWidth(BatchedCopy):
    """Copies as many columns of the page table as the host's mirror says are in use."""

    def copy(self, buffers: Metadata, values: Metadata) -> None:
        width = self.width
        copy_into(dataclasses.replace(buffers, page_table_1=None, real_page_table=None), values)  # type: ignore[arg-type]
        pages = -(-width // values.page_size)
        buffers.page_table_1[:, :width].copy_(values.page_table_1[:, :width])
        buffers.real_page_table[:, :pages].copy_(values.real_page_table[:, :pages])

    def values(self, batch: ForwardBatch, bs: int) -> list[Metadata]:
        mirror = batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu
        self.width = int(mirror.max()) if bs else 0
        return super().values(batch, bs)


class BatchedCopyOfUsedRows(BatchedCopy):
    """Copies the rows that the accepted tokens use; what lies behind them stays."""

    def copy(self, buffers: Metadata, values: Metadata) -> None:
        rows = int((values.seqlens_expanded > 0).sum())
        for name, tensor in vars(buffers).items():
            if isinstance(tensor, torch.Tensor):
                whole = tensor.shape[0] not in (
                    buffers.seqlens_expanded.shape[0],
                    buffers.seqlens_expanded.shape[0] + 1,
                )
                count = tensor.shape[0] if whole else rows + tensor.shape[0] - buffers.seqlens_expanded.shape[0]
                tensor[:count].copy_(getattr(values, name)[:count])


class BatchedCopyOfOneBucket(BatchedCopy):
    """The kernel's table of destination addresses is built at the first replay, for the bucket replayed then."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.destinations: list[Metadata] = []

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        mode = forward_batch.forward_mode
        key = ForwardMode.DECODE if mode.is_decode_or_idle else mode
        for step in self.attn_backends:
            step.forward_metadata = step._captured[key, bs]
        self.destinations = self.destinations or [step.forward_metadata for step in self.attn_backends]
        for target, values in zip(self.destinations, self.values(forward_batch, bs), strict=True):
            self.copy(target, values)

    def copy(self, buffers: Metadata, values: Metadata) -> None:
        for name, tensor in vars(buffers).items():
            if isinstance(tensor, torch.Tensor):
                rows = min(len(tensor), len(getattr(values, name)))
                tensor[:rows].copy_(getattr(values, name)[:rows])
