"""Mutants: what each operator writes, which change nothing, stable names, and a run that kills what it must."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from test_cli import UNUSABLE, assert_one_line_error, harness

from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.mutants.cases import (
    ANY_LINE,
    Case,
    Deadliness,
    cases_for,
    drawn_scenarios,
    importers_of,
    within,
)
from nsa_oracle.harness.mutants.mutants import TREE, Mutant, all_mutants, mutants_of, probed, sampled, tree_sources
from nsa_oracle.harness.mutants.nursery import compiled_lines
from nsa_oracle.harness.mutants.operators import Edit, edits
from nsa_oracle.harness.mutants.report import as_json, matrix, sum_line, survivors
from nsa_oracle.harness.mutants.scores import Fate, Score, ScoringError
from nsa_oracle.harness.mutants.scoring import score
from nsa_oracle.harness.report.text import render
from nsa_oracle.harness.scenarios.files import to_json
from nsa_oracle.harness.scenarios.scenario import Eager, Join, Scenario, Setup
from nsa_oracle.reference.types import ForwardMode

# Each snippet with every change that the operators find in it, in order.
CHANGES: list[tuple[str, list[tuple[str, str]]]] = [
    ("a < b", [("boundary-shifted", "a <= b"), ("comparison-negated", "a >= b"), ("operand-1", "a < b - 1")]),
    ("a <= 3", [("boundary-shifted", "a < 3"), ("comparison-negated", "a > 3"), ("operand+1", "a <= 3 + 1")]),
    ("a == b", [("comparison-negated", "a != b")]),
    ("a is None", [("comparison-negated", "a is not None")]),
    ("7", [("constant+1", "8"), ("constant-1", "6")]),
    ("1.0", [("constant+1", "2.0")]),
    ("float('-inf')", [("infinity-changed", "'inf'")]),
    ("True", [("boolean-flipped", "False")]),
    ("'text'", []),
    ("a + b", [("operator-swapped", "a - b"), ("right-operand-dropped", "a"), ("operand+1", "a + (b + 1)")]),
    ("a // b", [("operator-swapped", "a % b"), ("right-operand-dropped", "a"), ("operand+1", "a // (b + 1)")]),
    ("a >> b", [("operator-swapped", "a << b"), ("right-operand-dropped", "a")]),
    ("a & b", [("operator-swapped", "a | b"), ("right-operand-dropped", "a"), ("left-operand-dropped", "b")]),
    ("-a", [("sign-dropped", "a")]),
    ("not a", [("not-dropped", "a")]),
    ("a and b", [("and-or-swapped", "a or b"), ("condition-dropped", "b"), ("condition-dropped", "a")]),
    ("a if b else c", [("choice-first", "a"), ("choice-second", "c")]),
    (
        "tl.where(a, b, c)",
        [
            ("choice-first", "tl.where(a | True, b, c)"),
            ("choice-second", "tl.where(a & False, b, c)"),
            ("arguments-swapped", "tl.where(a, c, b)"),
        ],
    ),
    (
        "tl.minimum(a, b)",
        [("min-max-swapped", "tl.maximum(a, b)"), ("limit-dropped", "a"), ("limit-alone", "b")],
    ),
    ("tl.max(a, axis)", [("min-max-swapped", "tl.min(a, axis)")]),
    ("a.clamp_(max=b)", [("min-max-swapped", "a.clamp_(min=b)"), ("limit-dropped", "a")]),
    ("a.to(tl.int64)", [("cast-dropped", "a")]),
    ("tl.cumsum(a, axis)", [("sum-dropped", "a"), ("arguments-swapped", "tl.cumsum(axis, a)")]),
    ("tl.load(a, mask=b, other=c)", [("mask-dropped", "tl.load(a)")]),
    ("tl.multiple_of(a, 16)", []),
    ("range(a)", [("range-end-1", "range(a - 1)"), ("range-end+1", "range(a + 1)")]),
    (
        "range(a, b)",
        [("range-end-1", "range(a, b - 1)"), ("range-end+1", "range(a, b + 1)"), ("range-begin+1", "range(a + 1, b)")],
    ),
    ("a[b:]", [("slice-lower+1", "a[b + 1:]"), ("slice-lower-1", "a[b - 1:]")]),
    ("a[:b]", [("slice-upper+1", "a[:b + 1]"), ("slice-upper-1", "a[:b - 1]")]),
    ("a, b, a", [("entries-swapped", "(b, a, a)"), ("entries-swapped", "(a, a, b)")]),
    ("a[b, :]", []),
    ("{'a': b, 'c': d}", [("entries-swapped", "{'a': d, 'c': b}")]),
    ("f(a, b, *c)", [("arguments-swapped", "f(b, a, *c)")]),
]
FUNCTIONS: list[tuple[str, str, list[str]]] = [
    ("store-dropped", "def f(a): tl.store(a, a)", ["def f(a): pass"]),
    ("debug_barrier-dropped", "def f(): tl.debug_barrier()", ["def f(): pass"]),
    ("statement-dropped", "def f(a):\n    a = g(a)\n    b = a", ["def f(a):\n    pass\n    b = a"]),
    ("statement-dropped", "def f(a):\n    a += b", ["def f(a):\n    pass"]),
    ("statement-dropped", "class C:\n    def __init__(self):\n        self.a = b", []),
    ("guard-true", "def f():\n    if a:\n        g()", ["def f():\n    if (True):\n        g()"]),
    ("guard-false", "def f():\n    while a:\n        g()", ["def f():\n    while (False):\n        g()"]),
    ("guard-true", "def f():\n    while a:\n        g()", []),
    ("early-return", "def f():\n    a = b\n    if c:\n        g()", ["def f():\n    a = b\n    return\n"]),
    ("early-return", "def f():\n    a = b\n    if c:\n        g()\n    return a", []),
    ("stride-swapped", "def f(a_stride, b_stride): g(a_stride)", ["def f(a_stride, b_stride): g((b_stride))"]),
    ("stride-swapped", "def f(a_stride): g(a_stride)", []),
]
NOTHING = [
    "def f(a: Literal[1] = b) -> g[2]: ...",
    "def f():\n    '''Doc: a < b.'''",
    "def f(): assert a < 3, 'a + b'",
    "def f():\n    if a < 3:\n        raise ValueError(a + b)",
    "@jit(1 + 2)\ndef f(): ...",
    "BLOCK = 2 * 64",
    "SIZES = {1024: 4}",
    "def f(): return f'{a + 1}'",
    "def f():\n    if ALIGNED:\n        a = tl.multiple_of(a, 16)",
]
STORE = Path("kernels/page_table.py").as_posix()


def changes(source: str) -> list[tuple[str, str]]:
    return [(edit.operator, edit.text) for edit in edits(source)]


def replaced(source: str, operator: str) -> list[str]:
    return [edit.apply(source) for edit in edits(source) if edit.operator == operator]


@pytest.mark.parametrize(("source", "expected"), CHANGES, ids=[source for source, _ in CHANGES])
def test_what_an_operator_writes(source: str, expected: list[tuple[str, str]]) -> None:
    # Only those of the whole expression: what is in it has snippets of its own.
    whole = ast.parse(source).body[0]
    assert isinstance(whole, ast.Expr)
    nodes = [whole.value, *(n for n in ast.walk(whole) if isinstance(n, ast.Constant) and isinstance(n.value, str))]
    ends = {(node.lineno, node.col_offset, node.end_col_offset) for node in nodes}
    made = [
        (edit.operator, edit.text)
        for edit in edits(source)
        if (edit.node.lineno, edit.node.col_offset, edit.node.end_col_offset) in ends and edit.text != "pass"
    ]
    assert made == expected


@pytest.mark.parametrize(("operator", "source", "expected"), FUNCTIONS)
def test_what_an_operator_makes_of_a_function(operator: str, source: str, expected: list[str]) -> None:
    assert replaced(source, operator) == expected


@pytest.mark.parametrize("source", NOTHING)
def test_what_cannot_matter_is_left_alone(source: str) -> None:
    assert changes(source) == []


def test_numbers_in_capitals_matter_in_kernels() -> None:
    assert [edit.text for edit in edits("SLOT = 3", launches=False)] == ["4", "2"]


def test_a_launch_keeps_its_variant_and_its_tuning() -> None:
    source = "_run = Launcher(kernel)\ndef f(a, b):\n    flags = 1, b\n    _run(a, (*flags, 2), a, b, num_warps=4)"
    made = [edit for edit in edits(source) if edit.text != "pass"]
    assert [(edit.operator, edit.text) for edit in made] == [
        ("arguments-swapped", "_run(a, (*flags, 2), b, a, num_warps=4)"),
    ]


def test_every_operator_that_the_tree_meets_has_a_snippet_here() -> None:
    names = {mutant.edit.operator for mutant in all_mutants()}
    assert names <= {name for _, expected in CHANGES for name, _ in expected} | {name for name, _, _ in FUNCTIONS}


def test_lines_keep_their_numbers() -> None:
    source = textwrap.dedent("""\
        def f(a, b):
            c = g(
                a,
                b,
            )
            return c
        """)
    changed = replaced(source, "arguments-swapped")
    assert [text.splitlines()[-1] for text in changed] == ["    return c"]
    assert {text.count("\n") for text in changed} == {source.count("\n")}


def test_text_before_the_change_may_be_of_any_language() -> None:
    assert replaced("'é'; a < b", "boundary-shifted") == ["'é'; (a <= b)"]


def test_mutants_of_the_tree_are_python() -> None:
    for mutant in sampled(all_mutants(), 300, 0):
        changed = mutant.source
        compile(changed, mutant.file, "exec")
        assert changed != mutant.original
        assert changed.count("\n") == mutant.original.count("\n")
        assert mutant.before


def test_names_are_stable_and_one_of_a_kind() -> None:
    source = "def f(a, b):\n    return a < b, a < 3\n"
    names = [mutant.id for mutant in mutants_of("m.py", source)]
    assert "m.py:2:boundary-shifted:1" in names
    assert "m.py:2:boundary-shifted:2" in names
    assert len(set(names)) == len(names)
    assert names == [mutant.id for mutant in mutants_of("m.py", source)]
    assert (
        names
        == [mutant.id for mutant in mutants_of("m.py", source + "\n\ndef g(a):\n    return a + 1\n")][: len(names)]
    )
    everything = [mutant.id for mutant in all_mutants()]
    assert len(set(everything)) == len(everything)


def test_a_sample_is_the_same_for_a_seed() -> None:
    mutants = all_mutants(STORE)
    assert sampled(mutants, 5, 1) == sampled(mutants, 5, 1)
    assert sampled(mutants, 5, 1) != sampled(mutants, 5, 2)
    assert sampled(mutants, len(mutants) + 1, 0) == mutants


# Which cases, in which order.


def test_probes_tell_the_lines_that_run() -> None:
    source = "def f(a):\n    '''Doc.'''\n    if a:\n        b = 1\n    else:\n        b = 2\n    return b\n"
    seen: list[tuple[str, int]] = []
    space = {"_reached": lambda *line: seen.append(line)}
    exec(compile(probed("m.py", source), "m.py", "exec"), space)
    assert space["f"](0) == 2  # type: ignore[operator]
    assert [line for _, line in seen] == [2, 3, 6, 7]


def test_a_module_reaches_whoever_imports_it() -> None:
    sources = {
        "low.py": "",
        "middle.py": "from nsa_oracle.optimized.low import x",
        "high.py": "from nsa_oracle.optimized import middle",
        "other.py": "",
    }
    importers = importers_of(sources)
    assert importers["low.py"] == {"low.py", "middle.py", "high.py"}
    assert importers["other.py"] == {"other.py"}
    assert "kernels/topk.py" in importers_of(tree_sources())["kernels/fp8.py"]


def a_mutant(line: str = "x = a < b") -> Mutant:
    return next(m for m in mutants_of("m.py", f"def f(a, b):\n    {line}\n") if m.edit.operator == "boundary-shifted")


def test_cases_that_reach_a_line_and_those_with_a_layer_only_if_they_must() -> None:
    here, elsewhere = frozenset({("m.py", 2)}), frozenset({("m.py", 3)})
    plain = Case("plain", "", False, reach=here)
    layer = Case("layer", "", True, reach=here)
    other = Case("other", "", False, reach=elsewhere)
    assert cases_for(a_mutant(), [plain, layer, other], {}) == [plain]
    assert cases_for(a_mutant(), [layer, other], {}) == [layer]
    assert cases_for(a_mutant(), [other], {}) == []


def test_compiled_kernels_are_judged_on_cases_that_launch_them() -> None:
    """A file that others use is reached where one of those is, if its line is in no compiled code."""
    source = "def kernel(n):\n    return n + 1\n"
    (mutant, *_) = mutants_of("kernels/shared.py", source)
    launches = Case("launches", "", True, reach=frozenset({("kernels/user.py", ANY_LINE)}))
    prepares = Case("prepares", "", False, reach=frozenset({("kernels/other.py", ANY_LINE), ("user.py", 3)}))
    importers = {"kernels/shared.py": frozenset({"kernels/shared.py", "kernels/user.py", "user.py"})}
    assert cases_for(mutant, [launches, prepares], importers, compiled=True) == [launches]
    (mutant, *_) = mutants_of("user.py", source)
    assert cases_for(mutant, [launches, prepares], {}, compiled=True) == []


def test_compiled_kernels_are_judged_on_cases_whose_code_has_the_line() -> None:
    (mutant, *_) = mutants_of("kernels/k.py", "def kernel(n):\n    return max(\n        n, 1)\n")
    launched, importers = ("kernels/k.py", ANY_LINE), {"kernels/k.py": frozenset({"kernels/k.py"})}
    inner = Case("inner", "", True, reach=frozenset({launched, ("kernels/k.py", 3)}))
    other = Case("other", "", True, reach=frozenset({launched, ("kernels/k.py", 4), ("kernels/l.py", 3)}))
    assert cases_for(mutant, [inner, other], importers, compiled=True) == [inner]
    assert cases_for(mutant, [other], importers, compiled=True) == [other]


def test_compiled_code_tells_its_lines(tmp_path: Path) -> None:
    source = tmp_path / "kernel.source"
    source.write_text(
        f"""#loc = loc("{TREE}/kernels/topk.py":12:0)
        %0 = tt.load %1 : !tt.ptr<i32> loc("score"(#loc1))
        #loc1 = loc("{TREE}/kernels/fp8.py":345:18)
        #loc2 = loc("/elsewhere/triton/language/standard.py":7:4)
        #loc3 = loc(unknown)"""
    )
    assert compiled_lines(source) == {("kernels/topk.py", 12), ("kernels/fp8.py", 345)}


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from nsa_oracle.harness.mutants.scoring import _note_kernels
from nsa_oracle.optimized.kernels.attention import sparse_mla_combine_kernel as kernel

pointers = dict(zip(("out", "lse", "accs", "stats"), ("*bf16", "*fp32", "*fp32", "*fp32")))
signature = {**pointers, "num_chunks": "i32", "scale": "fp32", "scale_log2": "fp32"}
constants = {"HEADS": 16, "RANK": 64, "EARLY": %s}
reach = set()
_note_kernels(reach)
compile(ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants), GPUTarget("cuda", 90, 32))
print(sorted(line for file, line in reach if file == "kernels/attention.py"))
"""


@pytest.mark.parametrize("early", [False, True])
def test_lines_of_the_branch_that_was_compiled(early: bool, tmp_path: Path) -> None:
    """What Triton itself says, of a kernel that is compiled for a GPU that is not there."""
    lines = tree_sources()["kernels/attention.py"].splitlines()
    wait = next(number for number, line in enumerate(lines, start=1) if "gdc_wait()" in line)
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE % early],
        cwd=TREE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    reached = json.loads(told.stdout)
    assert (wait in reached) == early
    assert wait - 1 not in reached  # the branch itself is decided while compiling
    assert len(reached) > 20


def test_what_killed_the_last_mutants_goes_first() -> None:
    slow, quick, deadly = (Case(name, "", False, seconds) for name, seconds in (("s", 2), ("q", 0.1), ("d", 1)))
    deadliness = Deadliness()
    assert deadliness.order("m.py", [slow, deadly, quick]) == [quick, deadly, slow]
    for _ in range(20):
        deadliness.learn("m.py", ["q", "d"], "d")
    assert deadliness.order("m.py", [slow, deadly, quick])[0] == deadly
    assert deadliness.order("n.py", [slow, deadly, quick])[0] == quick


def test_patience_ends_between_two_cases_and_not_before_the_first() -> None:
    cases = [Case(name, "", False, seconds) for name, seconds in (("a", 1), ("b", 2), ("c", 3))]
    assert within(math.inf, cases) == cases
    assert within(5.5, cases) == cases[:2]
    assert within(0, cases) == cases[:1]


def test_fresh_cases_are_the_same_for_a_seed() -> None:
    drawn = drawn_scenarios(False, 3, 5)
    assert len(drawn) == 3
    assert drawn == drawn_scenarios(False, 3, 5)
    assert drawn != drawn_scenarios(False, 3, 6)
    assert all(scenario.setup.layer is not None for scenario in drawn_scenarios(True, 2, 5))


# A run.

EAGER = Scenario(
    setup=Setup(page_size=2, max_context_len=9, index_topk=4, num_steps=1, num_draft_tokens=1, pool_size=2),
    optimizations=("one_launch",),
    events=(Join(seq_len=5), Join(seq_len=3), Eager(mode=ForwardMode.DECODE)),
)
CASES = [Case("eager", to_json(EAGER), False)]


def planted(before: str, after: str) -> Mutant:
    """A mutant of the page table kernel of our own making."""
    source = tree_sources()[STORE]
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.expr) and ast.unparse(node) == before]
    assert len(found) == 1
    line = found[0].lineno
    return Mutant(f"{STORE}:{line}:planted:1", STORE, source, Edit("planted", found[0], after, line, False))


def test_a_run_kills_what_it_must_and_tells_what_it_does_not() -> None:
    mutants = [
        planted("columns < length", "columns < length - 1"),
        planted("page_columns * PAGE_SIZE < tl.minimum(begin + CHUNK, length)", "page_columns < 0"),
        planted("tl.load(source + columns, mask=live, other=0)", "tl.load(source + columns, mask=live, other=7)"),
        planted("begin + CHUNK <= length", "nobody"),
        planted("tl.cdiv(length, CHUNK)", "1 << 40"),
    ]
    scores = {scored.mutant: scored for scored in score(mutants, CASES, 2, reach_pays_from=0)}
    fates = [(scores[mutant].fate, scores[mutant].check) for mutant in mutants]
    assert fates == [
        (Fate.KILLED, Check.METADATA),
        (Fate.KILLED, Check.METADATA),
        (Fate.SURVIVED, None),  # equivalent: what is not live is not stored
        (Fate.KILLED, Check.CRASH),
        (Fate.TIME_OUT, None),
    ]
    assert [scores[mutant].case for mutant in mutants] == ["eager", "eager", "", "eager", "eager"]


def test_a_mutant_that_cannot_be_imported_or_reached_or_run_here() -> None:
    source = tree_sources()[STORE]
    by_name = {mutant.edit.operator: mutant for mutant in all_mutants("kernels/metadata.py")}
    barrier = by_name["debug_barrier-dropped"]
    unreached = next(m for m in all_mutants("kernels/fp8.py") if "float8e4nv" in m.before)
    first_import = next(node for node in ast.parse(source).body if isinstance(node, ast.Import))
    broken = Mutant(f"{STORE}:1:planted:1", STORE, source, Edit("planted", first_import, "1 / 0", 1, True))
    scores = {scored.mutant: scored for scored in score([barrier, unreached, broken], CASES, 1, reach_pays_from=0)}
    assert [scores[m].fate for m in (barrier, unreached, broken)] == [Fate.NOT_RUN, Fate.UNREACHED, Fate.IMPORT]
    assert scores[broken].sentence == "ZeroDivisionError: division by zero"


def test_a_case_that_fails_on_the_clean_tree_is_refused() -> None:
    with pytest.raises(ScoringError, match="case broken fails on the clean tree; mend that first: "):
        list(score([planted("columns < length", "None")], [Case("broken", "{}", False)], 1, reach_pays_from=0))


# What is told.


def scored(fate: Fate, check: Check | None = None, judged: int = 3) -> Score:
    return Score(a_mutant(), fate, check, "case", "sentence", judged, 0.5)


def test_the_tables_and_the_line() -> None:
    killed, alive, never = scored(Fate.KILLED, Check.METADATA), scored(Fate.SURVIVED), scored(Fate.UNREACHED, judged=0)
    scores = [killed, alive, never, scored(Fate.IMPORT), scored(Fate.TIME_OUT)]
    assert sum_line(scores) == "mutants: 3 of 5 killed, 1 survived (1 crash at import, 1 not reached)"
    assert sum_line([killed]) == "mutants: 1 of 1 killed, 0 survived"
    text = render(matrix(scores))
    assert all(word in text for word in ("m.py", "metadata", "crash at import", "time-out", "survived", "not reached"))
    assert "logits" not in text
    assert survivors([alive, never]).splitlines() == [
        "m.py:2:boundary-shifted:1  a < b  ->  a <= b  (survived 3 cases)",
        "m.py:2:boundary-shifted:1  a < b  ->  a <= b  (no case reaches it)",
    ]


def test_a_record() -> None:
    record = json.loads(as_json(scored(Fate.KILLED, Check.SHAPE)))
    assert record["id"] == "m.py:2:boundary-shifted:1"
    assert (record["fate"], record["check"], record["case"], record["cases"]) == ("killed", "shape", "case", 3)
    assert (record["before"], record["after"]) == ("a < b", "a <= b")


# The command.


def mutants(*words: str) -> subprocess.CompletedProcess[str]:
    return harness("mutants", *words)


def test_the_list() -> None:
    done = mutants("--list", "--file", STORE)
    assert done.returncode == 0, done.stderr
    assert f"{STORE}:" in done.stdout
    assert "store-dropped" in done.stdout


def test_one_mutant_from_end_to_end(tmp_path: Path) -> None:
    chosen = next(m for m in all_mutants("multi_step.py") if m.edit.operator == "not-dropped")  # any replay sees it
    records = tmp_path / "records.jsonl"
    done = mutants("--only", chosen.id, "--cases", "0", "--jobs", "1", "--json", str(records))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mutants: 1 of 1 killed, 0 survived" in done.stdout
    (record,) = (json.loads(line) for line in records.read_text().splitlines())
    assert (record["id"], record["fate"]) == (chosen.id, "killed")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--file", "no/such.py"), ("--file no/such.py", "no file of optimized/")),
        (("--only", "topk.py:1:none:1"), ("--only topk.py:1:none:1", "--list names them all")),
        (("--sample", "1", "--json", "/no/such/folder/x"), ("--json", "No such file")),
    ],
)
def test_options_that_cannot_be_used(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_one_line_error(mutants(*words), *parts)


def test_a_number_that_cannot_be_used() -> None:
    done = mutants("--sample", "0")
    assert done.returncode == UNUSABLE
    assert "Traceback" not in done.stderr
