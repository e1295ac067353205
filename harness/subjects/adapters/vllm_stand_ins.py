"""What vLLM's metadata builders need of the rest of the engine, on a machine that cannot import it.

Everything here is a stand-in, and none of it is judged: the configuration, the platform, the kernels that exist in CUDA
alone. DeepGEMM's schedule is that of the reference, so only the lengths that it is made for are judged, and when.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import torch

from nsa_oracle.harness.subjects.adapters.stand_ins import constant
from nsa_oracle.reference import schedules
from nsa_oracle.reference.types import BackendConfig

LAYER = "layer"
MAX_LOGITS_MB = 1  # of the indexer's prefill: so little that a prefill is cut into chunks
WORKSPACE_FACTOR = 1  # prefill workspace of attention, in contexts of the longest request


class Current:
    """What differs between the backends of one process: several exist in turn. family: of the GPU's capability."""

    config: BackendConfig
    family: int = 90


class _Platform:
    """CUDA on one kind of GPU. Any other ``is_...`` is False."""

    device_type = "cpu"
    simple_compile_backend = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("is_", "support")):
            return constant(name in ("is_cuda", "is_cuda_alike"))
        raise AttributeError(name)

    def is_device_capability_family(self, family: int) -> bool:
        return family == Current.family


class _Silent:
    """A logger."""

    def __getattr__(self, name: str) -> Any:
        return constant(None)


def vllm_config(config: BackendConfig, max_reqs: int, max_tokens: int) -> SimpleNamespace:
    """The configuration, as far as the builders ask it: DeepSeek V3.2 on one rank, an FP8 cache, one GPU."""
    drafts = config.speculative_num_draft_tokens - 1
    spec = SimpleNamespace(num_speculative_tokens=drafts, enable_adaptive_verification=False, parallel_drafting=False)
    return SimpleNamespace(
        num_speculative_tokens=drafts,
        speculative_config=spec if drafts else None,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=max_tokens, max_num_seqs=max_reqs),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=1,
            cp_kv_cache_interleave_size=1,
        ),
        attention_config=SimpleNamespace(
            resolve_indexer_kv_dtype=lambda default: default,
            sparse_mla_prefill_workspace_factor=WORKSPACE_FACTOR,
            hisparse_config=None,
            indexer_tp_shard_min_rows=0,
            use_fp4_indexer_cache=False,
        ),
        model_config=SimpleNamespace(
            max_model_len=config.max_context_len,
            hf_text_config=SimpleNamespace(index_topk=config.index_topk),
            hf_config=SimpleNamespace(index_topk=config.index_topk),
            dtype=torch.bfloat16,
            get_num_attention_heads=constant(64),
            model_arch_config=SimpleNamespace(total_num_attention_heads=64),
        ),
        cache_config=SimpleNamespace(cache_dtype="fp8_ds_mla", block_size=config.page_size),
        compilation_config=SimpleNamespace(
            cudagraph_mode=None, static_forward_context={LAYER: SimpleNamespace(prefill_backend=None)}
        ),
    )


def kv_cache_spec(config: BackendConfig) -> SimpleNamespace:
    """The cache of one layer. A state is a token."""
    size = config.page_size
    return SimpleNamespace(block_size=size, storage_block_size=size, num_states=size, tokens_per_state=1)


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor, block_kv: int, num_slots: int, indices: torch.Tensor | None = None
) -> torch.Tensor:
    """DeepGEMM's schedule for these lengths, of which each counts as a request: int32 [num_slots + 1, 2].

    As ``reference.schedules.paged_mqa_schedule``, but on the device alone, as a graph may record it.
    """
    segments = -(-context_lens.reshape(-1) // schedules.SPLIT_KV)
    ends, slots = segments.cumsum(0), torch.arange(num_slots, device=segments.device)
    more = ends[-1] % num_slots  # of the last slots have one segment more
    begin = slots * (ends[-1] // num_slots) + (slots - num_slots + more).clamp(min=0)
    last = len(segments) - 1
    row = torch.searchsorted(ends, begin, right=True).clamp(max=last)
    segment = (begin - (ends - segments)[row]) * (begin < ends[-1])
    starts = torch.stack([torch.where(begin < ends[-1], row, last), segment], dim=1).to(torch.int32)
    return torch.nn.functional.pad(starts, (0, 0, 0, 1)) + _end(num_slots, last + 1, starts.device)


def _end(slots: int, rows: int, device: torch.device) -> torch.Tensor:
    """Zeros, but for the last entry, (rows, 0)."""
    is_last = torch.arange(slots + 1, device=device) == slots
    return torch.stack([is_last * rows, is_last * 0], dim=1).to(torch.int32)


D = TypeVar("D")


@dataclass
class MLACommonMetadata(Generic[D]):
    """The record that the metadata of sparse MLA extends, in vLLM's ``mla_attention.py``."""

    num_reqs: int
    max_query_len: int
    max_seq_len: int
    num_actual_tokens: int
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    causal: bool = True
    head_dim: int | None = None
    prefill: Any = None
    decode: D | None = None


@dataclass
class MLACommonPrefillMetadata:
    """The base of a record for prefills outside the sparse path, which is never made here."""


class MLACommonBaseImpl(Generic[D]):
    """The base of attention itself, which is never built here."""


class FlashMLASchedMeta:
    """FlashMLA makes its schedule in the first call of its kernel, so there is none to compare."""


def values() -> Mapping[str, Mapping[str, object]]:
    """Attributes of the stand-in modules, by module name."""
    import triton  # once it has been decided whether kernels are interpreted
    import triton.language as tl

    settings = SimpleNamespace(
        VLLM_SPARSE_INDEXER_MAX_LOGITS_MB=MAX_LOGITS_MB,
        VLLM_USE_DEEP_GEMM=True,
        VLLM_USE_DEEP_GEMM_E8M0=False,
        VLLM_CACHE_ROOT="",
    )
    mla = "vllm.model_executor.layers.attention.mla_attention"
    one_rank = constant(SimpleNamespace(world_size=1, rank_in_group=0))
    return {
        "vllm": {"envs": settings},
        "vllm.envs": vars(settings),
        "vllm.config": {"CUDAGraphMode": SimpleNamespace(NONE=0)},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.logger": {"init_logger": constant(_Silent()), "logger": _Silent()},
        "vllm.triton_utils": {"tl": tl, "triton": triton, "HAS_TRITON": True},
        "vllm.distributed": {"get_dcp_group": one_rank},
        "vllm.utils.import_utils": {"has_deep_gemm": constant(True)},
        "vllm.utils.platform_utils": {"num_compute_units": lambda _: Current.config.paged_mqa_num_sms},
        "vllm.utils.torch_utils": {
            "PIN_MEMORY": False,
            "np_to_pinned_tensor": torch.from_numpy,
            "get_dtype_size": lambda dtype: dtype.itemsize,
        },
        "vllm.v1.worker.cp_utils": {"get_total_cp_world_size": constant(1)},
        "vllm.v1.attention.ops.flashmla": {
            "get_mla_metadata": constant((FlashMLASchedMeta(), None)),
            "FlashMLASchedMeta": FlashMLASchedMeta,
        },
        mla: {
            "MLACommonMetadata": MLACommonMetadata,
            "MLACommonPrefillMetadata": MLACommonPrefillMetadata,
            "MLACommonBaseImpl": MLACommonBaseImpl,
            "SparseMLAAttentionImpl": MLACommonBaseImpl,
            "get_mla_dims": constant(
                SimpleNamespace(kv_lora_rank=1, qk_nope_head_dim=1, qk_rope_head_dim=0, v_head_dim=1)
            ),
        },
        "deep_gemm": {"get_paged_mqa_logits_metadata": get_paged_mqa_logits_metadata},
    }
