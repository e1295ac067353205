"""Prints Markdown tables of a benchmark run: ``python -m tests.benchmarks.table benchmark.json``.

Reads what ``pytest tests/benchmarks --benchmark-only --benchmark-json=benchmark.json`` wrote. All times are medians in
microseconds; a dash stands for what the run did not measure.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GROUP = re.compile(r"(?P<family>.+?)(?P<sizes>(?: \w+=\w+)+)")  # "sparse MLA cache=fp8 heads=128 tokens=8"

Sizes = tuple[int | str, ...]  # of one row, one for each of the table's
Medians = Mapping[str, float]  # of one row: microseconds by subject
Families = Mapping[str, Mapping[Sizes, Medians]]


class MalformedRun(ValueError):
    """A file that is not a run of these benchmarks. The message is one line and names the cause."""


@dataclass(frozen=True)
class Ratio:
    """A column that divides one subject's median by another's."""

    numerator: str
    denominator: str

    def of(self, medians: Medians) -> str:
        if self.numerator not in medians or self.denominator not in medians:
            return "-"
        return f"{medians[self.numerator] / medians[self.denominator]:.2f}"


@dataclass(frozen=True)
class Derived:
    """A subject that is not measured: what ``combine`` makes of the medians of its parts, if all of them are there."""

    name: str
    combine: Callable[[Iterable[float]], float]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """How a family of benchmarks is laid out: a row for each combination of sizes, a column for each of the others.

    ``derived`` are subjects too: they are columns if ``subjects`` names them, and ratios may name them.
    """

    title: str
    sizes: tuple[str, ...]
    subjects: tuple[str, ...]
    ratios: tuple[Ratio, ...]
    derived: tuple[Derived, ...] = ()

    def row_of(self, sizes: str) -> Sizes:
        """The row that a group's sizes, "heads=128 tokens=8", belong to. Raises KeyError if it lacks one."""
        given = dict(size.split("=") for size in sizes.split())
        return tuple(int(given[name]) if given[name].isdecimal() else given[name] for name in self.sizes)

    def markdown(self, rows: Mapping[Sizes, Medians]) -> str:
        head = [*self.sizes, *self.subjects, *(f"{ratio.numerator} / {ratio.denominator}" for ratio in self.ratios)]
        lines = [f"### {self.title}", "", _line(head), _line(["---:"] * len(head))]
        for row in sorted(rows):
            medians = self._with_derived(rows[row])
            times = (f"{medians[subject]:.1f}" if subject in medians else "-" for subject in self.subjects)
            lines.append(_line([*map(str, row), *times, *(ratio.of(medians) for ratio in self.ratios)]))
        return "\n".join(lines)

    def _with_derived(self, medians: Medians) -> Medians:
        complete = [new for new in self.derived if all(part in medians for part in new.parts)]
        return {**medians, **{new.name: new.combine(medians[part] for part in new.parts) for new in complete}}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


STEPS = ("bs", "length", "N")
SWITCHES = ("precompute", "transform_table_cache", "strided_indices_cache", "batched_copy", "vectorized_seqlens")
STAGES = ("metadata", "store", "indexer", "top-k", "attention")
FLOOR = Derived("floor", max, ("copy floor", "matmul floor"))
TABLES = {
    **{
        f"seqlens_expanded {mode}": Table(
            f"`seqlens_expanded` in {mode}",
            ("bs",),
            ("loop", "vectorized_torch", "kernel"),
            (Ratio("loop", "kernel"), Ratio("vectorized_torch", "kernel")),
        )
        for mode in ("DRAFT_EXTEND", "TARGET_VERIFY")
    },
    "eager": Table(
        "All metadata of N steps, eager",
        STEPS,
        ("loop", *SWITCHES, "all five", "one launch", "one launch, aliased", "SGLang"),
        (Ratio("loop", "one launch"), Ratio("SGLang", "one launch")),
    ),
    "in graph": Table(
        "All metadata of N steps, in a graph",
        STEPS,
        ("one launch", "one launch, aliased", "SGLang", "floor"),
        (Ratio("one launch", "floor"), Ratio("SGLang", "one launch")),
    ),
    "sparse MLA": Table(
        "Sparse MLA, 2,048 keys",
        ("cache", "heads", "tokens"),
        ("ours", "FlashMLA", "copy floor", "matmul floor"),
        (Ratio("FlashMLA", "ours"), Ratio("ours", "floor")),
        (FLOOR,),
    ),
    "top-k": Table(
        "Top-k, 2,048 of each row",
        ("rows", "width"),
        ("ours", "ours, paged", "fast_topk", "fast_topk, paged", "torch.topk", "copy floor"),
        (Ratio("fast_topk", "ours"), Ratio("fast_topk, paged", "ours, paged"), Ratio("ours", "copy floor")),
    ),
    "indexer": Table(
        "Indexer logits",
        ("requests", "tokens", "width"),
        ("ours", "DeepGEMM", "copy floor"),
        (Ratio("DeepGEMM", "ours"), Ratio("ours", "copy floor")),
    ),
    "store": Table(
        "Quantise and store",
        ("cache", "rows"),
        ("ours", "copy floor"),
        (Ratio("ours", "copy floor"),),
    ),
    "step": Table(
        "A captured step",
        ("mode", "bs", "length"),
        (*STAGES, "sum of stages", "whole step", "copy floor", "matmul floor"),
        (Ratio("whole step", "sum of stages"), Ratio("whole step", "floor")),
        (Derived("sum of stages", sum, STAGES), FLOOR),
    ),
    "recorder": Table(
        "A call that is recorded: host time",
        ("between", "bs"),
        ("not recorded", "recorded", "recorded, digest"),
        (),
    ),
}


def read(path: Path) -> Families:
    """Medians by family (the group without its sizes), sizes and subject. Raises MalformedRun."""
    try:
        return _medians(json.loads(path.read_text(encoding="utf-8"))["benchmarks"])
    except OSError as error:
        raise MalformedRun(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise MalformedRun(f"{path}: not what pytest-benchmark writes for tests/benchmarks") from None


def _medians(benchmarks: Any) -> Families:
    families: dict[str, dict[Sizes, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for benchmark in benchmarks:
        group = GROUP.fullmatch(benchmark["group"])
        if group is None:
            raise ValueError("a group of other benchmarks")
        row = TABLES[group["family"]].row_of(group["sizes"])
        # A subject that is a function has no name among the parameters: it opens the id of the case.
        subject = benchmark["params"].get("name") or benchmark["param"].partition("-")[0]
        families[group["family"]][row][subject] = benchmark["stats"]["median"] * 1e6
    return families


def tables(families: Families) -> Iterator[str]:
    """Every table of the run, each with its heading."""
    for family, table in TABLES.items():
        if family in families:
            yield table.markdown(families[family])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.table", description=__doc__)
    parser.add_argument("file", type=Path, help="what --benchmark-json wrote")
    try:
        print("\n\n".join(tables(read(parser.parse_args().file))))
    except MalformedRun as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
