"""What kernels do with metadata that was made for other lengths: DeepGEMM's schedule, and the plan of SGLang's top-k.

It needs a Hopper GPU, sgl-deep-gemm 0.1.4 with apache-tvm-ffi 0.1.11, msgspec, and SGLang 0.5.23 installed or unpacked
into the folder that NSA_ORACLE_SGLANG names. docs/upstream.md has the results.

    NSA_ORACLE_SGLANG=sglang-0.5.23 python docs/examples/stale_metadata.py
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch

from nsa_oracle.harness.subjects.adapters.deep_gemm import BLOCK_KV, deep_gemm
from nsa_oracle.harness.subjects.adapters.sglang_kernels import kernels

HEADS, DIM = 64, 128
TOPK = 2048
SECONDS = 20  # a call that takes longer does not return


def microseconds(call: Callable[[], object], repeats: int = 50) -> float:
    """Mean time of ``call``, launch included, after one that is not counted."""
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return 1000 * begin.elapsed_time(end) / repeats


def lengths_of(batch: int, length: int) -> torch.Tensor:
    """Equal lengths, as kernels take them."""
    return torch.full((batch,), length, dtype=torch.int32, device="cuda")


def under_a_schedule(batch: int, length: int, scheduled: int) -> str:
    """Logits of ``batch`` requests of ``length`` tokens, under a schedule made for ``scheduled`` tokens."""
    package = deep_gemm()
    torch.manual_seed(0)
    pages = -(-length // BLOCK_KV)
    cache = torch.randint(0, 100, (batch * pages, BLOCK_KV, 1, DIM + 4), dtype=torch.uint8, device="cuda")
    cache.view(batch * pages, -1)[:, BLOCK_KV * DIM :].view(torch.float32).fill_(1.0)
    table = torch.arange(batch * pages, dtype=torch.int32, device="cuda").view(batch, pages)
    q = torch.randn(batch, 1, HEADS, DIM, device="cuda").to(torch.float8_e4m3fn)
    weights = torch.rand(batch, HEADS, device="cuda")
    lengths = lengths_of(batch, length)[:, None]
    sms = torch.cuda.get_device_properties(0).multi_processor_count

    def logits(plan: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = package.fp8_paged_mqa_logits(
            q, cache, weights, lengths, table, plan, pages * BLOCK_KV, clean_logits=False
        )
        return found[:, :length]

    fresh, stale = (
        package.get_paged_mqa_logits_metadata(lengths_of(batch, made)[:, None], BLOCK_KV, sms)
        for made in (length, scheduled)
    )
    same = "right" if torch.equal(logits(fresh), logits(stale)) else "WRONG"
    times = [microseconds(lambda plan=plan: logits(plan)) for plan in (fresh, stale)]  # type: ignore[misc]
    return f"| {batch} | {length:,} | {scheduled:,} | {same} | {times[0]:.0f} | {times[1]:.0f} |"


def under_a_plan(batch: int, long: int, length: int, planned: int) -> str:
    """Top-k of ``batch`` rows, of which ``long`` have ``length`` scores and the others 3,000, under a plan made for
    ``planned`` scores in all rows.
    """
    topk = kernels("dsv4.topk")
    torch.manual_seed(0)
    scores = torch.randn(batch, -(-length // 4) * 4, device="cuda")
    table = torch.arange(scores.shape[1], dtype=torch.int32, device="cuda").repeat(batch, 1)
    lengths = lengths_of(batch, 3000)
    lengths[:long] = length
    live = torch.arange(scores.shape[1], device="cuda") < lengths[:, None]
    best = scores.masked_fill(~live, -torch.inf).topk(TOPK).values
    wrong = []
    for made in (lengths, lengths_of(batch, planned)):
        out = torch.full((batch, TOPK), -1, dtype=torch.int32, device="cuda")  # a server leaves it uninitialised
        topk.topk_transform_paged_v2(scores, lengths, table, out, 1, topk.plan_topk_v2(made))
        found = scores.gather(1, out.clamp(min=0).long()).sort(descending=True).values
        wrong.append(int(((found != best).any(dim=1) | (out < 0).any(dim=1)).sum()))
    return f"| {batch} | {long} | {length:,} | {planned:,} | {wrong[0]} | {wrong[1]} |"


def under_too_long_a_schedule() -> str:
    """The same in a process of its own, since the call may not return."""
    try:
        subprocess.run([sys.executable, __file__, "hang"], check=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"the kernel does not return within {SECONDS} s"
    return "the kernel returns"


def main() -> None:
    """Print both tables as Markdown."""
    if sys.argv[1:]:
        under_a_schedule(8, 300, 8192)
        return
    print("| requests | tokens | scheduled for | logits | fresh, us | stale, us |\n|---|---|---|---|---|---|")
    for batch in (1, 8, 32, 128):
        for length in (2048, 16384, 65536, 131072):
            print(under_a_schedule(batch, length, 1), flush=True)
    print("\n| rows | long rows | scores | planned for | wrong, fresh | wrong, stale |\n|---|---|---|---|---|---|")
    for batch in (30, 31, 64, 512, 513):
        for long in (1, batch):
            for length in (65536, 65537, 131072):
                print(under_a_plan(batch, long, length, 1), flush=True)
    print(under_a_plan(64, 64, 70000, 131072), flush=True)
    print(f"\n8 requests of 300 tokens, under a schedule made for 8,192: {under_too_long_a_schedule()}")


if __name__ == "__main__":
    main()
