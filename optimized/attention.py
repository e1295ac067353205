"""Sparse multi-head latent attention over the selected tokens."""

from __future__ import annotations

import functools
import math

import torch

from nsa_oracle.optimized.kernels.attention import padded, sparse_mla_combine_kernel, sparse_mla_kernel
from nsa_oracle.optimized.kernels.attention_hopper import HEAD_BLOCK, NUM_WARPS, sparse_mla_hopper_kernel
from nsa_oracle.optimized.launch import Launcher, is_hopper, is_wide, runs_gluon
from nsa_oracle.optimized.library import register
from nsa_oracle.reference.types import AttentionConfig

CHUNK = 512  # indices that share one partial softmax: changing it changes low bits of every result
SCAN = 2048  # indices read per step of the search for a row's last valid index
MAX_HEAD_BLOCK = 64  # heads whose float32 outputs take half of the registers
MIN_HEAD_BLOCK = 16
PARTIAL_ROUNDS = 0.45  # cost of writing and reading a chunk's partial, relative to computing it
HOPPER_SIZES = 512, 64  # sizes of the latent and RoPE parts that the Hopper kernel supports: those of production

_attend = Launcher(sparse_mla_kernel, "q_row_stride")
_combine = Launcher(sparse_mla_combine_kernel, "num_chunks")
_attend_on_hopper = Launcher(sparse_mla_hopper_kernel, "q_row_stride")


def sparse_mla(
    config: AttentionConfig, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each row over the slots ``indices`` names: out bf16 [R, H, kv_lora_rank], lse float32 [R, H].

    out = softmax(q.k * sm_scale) v, where v is the first kv_lora_rank of k; lse is the natural log of the sum of
    exp(q.k * sm_scale). A row without a valid slot: out 0, lse -inf. A row's result depends on that row alone, bit for
    bit: not on the other rows of the batch, nor on the number of programs per row.

    q [R, H, qk_head_dim] bf16. kv_cache: see ``KVCacheDtype``. indices [R, K] int32: slots; negative ones, anywhere in
    the row, are skipped. No other slot is read. Last dimensions are dense; rows, heads and slots may be strided.
    """
    rows, heads, num_chunks = q.shape[0], config.num_heads, max(1, -(-indices.shape[1] // CHUNK))
    splits = _splits(rows * -(-heads // _head_block(heads)), num_chunks, q.device)
    out = torch.empty(rows, heads, config.kv_lora_rank, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(rows, heads, dtype=torch.float32, device=q.device)
    sparse_mla_into(config, out, lse, q, kv_cache, indices, splits)
    return out, lse


def sparse_mla_into(
    config: AttentionConfig,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    splits: int,
) -> None:
    """``sparse_mla`` into ``out`` and ``lse``. splits: programs per row, 1 or the number of chunks of ``indices``."""
    rows, heads, rank = out.shape
    accs = torch.empty(rows, splits, padded(heads), rank, dtype=torch.float32, device=q.device)
    stats = torch.empty(rows, splits, heads, 2, dtype=torch.float32, device=q.device)
    sparse_mla_op(out, lse, accs, stats, q, kv_cache, indices, config.sm_scale)
    if splits > 1:
        sparse_mla_combine_op(out, lse, accs, stats, config.sm_scale)


def _head_block(heads: int) -> int:
    """Heads per program: all, as a power of two; at least a tile of the matrix units, at most what registers hold."""
    return min(MAX_HEAD_BLOCK, max(MIN_HEAD_BLOCK, 1 << (heads - 1).bit_length()))


def _launch_sparse_mla(
    out: torch.Tensor,
    lse: torch.Tensor,
    accs: torch.Tensor,
    stats: torch.Tensor,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
) -> None:
    rows, heads, rank = out.shape
    if rows == 0:
        return
    splits, num_keys, rope, fp8 = accs.shape[1], indices.shape[1], q.shape[2] - rank, kv_cache.dtype is torch.uint8
    q_row_stride, q_head_stride, _ = q.stride()
    kv_stride, indices_stride = kv_cache.stride(0), indices.stride(0)
    assert q.stride(2) == 1 and kv_cache.stride(2) == 1 and indices.stride(1) == 1, "rows must be dense"  # noqa: PT018
    slot_bits = kv_cache.data_ptr() | kv_stride * kv_cache.element_size()
    assert not fp8 or slot_bits % 4 == 0, "slots of an FP8 cache must start on 4 bytes"
    q_bits = q.data_ptr() | q_row_stride * q.element_size() | q_head_stride * q.element_size()
    aligned = (slot_bits | q_bits | accs.data_ptr() | out.data_ptr()) % 16 == 0
    wide = is_wide(q_row_stride), is_wide(kv_stride), is_wide(indices_stride)
    # Both kernels have the same tensors and numbers.
    tensors = _attend.tensors(out=out, lse=lse, accs=accs, stats=stats, q=q, kv=kv_cache, indices=indices)
    numbers = _attend.numbers(
        q_row_stride=q_row_stride,
        q_head_stride=q_head_stride,
        kv_stride=kv_stride,
        indices_stride=indices_stride,
        num_keys=num_keys,
        programs_per_row=splits,
        scale=sm_scale,
        scale_log2=_scale_log2(sm_scale),
    )
    if aligned and (rank, rope) == HOPPER_SIZES and runs_gluon(sparse_mla_hopper_kernel):
        _attend_on_hopper(
            rows * splits * -(-heads // HEAD_BLOCK.value),
            (heads, fp8, *wide),
            tensors,
            numbers,
            _attend_on_hopper.constants(HEADS=heads, RANK=rank, ROPE=rope, FP8=fp8, CHUNK=CHUNK, SCAN=SCAN),
            num_warps=NUM_WARPS,
        )
        return
    head_block = _head_block(heads)
    key_block, num_stages = (64 if is_hopper() else 32), 2
    _attend(
        rows * splits * -(-heads // head_block),
        (heads, rank, rope, fp8, aligned, *wide),
        tensors,
        numbers,
        _attend.constants(
            HEADS=heads,
            RANK=rank,
            ROPE=rope,
            FP8=fp8,
            ALIGNED=aligned,
            HEAD_BLOCK=head_block,
            KEY_BLOCK=key_block,
            CHUNK=CHUNK,
            SCAN=SCAN,
        ),
        num_warps=8,
        num_stages=num_stages,
    )


def _launch_combine(
    out: torch.Tensor, lse: torch.Tensor, accs: torch.Tensor, stats: torch.Tensor, sm_scale: float
) -> None:
    rows, heads, rank = out.shape
    if rows == 0:
        return
    early = is_hopper()
    options = {"launch_pdl": True} if early else {}  # only NVIDIA's compiler has this option
    _combine(
        rows * heads,
        (heads, rank),
        _combine.tensors(out=out, lse=lse, accs=accs, stats=stats),
        _combine.numbers(num_chunks=accs.shape[1], scale=sm_scale, scale_log2=_scale_log2(sm_scale)),
        _combine.constants(HEADS=heads, RANK=rank, EARLY=early),
        num_warps=4,
        **options,
    )


sparse_mla_op = register(
    "sparse_mla(Tensor(a!) out, Tensor(b!) lse, Tensor(c!) accs, Tensor(d!) stats, Tensor q, Tensor kv_cache, "
    "Tensor indices, float sm_scale) -> ()",
    _launch_sparse_mla,
)
sparse_mla_combine_op = register(
    "sparse_mla_combine(Tensor(a!) out, Tensor(b!) lse, Tensor accs, Tensor stats, float sm_scale) -> ()",
    _launch_combine,
)


@functools.cache
def _scale_log2(sm_scale: float) -> float:
    """sm_scale * log2(e), rounded to float32: exactly 1.0 for sm_scale = ln 2."""
    return torch.tensor(sm_scale * math.log2(math.e), dtype=torch.float32).item()


def _splits(programs: int, num_chunks: int, device: torch.device) -> int:
    """Programs per row, 1 or one per chunk, whichever takes fewer rounds. ``programs``: blocks of heads of all rows.

    A round is one chunk on every multiprocessor. One program per chunk also has to write and read every partial.
    """
    multiprocessors = _multiprocessors(device)
    whole = -(-programs // multiprocessors) * num_chunks
    split = -(-programs * num_chunks // multiprocessors) + programs * num_chunks / multiprocessors * PARTIAL_ROUNDS
    return num_chunks if split < whole else 1


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # the interpreter: both choices occur
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
