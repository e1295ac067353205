"""A miniature of vLLM's package with the layout, names and habits of its builders, in which nothing else is theirs.

``write`` makes the folder of an unpacked wheel, ``wheel`` the wheel. Like the real ones its builders write to buffers
of their own, take the lengths from the device, and cut a prefill into chunks.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from nsa_oracle.harness.subjects.adapters import vllm

COMMON = """
from dataclasses import dataclass
from typing import Any


@dataclass
class CommonAttentionMetadata:
    query_start_loc: Any
    query_start_loc_cpu: Any
    seq_lens: Any
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Any
    slot_mapping: Any
    is_prefilling: Any
    seq_lens_cpu_upper_bound: Any


class AttentionMetadataBuilder:
    def __init__(self, spec, layer_names, config, device):
        self.spec, self.config, self.device = spec, config, device
        self.drafts = 1 + config.num_speculative_tokens
        self.tokens = config.scheduler_config.max_num_batched_tokens

    def build_for_cudagraph_capture(self, common_attn_metadata):
        return self.build(0, common_attn_metadata)


def decodes_of(common, most):
    lens = common.query_start_loc_cpu.diff()
    if lens[0] > most:
        return 0
    alike = (lens == lens[0]) | (lens == 0)
    return common.num_reqs if alike.all() else int(alike.int().argmin())
"""

INDEXER = """
from types import SimpleNamespace

import torch

from vllm.platforms import current_platform
from vllm.utils.deep_gemm import get_paged_mqa_logits_metadata
from vllm.utils.platform_utils import num_compute_units
from vllm.v1.attention.backend import AttentionMetadataBuilder, decodes_of

assert current_platform.is_cuda() and current_platform.is_device_capability_family(90)


class DeepseekV32IndexerMetadataBuilder(AttentionMetadataBuilder):
    requires_block_table_width = True

    def __init__(self, *given, block_table_width):
        super().__init__(*given)
        zeros = lambda *size: torch.zeros(size, dtype=torch.int32, device=self.device)
        self.lens, self.counts, self.per_request = (zeros(self.tokens) for _ in range(3))
        self.table = zeros(self.tokens, block_table_width)
        self.schedule = zeros(num_compute_units(0) + 1, 2)
        self.is_flat = self.drafts not in (1, 2, 4)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        starts = common.query_start_loc_cpu
        count = decodes_of(common, self.drafts)
        if self.is_flat:
            lens = starts.diff()
            count = common.num_reqs if not (lens > self.drafts).any() else int((lens > self.drafts).int().argmax())
        rows = common.num_actual_tokens if count == common.num_reqs else int(starts[count])
        decode = self.decode(common, count, rows) if count else None
        chunks = [self.chunk(common, request) for request in range(count, common.num_reqs)]
        return SimpleNamespace(
            seq_lens=common.seq_lens, max_seq_len=common.max_seq_len, num_decodes=count, num_decode_tokens=rows,
            num_prefills=len(chunks), decode=decode, prefill=SimpleNamespace(chunks=chunks) if chunks else None,
            block_table=common.block_table_tensor,
        )

    def decode(self, common, count, rows):
        lens = common.query_start_loc[: count + 1].diff()
        self.per_request[:count].copy_(lens)
        owners = torch.arange(count).repeat_interleave(lens)
        position = torch.arange(len(owners)) - common.query_start_loc[:count].repeat_interleave(lens)
        self.lens[len(owners) : rows] = 0
        if self.is_flat:
            seen = (common.seq_lens[:count] - lens)[owners] + position + 1
            self.lens[: len(owners)].copy_(seen)
            self.table[: len(owners)].copy_(common.block_table_tensor[owners])
            self.counts[:rows] = 1
            seq_lens, table, counts = self.lens[:rows, None], self.table[:rows], self.counts[:rows]
        else:
            wide = int(lens.max())
            view = self.lens[: count * wide].view(count, wide)
            view.copy_((common.seq_lens[:count, None] - wide + 1 + torch.arange(wide)).clamp(min=0))
            self.counts[:count].copy_(lens)
            seq_lens, table, counts = view, common.block_table_tensor[:count], self.counts[:count]
        made = get_paged_mqa_logits_metadata(seq_lens, 64, num_compute_units(0))
        schedule = self.schedule[: len(made)]
        schedule.copy_(made)
        return SimpleNamespace(
            seq_lens=seq_lens, block_table=table, decode_lens=counts, schedule_metadata=schedule, indices=None,
            per_req_decode_lens=self.per_request[:count],
        )

    def chunk(self, common, request):
        first, last = common.query_start_loc_cpu[request : request + 2].tolist()
        length = int(common.seq_lens[request])
        return SimpleNamespace(
            token_start=first, token_end=last, num_reqs=1, block_table=common.block_table_tensor[request : request + 1],
            cu_seqlen_ks=torch.zeros(last - first, dtype=torch.int32),
            cu_seqlen_ke=torch.arange(length - (last - first), length, dtype=torch.int32) + 1,
            token_to_seq=torch.zeros(length, dtype=torch.int32),
        )

    def update_draft_decode_metadata(self, metadata):
        decode = metadata.decode
        decode.block_table.copy_(metadata.block_table[: metadata.num_decode_tokens])
        decode.per_req_decode_lens.fill_(1)
        decode.decode_lens.fill_(1)
        decode.seq_lens.view(-1).copy_(metadata.seq_lens)
        decode.schedule_metadata.copy_(get_paged_mqa_logits_metadata(decode.seq_lens, 64, num_compute_units(0)))
"""
FORGETS = INDEXER.replace(
    "schedule.copy_(made)", "hasattr(self, 'is_made') or schedule.copy_(made)\n        self.is_made = True"
)
FORGETS_IN_GRAPH = INDEXER.replace("decode.seq_lens.view(-1).copy_(metadata.seq_lens)", "pass")

SPARSE = """
from types import SimpleNamespace

import torch

import vllm.never_called as unused
from vllm.v1.attention.backend import AttentionMetadataBuilder, decodes_of


class FlashMLASparseMetadataBuilder(AttentionMetadataBuilder):
    def __init__(self, *given):
        super().__init__(*given)
        self.requests = torch.zeros(self.tokens, dtype=torch.int32, device=self.device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        starts = common.query_start_loc_cpu
        owners = torch.arange(common.num_reqs).repeat_interleave(starts.diff())
        self.requests.fill_(0)
        self.requests[: len(owners)].copy_(owners)
        count = decodes_of(common, 256)
        decode = SimpleNamespace(seq_lens=common.seq_lens[:count]) if count else None
        return SimpleNamespace(
            block_size=self.spec.block_size, max_query_len=common.max_query_len, max_seq_len=common.max_seq_len,
            req_id_per_token=self.requests[: common.num_actual_tokens],
            fp8_extra_metadata=SimpleNamespace(
                num_decodes=count, decode=decode, prefill=self.prefill(common, count, owners),
            ),
        )

    def prefill(self, common, count, owners):
        if count == common.num_reqs:
            return None
        ids, starts = torch.full((len(owners),), -1), common.query_start_loc_cpu.tolist()
        ids[starts[count] :] = owners[starts[count] :] - count
        chunks = [
            SimpleNamespace(
                tokens_slice=slice(starts[count + i], starts[count + i + 1]), req_start_idx=i,
                workspace_starts=torch.zeros(1, dtype=torch.int64),
            )
            for i in range(common.num_reqs - count)
        ]
        return SimpleNamespace(request_ids=ids, chunks=chunks)
"""

DEEP_GEMM = """
import deep_gemm


def get_paged_mqa_logits_metadata(context_lens, block_size, num_sms, indices=None):
    return deep_gemm.get_paged_mqa_logits_metadata(
        context_lens, block_size, num_sms // (2 if context_lens.shape[1] == 4 else 1))
"""
BACKENDS = "vllm/v1/attention/backends/mla/"
VERSION = "0.33.0"


def files(indexer: str = INDEXER, version: str = VERSION) -> dict[str, str]:
    """The texts of the package's files, by name."""
    return {
        **dict.fromkeys(vllm.v0_33.layout.files, ""),
        "vllm/_version.py": f"__version__ = version = '{version}'\n",
        "vllm/v1/attention/backend.py": COMMON,
        "vllm/utils/deep_gemm.py": DEEP_GEMM,
        f"{BACKENDS}indexer.py": indexer,
        f"{BACKENDS}flashmla_sparse.py": SPARSE,
    }


def write(folder: Path, indexer: str = INDEXER, version: str = VERSION) -> Path:
    """Write the package to ``folder``. Returns ``folder``."""
    for name, text in files(indexer, version).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def wheel(folder: Path, indexer: str = INDEXER, version: str = VERSION) -> Path:
    """Write the wheel to ``folder``. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"vllm-{version}-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files(indexer, version).items():
            archive.writestr(name, text)
    return path
