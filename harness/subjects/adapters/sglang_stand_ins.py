"""What SGLang's attention backends need of the rest of the engine, on a machine that cannot import it.

Everything here is a stand-in, and none of it is judged: the settings of the server, the forward modes, the kernels that
exist in CUDA alone. Schedules are those of the reference, so only the lengths that a backend makes them for are judged,
and whether it makes them anew.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from nsa_oracle.harness.subjects.adapters.stand_ins import constant
from nsa_oracle.reference import schedules
from nsa_oracle.reference.types import BackendConfig

CAPABILITY = (9, 0)  # of the GPU that the backends are told to run on


class Mode(enum.Enum):
    """SGLang's ``ForwardMode``, as far as the backends ask it."""

    EXTEND = "EXTEND"
    DECODE = "DECODE"
    IDLE = "IDLE"
    TARGET_VERIFY = "TARGET_VERIFY"
    DRAFT_EXTEND = "DRAFT_EXTEND"
    DRAFT_EXTEND_V2 = "DRAFT_EXTEND_V2"

    def is_decode_or_idle(self) -> bool:
        return self in (Mode.DECODE, Mode.IDLE)

    def is_target_verify(self) -> bool:
        return self is Mode.TARGET_VERIFY

    def is_draft_extend(self, include_v2: bool = False) -> bool:
        return self is Mode.DRAFT_EXTEND or (include_v2 and self is Mode.DRAFT_EXTEND_V2)

    def is_draft_extend_v2(self) -> bool:
        return self is Mode.DRAFT_EXTEND_V2

    def is_extend(self, **_: bool) -> bool:
        return self in (Mode.EXTEND, Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND)

    def is_extend_without_speculative(self) -> bool:
        return self is Mode.EXTEND

    def is_context_parallel_extend(self, **_: bool) -> bool:
        return self is Mode.EXTEND


class Current:
    """The configuration of the backend that is being called; several exist in turn in one process."""

    config: BackendConfig


class Server:
    """Stands for what model runner, server arguments and runtime context say, by the names of all versions."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        flashmla = "flashmla_kv" if config.flashmla_num_sm_parts else "flashmla_sparse"
        impl = {f"{kind}_{when}_backend": value for kind in ("nsa", "dsa") for when, value in
                (("prefill", "flashmla_sparse"), ("decode", flashmla), ("topk", "sgl-kernel"))}  # fmt: skip
        self.arguments = SimpleNamespace(
            enable_deterministic_inference=False,
            speculative_eagle_topk=1,
            speculative_num_draft_tokens=config.speculative_num_draft_tokens,
            speculative_dsa_topk_backend="sgl-kernel",
            enable_nsa_prefill_context_parallel=False,
            enable_dsa_prefill_context_parallel=False,
            enable_memory_saver=False,
            enable_two_batch_overlap=False,
            enable_mixed_chunk=False,
            dsa_triton_union=1,
            attn_tp_size=1,
            attn_dcp_size=1,
            attn_dcp_rank=0,
            attn_cp_size=1,
            is_sm100=False,
            disaggregation_mode="null",
            **impl,
        )
        for group in ("deterministic", "features", "kernel", "overlap"):
            setattr(self.arguments, group, self.arguments)
        model = SimpleNamespace(
            hf_config=SimpleNamespace(architectures=["DeepseekV32ForCausalLM"]),
            context_len=config.max_context_len,
            num_attention_heads=64,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
        )
        # A byte cache of FP8 values: prefill then addresses the concatenated KV, as the contract does.
        cache = SimpleNamespace(
            nsa_kv_cache_store_fp8=True,
            dsa_kv_cache_store_fp8=True,
            kv_cache_dim=656,
            dtype=torch.uint8,
            size=int(req_to_token.numel()) * 4,
            page_size=config.page_size,
        )
        self.runner = SimpleNamespace(
            device=req_to_token.device,
            page_size=config.page_size,
            model_config=model,
            server_args=self.arguments,
            token_to_kv_pool=cache,
            req_to_token_pool=SimpleNamespace(req_to_token=req_to_token, size=len(req_to_token)),
            hisparse_coordinator=None,
            is_draft_worker=True,
            kv_cache_dtype=torch.float8_e4m3fn,
            max_running_requests=len(req_to_token),
        )


def arguments_of_current() -> Callable[..., Any]:
    """A function that returns the server's arguments for the current backend."""
    return lambda *_, **__: Server(Current.config, torch.empty(1, 1, dtype=torch.int32)).arguments


def get_mla_metadata(cache_seqlens: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashMLA's schedule for these lengths."""
    return schedules.flashmla_schedule(cache_seqlens.clamp(min=0), Current.config.flashmla_num_sm_parts)


def get_paged_mqa_logits_metadata(context_lens: torch.Tensor, block_kv: int, num_sms: int) -> torch.Tensor:
    """DeepGEMM's schedule for these lengths."""
    return schedules.paged_mqa_schedule(context_lens.reshape(-1).clamp(min=0), num_sms)


def plan_topk_v2(seqlens: torch.Tensor) -> torch.Tensor:
    """A copy of the lengths: the real plan is made of them alone, but its format is not judged."""
    return seqlens.clone()


def copy_to_one(*arguments: Any) -> None:
    """The copy kernel of one destination: nine fields, each of which may be None."""
    _copy(arguments[:9], arguments[9:18])


def copy_to_three(*arguments: Any) -> None:
    """The copy kernel of three destinations: eight fields each."""
    for destination in range(3):
        _copy(arguments[:8], arguments[8 * (destination + 1) : 8 * (destination + 2)])


def _copy(sources: tuple[Any, ...], destinations: tuple[Any, ...]) -> None:
    for source, destination in zip(sources, destinations, strict=True):
        if source is not None and destination is not None:
            destination[tuple(map(slice, source.shape))].copy_(source)


def inner_view(forward_batch: Any, *, bs: int, forward_mode: Mode, **_: object) -> SimpleNamespace:
    """The batch as one step sees it."""
    return SimpleNamespace(**{**vars(forward_batch), "batch_size": bs, "forward_mode": forward_mode})


def values() -> Mapping[str, Mapping[str, object]]:
    """Attributes of the stand-in modules of every version, by module name."""
    arguments, no, one = arguments_of_current(), constant(False), constant(1)
    platform: dict[str, object] = {
        **{
            f"is_{name}": no
            for name in ("hip", "gfx95_supported", "xpu", "musa", "npu", "blackwell", "sm100_supported")
        },
        "is_cuda": constant(True),
        "get_bool_env_var": no,
        "get_device_sm": constant(10 * CAPABILITY[0] + CAPABILITY[1]),
        "print_warning_once": constant(None),
        "ceil_div": lambda a, b: -(-a // b),
    }
    asked = ("exec", "parallel", "platform", "schedule", "spec", "disagg")
    context: dict[str, object] = {f"get_{name}": arguments for name in asked}
    top_k = constant(None)
    named: dict[str, dict[str, object]] = {
        "utils": platform,
        "utils.common": platform,
        "utils.torch_memory_saver_adapter": {"TorchMemorySaverAdapter": _NoMemorySaver},
        "configs.model_config": {
            "is_deepseek_nsa": constant(True),
            "is_deepseek_dsa": constant(True),
            "get_nsa_index_topk": lambda _: Current.config.index_topk,
            "get_dsa_index_topk": lambda _: Current.config.index_topk,
            "get_dsa_index_kpool": one,
        },
        "runtime_context": context,
        "server_args": {"get_global_server_args": arguments},
        "layers.dp_attention": {"get_attention_tp_size": one, "get_attention_tp_rank": constant(0)},
        "layers.attention.kv_shard_hooks": {"get_kv_shard_pool": constant(None)},
        "layers.attention.base_attn_backend": {"AttentionBackend": _NothingInGraph},
        "layers.attention.dsa.dsa_dcp": {"DcpPageTableCache": SimpleNamespace},
        "layers.cp.utils": {"is_cp_active": no},
        "model_executor.forward_batch_info": {"ForwardMode": Mode, "build_inner_fb_view": inner_view},
    }
    runner = "model_executor.runner_backend_utils."
    for module in ("breakable_cuda_graph", "breakable_cuda_graph.context", "tc_piecewise_cuda_graph"):
        named[runner + module] = {"is_in_breakable_cuda_graph": no, "is_in_tc_piecewise_cuda_graph": no}
    found: dict[str, dict[str, object]] = {f"sglang.srt.{name}": given for name, given in named.items()}
    copies: dict[str, object] = {
        "fused_metadata_copy_cuda": copy_to_one,
        "fused_metadata_copy_multi_cuda": copy_to_three,
    }
    schedule: dict[str, object] = {"get_mla_metadata": get_mla_metadata}
    return {
        **found,
        "sglang.jit_kernel.fused_metadata_copy": copies,
        "sglang.kernels.ops.attention.dsa.fused_metadata_copy": copies,
        "sglang.jit_kernel.dsv4.topk": {"plan_topk_v2": plan_topk_v2},
        "sglang.kernels.ops.attention.dsv4.topk": {"plan_topk_v2": plan_topk_v2},
        "sglang.kernels.ops.attention.flash_mla_interface": schedule,
        "sglang.kernels.ops.attention.flash_mla_sm120": {"_validate_flashinfer_sparse_mla_backend": no},
        "sgl_kernel.flash_mla": schedule,
        "deep_gemm": {
            "get_paged_mqa_logits_metadata": get_paged_mqa_logits_metadata,
            "get_num_sms": lambda: Current.config.paged_mqa_num_sms,
        },
        "sgl_kernel": {"fast_topk_v2": top_k},
    }


class _NothingInGraph:
    """SGLang's ``AttentionBackend``: its part of the preparation inside a graph is empty."""

    def init_forward_metadata_in_graph(self, forward_batch: object) -> None: ...


class _NoMemorySaver:
    @staticmethod
    def create(**_: object) -> _NoMemorySaver:
        return _NoMemorySaver()

    def region(self, **_: object) -> _NoMemorySaver:
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
