"""Where the fields of all steps live: three tensors, stacked over steps, and the ``Metadata`` views into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nsa_oracle.optimized.kernels import fields
from nsa_oracle.reference.types import BackendConfig, ForwardMode, Metadata

WORDS_PER_VECTOR = 4  # int32 words in a 16-byte access: every field and every page-table row starts on one


def round_up(count: int) -> int:
    """``count`` rounded up to whole vectors."""
    return -(-count // WORDS_PER_VECTOR) * WORDS_PER_VECTOR


def field_pitch(bs: int, num_rows: int) -> int:
    """Distance between packed fields. The longest has one entry more than there are requests or rows."""
    return round_up(max(bs, num_rows) + 1)


@dataclass(frozen=True)
class Layout:
    """Sizes of one step's packed fields: slots ``pitch`` apart (``kernels.fields``), then the schedules."""

    bs: int
    num_rows: int
    extend: bool
    paged_mqa_num_sms: int
    flashmla_num_sm_parts: int

    @classmethod
    def of(cls, config: BackendConfig, mode: ForwardMode, bs: int, num_rows: int) -> Layout:
        extend = mode is ForwardMode.EXTEND
        sms, parts = (0, 0) if extend else (config.paged_mqa_num_sms, config.flashmla_num_sm_parts)
        return cls(bs, num_rows, extend, sms, parts)

    @property
    def pitch(self) -> int:
        return field_pitch(self.bs, self.num_rows)

    @property
    def num_slots(self) -> int:
        return int((fields.NUM_EXTEND_FIELDS if self.extend else fields.NUM_GRAPH_FIELDS).value)

    @property
    def paged_mqa_offset(self) -> int:
        return self.num_slots * self.pitch

    @property
    def flashmla_offset(self) -> int:
        return self.paged_mqa_offset + (round_up(2 * (self.paged_mqa_num_sms + 1)) if self.paged_mqa_num_sms else 0)

    @property
    def size(self) -> int:
        return self.flashmla_offset + 8 * self.flashmla_num_sm_parts


@dataclass(eq=False)
class StepBuffers:
    """Fields of S steps. All tensors int32 and stacked over steps.

    packed [S, layout.size]: all small fields. page_table_1 [S, rows, W]; real_page_table [S, rows, ceil(W / P)], the
    same tensor as page_table_1 when P = 1; flattened [S, sum(seq_lens)] in an EXTEND with a cached prefix, else None.
    metadata: one per step, views of the above.
    """

    layout: Layout
    packed: torch.Tensor
    page_table_1: torch.Tensor
    real_page_table: torch.Tensor
    flattened: torch.Tensor | None
    metadata: list[Metadata]

    @property
    def num_steps(self) -> int:
        return self.packed.shape[0]

    def field(self, slot: int, length: int) -> torch.Tensor:
        """One packed field of all steps: [S, length]."""
        begin = slot * self.layout.pitch
        return self.packed[:, begin : begin + length]

    def step(self, index: int) -> StepBuffers:
        """The buffers of one step alone (S = 1), the same memory."""
        one = slice(index, index + 1)
        flattened = None if self.flattened is None else self.flattened[one]
        return StepBuffers(
            self.layout, self.packed[one], self.page_table_1[one], self.real_page_table[one], flattened,
            self.metadata[one],
        )  # fmt: skip


def build(
    config: BackendConfig,
    layout: Layout,
    packed: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    flattened: torch.Tensor | None,
    widths: Sequence[int],
    max_seq_len_q: int = 1,
) -> StepBuffers:
    """Step buffers over existing memory. ``widths``: width of each step's page tables (the stacked: the largest)."""
    page_table_1, real_page_table = tables
    metadata: list[Metadata] = []
    for step, width in enumerate(widths):
        table = page_table_1[0 if page_table_1.shape[0] == 1 else step, :, :width]
        pages = table
        if config.page_size > 1:
            num_pages = -(-width // config.page_size)
            pages = real_page_table[0 if real_page_table.shape[0] == 1 else step, :, :num_pages]
        metadata.append(_view(config.page_size, layout, packed[step], table, pages, width, max_seq_len_q))
        if flattened is not None:
            metadata[step].page_table_1_flattened = flattened[step]
    return StepBuffers(layout, packed, page_table_1, real_page_table, flattened, metadata)


def _view(
    page_size: int,
    layout: Layout,
    packed: torch.Tensor,
    table: torch.Tensor,
    pages: torch.Tensor,
    width: int,
    max_seq_len_q: int,
) -> Metadata:
    """Metadata over one step's packed fields: int32 [layout.size]."""
    bs, rows, pitch = layout.bs, layout.num_rows, layout.pitch
    slots = packed[: layout.num_slots * pitch].view(layout.num_slots, pitch).unbind()  # one call for all slots
    metadata = Metadata(
        page_size=page_size,
        max_seq_len_q=max_seq_len_q,
        max_seq_len_k=width,
        cache_seqlens_int32=slots[fields.CACHE_SEQLENS.value][:bs],
        cu_seqlens_q=slots[fields.CU_SEQLENS_Q.value][: (bs if layout.extend else rows) + 1],
        cu_seqlens_k=slots[fields.CU_SEQLENS_K.value][: bs + 1],
        seqlens_expanded=slots[fields.SEQLENS_EXPANDED.value][:rows],
        nsa_cache_seqlens_int32=slots[fields.NSA_CACHE_SEQLENS.value][:rows],
        nsa_cu_seqlens_q=slots[fields.NSA_CU_SEQLENS_Q.value][: rows + 1],
        nsa_cu_seqlens_k=slots[fields.NSA_CU_SEQLENS_K.value][: rows + 1],
        page_table_1=table,
        real_page_table=pages,
    )
    if layout.paged_mqa_num_sms:
        entries = 2 * (layout.paged_mqa_num_sms + 1)
        begin = layout.paged_mqa_offset
        metadata.paged_mqa_schedule_metadata = packed[begin : begin + entries].view(-1, 2)
    if layout.flashmla_num_sm_parts:
        metadata.flashmla_metadata = packed[layout.flashmla_offset : layout.size].view(-1, 8)
        metadata.flashmla_num_splits = slots[fields.FLASHMLA_NUM_SPLITS.value][: rows + 1]
    if layout.extend:
        metadata.topk_indices_offset = slots[fields.TOPK_INDICES_OFFSET.value][:rows]
        metadata.indexer_k_start_end = (
            slots[fields.INDEXER_K_START.value][:rows],
            slots[fields.INDEXER_K_END.value][:rows],
        )
        metadata.token_to_batch_idx = slots[fields.TOKEN_TO_BATCH_IDX.value][:rows]
    return metadata


def allocate(
    config: BackendConfig,
    layout: Layout,
    widths: Sequence[int],
    device: torch.device,
    flattened_size: int | None = None,
    max_seq_len_q: int = 1,
) -> StepBuffers:
    """Uninitialised buffers of ``len(widths)`` steps, exactly as large as one batch needs (rows padded to vectors)."""
    num_steps, table_rows, width = len(widths), layout.bs if layout.extend else layout.num_rows, max(widths)
    packed = torch.empty(num_steps, layout.size, dtype=torch.int32, device=device)
    tables = allocate_tables(config, num_steps, table_rows, width, device)
    flattened = None
    if flattened_size is not None:
        flattened = torch.empty(num_steps, flattened_size, dtype=torch.int32, device=device)
    return build(config, layout, packed, tables, flattened, widths, max_seq_len_q)


def allocate_tables(
    config: BackendConfig, num_steps: int, num_rows: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(page_table_1, real_page_table), [num_steps, num_rows, columns], each row on a 16-byte boundary."""

    def table(columns: int) -> torch.Tensor:
        padded = torch.empty(num_steps, num_rows, round_up(columns), dtype=torch.int32, device=device)
        return padded[:, :, :columns]

    page_table_1 = table(width)
    return page_table_1, page_table_1 if config.page_size == 1 else table(-(-width // config.page_size))


class GraphBuffers:
    """The buffers that captured graphs read, by (mode, bs), stacked over the steps that share them.

    The page tables are most of the memory, and only one graph runs at a time, so all buckets are views of one
    allocation for the largest. A bucket that was captured keeps its addresses until ``GraphBuffers`` is dropped.
    """

    def __init__(
        self, config: BackendConfig, device: torch.device, num_steps: int, max_bs: int, max_num_tokens: int
    ) -> None:
        self.config = config
        self.device = device
        self.num_steps = num_steps
        self._tables = self._allocate_tables(max(max_bs, max_num_tokens))
        self._captured: dict[tuple[ForwardMode, int], StepBuffers] = {}

    def capture(self, mode: ForwardMode, bs: int) -> StepBuffers:
        """The buffers of ``mode`` and ``bs``, made on first use."""
        key = graph_key(mode, bs)
        if key not in self._captured:
            rows = bs * self.config.rows_per_request(mode)
            # More rows than announced: the bucket gets its own tables, because earlier captures hold the shared ones.
            shared = rows <= self._tables[0].shape[1]
            page_table_1, real_page_table = self._tables if shared else self._allocate_tables(rows)
            layout = Layout.of(self.config, mode, bs, rows)
            packed = torch.empty(self.num_steps, layout.size, dtype=torch.int32, device=self.device)
            tables = (page_table_1[:, :rows], real_page_table[:, :rows])
            widths = [self.config.max_context_len] * self.num_steps
            self._captured[key] = build(self.config, layout, packed, tables, None, widths)
        return self._captured[key]

    def captured(self, mode: ForwardMode, bs: int) -> StepBuffers:
        """The buffers of a bucket captured before. Raises KeyError if it was not."""
        return self._captured[graph_key(mode, bs)]

    def _allocate_tables(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return allocate_tables(self.config, self.num_steps, rows, self.config.max_context_len, self.device)


def graph_key(mode: ForwardMode, bs: int) -> tuple[ForwardMode, int]:
    """An idle rank replays the DECODE graph of its bucket."""
    return (ForwardMode.DECODE if mode.is_decode_or_idle else mode, bs)
