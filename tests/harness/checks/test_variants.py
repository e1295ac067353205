"""Which variants of kernels are counted, and when their number follows the lengths."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from nsa_oracle.harness.checks.variants import FRESH, WARM_UP, VariantCounter, VariantGrowth
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.reference.types import ForwardMode

DECODE, EXTEND = ForwardMode.DECODE, ForwardMode.EXTEND
ODD = [131 + 2 * i for i in range(WARM_UP + FRESH)]  # between two powers of two, of no multiple of 16


def batch(*lengths: int, mode: ForwardMode = DECODE) -> Batch:
    return Batch(mode, (0,) * len(lengths), lengths, lengths, (1,) * len(lengths))


def grown(lengths: Sequence[int], variants: Sequence[Sequence[int]], **launches: Any) -> Any:
    """The finding after calls of one request each, with the handles that each used."""
    growth = VariantGrowth()
    for length, handles in zip(lengths, variants, strict=True):
        growth.note_eager(batch(length), {"copy": frozenset(handles)} if handles else {})
    return growth.finding()


class Chain:
    """A chain of hooks, as Triton has it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def add(self, call: Any) -> None:
        self.calls.append(call)

    def remove(self, call: Any) -> None:
        self.calls.remove(call)

    def launch(self, **data: Any) -> None:
        for call in self.calls:
            call(SimpleNamespace(data=data))


class TestCounter:
    @pytest.fixture
    def chain(self, monkeypatch: pytest.MonkeyPatch) -> Chain:
        chain = Chain()
        knobs = SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=chain))
        monkeypatch.setitem(__import__("sys").modules, "triton.knobs", knobs)
        return chain

    def test_counts_while_counting(self, chain: Chain) -> None:
        counter = VariantCounter()
        with counter.counting():
            for handle in (1, 2, 1):
                chain.launch(name="copy", function=handle)
            chain.launch(name="fill", function=3)
            assert counter.take() == {"copy": {1, 2}, "fill": {3}}
            assert counter.take() == {}
        assert chain.calls == []

    def test_launch_that_does_not_say_what_it_is(self, chain: Chain) -> None:
        counter = VariantCounter()
        with counter.counting():
            chain.launch(stream=0)
        assert counter.take() == {}

    def test_version_without_a_chain(self, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(__import__("sys").modules["triton.knobs"].runtime, "launch_enter_hook", None)
        with VariantCounter().counting():
            pass

    def test_triton_of_this_environment_has_the_chain(self) -> None:
        from triton import knobs

        counter = VariantCounter()
        with counter.counting():
            knobs.runtime.launch_enter_hook(SimpleNamespace(data={"name": "copy", "function": 5}))
        assert counter.take() == {"copy": {5}}
        assert counter._note not in knobs.runtime.launch_enter_hook.calls


class TestGrowth:
    def test_a_variant_for_each_length(self) -> None:
        finding = grown(ODD, [[n] for n in ODD])
        assert (finding.kind, finding.field) == (Kind.VARIANTS, "copy")
        assert "8 calls" in finding.got

    def test_one_variant_for_all(self) -> None:
        assert grown(ODD, [[1]] * len(ODD)) is None

    def test_new_variants_beside_an_old_one_grow_too(self) -> None:
        assert grown(ODD, [[0, n] for n in ODD]) is not None

    def test_too_few_calls(self) -> None:
        assert grown(ODD[:-1], [[n] for n in ODD[:-1]]) is None

    def test_one_call_that_needed_nothing_new(self) -> None:
        variants = [[n] for n in ODD]
        variants[5] = variants[4]
        assert grown(ODD, variants) is None

    def test_a_kernel_that_sits_out_a_call(self) -> None:
        variants = [[n] for n in ODD]
        for sits_out in (5, len(ODD) - 1):
            assert grown(ODD, [*variants[:sits_out], [], *variants[sits_out + 1 :]]) is None

    @pytest.mark.parametrize(
        "lengths",
        [[2**i for i in range(WARM_UP + FRESH)], [16 * (1 + i) for i in range(WARM_UP + FRESH)], [7] * 20],
        ids=["powers of two", "multiples of 16 over several powers", "the same again"],
    )
    def test_sizes_that_may_select_code(self, lengths: list[int]) -> None:
        """A tile rounded up to a power of two is compiled anew for each of these, and rightly."""
        assert grown(lengths, [[n] for n in range(len(lengths))]) is None

    def test_variants_that_other_calls_have_used(self) -> None:
        growth = VariantGrowth()
        growth.note({"copy": frozenset(ODD[WARM_UP + 1 : WARM_UP + 2])})
        for length in ODD:
            growth.note_eager(batch(length), {"copy": frozenset({length})})
        assert growth.finding() is None

    def test_batch_sizes_and_modes_are_kinds_of_their_own(self) -> None:
        growth = VariantGrowth()
        for number, length in enumerate(ODD):
            kind = (batch(length), batch(length, length), batch(length, mode=EXTEND))[number % 3]
            growth.note_eager(kind, {"copy": frozenset({number})})
        assert growth.finding() is None
