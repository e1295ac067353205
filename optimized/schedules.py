"""Work schedules of attention kernels, derived from lengths by one small launch each. See ``reference.schedules``."""

from __future__ import annotations

import torch

from nsa_oracle.optimized.kernels.schedules import flashmla_schedule_kernel, paged_mqa_schedule_kernel
from nsa_oracle.optimized.launch import Launcher
from nsa_oracle.optimized.library import register

# Tile of multiprocessors x rows over which the paged-MQA schedule counts: 16 counters per thread at 4 warps.
SM_BLOCK = 64
ROW_BLOCK = 32
FLASHMLA_BLOCK = 512  # rows per step of the search for the end of a part

_paged_mqa = Launcher(paged_mqa_schedule_kernel, "lengths_stride")
_flashmla = Launcher(flashmla_schedule_kernel, "lengths_stride")


def _launch_paged_mqa(context_lens: torch.Tensor, schedule: torch.Tensor, num_sms: int) -> None:
    """context_lens [S, R] int32, schedule [S, 2 * (num_sms + 1)] int32; both dense within a step."""
    _paged_mqa(
        context_lens.shape[0],
        (),
        _paged_mqa.tensors(lengths=context_lens, schedule=schedule),
        _paged_mqa.numbers(
            lengths_stride=context_lens.stride(0),
            schedule_stride=schedule.stride(0),
            num_rows=context_lens.shape[1],
            num_sms=num_sms,
        ),
        _paged_mqa.constants(SM_BLOCK=SM_BLOCK, ROW_BLOCK=ROW_BLOCK),
    )


def _launch_flashmla(
    nsa_cache_seqlens: torch.Tensor, metadata: torch.Tensor, num_splits: torch.Tensor, num_sm_parts: int
) -> None:
    """nsa_cache_seqlens [S, R], metadata [S, 8 * num_sm_parts], num_splits [S, R + 1]; int32, dense within a step."""
    _flashmla(
        nsa_cache_seqlens.shape[0],
        (),
        _flashmla.tensors(lengths=nsa_cache_seqlens, metadata=metadata, num_splits=num_splits),
        _flashmla.numbers(
            lengths_stride=nsa_cache_seqlens.stride(0),
            metadata_stride=metadata.stride(0),
            splits_stride=num_splits.stride(0),
            num_rows=nsa_cache_seqlens.shape[1],
            num_sm_parts=num_sm_parts,
        ),
        _flashmla.constants(BLOCK=FLASHMLA_BLOCK),
    )


paged_mqa_schedule = register(
    "paged_mqa_schedule(Tensor context_lens, Tensor(a!) schedule, int num_sms) -> ()", _launch_paged_mqa
)
flashmla_schedule = register(
    "flashmla_schedule(Tensor nsa_cache_seqlens, Tensor(a!) metadata, Tensor(b!) num_splits, int num_sm_parts) -> ()",
    _launch_flashmla,
)
