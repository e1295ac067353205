"""Mutations change what runs, kernels and what is inlined into them included, and leave nothing behind."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest
import torch

from nsa_oracle import optimized
from nsa_oracle.harness.bugs.mutate import Mutation, MutationError, mutated
from nsa_oracle.optimized import attention, indexer, kv_cache, topk
from nsa_oracle.optimized.kernels import fp8
from nsa_oracle.optimized.layer import SparseAttention
from nsa_oracle.reference.types import AttentionConfig, BackendConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BEST_OF_THREE = [1, 2]  # of 0, 1, 2

WIDER_LANES = Mutation("nsa_oracle.optimized.kv_cache:lanes", "1 <<", "2 <<")
FIRST_TWO = Mutation("nsa_oracle.optimized.kernels.topk:topk_kernel", "if length <= k:", "if length <= k + 1:")
WORST = Mutation("nsa_oracle.optimized.kernels.topk:score", "(logits,", "(-logits,")
ABSENT = Mutation("nsa_oracle.optimized.kv_cache:lanes", "no such text", "")
AMBIGUOUS = Mutation("nsa_oracle.optimized.kv_cache:lanes", "int", "float")


def selected() -> list[int]:
    """The two best of three scores."""
    logits = torch.arange(3, dtype=torch.float32, device=DEVICE)[None]
    length = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    found: list[int] = topk.topk_indices(logits, length, 2)[0].tolist()
    return found


def contents() -> dict[tuple[str, str], object]:
    """Every attribute of every module of ``optimized/``, and the kernel of each launcher."""
    modules = {name: module for name, module in sys.modules.items() if f"{name}.".startswith("nsa_oracle.optimized.")}
    found = {(name, attribute): value for name, module in modules.items() for attribute, value in vars(module).items()}
    kernels = {(*key, "kernel"): vars(value)["kernel"] for key, value in found.items() if hasattr(value, "_compiled")}
    return {**found, **kernels}


@pytest.fixture(autouse=True)
def _all_is_put_back() -> Iterator[None]:
    # Triton adds names of its own to the modules of kernels that it interprets, at their first launch.
    assert selected() == BEST_OF_THREE
    before, methods = contents(), dict(vars(SparseAttention))
    yield
    after = contents()
    assert [key for key, value in before.items() if after.get(key) is not value] == []
    assert dict(vars(SparseAttention)) == methods
    assert selected() == BEST_OF_THREE


def test_a_function_wherever_it_was_imported() -> None:
    with mutated(WIDER_LANES):
        assert kv_cache.lanes(5) == 16
        assert indexer.lanes(5) == 16
    assert kv_cache.lanes(5) == 8
    assert indexer.lanes is kv_cache.lanes


def test_a_kernel() -> None:
    with mutated(FIRST_TWO):
        assert selected() == [0, 1]


def test_a_device_function_inlined_into_one_that_is_inlined_into_a_kernel() -> None:
    with mutated(WORST):
        assert selected() == [0, 1]


def test_a_method() -> None:
    layer = SparseAttention(BackendConfig(1, 4, 2, 1, 1), AttentionConfig())
    logits, length = torch.zeros(1, 3, device=DEVICE), torch.tensor([3], device=DEVICE)
    method = Mutation("nsa_oracle.optimized.layer:SparseAttention.topk_indices", "self.config.index_topk", "1")
    with mutated(method):
        assert layer.topk_indices(logits, length).shape == (1, 1)
        assert not hasattr(sys.modules["nsa_oracle.optimized.layer"], "topk_indices")
    assert layer.topk_indices(logits, length).shape == (1, 2)


def test_a_cached_function_forgets_what_it_knew() -> None:
    programs = Mutation("nsa_oracle.optimized.attention:_multiprocessors", "return 8", "return 9")
    before = attention._multiprocessors(torch.device("cpu"))
    with mutated(programs):
        assert attention._multiprocessors(torch.device("cpu")) == 9
    assert attention._multiprocessors(torch.device("cpu")) == before == 8


def test_no_launcher_keeps_what_was_compiled_of_the_other_tree() -> None:
    launcher = topk._topk
    assert launcher._compiled
    with mutated(FIRST_TWO):
        assert not launcher._compiled
        selected()
        assert launcher._compiled
    assert not launcher._compiled


def test_two_of_one_function() -> None:
    with mutated(WIDER_LANES, Mutation("nsa_oracle.optimized.kv_cache:lanes", "(size - 1)", "size")):
        assert kv_cache.lanes(8) == 32
    assert kv_cache.lanes(8) == 8


def test_nested() -> None:
    with mutated(FIRST_TWO):
        with mutated(WORST, Mutation(FIRST_TWO.target, "length <= k + 1", "length <= k - 2")):
            assert selected() == [0, 1]
            with mutated(Mutation(WORST.target, "(-logits,", "(logits,")):
                assert selected() == [1, 2]
        assert selected() == [0, 1]


@pytest.mark.parametrize(("refused", "count"), [(ABSENT, 0), (AMBIGUOUS, 2)])
def test_a_text_that_does_not_occur_once_is_refused(refused: Mutation, count: int) -> None:
    with (
        pytest.raises(MutationError, match=f"nsa_oracle.optimized.kv_cache:lanes: .* occurs {count} times"),
        mutated(refused),
    ):
        pass


def test_nothing_is_changed_if_one_of_several_is_refused() -> None:
    before = kv_cache.lanes
    with pytest.raises(MutationError), mutated(WIDER_LANES, ABSENT):
        pass
    assert kv_cache.lanes is before


def test_put_back_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), mutated(WIDER_LANES):
        raise ZeroDivisionError
    assert kv_cache.lanes(5) == 8


def test_a_module_imported_later_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "nsa_oracle.optimized.kernels.kv_cache"
    monkeypatch.setattr(optimized.kernels, "kv_cache", sys.modules[name])  # to be put back
    monkeypatch.delitem(sys.modules, name)
    with mutated(Mutation("nsa_oracle.optimized.kernels.fp8:to_e4m3_bits", "& 0x80", "& 0x00")):
        assert importlib.import_module(name).to_e4m3_bits is fp8.to_e4m3_bits
    assert importlib.import_module(name).to_e4m3_bits is fp8.to_e4m3_bits
