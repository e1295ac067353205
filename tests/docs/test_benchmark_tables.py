"""The tables of docs/records/benchmarks.md are what ``tests/benchmarks/table.py`` prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.table import TABLES
from tests.support.pages import PAGES
from tests.support.project import PROJECT


def test_benchmark_tables(tmp_path: Path) -> None:
    def entry(group: str, param: str, median: float, **params: object) -> dict[str, object]:
        return {"group": group, "param": param, "params": params, "stats": {"median": median}}

    run = [
        entry("seqlens_expanded TARGET_VERIFY bs=8", "loop-TARGET_VERIFY-8", 120e-6),
        entry("seqlens_expanded TARGET_VERIFY bs=8", "kernel-TARGET_VERIFY-8", 30e-6),
        entry("eager bs=8 length=8192 N=4", "one launch-8-8192-4", 20e-6, name="one launch"),
        entry("in graph bs=8 length=8192 N=4", "floor-8-8192-4", 1e-6, name="floor"),
        entry("in graph bs=8 length=8192 N=4", "one launch, aliased-8-8192-4", 2e-6, name="one launch, aliased"),
        entry("in graph bs=8 length=8192 N=4", "one launch-8-8192-4", 3e-6, name="one launch"),
        entry("sparse MLA cache=fp8 heads=128 tokens=64", "ours-fp8-128-64", 90e-6, name="ours"),
        entry("sparse MLA cache=fp8 heads=128 tokens=64", "FlashMLA-fp8-128-64", 45e-6, name="FlashMLA"),
        entry("sparse MLA cache=fp8 heads=128 tokens=64", "copy floor-fp8-128-64", 20e-6, name="copy floor"),
        entry("sparse MLA cache=fp8 heads=128 tokens=64", "matmul floor-fp8-128-64", 30e-6, name="matmul floor"),
        entry("sparse MLA cache=fp8 heads=128 tokens=8", "ours-fp8-128-8", 10e-6, name="ours"),
        entry("sparse MLA cache=fp8 heads=128 tokens=8", "copy floor-fp8-128-8", 5e-6, name="copy floor"),
        entry("top-k rows=8 width=8192", "ours-8-8192", 20e-6, name="ours"),
        entry("top-k rows=8 width=8192", "fast_topk-8-8192", 25e-6, name="fast_topk"),
        entry("store cache=bf16 rows=64", "ours-bf16-64", 3e-6, name="ours"),
        entry("recorder between=work bs=64", "recorded-64-work", 15e-6, name="recorded"),
        *(
            entry("step mode=DECODE bs=64 length=8192", f"{name}-DECODE-64-8192", median, name=name)
            for name, median in [
                ("metadata", 2e-6),
                ("store", 3e-6),
                ("indexer", 40e-6),
                ("top-k", 15e-6),
                ("attention", 60e-6),
                ("whole step", 108e-6),
                ("copy floor", 20e-6),
                ("matmul floor", 40e-6),
            ]
        ),
    ]
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"benchmarks": run}))
    command = [sys.executable, "-m", "tests.benchmarks.table"]
    done = subprocess.run([*command, str(path)], cwd=PROJECT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "| 8 | 120.0 | - | 30.0 | 4.00 | - |" in lines
    assert "| 8 | 8192 | 4 | 3.0 | 2.0 | - | 1.0 | 3.00 | - |" in lines
    (floors,) = (number for number, line in enumerate(lines) if line.endswith("| FlashMLA / ours | ours / floor |"))
    assert lines[floors + 2 : floors + 4] == [
        "| fp8 | 128 | 8 | 10.0 | - | 5.0 | - | - | - |",  # sizes in order; half a floor is none
        "| fp8 | 128 | 64 | 90.0 | 45.0 | 20.0 | 30.0 | 0.50 | 3.00 |",
    ]
    assert "| 8 | 8192 | 20.0 | - | 25.0 | - | - | - | 1.25 | - | - |" in lines
    assert "| bf16 | 64 | 3.0 | - | - |" in lines
    assert "| work | 64 | - | 15.0 | - |" in lines
    stages = "2.0 | 3.0 | 40.0 | 15.0 | 60.0"
    assert f"| DECODE | 64 | 8192 | {stages} | 120.0 | 108.0 | 20.0 | 40.0 | 0.90 | 2.70 |" in lines

    path.write_text(json.dumps({"benchmarks": [entry("something else bs=8", "ours-8", 1e-6, name="ours")]}))
    done = subprocess.run([*command, str(path)], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    path.write_text("{}")
    done = subprocess.run([*command, str(path)], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_benchmarks_name_the_sizes_of_their_tables() -> None:
    """A benchmark's group has its sizes as ``name={value}``, which the table of its family has as columns."""
    sources = [path.read_text() for path in (PROJECT / "tests" / "benchmarks").glob("test_*.py")]
    groups = [group for source in sources for group in re.findall(r'benchmark\.group = f"([^"]+)"', source)]
    assert len(groups) >= len({*TABLES}) - 1  # one group serves both modes of seqlens_expanded
    for group in groups:
        words = re.sub(r"{mode.value}(?= )", "DRAFT_EXTEND", group) if group.startswith("seqlens") else group
        family = re.sub(r" \w+={.*", "", words)
        assert set(TABLES[family].sizes) == set(re.findall(r"(\w+)={", words)), group


def test_columns_are_described() -> None:
    """Every column of a time has a row in docs/benchmarks.md, or is a ratio or a size."""
    heads = re.findall(r"^(\|.*\|)\n\| -", PAGES["docs/records/benchmarks.md"].partition("## Tried")[0], re.MULTILINE)
    columns = {column.strip() for head in heads for column in head.strip("|").split("|")}
    times = {column for column in columns if " / " not in column}
    sizes = {"bs", "length", "N", "cache", "heads", "tokens", "rows", "width", "mode", "between", "requests"}
    described = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", PAGES["docs/benchmarks.md"], re.MULTILINE)
    known = {*described, *(name for names in described for name in names.split(", ")), "fast_topk, paged"}
    assert times - sizes <= known
