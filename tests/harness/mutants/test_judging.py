"""A run kills the mutants that it must, and reports the others."""

from __future__ import annotations

import ast

import pytest

from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.mutants.cases import Case
from nsa_oracle.harness.mutants.judging import score
from nsa_oracle.harness.mutants.mutants import Mutant, all_mutants, tree_sources
from nsa_oracle.harness.mutants.operators import Edit
from nsa_oracle.harness.mutants.score import Fate, ScoringError
from nsa_oracle.harness.scenarios.files import to_json
from nsa_oracle.harness.scenarios.scenario import Eager, Join, Scenario
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.reference.types import ForwardMode
from tests.support.mutants import STORE

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


def test_a_run_kills_what_it_must_and_names_what_survives() -> None:
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
