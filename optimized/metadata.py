"""All metadata of a batch: in one launch, or composed field by field and copied into place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from nsa_oracle.optimized import buffers, lengths, page_table, schedules
from nsa_oracle.optimized.buffers import Layout, StepBuffers
from nsa_oracle.optimized.kernels import fields
from nsa_oracle.optimized.kernels.copy import copy_steps_kernel
from nsa_oracle.optimized.kernels.metadata import fill_metadata_kernel
from nsa_oracle.optimized.launch import Launcher, is_wide
from nsa_oracle.optimized.library import register
from nsa_oracle.optimized.optimizations import Optimizations
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata

CHUNK = 1024  # tokens of a page-table row moved at once: two 16-byte vectors a thread at 4 warps
# Page-table programs: more find no work in short rows and delay the launch (see docs/records/benchmarks.md).
PROGRAMS = 2 * 132

_fill = Launcher(fill_metadata_kernel, "packed_stride")
_copy = Launcher(copy_steps_kernel, "packed_stride")


@dataclass(frozen=True)
class Sizes:
    """What an eager call must know on the host to size its outputs. Reading it from the device synchronises once.

    widths: page-table width of each step. flattened: sum of the KV lengths if a prefix is cached, else None.
    """

    num_rows: int
    widths: list[int]
    max_seq_len_q: int = 1
    flattened: int | None = None


def read_sizes(config: BackendConfig, batch: ForwardBatch, step: int, num_steps: int) -> Sizes:
    """Sizes of steps ``step .. step + num_steps - 1`` from the device tensors, the only ones that are up to date."""
    mode, bs = batch.forward_mode, batch.batch_size
    wanted = [batch.seq_lens[:bs]]
    query_lens = lengths.query_lens(batch)
    if query_lens is not None:
        wanted.append(query_lens[:bs])
    if mode is ForwardMode.EXTEND:
        assert batch.extend_prefix_lens is not None, "EXTEND needs extend_prefix_lens"
        wanted.append(batch.extend_prefix_lens[:bs])
    numbers: list[int] = (wanted[0] if len(wanted) == 1 else torch.cat(wanted)).tolist()
    seq_lens, q_lens, prefix_lens = numbers[:bs], numbers[bs : 2 * bs], numbers[2 * bs :]

    longest = max(seq_lens, default=-1)
    widths = [longest + lengths.extra_tokens(config, mode, step + i) if bs else 0 for i in range(num_steps)]
    if mode is ForwardMode.EXTEND:
        flattened = sum(seq_lens) if any(prefix_lens) else None
        return Sizes(sum(q_lens), widths, max(q_lens, default=0), flattened)
    return Sizes(bs * config.rows_per_request(mode) if query_lens is None else sum(q_lens), widths)


def compute_metadata(
    config: BackendConfig,
    req_to_token: torch.Tensor,
    batch: ForwardBatch,
    step: int,
    num_steps: int,
    in_graph: bool,
    optimizations: Optimizations,
    indices: page_table.StridedIndices,
) -> StepBuffers:
    """Freshly computed fields of steps ``step .. step + num_steps - 1``, composed from the parts.

    in_graph: lay the fields out as a captured graph holds them, else exactly as long as the batch needs. The page
    tables do not depend on the step (a longer step just has more live columns), so they are computed once: [1, R, W].
    """
    mode, bs, device = batch.forward_mode, batch.batch_size, batch.seq_lens.device

    # 1. Sizes and memory for the small fields.
    if in_graph:
        sizes = Sizes(bs * config.rows_per_request(mode), [config.max_context_len] * num_steps)
    else:
        sizes = read_sizes(config, batch, step, num_steps)
    layout = Layout.of(config, mode, bs, sizes.num_rows)
    packed = torch.empty(num_steps, layout.size, dtype=torch.int32, device=device)

    # 2. Where the KV lives.
    width = max(sizes.widths)
    table = page_table.page_table_1(config, req_to_token, batch, sizes.num_rows, width, optimizations)  # [R, W]
    columns = indices.columns(table.shape[1], device) if config.page_size > 1 else table
    pages = page_table.real_page_table(table, config.page_size, columns)  # [R, ceil(W / P)]
    computed = buffers.build(
        config, layout, packed, (table[None], pages[None]), None, sizes.widths, sizes.max_seq_len_q
    )

    # 3. How much KV each request and each query token sees.
    fill = lengths.expand_seqlens if optimizations.vectorized_seqlens else lengths.fill_lengths
    fill(config, batch, step, computed)
    if sizes.flattened is not None:
        kv_lens = computed.field(fields.CACHE_SEQLENS.value, bs)[0].tolist()
        flattened = torch.cat([row[:kv_len] for row, kv_len in zip(table, kv_lens, strict=True)])
        computed.flattened = flattened[None].expand(num_steps, -1)
        for metadata in computed.metadata:
            metadata.page_table_1_flattened = flattened

    # 4. Schedules of the decode kernels, one request per row.
    rows = layout.num_rows
    if layout.paged_mqa_num_sms:
        expanded = computed.field(fields.SEQLENS_EXPANDED.value, rows)
        schedules.paged_mqa_schedule(expanded, packed[:, layout.paged_mqa_offset :], layout.paged_mqa_num_sms)
    if layout.flashmla_num_sm_parts:
        nsa_cache_seqlens = computed.field(fields.NSA_CACHE_SEQLENS.value, rows)
        num_splits = computed.field(fields.FLASHMLA_NUM_SPLITS.value, rows + 1)
        parts = packed[:, layout.flashmla_offset :]
        schedules.flashmla_schedule(nsa_cache_seqlens, parts, num_splits, layout.flashmla_num_sm_parts)
    return computed


def copy_into(target: StepBuffers, source: StepBuffers, batched: bool) -> None:
    """Writes ``source`` (one step for all, or as many as ``target``) into the tensors of ``target``, in place.

    batched: one launch for all fields and steps, live cells only; else one ``copy_`` per field and step.
    """
    if batched:
        copy_steps(
            target.packed, target.page_table_1, target.real_page_table, target.flattened, source.packed,
            source.page_table_1, source.flattened, target.layout.bs, target.layout.num_rows, target.layout.extend,
            target.metadata[0].page_size,
        )  # fmt: skip
        return
    for index, metadata in enumerate(target.metadata):
        _copy_fields(metadata, source.metadata[0 if source.num_steps == 1 else index])


def _copy_fields(target: Metadata, source: Metadata) -> None:
    for field in dataclasses.fields(Metadata):
        held, values = getattr(target, field.name), getattr(source, field.name)
        if isinstance(held, torch.Tensor):
            if held.dim() == 2 and values.shape[1] < held.shape[1]:  # req_to_token may be narrower than the buffer
                held = held[:, : values.shape[1]]
            held.copy_(values)
    if target.indexer_k_start_end is not None and source.indexer_k_start_end is not None:
        for held, values in zip(target.indexer_k_start_end, source.indexer_k_start_end, strict=True):
            held.copy_(values)


def fill(
    config: BackendConfig, req_to_token: torch.Tensor, batch: ForwardBatch, step: int, target: StepBuffers
) -> None:
    """Every field of every step of ``target``, which begins at draft step ``step``, in one launch.

    Reads only device tensors and allocates nothing, so it may run inside a graph capture.
    """
    mode = batch.forward_mode
    fill_metadata(
        target.packed,
        target.page_table_1,
        target.real_page_table,
        target.flattened,
        req_to_token,
        batch.req_pool_indices,
        batch.seq_lens,
        lengths.query_lens(batch),
        target.layout.bs,
        target.layout.num_rows,
        config.rows_per_request(mode),
        lengths.extra_tokens(config, mode, step),
        lengths.row_layout(mode),
        config.step_advance(mode, 0) > 0,
        config.index_topk,
        config.page_size,
        target.layout.paged_mqa_num_sms,
        target.layout.flashmla_num_sm_parts,
    )


def fill_eagerly(
    config: BackendConfig, req_to_token: torch.Tensor, batch: ForwardBatch, step: int, num_steps: int, distinct: int
) -> StepBuffers:
    """Fresh metadata of ``num_steps`` steps in ``distinct`` buffers (1: all the same), by one launch."""
    sizes = read_sizes(config, batch, step, num_steps)
    layout = Layout.of(config, batch.forward_mode, batch.batch_size, sizes.num_rows)
    target = buffers.allocate(
        config, layout, sizes.widths[:distinct], batch.seq_lens.device, sizes.flattened, sizes.max_seq_len_q
    )
    fill(config, req_to_token, batch, step, target)
    return target


def _source_aligned(table: torch.Tensor, row_stride: int) -> bool:
    return row_stride % buffers.WORDS_PER_VECTOR == 0 and table.data_ptr() % 16 == 0


def _programs_per_row(num_rows: int, width: int) -> int:
    """Programs that share a page-table row: enough to fill the GPU, at most one per chunk. Depends on shapes only."""
    return max(1, min(-(-PROGRAMS // max(num_rows, 1)), -(-width // CHUNK)))


def _page_lanes(page_size: int) -> int:
    """Pages that can begin in one chunk, as a power of two."""
    return 1 << (-(-CHUNK // page_size) - 1).bit_length()


def _launch_fill(
    packed: torch.Tensor,
    page_table: torch.Tensor,
    real_page_table: torch.Tensor,
    flattened: torch.Tensor | None,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor | None,
    bs: int,
    num_rows: int,
    rows_per_request: int,
    extra: int,
    row_layout: int,
    advancing: bool,
    index_topk: int,
    page_size: int,
    num_sms: int,
    num_sm_parts: int,
) -> None:
    """Stacked buffers as in ``StepBuffers``; inputs int32 or int64 with any stride; req_to_token int32."""
    num_steps = packed.shape[0]
    width = min(page_table.shape[2], req_to_token.shape[1])
    source_stride = req_to_token.stride(0)
    programs = _programs_per_row(bs, page_table.shape[2])
    small_programs = (num_steps if advancing else 1) * (1 + (num_sms > 0) + (num_sm_parts > 0))
    lens = seq_lens if query_lens is None else query_lens
    table_steps, table_rows, _ = page_table.stride()
    pages_steps, pages_rows, _ = real_page_table.stride()
    aligned = _source_aligned(req_to_token, source_stride)
    flags = (row_layout, advancing, page_size, num_sms > 0, num_sm_parts > 0, flattened is not None, aligned)
    inputs = (req_pool_indices.dtype, seq_lens.dtype, lens.dtype)
    _fill(
        small_programs + bs * programs,
        (*flags, *inputs, is_wide(table_steps), is_wide(pages_steps), is_wide(source_stride)),
        _fill.tensors(
            packed=packed,
            table=page_table,
            pages=real_page_table,
            flattened=packed if flattened is None else flattened,
            req_to_token=req_to_token,
            req_pool_indices=req_pool_indices,
            seq_lens=seq_lens,
            query_lens=lens,
        ),
        _fill.numbers(
            packed_stride=packed.stride(0),
            pitch=buffers.field_pitch(bs, num_rows),
            table_step_stride=table_steps,
            table_row_stride=table_rows,
            pages_step_stride=pages_steps,
            pages_row_stride=pages_rows,
            flattened_stride=0 if flattened is None else flattened.stride(0),
            req_to_token_stride=source_stride,
            pool_stride=req_pool_indices.stride(0),
            seq_stride=seq_lens.stride(0),
            query_stride=lens.stride(0),
            num_steps=num_steps,
            bs=bs,
            num_rows=num_rows,
            rows_per_request=rows_per_request,
            width=width,
            extra=extra,
            index_topk=index_topk,
            num_sms=num_sms,
            num_sm_parts=num_sm_parts,
            programs_per_request=programs,
        ),
        _fill.constants(
            ROW_LAYOUT=row_layout,
            ADVANCING=advancing,
            PAGE_SIZE=page_size,
            PAGE_LANES=_page_lanes(page_size),
            HAS_PAGED_MQA=num_sms > 0,
            HAS_FLASHMLA=num_sm_parts > 0,
            HAS_FLATTENED=flattened is not None,
            SOURCE_ALIGNED=aligned,
            LENGTH_BLOCK=lengths.LENGTH_BLOCK,
            SM_BLOCK=schedules.SM_BLOCK,
            ROW_BLOCK=schedules.ROW_BLOCK,
            FLASHMLA_BLOCK=schedules.FLASHMLA_BLOCK,
            CHUNK=CHUNK,
        ),
    )


def _launch_copy(
    packed: torch.Tensor,
    page_table: torch.Tensor,
    real_page_table: torch.Tensor,
    flattened: torch.Tensor | None,
    source_packed: torch.Tensor,
    source_page_table: torch.Tensor,
    source_flattened: torch.Tensor | None,
    bs: int,
    num_rows: int,
    extend: bool,
    page_size: int,
) -> None:
    """The destination is stacked over S steps, sources over 1 or S. Pages are derived again from the source's slots."""
    num_steps, packed_size = packed.shape
    source_steps = source_packed.shape[0]
    _, table_rows, width = page_table.shape
    programs = _programs_per_row(table_rows, width)
    lengths_slot = (fields.CACHE_SEQLENS if extend else fields.SEQLENS_EXPANDED).value
    pitch = buffers.field_pitch(bs, num_rows)
    flattened_size = 0 if flattened is None else flattened.shape[1]
    grid = table_rows * programs + -(-packed_size // CHUNK) + -(-flattened_size // CHUNK)
    aligned = _source_aligned(source_page_table, source_page_table.stride(1))
    _copy(
        grid,
        (page_size, flattened is not None, aligned, is_wide(page_table.stride(0)), is_wide(real_page_table.stride(0))),
        _copy.tensors(
            packed=packed,
            table=page_table,
            pages=real_page_table,
            flattened=packed if flattened is None else flattened,
            source_packed=source_packed,
            source_table=source_page_table,
            source_flattened=packed if source_flattened is None else source_flattened,
        ),
        _copy.numbers(
            packed_stride=packed.stride(0),
            table_step_stride=page_table.stride(0),
            table_row_stride=page_table.stride(1),
            pages_step_stride=real_page_table.stride(0),
            pages_row_stride=real_page_table.stride(1),
            flattened_stride=0 if flattened is None else flattened.stride(0),
            source_packed_stride=0 if source_steps == 1 else source_packed.stride(0),
            source_table_row_stride=source_page_table.stride(1),
            num_steps=num_steps,
            packed_size=packed_size,
            flattened_size=flattened_size,
            lengths_offset=lengths_slot * pitch,
            num_source_steps=source_steps,
            num_table_rows=table_rows,
            width=min(width, source_page_table.shape[2]),
            programs_per_row=programs,
        ),
        _copy.constants(
            PAGE_SIZE=page_size,
            PAGE_LANES=_page_lanes(page_size),
            HAS_FLATTENED=flattened is not None,
            SOURCE_ALIGNED=aligned,
            CHUNK=CHUNK,
        ),
    )


fill_metadata = register(
    "fill_metadata(Tensor(a!) packed, Tensor(b!) page_table, Tensor(c!) real_page_table, Tensor(d!)? flattened, "
    "Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, Tensor? query_lens, int bs, int num_rows, "
    "int rows_per_request, int extra, int row_layout, bool advancing, int index_topk, int page_size, int num_sms, "
    "int num_sm_parts) -> ()",
    _launch_fill,
)
copy_steps = register(
    "copy_steps(Tensor(a!) packed, Tensor(b!) page_table, Tensor(c!) real_page_table, Tensor(d!)? flattened, "
    "Tensor source_packed, Tensor source_page_table, Tensor? source_flattened, int bs, int num_rows, bool extend, "
    "int page_size) -> ()",
    _launch_copy,
)
