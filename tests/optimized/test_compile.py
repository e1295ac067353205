"""Every kernel compiles for every supported GPU, and the number of compilations does not grow with what batches vary.

SGLang #36888: a stride that was a compile-time constant made thousands of variants.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import PROJECT

KERNELS = {
    "copy_steps_kernel",
    "expand_seqlens_kernel",
    "fill_metadata_kernel",
    "flashmla_schedule_kernel",
    "indexer_logits_kernel",
    "paged_mqa_schedule_kernel",
    "sparse_mla_combine_kernel",
    "sparse_mla_kernel",
    "store_cache_kernel",
    "topk_filter_kernel",
    "topk_kernel",
}
HOPPER_KERNELS = {"indexer_logits_hopper_kernel", "sparse_mla_hopper_kernel"}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles_and_sizes_select_no_variant(capability: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_only", str(capability)],
        cwd=PROJECT,
        env={
            **os.environ,
            "TRITON_CACHE_DIR": str(tmp_path),  # a cache hit would prove nothing
            "TRITON_DEFAULT_FP_FUSION": "0",  # as it may be by default in a later version
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["first"]) == KERNELS | (HOPPER_KERNELS if capability == 90 else set())
    assert result["smallest_cubin"] > 0
    assert result["fused"] == [True], "a launch leaves it to Triton whether products and sums are contracted"
    assert result["after"] == result["first"], "a size, length, width or stride selects a variant"
