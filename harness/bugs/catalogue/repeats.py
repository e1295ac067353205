"""Bugs of what a backend keeps from one call to the next, or shares with another backend."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from typing import ClassVar

import torch

from nsa_oracle.harness import fields
from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, by_mutation, by_wrapping
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.bugs.wrappers import BackendWrapper, HostNumbers, KeepsFields, Moment, OwnPool
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.protocol import SingleStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata


class SkipsTheSameBatch(KeepsFields):
    """A replay of a batch with the lengths, pool rows and accept lengths of the graph's last one changes nothing."""

    names = tuple(field.name for field in fields.FIELDS)

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.last: dict[object, object] = {}

    def key(self, batch: ForwardBatch) -> object:
        """What a replay is told from the last one by."""
        return HostNumbers.of(batch)

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment is Moment.REPLAY:
            graph, key = (step, self._key(0, batch)), self.key(batch)
            self.same = self.last.get(graph) == key
            self.last[graph] = key
        return super().given(batch, moment, step)

    def keeps(self, batch: ForwardBatch) -> bool:
        return self.same


class SkipsTheSameEnds(SkipsTheSameBatch):
    """So does one whose requests also have the first and last slots of that one, whatever lies between them."""

    def key(self, batch: ForwardBatch) -> object:
        numbers = HostNumbers.of(batch)
        rows = zip(numbers.pool_rows, numbers.seq_lens, strict=True)
        return numbers, [(int(self.pool[row, 0]), int(self.pool[row, max(length, 1) - 1])) for row, length in rows]


class SkipsOtherAccepts(SkipsTheSameBatch):
    """So does one with the lengths and slots of that one, whatever was accepted."""

    def key(self, batch: ForwardBatch) -> object:
        numbers = HostNumbers.of(batch)
        rows = zip(numbers.pool_rows, numbers.seq_lens, strict=True)
        return [self.pool[row, :length].tolist() for row, length in rows]


class SkipsTheHundredth(KeepsFields):
    """Every hundredth replay of a graph changes nothing."""

    names = SkipsTheSameBatch.names

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.replays: Counter[object] = Counter()

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment is Moment.REPLAY:
            key = step, self._key(0, batch)
            self.replays[key] += 1
            self.skips = self.replays[key] % 100 == 0
        return super().given(batch, moment, step)

    def keeps(self, batch: ForwardBatch) -> bool:
        return self.skips


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


class LengthensAgain(BackendWrapper):
    """What a mode adds to a length is added again if the same batch is prepared once more."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.last: dict[int | None, torch.Tensor] = {}

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment not in (Moment.EAGER, Moment.REPLAY):
            return batch
        again = self.last.get(step) is batch.seq_lens  # the engine makes a new view for each batch that it loads
        self.last[step] = batch.seq_lens
        return dataclasses.replace(batch, seq_lens=batch.seq_lens + 1) if again else batch


class SharesBuffers(KeepsFields):
    """Backends of one process have the same buffer of KV bounds for a mode and a bucket."""

    all: ClassVar[weakref.WeakSet[SharesBuffers]] = weakref.WeakSet()

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.all.add(self)

    def shares_with(self, other: SharesBuffers) -> bool:
        """Whether this backend and ``other`` have the same buffer."""
        return True

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        super().done(backend, batch, moment, index)
        if moment is Moment.REPLAY:
            key = self._key(index, batch)
            sharing = [other for other in self.all if other is not self and self.shares_with(other)]
            for other in [other for other in sharing if key in other.bound]:
                other.bound[key].cu_seqlens_k.copy_(backend.forward_metadata.cu_seqlens_k)


class SharesBuffersIfAlike(SharesBuffers):
    """Backends share the buffer only if their configurations are equal, as those of draft and target model may be."""

    def shares_with(self, other: SharesBuffers) -> bool:
        return other.config == self.config


class SharesBuffersOfIdleRanks(SharesBuffers):
    """Backends share the buffer only in replays without a request."""

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        if moment is Moment.CAPTURE or batch.forward_mode is ForwardMode.IDLE:
            super().done(backend, batch, moment, index)

    def keeps(self, batch: ForwardBatch) -> bool:
        return False


class KeepsEagerMetadata(BackendWrapper):
    """An eager call of a mode, lengths, pool rows and accept lengths that were called before gives that metadata."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.kept: dict[object, Metadata] = {}

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        if moment is Moment.EAGER and batch.forward_mode is not ForwardMode.EXTEND:
            key = (index, batch.forward_mode, str(HostNumbers.of(batch)))
            backend.forward_metadata = self.kept.setdefault(key, backend.forward_metadata)


class SharesRowStarts(BackendWrapper):
    """The distance of the rows of a pool is kept for the next backend whose pool has as many rows."""

    last: ClassVar[dict[str, int]] = {}

    def pool_for(self, req_to_token: torch.Tensor) -> torch.Tensor:
        rows, columns = req_to_token.shape
        stride = self.last["stride"] if self.last.get("rows") == rows else req_to_token.stride(0)
        self.last.update(rows=rows, stride=req_to_token.stride(0))
        room = req_to_token.untyped_storage().nbytes() // 4 - req_to_token.storage_offset()
        return req_to_token.as_strided((rows, columns), (min(stride, (room - columns) // max(1, rows - 1)), 1))


class PrefillsInGraphMemory(KeepsFields):
    """A prefill takes memory of a graph as scratch: that of query bounds, which are written once, at capture."""

    names = ("cu_seqlens_q", "nsa_cu_seqlens_q")

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        super().done(backend, batch, moment, index)
        if moment is Moment.EAGER and batch.forward_mode is ForwardMode.EXTEND:
            for bound in self.bound.values():
                bound.cu_seqlens_q.fill_(len(batch.seq_lens))


class LengthsWithGaps(BackendWrapper):
    """The lengths of query tokens are every second entry of a buffer."""

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        if moment is Moment.EAGER:
            metadata = backend.forward_metadata
            pairs = torch.stack((metadata.seqlens_expanded,) * 2, 1)
            backend.forward_metadata = dataclasses.replace(metadata, seqlens_expanded=pairs[:, 0])


class LosesCachedPrompts(BackendWrapper):
    """The flattened table of a prefill lacks the requests without a new token."""

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        flattened = backend.forward_metadata.page_table_1_flattened
        if moment is Moment.EAGER and flattened is not None and batch.extend_seq_lens is not None:
            kept = (batch.extend_seq_lens > 0).repeat_interleave(batch.seq_lens)
            backend.forward_metadata = dataclasses.replace(
                backend.forward_metadata, page_table_1_flattened=flattened[kept]
            )


class DropsChunksBetween(BackendWrapper):
    """The requests of a prefill's tokens are counted without those between others that have no new token."""

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        requests = backend.forward_metadata.token_to_batch_idx
        if batch.forward_mode is ForwardMode.EXTEND and requests is not None and len(requests):
            present = torch.unique_consecutive(requests, return_inverse=True)[1] + requests[0]
            backend.forward_metadata = dataclasses.replace(
                backend.forward_metadata, token_to_batch_idx=present.to(requests.dtype)
            )


class TakenForDecodes(BackendWrapper):
    """A prefill whose first request has one new token has one row a request."""

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        new = batch.extend_seq_lens
        is_prefill = batch.forward_mode is ForwardMode.EXTEND and new is not None and len(new) > 0
        if not is_prefill or new is None or int(new[0]) != 1:
            return batch
        ones = torch.ones_like(new)
        return dataclasses.replace(batch, extend_seq_lens=ones, extend_prefix_lens=batch.seq_lens.to(new.dtype) - 1)


BUGS = (
    Bug(
        name="mixed-batch-taken-for-decodes",
        group=Group.TABLES,
        sentence="A prefill whose first request has one new token is taken for a batch of decodes, of one row each.",
        reference="vllm#47381",
        trigger="a prefill of a decode and of a request with several new tokens",
        caught_by=frozenset({Check.SHAPE, Check.METADATA}),
        plant=by_wrapping(TakenForDecodes),
    ),
    Bug(
        name="cached-prompt-lost",
        group=Group.TABLES,
        sentence="The flattened table of a prefill lacks the KV of a request that has no new token.",
        reference=REVIEW,
        trigger="a prefill in which all tokens of a request are cached",
        caught_by=frozenset({Check.SHAPE}),
        plant=by_wrapping(LosesCachedPrompts),
    ),
    Bug(
        name="chunks-without-tokens-dropped",
        group=Group.TABLES,
        sentence="Tokens of a prefill are dealt to its requests as if none between others were without a new token.",
        reference=REVIEW,
        trigger="a prefill of a request without a new token between two that have some",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(DropsChunksBetween),
    ),
    Bug(
        name="lengths-with-gaps",
        group=Group.BUFFERS,
        sentence="The lengths of query tokens are every second entry of a buffer, and kernels read them as if dense.",
        reference=REVIEW,
        trigger="an eager call of several rows",
        caught_by=frozenset({Check.SHAPE}),
        plant=by_wrapping(LengthsWithGaps),
    ),
    Bug(
        name="lengthened-by-each-preparation",
        group=Group.PADDING,
        sentence="Preparing the same batch once more, as in a warm-up, makes its lengths grow again.",
        reference=REVIEW,
        trigger="a batch that is prepared twice",
        caught_by=frozenset({Check.METADATA, Check.SHAPE}),
        plant=by_wrapping(LengthensAgain),
    ),
    Bug(
        name="buffers-shared-by-two-backends",
        group=Group.BUFFERS,
        sentence="Two backends of a process have one buffer of KV bounds for the same mode and bucket.",
        reference=REVIEW,
        trigger="a second backend, which prepares a replay in between",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(SharesBuffers),
    ),
    Bug(
        name="buffers-shared-by-alike-backends",
        group=Group.BUFFERS,
        sentence="Two backends of a process have one buffer of KV bounds if their configurations are equal.",
        reference=REVIEW,
        trigger="a second backend of the same context length, which prepares a replay in between",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(SharesBuffersIfAlike),
    ),
    Bug(
        name="buffers-shared-by-idle-ranks",
        group=Group.BUFFERS,
        sentence="Two backends of a process have one buffer of KV bounds in replays without a request, and only there.",
        reference=REVIEW,
        trigger="a second backend, which prepares a replay of an idle rank in between",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(SharesBuffersOfIdleRanks),
    ),
    Bug(
        name="eager-metadata-kept-by-lengths",
        group=Group.TABLES,
        sentence="An eager call gives the metadata of an earlier one of the same lengths, whatever its pages are now.",
        reference=REVIEW,
        trigger="two eager calls of the same batch, the second one on other pages",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(KeepsEagerMetadata),
    ),
    Bug(
        name="row-starts-kept-for-another-context",
        group=Group.BUFFERS,
        sentence="Where the rows of a pool start is cached by their number, not by the context length as well.",
        reference=REVIEW,
        trigger="a second backend of another context length",
        caught_by=frozenset({Check.METADATA, Check.CRASH}),
        plant=by_wrapping(SharesRowStarts),
    ),
    Bug(
        name="prefill-in-graph-memory",
        group=Group.BUFFERS,
        sentence="A prefill uses memory of a graph as scratch, of which replays write only what changes.",
        reference=REVIEW,
        trigger="a prefill between two replays of one graph",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(PrefillsInGraphMemory),
    ),
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
        name="refresh-skipped-for-the-same-ends",
        group=Group.TABLES,
        sentence="A replay is not prepared if its numbers, and each request's first and last slot, are the last one's.",
        reference=REVIEW,
        trigger="the same batch on other pages between its first and its last ones",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(SkipsTheSameEnds),
    ),
    Bug(
        name="refresh-skipped-for-other-accepts",
        group=Group.TABLES,
        sentence="A replay is not prepared if lengths and slots are those of the last replay, whatever was accepted.",
        reference=REVIEW,
        trigger="a draft extend of the same lengths with other accept lengths",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(SkipsOtherAccepts),
    ),
    Bug(
        name="hundredth-refresh-skipped",
        group=Group.TABLES,
        sentence="Every hundredth replay of a graph is not prepared.",
        reference=REVIEW,
        trigger="more than a hundred replays of one graph",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(SkipsTheHundredth),
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
        cpu=True,
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.lengths:load_lengths",
                "mask=valid, other=0).to(tl.int32) + extra",
                "mask=requests <= tl.max(tl.where(valid, requests, -1), 0) + 1, other=0).to(tl.int32) + extra",
            )
        ),
    ),
    Bug(
        name="place-read-before-it-is-there",
        group=Group.TABLES,
        sentence="A request's first row in a prefill is read from the running sum that another program stores.",
        reference=REVIEW,
        trigger="a prefill of two requests",
        caught_by=frozenset({Check.CRASH}),
        cpu=True,
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.lengths:expand_seqlens_kernel",
                "        kv_len = tl.load(seq_lens + request * seq_stride)",
                "        row_begin = tl.load(packed + pitch * CU_SEQLENS_Q + request)\n"
                "        kv_len = tl.load(seq_lens + request * seq_stride)",
            )
        ),
    ),
)
