"""The backend of a miniature of SGLang 0.5.15 and 0.5.23: today's names, two more fields, and an older defect.

It computes with the reference under SGLang's names, and like the real one fails at whatever it would be given wrongly.
Of four steps or more, it leaves the first three with the schedule and the plan of the capture.
"""

from __future__ import annotations

BACKEND = "sglang/srt/layers/attention/dsa_backend.py"
TEXT = """
from types import SimpleNamespace

import torch

import deep_gemm
from nsa_oracle.reference import metadata as reference
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, SpecInfo
from sgl_kernel.flash_mla import get_mla_metadata
from sglang.kernels.ops.attention.dsv4.topk import plan_topk_v2
from sglang.srt.configs.model_config import get_dsa_index_topk
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

STALE_STEPS = 3
REFRESHED_ELSEWHERE = ("paged_mqa_schedule_metadata", "topk_v2_plan")


def renamed(found):
    made = SimpleNamespace(**vars(found))
    for name in ("cache_seqlens_int32", "cu_seqlens_q", "cu_seqlens_k"):
        setattr(made, "dsa_" + name, vars(made).pop("nsa_" + name))
    made.dsa_seqlens_expanded = vars(made).pop("seqlens_expanded")
    made.flashmla_metadata = None
    return made


class DeepseekSparseAttnBackend(AttentionBackend):
    def __init__(self, model_runner, skip_prefill=False, speculative_step_id=0, topk=0, speculative_num_steps=0):
        assert topk == 1 and torch.cuda.get_device_capability() == (9, 0)
        self.pool = model_runner.req_to_token_pool.req_to_token
        self.config = BackendConfig(
            model_runner.page_size, model_runner.model_config.context_len, get_dsa_index_topk(None),
            speculative_num_steps, model_runner.server_args.speculative_num_draft_tokens,
            paged_mqa_num_sms=deep_gemm.get_num_sms(),
        )
        self.flashmla = model_runner.server_args.dsa_decode_backend == "flashmla_kv"
        self.captured = {}

    def compute(self, batch, in_graph):
        mode, bs = batch.forward_mode, batch.batch_size
        new, cached = batch.extend_seq_lens, batch.extend_prefix_lens
        given = ForwardBatch(ForwardMode[mode.name], bs, batch.req_pool_indices[:bs], batch.seq_lens[:bs],
                             extend_seq_lens=new, extend_prefix_lens=cached)
        made = renamed(reference.compute_metadata(self.config, self.pool, given, 0, in_graph))
        lengths = made.dsa_seqlens_expanded
        made.topk_v2_plan = plan_topk_v2(lengths)
        if mode.is_extend_without_speculative():
            made.indexer_seq_lens, made.indexer_seq_lens_cpu = batch.seq_lens, batch.seq_lens_cpu
            return made
        made.paged_mqa_ctx_lens_2d = lengths[:, None]
        made.paged_mqa_schedule_metadata = deep_gemm.get_paged_mqa_logits_metadata(
            made.paged_mqa_ctx_lens_2d, 64, deep_gemm.get_num_sms())
        if self.flashmla:
            table, splits = get_mla_metadata(cache_seqlens=made.dsa_cache_seqlens_int32)
            made.flashmla_metadata = SimpleNamespace(flashmla_metadata=table, num_splits=splits)
        return made

    def init_forward_metadata(self, batch):
        if batch.seq_lens_cpu is not None:
            width = batch.seq_lens_cpu.max().item()
            assert width == batch.seq_lens.max().item()
        if batch.forward_mode.is_extend_without_speculative():
            batch.seq_lens_cpu.tolist()
        self.forward_metadata = self.compute(batch, False)

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        self.captured = {}

    def init_forward_metadata_out_graph(self, batch, in_capture=False, stale=()):
        made = self.compute(batch, True)
        if in_capture:
            self.captured.setdefault(batch.batch_size, made)  # a later capture of as many requests gets the same
        self.forward_metadata = self.captured[batch.batch_size]
        kept = vars(self.forward_metadata)
        for name, value in vars(made).items():
            if isinstance(value, torch.Tensor) and name not in stale:
                kept[name].copy_(value)
        if made.flashmla_metadata is not None:
            for name in ("flashmla_metadata", "num_splits"):
                getattr(kept["flashmla_metadata"], name).copy_(getattr(made.flashmla_metadata, name))


class DeepseekSparseAttnMultiStepBackend:
    def __init__(self, model_runner, topk, speculative_num_steps):
        self.attn_backends = [
            DeepseekSparseAttnBackend(model_runner, False, i, topk, speculative_num_steps)
            for i in range(speculative_num_steps - 1)
        ]

    def init_forward_metadata(self, batch):
        for step in self.attn_backends:
            step.init_forward_metadata(batch)

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        for step in self.attn_backends:
            step.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, batch, in_capture=False):
        assert batch.forward_mode.is_decode_or_idle()
        is_fused = len(self.attn_backends) >= 3 and not in_capture
        for number, step in enumerate(self.attn_backends):
            is_stale = is_fused and number < STALE_STEPS
            step.init_forward_metadata_out_graph(batch, in_capture, REFRESHED_ELSEWHERE if is_stale else ())

    def init_forward_metadata_in_graph(self, batch):
        for step in self.attn_backends:
            step.init_forward_metadata_in_graph(batch)
"""
MENDED = TEXT.replace("STALE_STEPS = 3", "STALE_STEPS = 0")
