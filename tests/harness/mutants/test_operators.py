"""What each operator writes, and what it leaves alone."""

from __future__ import annotations

import ast
import textwrap

import pytest

from nsa_oracle.harness.mutants.mutants import all_mutants
from nsa_oracle.harness.mutants.operators import edits

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
