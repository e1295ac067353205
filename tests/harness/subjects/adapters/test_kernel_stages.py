"""Published kernels as stages of a layer, behind packages that compute with ours in their place."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_oracle.harness.compiled.launcher import left_to_the_interpreter
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.subjects.adapters import deep_gemm, flash_mla, sglang_kernels
from nsa_oracle.optimized import attention, indexer
from nsa_oracle.reference.types import AttentionConfig, KVCacheDtype
from tests.support.layer_cases import lattice, replay_of_two
from tests.support.surveys import broken, surveyed

INDEX = {**lattice(), "index_n_heads": 64, "index_head_dim": 128}


def fake_deep_gemm() -> SimpleNamespace:
    """DeepGEMM's two functions, as it documents them: cells behind a row's length hold anything."""

    def logits(
        q: torch.Tensor, cache: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor,
        schedule: torch.Tensor, width: int, *, clean_logits: bool,
    ) -> torch.Tensor:  # fmt: skip
        assert q.shape[1:] == (1, 64, 128)
        assert cache.shape[1:] == (64, 1, 132)
        assert lengths.shape == (len(q), 1)
        assert not clean_logits, "it cleans only where lengths have one dimension"
        assert schedule.shape == (len(q), 64)
        config = AttentionConfig(index_n_heads=64, index_head_dim=128)
        found = indexer.indexer_logits(config, q[:, 0], weights, cache.flatten(1), table, lengths[:, 0], width)
        return found.masked_fill(found == -torch.inf, 7)

    def schedule(lengths: torch.Tensor, page_size: int, multiprocessors: int) -> torch.Tensor:
        return lengths.new_empty(len(lengths), page_size)

    return SimpleNamespace(fp8_paged_mqa_logits=logits, get_paged_mqa_logits_metadata=schedule)


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        found = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


def test_logits_of_deep_gemm_are_cleaned_and_judged(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_deep_gemm())
    records = surveyed(deep_gemm.PagedLogits, device, replay_of_two(layer=INDEX, page_size=64), monkeypatch)
    assert broken(records) == set()
    assert records["lattice content: as the reference"].checked
    wrong = fake_deep_gemm()
    right = wrong.fp8_paged_mqa_logits
    wrong.fp8_paged_mqa_logits = lambda *given, **named: right(*given, **named).roll(1, 1)
    monkeypatch.setitem(sys.modules, "deep_gemm", wrong)
    records = surveyed(deep_gemm.PagedLogits, device, replay_of_two(layer=INDEX, page_size=64), monkeypatch)
    assert broken(records) == {"lattice content: as the reference"}


def fake_flash_mla(factor: float = 1) -> SimpleNamespace:
    """FlashMLA's functions for Hopper, with the lse of a row without a key that it gives. factor: of out."""

    def attend(
        q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor, scale: float, kind: KVCacheDtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = AttentionConfig(num_heads=q.shape[1], kv_cache_dtype=kind, sm_scale=scale)
        out, lse = attention.sparse_mla(config, q, cache, indices[:, 0])
        return out * factor, lse.masked_fill(lse == -torch.inf, torch.inf)

    def prefill(
        q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor, scale: float, rank: int, *, use_legacy: bool
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        assert use_legacy
        assert rank == 512
        out, lse = attend(q, cache, indices, scale, KVCacheDtype.BF16)
        return out, None, lse

    def decode(
        q: torch.Tensor, pages: torch.Tensor, table: None, lengths: None, rank: int, schedule: str, *,
        softmax_scale: float, indices: torch.Tensor, use_legacy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        assert (schedule, use_legacy) == ("to be made", True)
        assert pages.shape[1:] == (64, 1, 656)
        cache = pages.view(torch.uint8).view(-1, 1, 656)
        out, lse = attend(q[:, 0], cache, indices, softmax_scale, KVCacheDtype.FP8)
        return out[:, None], lse[:, :, None]

    return SimpleNamespace(
        flash_mla_sparse_fwd=prefill, flash_mla_with_kvcache=decode, get_mla_metadata=lambda: ("to be made", None)
    )


@pytest.mark.parametrize(
    ("layer", "kind"), [(flash_mla.Prefill, KVCacheDtype.BF16), (flash_mla.Decode, KVCacheDtype.FP8)]
)
def test_attention_of_flash_mla_is_judged(
    layer: Any, kind: KVCacheDtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {**lattice(kind), "num_heads": 3, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    monkeypatch.setitem(sys.modules, "flash_mla", fake_flash_mla())
    case = replay_of_two(layer=sizes, page_size=64)
    assert broken(surveyed(layer, device, case, monkeypatch)) == set()
    monkeypatch.setitem(sys.modules, "flash_mla", fake_flash_mla(factor=2))
    assert broken(surveyed(layer, device, case, monkeypatch)) == {"lattice content: as the reference"}


def test_a_row_without_a_key_has_the_lse_of_the_contract(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_mla", fake_flash_mla())
    config = AttentionConfig(num_heads=3, kv_cache_dtype=KVCacheDtype.BF16)
    layer = flash_mla.Prefill(replay_of_two().setup.backend_config, config)
    nothing = torch.full((2, 8), -1, dtype=torch.int32, device=device)
    q, cache = (
        torch.ones(size, 3, 576, dtype=torch.bfloat16, device=device)[:, :heads] for size, heads in ((2, 3), (5, 1))
    )
    assert layer.sparse_mla(q, cache, nothing)[1].tolist() == [[-torch.inf] * 3] * 2


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, load in (("deep_gemm", deep_gemm.deep_gemm), ("flash_mla", flash_mla.flash_mla)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(BackendError, match=rf"^{name} cannot be imported: .*; install sgl-"):
            load()


LOOKUP = """
import torch, triton
import triton.language as tl

@triton.jit
def lookup(table, positions, out, stride, K: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, K)
    position = tl.load(positions + row * K + column)
    slot = tl.load(table + row * stride + position, mask=position >= 0, other=-1)
    tl.store(out + row * K + column, slot{fault})

def transform_index_page_table_decode(page_table, topk_indices):
    assert page_table.is_cuda, "asserted on a GPU only"
    out = torch.empty_like(topk_indices)
    lookup[(len(out),)](page_table, topk_indices, out, page_table.stride(0), topk_indices.shape[1])
    return out
"""
DECODE = """
import torch
from sglang.kernels.ops.attention.metadata import anything

def triton_sparse_mla_decode(q_nope, q_rope, kv, indices, scale, rank):
    assert torch.cuda.current_device() == 0 and torch.cuda.get_device_capability() == (9, 0)
    q, out = torch.cat([q_nope, q_rope], -1).double(), torch.zeros_like(q_nope)
    live = indices[:, 0] >= 0
    for row, slots in enumerate(indices[:, 0]):
        keys = torch.where(live[row][:, None], kv[slots.clamp(min=0).long(), 0].double(), 0)
        scores = (q[row] @ keys.T * scale).masked_fill(~live[row], -torch.inf)
        out[row] = scores.softmax(-1).nan_to_num(0) @ keys[:, :rank]
    return out[None]
"""


@pytest.fixture
def kernels_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a wheel of SGLang that has these kernels, and unloads it behind the test."""

    def write(fault: str = "") -> None:
        attention_of = tmp_path / "sglang/kernels/ops/attention"
        (attention_of / "dsa").mkdir(parents=True)
        (tmp_path / "sglang/_version.py").write_text("__version__ = '0.5.23'")
        (attention_of / "metadata.py").write_text("anything = None")
        (attention_of / "dsa/transform_index.py").write_text(LOOKUP.replace("{fault}", fault))
        (attention_of / "dsa/triton_sparse_mla_decode.py").write_text(DECODE)
        monkeypatch.setenv("NSA_ORACLE_SGLANG", str(tmp_path))

    before = list(sys.meta_path)
    yield write
    sys.meta_path[:] = before
    sglang_kernels.PUBLISHED._hook = None
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        del sys.modules[name]


@pytest.mark.parametrize("fault", ["", " + (column == 2).to(tl.int32)"])
def test_a_lookup_of_sglang_is_judged(
    kernels_of: Any, fault: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels_of(fault)
    records = surveyed(sglang_kernels.TransformIndex, device, replay_of_two(layer=lattice()), monkeypatch)
    wrong = {name for name in broken(records) if not name.startswith("made-up logits: ")}
    assert wrong == ({"lattice content: as the reference"} if fault else set())
    assert "lookup" not in left_to_the_interpreter()


def test_attention_of_sglang_is_judged_as_on_a_gpu(
    kernels_of: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels_of()
    before = torch.cuda.current_device
    case = replay_of_two(layer=lattice())
    assert broken(surveyed(sglang_kernels.TritonDecode, device, case, monkeypatch)) == set()
    assert torch.cuda.current_device is before


def test_rows_lie_apart_as_kernels_want_them() -> None:
    rows = sglang_kernels.padded_rows(torch.arange(15.0).view(3, 5), 4)
    assert rows.tolist() == torch.arange(15.0).view(3, 5).tolist()
    assert rows.stride() == (8, 1)
