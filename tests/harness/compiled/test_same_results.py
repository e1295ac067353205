"""Every launch of optimized/ in some saved cases writes the same bits as C and in the interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from triton.runtime import interpreter

from nsa_oracle.harness.graphs.operators import tensors_in
from nsa_oracle.harness.judge import judge
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.subjects.default import optimized_backend
from tests.support.project import PROJECT

MOST_BYTES = 1 << 26  # a storage that is larger is address space
CASES = {  # exact content, so that the order of sums does not matter; with a kernel that the case launches
    "layer-several-chunks-of-keys": "sparse_mla_combine_kernel",
    "layer-rows-of-many-shares": "topk_filter_kernel",
    "layer-sixteen-heads-in-chunks": "indexer_logits_kernel",
    "prefill-into-every-step-in-one-copy": "copy_steps_kernel",
    "schedules-of-advancing-steps-from-parts": "flashmla_schedule_kernel",
    "same-batch-on-other-pages": "fill_metadata_kernel",
}


def same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the bits are equal, but for those of a NaN."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    equal = one.view(bits) == other.view(bits)
    if one.is_floating_point():
        equal |= torch.isnan(one.float()) & torch.isnan(other.float())
    return bool(equal.all())


class BothWays:
    """Runs each launch twice, from the same memory, and counts launches by kernel."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.compiled, self.interpreted = call, call.__wrapped__  # type: ignore[attr-defined]
        self.launches: Counter[str] = Counter()

    def launch(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        tensors = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors_in((args, kwargs))}
        memory = [whole(tensor) for tensor in tensors.values() if tensor.untyped_storage().nbytes() <= MOST_BYTES]
        before = [tensor.clone() for tensor in memory]
        self.compiled(executor, *args, **kwargs)
        results = [tensor.clone() for tensor in memory]
        for tensor, content in zip(memory, before, strict=True):
            tensor.copy_(content)
        self.interpreted(executor, *args, **kwargs)
        name = executor.fn.__name__
        assert all(map(same_numbers, memory, results)), name
        self.launches[name] += 1


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of the tensor's memory, as numbers of its type."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.element_size(),))


@pytest.mark.parametrize(("case", "kernel"), CASES.items(), ids=list(CASES))
def test_kernels_give_the_bits_of_the_interpreter(case: str, kernel: str, all_are_compiled: None) -> None:
    both = BothWays(interpreter.GridExecutor.__call__)
    # Not the fixture monkeypatch: it would put back the compiling launch after the tier is gone.
    with patch.object(interpreter.GridExecutor, "__call__", lambda *args, **kwargs: both.launch(*args, **kwargs)):
        judge(load(PROJECT / "tests" / "cases" / f"{case}.json"), optimized_backend, torch.device("cpu"))
    assert both.launches[kernel]
