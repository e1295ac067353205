"""Every declaration of vLLM's adapter: deleting it makes a run fail, and so does one more than is needed.

On a miniature that has vLLM's differences and no defect.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Join, Replay
from nsa_oracle.harness.scenarios.setup import Mirror
from nsa_oracle.harness.subjects.adapters.vllm import PUBLISHED
from nsa_oracle.reference.types import StepSemantics
from tests.support import miniature_vllm
from tests.support.backends import vllm_variants
from tests.support.declarations import failures, surveyed
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND_V2, EXTEND, VERIFY, case

SIZES = {
    "page_size": 64,
    "max_context_len": 130,
    "num_steps": 1,
    "num_draft_tokens": 4,
    "drive": "single_step",
    "paged_mqa_num_sms": 6,
}
MODES = (DECODE, VERIFY, DRAFT_EXTEND_V2)
CASES = {
    "history": case(
        *(Capture(mode=mode, buckets=(3,)) for mode in MODES),
        Join(seq_len=90),
        Join(seq_len=2),
        *(Replay(mode=mode) for mode in MODES),
        *(Eager(mode=mode) for mode in MODES),
        Accept(accept_lengths=(1, 1)),
        Eager(mode=EXTEND, extend_lens=(7, 1)),
        Eager(mode=EXTEND, extend_lens=(90, 2)),
        **SIZES,
    ),
    "history of a short request": case(
        *(Capture(mode=mode, buckets=(2,)) for mode in MODES),
        Join(seq_len=1),
        *(Replay(mode=mode) for mode in MODES),
        **{**SIZES, "num_draft_tokens": 3},
    ),
    "no mirror": case(Capture(mode=DECODE, buckets=(1,)), Join(seq_len=3), Replay(mode=DECODE, mirror=Mirror.ABSENT),
                      **SIZES),
    "no mirror eagerly": case(Join(seq_len=3), Eager(mode=DECODE, mirror=Mirror.ABSENT), **SIZES),
    "no request": case(Eager(mode=VERIFY), **SIZES),
    "padding alone": case(Capture(mode=VERIFY, buckets=(1,)), Replay(mode=VERIFY), **SIZES),
    "nothing new": case(Join(seq_len=3), Join(seq_len=5), Eager(mode=EXTEND, extend_lens=(0, 5)), **SIZES),
    "advancing steps": case(Join(seq_len=3), Eager(mode=DECODE), step_semantics=StepSemantics.ADVANCING, **SIZES),
    "two steps": case(Join(seq_len=3), Eager(mode=DECODE), **{**SIZES, "num_steps": 2}),
    "a schedule of FlashMLA": case(Join(seq_len=3), Eager(mode=DECODE), flashmla_num_sm_parts=3, **SIZES),
}  # fmt: skip
UNDECLARED = "which the adapter does not declare"
OF_FIELDS = (
    "cache_seqlens_int32", "seqlens_expanded", "seqlens_expanded", "real_page_table", "paged_mqa_schedule_metadata",
    "token_to_batch_idx", UNDECLARED, UNDECLARED, UNDECLARED, "topk_indices_offset", UNDECLARED,
)  # fmt: skip
EXPECTED = {
    "roles": ("history", "missing a required argument: 'role'"),
    "modes": ("history", "roles: none has IDLE"),
    "sizes_step_semantics": ("advancing steps", "seqlens_expanded"),
    "sizes_num_steps": ("two steps", "is built"),
    "sizes_flashmla_num_sm_parts": ("a schedule of FlashMLA", "flashmla_metadata"),
    "empty_batches": ("no request", "runs"),
    "empty_replays": ("padding alone", "runs"),
    "empty_chunks": ("nothing new", "runs"),
    "mirrors_graph": ("no mirror", "runs"),
    "mirrors_eager": ("no mirror eagerly", "runs"),
    "padding_DECODE": ("history", "token_to_batch_idx"),
    "padding_TARGET_VERIFY": ("history", "seqlens_expanded"),
    "padding_DRAFT_EXTEND_V2": ("history", "token_to_batch_idx"),
    "absent_*": ("history", "nsa_cu_seqlens_k"),
    "absent_EXTEND": ("history", "page_table_1_flattened"),
    **{f"own_fields_{number}": ("history", name) for number, name in enumerate(OF_FIELDS)},
    "own_fields_2": ("history of a short request", "seqlens_expanded"),
    "waivers_0": ("history", "max_seq_len_q"),
    "waivers_1": ("history", "max_seq_len_q"),
}
OF_NO_DIFFERENCE = ("roles_target", "roles_draft")  # one pair of builders could serve both
NEEDLESS = {
    "for_nothing_waivers": "WAIVER NOT NEEDED: cache_seqlens_int32 in DECODE, everywhere: ",
    "for_nothing_absent": "ABSENT NOT NEEDED: paged_mqa_schedule_metadata in DECODE: ",
    "for_nothing_absent_nowhere": "ABSENT NOT NEEDED: token_to_batch_idx in DECODE: ",  # it is an own field there
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked miniature."""
    return miniature_vllm.write(tmp_path_factory.mktemp("vllm"))


def spec(what: str) -> str:
    return f"{vllm_variants.__name__}:v0_33__{what}"


@pytest.mark.parametrize("name", CASES)
def test_the_declarations_are_enough_and_all_are_needed(name: str, folder: Path) -> None:
    """Cases that show a limit are not drawn."""
    found = surveyed(PUBLISHED.folder, folder, spec("no_change"), CASES[name])
    assert (None if found is None else found[0]) == ([] if name.startswith("history") else None)


def test_every_declaration_is_deleted_below() -> None:
    assert {*EXPECTED, *OF_NO_DIFFERENCE} == set(vllm_variants.deletions())


@pytest.mark.parametrize(("declaration", "name", "why"), [(what, *expected) for what, expected in EXPECTED.items()])
def test_no_declaration_can_be_left_out(declaration: str, name: str, why: str, folder: Path) -> None:
    found = failures(PUBLISHED.folder, folder, spec(declaration), CASES[name])
    assert any(why in line for line in found), found


@pytest.mark.parametrize("declaration", OF_NO_DIFFERENCE)
def test_what_only_says_how_the_engine_drives_hides_nothing(declaration: str, folder: Path) -> None:
    assert failures(PUBLISHED.folder, folder, spec(declaration), CASES["history"]) == []


@pytest.mark.parametrize("addition", NEEDLESS)
def test_no_needless_declaration_can_be_added(addition: str, folder: Path) -> None:
    (line,) = failures(PUBLISHED.folder, folder, spec(addition), CASES["history"])
    assert NEEDLESS[addition] in line
