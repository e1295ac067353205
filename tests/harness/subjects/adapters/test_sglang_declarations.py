"""Every declaration of SGLang's adapters: deleting it makes a run fail, and so does one more than is needed.

On miniatures of the published versions that have SGLang's differences and no defect.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Mirror
from nsa_oracle.harness.subjects.adapters.sglang import PUBLISHED
from nsa_oracle.reference.types import StepSemantics
from tests.support import miniature_sglang
from tests.support.backends import sglang_variants
from tests.support.backends.sglang_variants import BY_NAME
from tests.support.declarations import failures, surveyed
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, DRAFT_EXTEND_V2, EXTEND, VERIFY, case

SIZES = {"num_steps": 2, "num_draft_tokens": 4, "max_context_len": 67, "paged_mqa_num_sms": 3}


def history(*modes: object) -> Scenario:
    """Every mode, in graphs and eagerly, with requests that have one token and a row for each draft token."""
    return case(
        *(Capture(mode=mode, buckets=(2,)) for mode in modes),
        Join(seq_len=5),
        Replay(mode=DECODE),
        Eager(mode=EXTEND),
        Accept(accept_lengths=(1,)),
        *(Replay(mode=mode) for mode in modes[1:]),
        *(Eager(mode=mode) for mode in modes),
        Join(seq_len=1),
        Accept(accept_lengths=(1, 0)),
        *(Replay(mode=mode) for mode in modes[1:]),
        flashmla_num_sm_parts=3,
        **SIZES,
    )


TWO_TOKENS_MORE = (Join(seq_len=3), Accept(accept_lengths=(2,)))
CASES = {
    "history": history(DECODE, VERIFY, DRAFT_EXTEND_V2),
    "history with DRAFT_EXTEND": history(DECODE, VERIFY, DRAFT_EXTEND_V2, DRAFT_EXTEND),
    "stale mirror": case(
        Capture(mode=DECODE, buckets=(1,)), *TWO_TOKENS_MORE, Replay(mode=DECODE, mirror=Mirror.STALE), **SIZES
    ),
    "stale mirror eagerly": case(*TWO_TOKENS_MORE, Eager(mode=DECODE, mirror=Mirror.STALE), **SIZES),
    "no mirror in EXTEND": case(Join(seq_len=3), Eager(mode=EXTEND, mirror=Mirror.ABSENT), **SIZES),
    "no request": case(Eager(mode=DECODE), **SIZES),
    "advancing steps": case(
        Join(seq_len=3), Eager(mode=DECODE), step_semantics=StepSemantics.ADVANCING, **{**SIZES, "num_steps": 3}
    ),
}
OF_EVERY_VERSION = {
    "roles": ("history", "missing a required argument: 'role'"),
    "step_backends_draft": ("history", "is built"),
    "step_backends_target": ("history", "is built"),
    "step_backends_draft_extend_v2": ("history", "is built"),
    "sizes_step_semantics": ("advancing steps", "seqlens_expanded"),
    "empty_batches": ("no request", "runs"),
    "mirrors_eager": ("stale mirror eagerly", "runs"),
    "unread": ("history", ", which the adapter neither judges nor lists as unread"),
}
OF_THE_DSA_BACKENDS = {
    **OF_EVERY_VERSION,
    "roles_draft": ("history", "can be captured"),
    "modes": ("history", "roles: none has DRAFT_EXTEND"),
    "mirrors_EXTEND": ("no mirror in EXTEND", "runs"),
    "own_fields_0": ("history", "the metadata has paged_mqa_ctx_lens_2d, which the adapter neither judges nor"),
    "own_fields_1": ("history", "the metadata has topk_v2_plan, which the adapter neither judges nor"),
}
OF_NO_DIFFERENCE = {  # how the engine drives: the backend holds without it, too
    "v0_5_8": {"padding_DRAFT_EXTEND": "history with DRAFT_EXTEND"},
    **{key: {"roles_target": "history", "roles_draft_extend_v2": "history"} for key in ("v0_5_15", "v0_5_23")},
}
TAIL_FIELDS = ("seqlens_expanded", "nsa_cache_seqlens_int32", "nsa_cu_seqlens_k")
EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "v0_5_8": {
        **OF_EVERY_VERSION,
        "roles_draft": ("history", "runs"),
        "roles_target": ("history", "shows what the graph reads"),
        "roles_draft_extend_v2": ("history", "real_page_table"),
        "roles_draft_extend": ("history with DRAFT_EXTEND", "real_page_table"),
        "step_backends_draft_extend": ("history with DRAFT_EXTEND", "is built"),
        "mirrors_graph": ("stale mirror", "runs"),
        "absent_DRAFT_EXTEND_V2": ("history", "paged_mqa_schedule_metadata"),
        "own_fields_0": ("history with DRAFT_EXTEND", "paged_mqa_schedule_metadata"),
        "own_fields_1": ("history with DRAFT_EXTEND", "flashmla_metadata"),
        "own_fields_2": ("history with DRAFT_EXTEND", "flashmla_num_splits"),
        **{f"waivers_{number}": ("history with DRAFT_EXTEND", TAIL_FIELDS[number % 3]) for number in range(9)},
    },
    "v0_5_15": OF_THE_DSA_BACKENDS,
    "v0_5_23": OF_THE_DSA_BACKENDS,
}
NEEDLESS = {
    "for_nothing_waivers": "WAIVER NOT NEEDED: cache_seqlens_int32 in DECODE, everywhere: ",
    "for_nothing_absent": "ABSENT NOT NEEDED: paged_mqa_schedule_metadata in DECODE: ",
    "for_nothing_absent_nowhere": "absent: no call expects 'token_to_batch_idx' in DECODE; remove it",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The unpacked miniatures by adapter."""
    found = {}
    for version, adapter in PUBLISHED.adapters.items():
        folder = tmp_path_factory.mktemp(adapter.__name__)
        found[adapter.__name__] = miniature_sglang.write(folder, version, miniature_sglang.mended(version))
    return found


def spec(adapter: str, what: str = "no_change") -> str:
    return f"{sglang_variants.__name__}:{adapter}__{what}"


@pytest.mark.parametrize("adapter", BY_NAME)
def test_the_declarations_are_enough_and_all_are_needed(adapter: str, folders: dict[str, Path]) -> None:
    """No case below fails unless a declaration is changed; those that show a limit are not drawn."""
    for name in {name for name, _ in EXPECTED[adapter].values()}:
        found = surveyed(PUBLISHED.folder, folders[adapter], spec(adapter), CASES[name])
        assert found is None or found[0] == []
        assert (found is None) == (not name.startswith("history")), name


@pytest.mark.parametrize("adapter", BY_NAME)
def test_every_declaration_is_deleted_below(adapter: str) -> None:
    assert {*EXPECTED[adapter], *OF_NO_DIFFERENCE[adapter]} == set(sglang_variants.deletions(BY_NAME[adapter]))


@pytest.mark.parametrize(
    ("adapter", "declaration", "name", "why"),
    [(adapter, what, *expected) for adapter, table in EXPECTED.items() for what, expected in table.items()],
)
def test_no_declaration_can_be_left_out(
    adapter: str, declaration: str, name: str, why: str, folders: dict[str, Path]
) -> None:
    """Of a limit: such cases are then drawn, and they fail."""
    found = failures(PUBLISHED.folder, folders[adapter], spec(adapter, declaration), CASES[name])
    assert any(why in line for line in found), found


@pytest.mark.parametrize(
    ("adapter", "declaration", "name"),
    [(adapter, what, name) for adapter, table in OF_NO_DIFFERENCE.items() for what, name in table.items()],
)
def test_what_only_says_how_the_engine_drives_hides_nothing(
    adapter: str, declaration: str, name: str, folders: dict[str, Path]
) -> None:
    assert failures(PUBLISHED.folder, folders[adapter], spec(adapter, declaration), CASES[name]) == []


def test_padding_decides_whether_three_waivers_are_reached(folders: dict[str, Path]) -> None:
    """Without it nobody would need them."""
    name = "seqlens_expanded in DRAFT_EXTEND, of negative lengths"
    for what, times in (("no_change", 1), ("padding_DRAFT_EXTEND", 0)):
        found = surveyed(
            PUBLISHED.folder,
            folders["v0_5_8"],
            spec("v0_5_8", what),
            CASES["history with DRAFT_EXTEND"],
        )
        assert found is not None
        assert (found[0], found[1].waivers[name].needed) == ([], times)


@pytest.mark.parametrize("adapter", BY_NAME)
@pytest.mark.parametrize("addition", NEEDLESS)
def test_no_needless_declaration_can_be_added(adapter: str, addition: str, folders: dict[str, Path]) -> None:
    (line,) = failures(PUBLISHED.folder, folders[adapter], spec(adapter, addition), CASES["history"])
    assert NEEDLESS[addition] in line
