"""No verdict depends on whether products and sums are contracted to fused multiply-adds."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from nsa_oracle.harness.compiled import building
from nsa_oracle.harness.compiled.launcher import CompiledKernel
from nsa_oracle.harness.judge import judge
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.subjects.default import optimized_backend
from tests.support.project import PROJECT

CASES = (
    "layer-relations-on-ordinary-data",
    "layer-two-speculative-cycles",
    "layer-rows-of-many-shares",
    "layer-sixteen-heads-in-chunks",
    "layer-padding-of-slot-minus-one",
)


@pytest.fixture
def contracted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C compiler contracts what it can, as ptxas does by default."""
    if not building._processor_flags():
        pytest.skip("this processor has no fused multiply-add")
    flags = ["-ffp-contract=fast" if flag.startswith("-ffp-contract") else flag for flag in building.FLAGS]
    assert flags != list(building.FLAGS)
    monkeypatch.setattr(building, "FLAGS", ("-O2", *flags[1:]))  # -Og contracts nothing
    # What is compiled already is compiled anew, and again after this.
    monkeypatch.setattr(CompiledKernel, "launch", _afresh(CompiledKernel.launch))


def _afresh(launch: object) -> object:
    seen: dict[int, dict[object, object]] = {}

    def launched(kernel: CompiledKernel, executor: object, args: tuple[object, ...], kwargs: object) -> None:
        kept, kernel._variants = kernel._variants, seen.setdefault(id(kernel), {})  # type: ignore[assignment]
        try:
            launch(kernel, executor, args, kwargs)  # type: ignore[operator]
        finally:
            kernel._variants = kept

    return launched


@triton.jit
def product_and_sum_kernel(x: tl.tensor, y: tl.tensor, z: tl.tensor, target: tl.tensor) -> None:
    tl.store(target, tl.load(x) * tl.load(y) + tl.load(z))


def contracts() -> bool:
    """Whether x * y + z is rounded once: x * y is 1 + 2^-12 + 2^-26, which float32 rounds to -z."""
    x, y, z, target = (torch.full((1,), value) for value in (1 + 2**-13, 1 + 2**-13, -1 - 2**-12, 0.0))
    product_and_sum_kernel[(1,)](x, y, z, target)
    return target.item() != 0.0


def test_products_and_sums_are_rounded_one_by_one(all_are_compiled: None) -> None:
    assert not contracts()


@pytest.mark.parametrize("case", CASES)
def test_verdicts_are_the_same_if_they_are_contracted(case: str, contracted: None, all_are_compiled: None) -> None:
    assert contracts()
    scenario = load(PROJECT / "tests" / "cases" / f"{case}.json")
    assert judge(scenario, optimized_backend, torch.device("cpu")).cases == 1
