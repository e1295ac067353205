"""What a backend may declare about itself, and how a malformed declaration is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nsa_oracle.harness.fields import FIELDS, Axis
from nsa_oracle.harness.scenarios.batch import Batch, Padding
from nsa_oracle.harness.subjects.declarations import (
    ASKS_THE_MOST,
    Call,
    OwnField,
    Role,
    Waiver,
    behind_last_token,
    everywhere,
    of_negative_lengths,
    of_padding,
    read_declarations,
)
from nsa_oracle.harness.subjects.misspelt import misspelt_declaration
from nsa_oracle.reference.types import BackendConfig, ForwardMode
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, DRAFT_EXTEND_V2, IDLE, case

BY_NAME = {field.name: field for field in FIELDS}
CONFIG = BackendConfig(4, 16, 8, 3, 3)
# Lengths 5, 2 and, as padding, 1; the first request has one row, the second none, padding three.
CALL = Call(CONFIG, Batch(DRAFT_EXTEND, (0, 1, 0), (5, 2, 1), None, (1, 0, 3)), 2, True, 0)


def read(**attributes: Any) -> Any:
    return read_declarations(SimpleNamespace(**attributes))


def test_nothing_declared_asks_the_most() -> None:
    assert read() == ASKS_THE_MOST
    (role,) = ASKS_THE_MOST.roles
    assert role.modes == tuple(ForwardMode)
    assert (role.name, role.count(4)) == (None, 4)


def test_roles_and_steps() -> None:
    found = read(roles={"draft": ("DECODE", IDLE)}, modes=("DECODE", "IDLE"), step_backends={"draft": "N-1"})
    assert found.roles == (Role("draft", (DECODE, IDLE), "N-1"),)
    assert found.role_of(IDLE).count(4) == 3
    assert read(step_backends="1").roles[0].count(4) == 1


MALFORMED = {
    "steps": ({"step_backends": 3}, "step_backends cannot be 3; choose from N, N-1, 1"),
    "steps of no role": (
        {"roles": {"draft": ("DECODE",)}, "modes": ("DECODE",), "step_backends": {"verify": "1"}},
        "step_backends: there is no role 'verify'; choose from draft",
    ),
    "a list of roles": ({"roles": ["draft"]}, "roles must map names to modes"),
    "an unknown mode": ({"roles": {"draft": ("PREFILL",)}}, "roles: there is no mode 'PREFILL'"),
    "no role": ({"roles": {"draft": ("DECODE",)}}, "roles: none has EXTEND, IDLE, TARGET_VERIFY, DRAFT_EXTEND,"),
    "no roles": ({"roles": {}}, "roles names no role; leave it out"),
    "two roles": (
        {"roles": {"a": ("DECODE",), "b": ("DECODE",)}, "modes": ("DECODE",)},
        "roles: DECODE in a and b; a mode must have one role",
    ),
    "padding": ({"padding": {"DECODE": 1}}, "padding must map modes to nsa_oracle.harness.scenarios.batch.Padding"),
    "absent": ({"absent": ("page_table_1",)}, "absent must map modes to fields; it is of type tuple"),
    "a field": (
        {"absent": {"DECODE": ("page_table_2",)}},
        "absent: there is no field 'page_table_2'; known are cache_seqlens_int32, ",
    ),
    "a pair of fields": (
        {"absent": {"DECODE": ("indexer_k_start_end",)}},
        "absent: there is no field 'indexer_k_start_end'; there are 'indexer_k_start' and 'indexer_k_end'",
    ),
    "a field that is nowhere": (
        {"absent": {"DECODE": ("token_to_batch_idx",)}},
        "absent: no call expects 'token_to_batch_idx' in DECODE; remove it",
    ),
    "a field of a mode that is not declared": (
        {"absent": {"*": ("token_to_batch_idx",)}, "modes": ("DECODE",)},
        "absent: no call expects 'token_to_batch_idx' in any mode; remove it",
    ),
    "a schedule in prefill": ({"absent": {"EXTEND": ("flashmla_metadata",)}}, "expects 'flashmla_metadata' in EXTEND"),
    "a host scalar": ({"absent": {"*": ("page_size",)}}, "absent: no call expects 'page_size' in any mode; remove it"),
    "a text for fields": ({"unjudged": {"*": "page_table_1"}}, "unjudged: fields must be a list or tuple"),
    "waivers": ({"waivers": ("page_table_1",)}, "waivers must be a list of "),
    "one waiver": (
        {"waivers": Waiver("DECODE", "page_table_1", "x")},
        "waivers must be a list or tuple of nsa_oracle.harness.subjects.declarations.Waiver; it is of type Waiver; "
        "write waivers = (Waiver(...),)",
    ),
    "stand-ins": ({"stand_ins": ("x",)}, "stand_ins must be a function that gives names; it is of type tuple"),
    "empty batches": ({"empty_batches": "no"}, "empty_batches must be True or False; it is of type str"),
    "modes twice": ({"modes": ("DECODE", DECODE)}, "modes: DECODE is listed twice; remove one of them"),
    "absent in another mode": (
        {"modes": ("DECODE",), "absent": {"EXTEND": ("page_table_1",)}},
        "absent: modes excludes EXTEND; remove it there, or add it to modes",
    ),
    "a waiver of another mode": (
        {"modes": ("DECODE",), "waivers": (Waiver("EXTEND", "page_table_1", "x"),)},
        "waivers: modes excludes EXTEND",
    ),
    "padding of another mode": (
        {"modes": ("IDLE",), "padding": {"TARGET_VERIFY": Padding()}},
        "padding: modes excludes TARGET_VERIFY",
    ),
    "a reason": ({"waivers": (Waiver("DECODE", "page_table_1", " "),)}, "has no reason"),
    "a waiver's mode": ({"waivers": (Waiver("PREFILL", "page_table_1", "x"),)}, "waivers: there is no mode"),
    "a waiver's field": ({"waivers": (Waiver("DECODE", "tables", "x"),)}, "waivers: there is no field 'tables'"),
}


@pytest.mark.parametrize(("attributes", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_declarations_are_refused_in_one_line(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read(**attributes)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


class Base:
    modes = ("DECODE",)


class Derived(Base):
    mode = ("EXTEND",)


class Both(Derived):
    modes = ("EXTEND",)


def test_a_misspelt_declaration_is_told_beside_that_of_a_base_class() -> None:
    assert misspelt_declaration(Derived) == "it has mode: did you mean modes?"
    assert misspelt_declaration(Both) == ""


def test_idle_batches_are_padded_as_their_graph_is() -> None:
    assert read(modes=("IDLE",), padding={"DECODE": Padding()}).padding == {DECODE: Padding()}


MISSPELT = {
    "mode": ("DECODE",),
    "size": {"page_size": (64,)},
    "waiver": Waiver("DECODE", "page_table_1", "x"),
    "own_field": (OwnField("plan", lambda metadata, call: None),),
    "mirror": {"eager": ("equal",)},
    "role": {"draft": ("DECODE",)},
    "step_backend": "N-1",
    "paddings": {"DECODE": Padding()},
    "absents": {"*": ("page_table_1",)},
    "unjudge": {DECODE: ["page_table_1"]},
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_declaration_is_told(name: str) -> None:
    line = misspelt_declaration(SimpleNamespace(**{name: MISSPELT[name]}))
    assert line.startswith(f"it has {name}: did you mean ")


@pytest.mark.parametrize(
    "attributes",
    [
        {"mode": "DECODE"},
        {"mode": ("fast", "slow")},
        {"size": (64,)},
        {"size": {"width": 3}},
        {"mirror": True},
        {"role": {"draft": "x"}},
        {"mode": ("DECODE",), "modes": ("DECODE",)},
        {"unrelated": ("DECODE",)},
    ],
)
def test_attributes_of_the_author_are_no_misspelt_declarations(attributes: dict[str, Any]) -> None:
    assert misspelt_declaration(SimpleNamespace(**attributes)) == ""


def test_a_field_of_the_author_may_be_named_by_other_declarations() -> None:
    own = OwnField("plan", lambda metadata, call: None)
    found = read(own_fields=(own,), absent={"DECODE": ("plan",)}, waivers=(Waiver("IDLE", "plan", "why"),))
    assert found.own_names == ("plan",)
    assert found.lists(found.absent, DECODE, "plan")
    assert not found.lists(found.absent, IDLE, "plan")
    assert OwnField("page_table_1", lambda metadata, call: None).field is BY_NAME["page_table_1"]


def test_padding_is_that_of_the_mode() -> None:
    found = read(padding={"DRAFT_EXTEND": Padding(seq_len="all", pool_row=2, accept_length="all")})
    empty = Batch(DRAFT_EXTEND, (), (), (), ())
    setup = case(num_draft_tokens=3).setup
    assert found.padded(empty, 1, setup) == Batch(DRAFT_EXTEND, (2,), (3,), (3,), (3,))
    assert ASKS_THE_MOST.padded(empty, 1, setup) == Batch(DRAFT_EXTEND, (0,), (1,), (1,), (1,))
    assert found.padded(Batch(DECODE, (), (), (), ()), 1, setup) == Batch(DECODE, (0,), (1,), (1,), (1,))
    zero = case(num_draft_tokens=3, padding_len=0).setup
    assert ASKS_THE_MOST.padded(empty, 1, zero) == Batch(DRAFT_EXTEND, (0,), (0,), (0,), (1,))
    assert found.padded(empty, 1, zero) == Batch(DRAFT_EXTEND, (2,), (3,), (3,), (3,)), "a declared padding stays"


def cells(mask: Any, name: str, size: int, call: Call = CALL) -> list[int]:
    return np.flatnonzero(mask(call, BY_NAME[name], (size,))).tolist()


def test_cells_behind_the_last_token() -> None:
    assert cells(behind_last_token, "seqlens_expanded", 9) == [4, 5, 6, 7, 8]
    assert cells(behind_last_token, "nsa_cu_seqlens_k", 10) == [5, 6, 7, 8, 9]
    assert cells(behind_last_token, "cache_seqlens_int32", 3) == []


def test_cells_of_padding() -> None:
    assert cells(of_padding, "seqlens_expanded", 9) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert cells(of_padding, "nsa_cu_seqlens_k", 10) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert cells(of_padding, "cache_seqlens_int32", 3) == [2]
    assert cells(of_padding, "cu_seqlens_k", 4) == [3]


def test_cells_of_negative_lengths() -> None:
    """The rows of the padding would have lengths -1, 0 and 1."""
    assert cells(of_negative_lengths, "seqlens_expanded", 9) == [1]
    assert cells(of_negative_lengths, "nsa_cu_seqlens_k", 10) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert cells(of_negative_lengths, "cache_seqlens_int32", 3) == []
    all_rows = Call(CONFIG, Batch(DRAFT_EXTEND_V2, (0, 1), (5, 2), None, (1, 1)), 2, True, 0)
    assert cells(of_negative_lengths, "seqlens_expanded", 6, all_rows) == [], "-1 + 1 is not negative"


def test_everywhere_is_everywhere() -> None:
    assert everywhere(CALL, BY_NAME["page_table_1"], (2, 3)).all()
    assert BY_NAME["page_table_1"].axes[0] is Axis.ROW
