"""A miniature of SGLang's package with the layout, names and habits of one version, in which nothing else is theirs.

``write`` makes the folder of an unpacked wheel, ``wheel`` the wheel. Its backend computes with the reference, under
SGLang's names; like the real ones it fails at whatever it would be given wrongly, and its multi-step backend forgets
the schedule.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from nsa_oracle.harness.subjects.adapters import sglang
from tests.support import miniature_dsa

OLDER = """
from types import SimpleNamespace

import torch


from nsa_oracle.reference import metadata as reference
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, SpecInfo
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.nsa.utils import TOPK_IS_THEIRS
from sglang.srt.model_executor.forward_batch_info import ForwardMode as Mode
from sglang.srt.utils import is_cuda
from sgl_kernel.flash_mla import get_mla_metadata
import deep_gemm
import sglang.srt.layers.something_never_called as unused

assert is_cuda() and TOPK_IS_THEIRS


class Metadata:
    def __init__(self, found):
        vars(self).update(vars(found))
        self.nsa_seqlens_expanded = found.seqlens_expanded
        self.flashmla_metadata = None
        del self.seqlens_expanded


class NativeSparseAttnBackend(AttentionBackend):
    def __init__(self, model_runner, skip_prefill=False, speculative_step_id=0, topk=0, speculative_num_steps=0):
        assert topk == 1 and torch.cuda.get_device_capability() == (9, 0)
        self.pool = model_runner.req_to_token_pool.req_to_token
        self.config = BackendConfig(
            model_runner.page_size, model_runner.model_config.context_len, self.topk_of(), speculative_num_steps,
            model_runner.server_args.speculative_num_draft_tokens, paged_mqa_num_sms=deep_gemm.get_num_sms(),
        )
        self.flashmla = model_runner.server_args.nsa_decode_backend == "flashmla_kv"
        self.captured = {}

    def topk_of(self):
        from sglang.srt.configs.model_config import get_nsa_index_topk
        return get_nsa_index_topk(None)

    def compute(self, mode, bs, rows, lens, info, in_graph, prefix=None, new=None):
        batch = ForwardBatch(ForwardMode[mode.name], bs, rows[:bs], lens[:bs], spec_info=info,
                             extend_seq_lens=new, extend_prefix_lens=prefix)
        found = reference.compute_metadata(self.config, self.pool, batch, 0, in_graph)
        made = Metadata(found)
        rows = len(found.seqlens_expanded)
        made.live = int(info.accept_length.sum()) if mode.is_draft_extend() else rows
        if mode.is_draft_extend(include_v2=True):  # not clamped at 0
            drafts = self.config.speculative_num_draft_tokens
            counts = [drafts] * bs if mode.is_draft_extend_v2() else info.accept_length.tolist()
            expanded = [torch.arange(n - c + 1, n + 1) for n, c in zip(lens[:bs].tolist(), counts, strict=True)]
            made.nsa_seqlens_expanded[:made.live] = torch.cat(expanded)
            made.nsa_cache_seqlens_int32[:] = made.nsa_seqlens_expanded.clamp(max=self.config.index_topk)
            made.nsa_cu_seqlens_k[1:] = made.nsa_cache_seqlens_int32.cumsum(0)
        lengths = made.nsa_seqlens_expanded[:made.live]
        if mode.is_extend_without_speculative():
            made.indexer_seq_lens_cpu = lens.cpu()
        if mode.is_draft_extend_v2():
            made.paged_mqa_schedule_metadata = None
        elif not mode.is_extend_without_speculative():
            made.paged_mqa_schedule_metadata = deep_gemm.get_paged_mqa_logits_metadata(
                lengths, 64, deep_gemm.get_num_sms())
        if self.flashmla:
            table, splits = get_mla_metadata(cache_seqlens=made.nsa_cache_seqlens_int32[:made.live])
            splits = torch.nn.functional.pad(splits, (0, rows - made.live))
            made.flashmla_metadata = SimpleNamespace(flashmla_metadata=table, num_splits=splits)
        return made

    def init_forward_metadata(self, batch):
        assert batch.seq_lens_cpu.tolist() == batch.seq_lens.tolist() and batch.batch_size
        batch.using_mha_one_shot_fp8_dequant = False
        info = None
        if batch.forward_mode.is_draft_extend(include_v2=True):
            assert batch.extend_num_tokens == sum(batch.extend_seq_lens_cpu) == len(batch.positions)
            info = SpecInfo(batch.extend_seq_lens)
        self.forward_metadata = self.compute(
            batch.forward_mode, batch.batch_size, batch.req_pool_indices, batch.seq_lens, info, False,
            batch.extend_prefix_lens, batch.extend_seq_lens,
        )

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        self.captured = {}

    def init_forward_metadata_capture_cuda_graph(self, bs, num_tokens, rows, lens, encoder_lens, mode, info):
        if info is not None:
            info = SpecInfo(info.accept_length)
        self.captured[bs] = self.compute(mode, bs, rows, lens, info, True)
        self.forward_metadata = self.captured[bs]

    def init_forward_metadata_replay_cuda_graph(
        self, bs, rows, lens, lens_sum, encoder_lens, mode, info, lens_cpu, out_cache_loc=None, stale=False
    ):
        assert lens_cpu.tolist() == lens.tolist()
        if info is not None:
            info = SpecInfo(info.accept_length)
        fresh, mine = self.compute(mode, bs, rows, lens, info, True), self.captured[bs]
        ends = {"nsa_seqlens_expanded": fresh.live, "nsa_cache_seqlens_int32": fresh.live,
                "nsa_cu_seqlens_k": fresh.live + 1}
        for name, value in vars(mine).items():
            if isinstance(value, torch.Tensor) and not (stale and name == "paged_mqa_schedule_metadata"):
                value[:ends.get(name)].copy_(getattr(fresh, name)[:ends.get(name)])
        if mine.flashmla_metadata is not None:
            for name in ("flashmla_metadata", "num_splits"):
                getattr(mine.flashmla_metadata, name).copy_(getattr(fresh.flashmla_metadata, name))
        self.forward_metadata = mine


class NativeSparseAttnMultiStepBackend:
    def __init__(self, model_runner, topk, speculative_num_steps):
        self.attn_backends = [
            NativeSparseAttnBackend(model_runner, False, i, topk, speculative_num_steps)
            for i in range(speculative_num_steps)
        ]

    def init_forward_metadata(self, batch):
        for step in self.attn_backends[:-1]:
            step.init_forward_metadata(batch)

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        for step in self.attn_backends:
            step.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_capture_cuda_graph(self, batch):
        for step in self.attn_backends:
            step.init_forward_metadata_capture_cuda_graph(
                batch.batch_size, batch.batch_size, batch.req_pool_indices, batch.seq_lens, None, Mode.DECODE, None)

    def init_forward_metadata_replay_cuda_graph(self, batch, bs):
        for step in self.attn_backends:
            step.init_forward_metadata_replay_cuda_graph(
                bs, batch.req_pool_indices, batch.seq_lens, batch.seq_lens_sum, None, Mode.DECODE, None,
                batch.seq_lens_cpu, stale=True)
"""

BACKEND = "sglang/srt/layers/attention/nsa_backend.py"
FILES = {
    "sglang/__init__.py": "raise RuntimeError('the package itself is not run')\n",
    "sglang/srt/environ.py": "",
    BACKEND: OLDER,
    "sglang/srt/layers/attention/nsa/utils.py": "TOPK_IS_THEIRS = True\n",
    "sglang/srt/layers/attention/nsa/nsa_backend_mtp_precompute.py": "",
}


MENDED = OLDER.replace("stale=True", "stale=False")


def mended(version: str) -> dict[str, str]:
    """The files of a version that refreshes its schedule, so that nothing but a declaration can break a run."""
    if version == "0.5.8":
        return {**FILES, BACKEND: MENDED}
    needed = sglang.PUBLISHED.adapters[version].layout.files
    return {**dict.fromkeys(needed, ""), miniature_dsa.BACKEND: miniature_dsa.MENDED}


def write(folder: Path, version: str = "0.5.8", files: Mapping[str, str] = FILES) -> Path:
    """Write the package to ``folder``. Returns ``folder``."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "sglang" / "_version.py").write_text(f"version: str\n__version__ = version = '{version}'\n")
    return folder


def wheel(folder: Path, version: str = "0.5.8", changed: Mapping[str, str | None] = {}) -> Path:
    """Write the wheel to ``folder``. changed: texts of other files; None leaves one out. Returns its path."""
    info = f"sglang-{version}.dist-info"
    files: dict[str, str | None] = {
        **FILES,
        "sglang/_version.py": f"__version__ = version = '{version}'\n",
        "sglang/never_needed.py": "raise RuntimeError('not run')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
        **changed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sglang-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            if text is not None:
                archive.writestr(name, text)
    return path
