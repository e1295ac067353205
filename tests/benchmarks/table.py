"""Prints Markdown tables of a benchmark run: ``python -m tests.benchmarks.table benchmark.json``.

Reads what ``pytest tests/benchmarks --benchmark-only --benchmark-json=benchmark.json`` wrote. All times are medians in
microseconds; a dash stands for what the run did not measure.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEQLENS = ("loop", "vectorized_torch", "kernel")
SWITCHES = ("precompute", "transform_table_cache", "strided_indices_cache", "batched_copy", "vectorized_seqlens")
EAGER = ("loop", *SWITCHES, "all five", "one launch", "one launch, aliased", "SGLang")
IN_GRAPH = ("one launch", "one launch, aliased", "SGLang", "floor")
GROUP = re.compile(r"(?P<family>seqlens_expanded \w+|eager|in graph) (?P<sizes>\w+=\d+(?: \w+=\d+)*)")

Sizes = tuple[int, ...]  # of one row: bs, or bs, length and N
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
        sizes = tuple(int(size.partition("=")[2]) for size in group["sizes"].split())
        # A subject that is a function has no name among the parameters: it opens the id of the case.
        subject = benchmark["params"].get("name") or benchmark["param"].partition("-")[0]
        families[group["family"]][sizes][subject] = benchmark["stats"]["median"] * 1e6
    return families


def tables(families: Families) -> Iterator[str]:
    """Every table of the run, each with its heading."""
    for family in sorted(name for name in families if name.startswith("seqlens_expanded ")):
        mode = family.partition(" ")[2]
        ratios = (Ratio("loop", "kernel"), Ratio("vectorized_torch", "kernel"))
        yield table(f"`seqlens_expanded` in {mode}", ("bs",), SEQLENS, ratios, families[family])
    sizes = ("bs", "length", "N")
    if "eager" in families:
        ratios = (Ratio("loop", "one launch"), Ratio("SGLang", "one launch"))
        yield table("All metadata of N steps, eager", sizes, EAGER, ratios, families["eager"])
    if "in graph" in families:
        ratios = (Ratio("one launch", "floor"), Ratio("SGLang", "one launch"))
        yield table("All metadata of N steps, in a graph", sizes, IN_GRAPH, ratios, families["in graph"])


def table(
    title: str,
    sizes: Sequence[str],
    subjects: Sequence[str],
    ratios: Sequence[Ratio],
    rows: Mapping[Sizes, Medians],
) -> str:
    """One Markdown table: a row for each combination of sizes, a column for each subject and ratio."""
    head = [*sizes, *subjects, *(f"{ratio.numerator} / {ratio.denominator}" for ratio in ratios)]
    lines = [f"### {title}", "", _line(head), _line(["---:"] * len(head))]
    for row in sorted(rows):
        medians = rows[row]
        times = (f"{medians[subject]:.1f}" if subject in medians else "-" for subject in subjects)
        lines.append(_line([*map(str, row), *times, *(ratio.of(medians) for ratio in ratios)]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.table", description=__doc__)
    parser.add_argument("file", type=Path, help="what --benchmark-json wrote")
    try:
        print("\n\n".join(tables(read(parser.parse_args().file))))
    except MalformedRun as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
