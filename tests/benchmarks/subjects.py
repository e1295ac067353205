"""What the metadata benchmarks put side by side: batches, our paths, SGLang's kernel, and the bandwidth floor."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nsa_oracle.optimized.lengths import expand_seqlens
from nsa_oracle.optimized.multi_step import MultiStepBackend
from nsa_oracle.optimized.optimizations import Optimizations
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, SpecInfo

CONTEXT = 163_840
DRAFT_TOKENS = 4
PAGE_SIZE = 64
TOPK = 2048
PEER_FILE = "ORACLE_PEER_DSA_METADATA"  # path of SGLang's dsa_metadata.py; without it the peer is left out

EAGER = {
    "loop": (),
    "precompute": ("precompute",),
    "transform_table_cache": ("transform_table_cache",),
    "strided_indices_cache": ("strided_indices_cache",),
    "batched_copy": ("batched_copy",),
    "vectorized_seqlens": ("vectorized_seqlens",),
    "all five": (
        "precompute",
        "transform_table_cache",
        "strided_indices_cache",
        "batched_copy",
        "vectorized_seqlens",
    ),
    "one launch": ("one_launch",),
    "one launch, aliased": ("one_launch", "aliased_steps"),
}


@dataclass
class Workload:
    """One batch shape on the GPU, every length within 1% of ``length``."""

    bs: int
    length: int
    num_steps: int
    mode: ForwardMode = ForwardMode.DECODE

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        jitter = torch.randint(0, max(1, self.length // 100), (self.bs,), generator=generator)
        lengths = self.length - jitter
        pages = torch.randperm(self.bs * (CONTEXT // PAGE_SIZE), generator=generator, dtype=torch.int32)
        slots = pages.view(self.bs, -1, 1) * PAGE_SIZE + torch.arange(PAGE_SIZE, dtype=torch.int32)
        self.config = BackendConfig(PAGE_SIZE, CONTEXT, TOPK, self.num_steps, DRAFT_TOKENS)
        self.req_to_token = slots.view(self.bs, CONTEXT).cuda()  # [bs, CONTEXT]
        self.batch = ForwardBatch(
            self.mode,
            self.bs,
            torch.randperm(self.bs, generator=generator).cuda(),
            lengths.cuda(),
            seq_lens_cpu=lengths,
            spec_info=SpecInfo(torch.randint(1, DRAFT_TOKENS + 1, (self.bs,), generator=generator).int().cuda()),
        )

    def backend(self, *names: str) -> MultiStepBackend:
        """Our backend with these optimisations, its buffers bound for this batch."""
        backend = MultiStepBackend(self.config, self.req_to_token, Optimizations.from_names(names))
        backend.init_cuda_graph_state(self.bs, self.bs * DRAFT_TOKENS)
        backend.init_forward_metadata_capture_cuda_graph(self.batch)
        return backend

    def bytes_moved(self, written_steps: int) -> int:
        """Least traffic: each live slot read once, and written once with its page to every step."""
        slots = int(self.batch.seq_lens.sum())
        return 4 * (slots + written_steps * (slots + slots // PAGE_SIZE))

    def floor(self) -> Callable[[], object]:
        """A device-to-device copy of as many bytes as copying into every step must move."""
        source = torch.zeros(self.bytes_moved(self.num_steps) // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return partial(target.copy_, source)

    def peer(self) -> Callable[[], None] | None:
        """SGLang's fused decode kernel, launched once a step as SGLang does; None where its file is not given."""
        module = _load_peer()
        if module is None:
            return None
        held = [step.forward_metadata for step in self.backend("one_launch").attn_backends]
        longest = int(self.batch.seq_lens.max())

        def prepare() -> None:
            for step in held:
                module.fused_dsa_decode_metadata(
                    self.batch.seq_lens,
                    self.batch.req_pool_indices,
                    self.req_to_token,
                    step.cache_seqlens_int32,
                    step.cu_seqlens_k,
                    step.page_table_1,
                    step.nsa_cache_seqlens_int32,
                    step.nsa_cu_seqlens_k,
                    step.real_page_table,
                    self.bs,
                    longest,
                    TOPK,
                    PAGE_SIZE,
                )

        return prepare


def _load_peer() -> Any:
    path = os.environ.get(PEER_FILE)
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location("dsa_metadata", Path(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loop(load: Workload) -> Callable[[], object]:
    """``seqlens_expanded`` as it was before the vectorisation: one arange per request, from the host mirror."""
    assert load.batch.seq_lens_cpu is not None
    mirror = load.batch.seq_lens_cpu

    def expand() -> torch.Tensor:
        if load.mode is ForwardMode.TARGET_VERIFY:
            query_lens = [DRAFT_TOKENS] * load.bs
            kv_lens = [DRAFT_TOKENS + length for length in mirror.tolist()]
        else:
            assert load.batch.spec_info is not None
            query_lens = load.batch.spec_info.accept_length.tolist()
            kv_lens = mirror.tolist()
        return torch.cat(
            [
                torch.arange(kv_len - q_len + 1, kv_len + 1, dtype=torch.int32, device="cuda")
                for q_len, kv_len in zip(query_lens, kv_lens, strict=True)
            ]
        )

    return expand


def vectorized_torch(load: Workload) -> Callable[[], object]:
    """The vectorisation that was reverted: a handful of small torch launches."""
    batch = load.batch

    def verify() -> torch.Tensor:
        kv_lens = (batch.seq_lens + DRAFT_TOKENS).int()
        base = torch.arange(DRAFT_TOKENS, dtype=torch.int32, device="cuda").unsqueeze(0)
        repeated = base.expand(load.bs, -1).contiguous().view(-1)
        return torch.repeat_interleave(kv_lens - DRAFT_TOKENS + 1, DRAFT_TOKENS) + repeated

    def extend() -> torch.Tensor:
        assert batch.spec_info is not None
        q_lens = batch.spec_info.accept_length
        ends = torch.cumsum(q_lens, 0)
        starts = torch.repeat_interleave(batch.seq_lens.int() - q_lens + 1 - (ends - q_lens), q_lens)
        return starts + torch.arange(starts.shape[0], dtype=torch.int32, device="cuda")

    return verify if load.mode is ForwardMode.TARGET_VERIFY else extend


def kernel(load: Workload) -> Callable[[], object]:
    """Our one launch, which fills ``seqlens_expanded`` and every other length field with it."""
    backend = load.backend()
    target = backend._buffers.captured(load.mode, load.bs)
    return lambda: expand_seqlens(load.config, load.batch, 0, target)
