"""SGLang's own kernels as stages of a layer: its top-k kernels, its sparse attention in Triton, its table lookup.

They are those of SGLang 0.5.23, from an installed package or an unpacked wheel in the folder that
``NSA_ORACLE_SGLANG`` names. Top-k is CUDA code that SGLang builds with nvcc on first use, so it needs a GPU, and the
packages apache-tvm-ffi and msgspec. Triton kernels run without a GPU as well. Stages that a layer below does not define
are taken from ``optimized/``:

    nsa-oracle survey --layer nsa_oracle.harness.subjects.adapters.sglang_kernels:TopKV2 --device cuda
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch

from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.harness.scenarios.limits import Sizes
from nsa_oracle.harness.subjects.adapters.packages import Package, PackageLayout
from nsa_oracle.harness.subjects.adapters.stand_ins import constant
from nsa_oracle.harness.subjects.default import optimized_layer
from nsa_oracle.reference.types import AttentionConfig, BackendConfig, KVCacheDtype

_OPS = "sglang.kernels.ops.attention."
_CORES_WITHOUT_A_GPU = 132


def _cores(device: int | None = None) -> int:
    if not torch.cuda.is_available():
        return _CORES_WITHOUT_A_GPU
    return torch.cuda.get_device_properties(device or 0).multi_processor_count


def _values() -> Mapping[str, Mapping[str, object]]:
    no, yes = constant(False), constant(True)
    return {
        "sglang.srt.utils": {"is_xpu": no, "is_gfx95_supported": no, "get_device_core_count": _cores},
        "sglang.srt.utils.common": {"is_cuda": yes},
        "sglang.kernels.ops.quantization.fp8_kernel": {"is_fp8_fnuz": no},
    }


LAYOUT = PackageLayout(
    version="0.5.23",
    real=(
        "sglang.kernels.jit",
        "sglang.kernels.jit.utils.*",
        "sglang.srt.environ",
        *(_OPS + name for name in ("dsv4.topk", "dsv4.candidate_table", "dsv4.utils", "fast_topk", "deep_select")),
    ),
    kernels=(
        _OPS + "metadata",
        *(_OPS + "dsa." + name for name in ("transform_index", "triton_sparse_mla", "triton_sparse_mla_decode")),
        _OPS + "dsa.triton_sparse_mla_prefill",
    ),
)
PUBLISHED = Package("sglang", "NSA_ORACLE_SGLANG", _values, (), series=2)


def as_on_hopper() -> AbstractContextManager[Any]:
    """A context in which launchers of Triton kernels, which ask for a GPU, find one; none if there is a GPU."""
    if torch.cuda.is_available():
        return nullcontext()
    return mock.patch.multiple(
        torch.cuda,
        current_device=constant(0),
        get_device_capability=constant((9, 0)),
        current_stream=constant(SimpleNamespace(cuda_stream=0)),
    )


def kernels(module: str) -> ModuleType:
    """A module of SGLang's attention kernels. Raises BackendError, in one line, if it cannot be loaded."""
    return PUBLISHED.load(LAYOUT, _OPS + module)


def padded_rows(logits: torch.Tensor, columns: int) -> torch.Tensor:
    """``logits`` [R, W] at a row stride that is a multiple of ``columns``, as SGLang's indexer hands them over."""
    rows, width = logits.shape
    wide = logits.new_full((rows, -(-width // columns) * columns), float("nan"))
    wide[:, :width] = logits
    return wide[:, :width]


class _TopK:
    """What the top-k kernels share: they give the right tokens, in no fixed order."""

    sizes: ClassVar[Sizes] = {"index_topk": (512, 1024, 2048)}
    weaker: ClassVar[dict[str, Strictness]] = dict.fromkeys(Strictness.SAME_SET.stages, Strictness.SAME_SET)

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.index_topk = config.index_topk
        self.page_size = config.page_size

    def empty(self, logits: torch.Tensor) -> torch.Tensor:
        """Where a kernel writes its result: int32 [R, K]."""
        return torch.empty(len(logits), self.index_topk, dtype=torch.int32, device=logits.device)


class TopKV2(_TopK):
    """The top-k of SGLang's decode and prefill: a plan made from the lengths, then selection fused with the table."""

    def _paged(self, logits: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
        theirs, out = kernels("dsv4.topk"), self.empty(logits)
        if len(logits):
            theirs.topk_transform_paged_v2(padded_rows(logits, 4), lengths, table, out, 1, theirs.plan_topk_v2(lengths))
        return out

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        return self._paged(logits, seqlens_expanded, None)

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        return self._paged(logits, seqlens_expanded, page_table_1.contiguous())

    def topk_transform_ragged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, topk_indices_offset: torch.Tensor
    ) -> torch.Tensor:
        out = self.empty(logits)
        if len(logits):
            kernels("dsv4.topk").topk_transform_ragged_v2(
                padded_rows(logits, 4), seqlens_expanded, out_offsets=topk_indices_offset, out_indices=out
            )
        return out


class FastTopK(_TopK):
    """The radix top-k that v2 replaced, as SGLang builds it now."""

    sizes: ClassVar[Sizes] = {"index_topk": (512, 2048)}

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        if not len(logits):
            return self.empty(logits)
        found: torch.Tensor = kernels("fast_topk").fast_topk(logits.contiguous(), seqlens_expanded, self.index_topk)
        return found


class DeepSelect(_TopK):
    """DeepSelect. It can sort what it selects by position; which of equal scores it selects is not fixed."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        if not len(logits):
            return self.empty(logits)
        select = kernels("deep_select")
        columns = select.get_input_stride_alignment_bytes() // logits.element_size()
        rows = padded_rows(logits, columns)
        found: torch.Tensor = select.topk(
            rows, self.index_topk, end=seqlens_expanded, sorted_index=True, idx_oob_fill_value=-1
        )[1]
        return found.contiguous()


class TransformIndex:
    """The lookup of selected positions in the page table, behind our top-k."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.ours = optimized_layer(config, attention)

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        positions = self.ours.topk_indices(logits, seqlens_expanded)
        if not len(logits):
            return positions
        found: torch.Tensor = kernels("dsa.transform_index").transform_index_page_table_decode(page_table_1, positions)
        return found


class TritonDecode:
    """Sparse attention over a bf16 cache, split over the keys.

    It multiplies by a reciprocal, hence ``weaker``. It returns no lse: that is ours, and its rows say nothing.
    """

    sizes: ClassVar[Sizes] = {
        "kv_lora_rank": (128, 256, 512),
        "kv_cache_dtype": (KVCacheDtype.BF16,),
        "index_topk": (64, 128, 512, 2048),
        "qk_rope_head_dim": (16, 32, 64),
        "far_slots": (False,),  # the cache must be dense
    }
    weaker: ClassVar[dict[str, Strictness]] = {"out": Strictness.ONE_STEP}

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.attention = attention
        self.ours = optimized_layer(config, attention)

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self.ours.sparse_mla(q, kv_cache, indices)
        if not len(q):
            return out, lse
        with as_on_hopper():
            return self.attend(q, kv_cache, indices), lse

    def attend(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Out, bf16 [R, heads, latent]."""
        rank = self.attention.kv_lora_rank
        found: torch.Tensor = kernels("dsa.triton_sparse_mla_decode").triton_sparse_mla_decode(
            q[..., :rank], q[..., rank:], kv_cache, indices[:, None], self.attention.sm_scale, rank
        )
        return found[0]


class TritonForward(TritonDecode):
    """The same, in one pass where there are many rows."""

    def attend(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        rank = self.attention.kv_lora_rank
        found: torch.Tensor = kernels("dsa.triton_sparse_mla").triton_sparse_mla_fwd(
            q[..., :rank], q[..., rank:], kv_cache, indices[:, None], self.attention.sm_scale, rank
        )
        return found[0]


class TritonPrefill(TritonDecode):
    """The prefill kernel."""

    union = 0

    def attend(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = kernels("dsa.triton_sparse_mla_prefill").sparse_mla_prefill(
            q.contiguous(), kv_cache, indices.contiguous(), self.attention.sm_scale, self.attention.kv_lora_rank,
            union=self.union,
        )  # fmt: skip
        return found


class TritonPrefillUnion(TritonPrefill):
    """The prefill kernel whose neighbouring rows share one list of slots."""

    union = 4
