"""How a difference is named, and which cells count."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nsa_oracle.harness import fields
from nsa_oracle.harness.checks.metadata import AS_CAPTURED, compare_metadata
from nsa_oracle.harness.checks.places import RowLabels
from nsa_oracle.harness.checks.tally import Tally
from nsa_oracle.harness.engine.expected import expected_metadata
from nsa_oracle.harness.engine.observations import Observation, StepObservation
from nsa_oracle.harness.fields import FIELDS, Axis
from nsa_oracle.harness.findings import Finding, Kind, Neighbour, Owner
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Finish, Join, Replay
from nsa_oracle.reference.types import BackendConfig, ForwardMode, Metadata
from tests.support.backends import replays
from tests.support.metadata_cases import case, factory_of

CPU = torch.device("cpu")
CONFIG = BackendConfig(
    page_size=4,
    max_context_len=16,
    index_topk=8,
    speculative_num_steps=1,
    speculative_num_draft_tokens=2,
    paged_mqa_num_sms=2,
    flashmla_num_sm_parts=1,
)
POOL = torch.arange(4, 36, dtype=torch.int32).reshape(2, 16).numpy()
BY_NAME = {field.name: field for field in FIELDS}


def batch(mode: ForwardMode, *seq_lens: int, accepts: tuple[int, ...] = (), new: tuple[int, ...] = ()) -> Batch:
    rows = tuple(range(len(seq_lens)))
    return Batch(mode, rows, seq_lens, None, accepts or (1,) * len(seq_lens), new)


def observed(sent: Batch, raw_bs: int | None = None, in_graph: bool = True, **changes: Any) -> Observation:
    """What a clean backend shows of ``sent``, with tensors replaced by ``changes``."""
    seen = Observation(sent, sent.size if raw_bs is None else raw_bs, in_graph, ())
    (metadata,) = expected_metadata(CONFIG, POOL, seen.batch, seen.in_graph)
    return dataclasses.replace(seen, steps=(as_seen(metadata, **changes),))


def as_seen(metadata: Metadata, **changes: Any) -> StepObservation:
    tensors = {name: tensor.clone() for name, tensor in fields.tensors(metadata).items()}
    scalars = {name: getattr(metadata, name) for name in fields.HOST_SCALARS}
    for name, change in changes.items():
        if name in scalars:
            scalars[name] = change
        elif callable(change):
            change(tensors[name])
        else:
            tensors[name] = change
    return StepObservation(
        tensors, {n: t.dtype for n, t in tensors.items()}, {n: t.device for n, t in tensors.items()}, scalars
    )


def verdict(seen: Observation) -> Finding | None:
    return compare_metadata(seen, expected_metadata(CONFIG, POOL, seen.batch, seen.in_graph), CPU, Tally())


DECODED = batch(ForwardMode.DECODE, 5, 2)


def test_clean_observation_has_no_finding_and_is_counted() -> None:
    seen = observed(DECODED)
    tally = Tally()
    assert compare_metadata(seen, expected_metadata(CONFIG, POOL, seen.batch, seen.in_graph), CPU, tally) is None
    assert tally.fields == 12
    assert tally.cells == sum(tensor.numel() for tensor in seen.steps[0].tensors.values())


@pytest.mark.parametrize(
    ("mode", "new"),
    [
        *((mode, ()) for mode in ForwardMode if mode not in (ForwardMode.IDLE, ForwardMode.EXTEND)),
        *((ForwardMode.EXTEND, new) for new in ((2, 1), (2, 0), (0, 2), (0, 0))),  # also as many tokens as requests
    ],
)
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_each_live_cell_counts_and_no_dead_one(name: str, mode: ForwardMode, new: tuple[int, ...]) -> None:
    """Flip every cell of every field by itself, by the definition of live cells and not by the judge's code."""
    sent = batch(mode, 5, 2, accepts=(0, 2), new=new)
    clean = observed(sent, in_graph=mode is not ForwardMode.EXTEND)
    tensor = clean.steps[0].tensors.get(name)
    if tensor is None:
        assert verdict(clean) is None
        return
    lengths = (5, 2) if mode is ForwardMode.EXTEND else clean.steps[0].tensors["seqlens_expanded"].tolist()
    for index in torch.cartesian_prod(*map(torch.arange, tensor.shape)).reshape(-1, tensor.dim()).tolist():

        def flip(cells: torch.Tensor, at: tuple[int, ...] = tuple(index)) -> None:
            cells[at] += 1

        found = verdict(observed(sent, in_graph=mode is not ForwardMode.EXTEND, **{name: flip}))
        dead = {
            "page_table_1": lambda row, column: column >= lengths[row],
            "real_page_table": lambda row, column: column * CONFIG.page_size >= lengths[row],
            "flashmla_metadata": lambda _, entry: entry == 7,
        }.get(name, lambda *_: False)
        if dead(*index):
            assert found is None
        else:
            assert found is not None
            assert (found.kind, found.field, found.differing) == (Kind.VALUE, name, 1)
            assert (int(found.got), found.expected) == (int(tensor[tuple(index)]) + 1, str(int(tensor[tuple(index)])))


def test_sentence() -> None:
    def spoil(cells: torch.Tensor) -> None:
        cells[1, 0:2] = -7

    found = verdict(observed(DECODED, raw_bs=1, page_table_1=spoil))
    assert found is not None
    assert found.sentence() == (
        "wrong value: page_table_1 at step 0, row 1 (padding request 1, draft token 0), column 0: "
        "got -7, expected 20; 2 of 7 live cells differ"
    )
    assert [(n.got, n.expected) for n in found.neighbours] == [("-7", "20"), ("-7", "21")], "dead cells are left out"


def test_neighbours_are_three_on_either_side() -> None:
    def spoil(cells: torch.Tensor) -> None:
        cells[0, 8] = 0

    found = verdict(observed(batch(ForwardMode.DECODE, 14), page_table_1=spoil))
    assert found is not None
    where = "row 0 (request 0, draft token 0), column"
    assert found.neighbours == tuple(
        Neighbour(f"{where} {n}", "0" if n == 8 else str(4 + n), str(4 + n)) for n in range(5, 12)
    )


def test_picture_shows_whose_the_rows_are_and_which_cells_count() -> None:
    def spoil(cells: torch.Tensor) -> None:
        cells[2, 1] = -7

    found = verdict(observed(batch(ForwardMode.DRAFT_EXTEND, 9, 2, accepts=(1, 2)), raw_bs=1, page_table_1=spoil))
    assert found is not None
    seen = found.picture
    assert seen is not None
    assert (seen.shape, seen.axis) == ((4, 16), "column")
    assert [(row.owner, row.states) for row in seen.rows] == [
        (Owner.REQUEST, "." * 9 + "-" * 7),
        (Owner.PADDING, "." + "-" * 15),
        (Owner.PADDING, ".x" + "-" * 14),
        (Owner.TAIL, "-" * 16),
    ]


class EqualsAll(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__

    def __ne__(self, other: object) -> bool:
        return False


def test_sentence_without_place_or_count() -> None:
    assert Finding(Kind.INPUT, "x", "a", "b").sentence() == "input modified: x: got a, expected b"
    assert Finding(Kind.SHAPE, "x", "a", "b", step=2).sentence() == "wrong shape: x at step 2: got a, expected b"


@pytest.mark.parametrize(
    ("change", "kind", "got", "expected"),
    [
        ({"page_size": 8}, Kind.HOST_SCALAR, "8", "4"),
        ({"max_seq_len_k": None}, Kind.HOST_SCALAR, "None", "16, an int of Python"),
        ({"max_seq_len_k": torch.tensor(16)}, Kind.HOST_SCALAR, "tensor(16)", "16, an int of Python"),
        ({"max_seq_len_k": EqualsAll(17)}, Kind.HOST_SCALAR, "17", "16"),
        ({"max_seq_len_q": torch.tensor([1, 1])}, Kind.HOST_SCALAR, "tensor([1, 1])", "1, an int of Python"),
        ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int64)}, Kind.DTYPE, "torch.int64", "torch.int32"),
        ({"cu_seqlens_k": torch.zeros(3, 1, dtype=torch.int32)}, Kind.SHAPE, "[3, 1]", "[3]"),
        ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32, device="meta")}, Kind.DEVICE, "meta", "cpu"),
        ({"token_to_batch_idx": torch.zeros(2)}, Kind.UNEXPECTED, "a tensor of shape [2]", "None"),
    ],
)
def test_form_is_compared_before_content(change: dict[str, Any], kind: Kind, got: str, expected: str) -> None:
    found = verdict(observed(DECODED, **change))
    assert found is not None
    assert (found.kind, found.got, found.expected, found.step) == (kind, got, expected, 0)
    assert len(found.sentence().splitlines()) == 1


def test_first_wrong_step_is_named() -> None:
    config = dataclasses.replace(CONFIG, speculative_num_steps=3)
    seen = observed(DECODED)

    def spoil(cells: torch.Tensor) -> None:
        cells[1] = 9

    (good,), (bad,) = seen.steps, observed(DECODED, cu_seqlens_q=spoil).steps
    seen = dataclasses.replace(seen, steps=(good, bad, bad))
    found = compare_metadata(seen, expected_metadata(config, POOL, seen.batch, seen.in_graph), CPU, Tally())
    assert found is not None
    assert (found.step, found.field, found.place) == (1, "cu_seqlens_q", "bound before row 1")


def test_empty_batch() -> None:
    seen = observed(Batch(ForwardMode.IDLE, (), (), (), ()), in_graph=False)
    assert verdict(seen) is None
    assert RowLabels(seen).rows == []


def labels(sent: Batch, raw_bs: int) -> list[str]:
    seen = observed(sent, raw_bs)
    return [RowLabels(seen).row(number) for number in range(len(seen.steps[0].tensors["seqlens_expanded"]))]


def test_rows_are_named_by_request_and_token() -> None:
    assert labels(batch(ForwardMode.DECODE, 5, 2), 1) == [
        "row 0 (request 0, draft token 0)",
        "row 1 (padding request 1, draft token 0)",
    ]
    assert labels(batch(ForwardMode.TARGET_VERIFY, 5, 2), 2) == [
        "row 0 (request 0, draft token 0)",
        "row 1 (request 0, draft token 1)",
        "row 2 (request 1, draft token 0)",
        "row 3 (request 1, draft token 1)",
    ]
    assert labels(batch(ForwardMode.DRAFT_EXTEND, 5, 2, accepts=(0, 2)), 2) == [
        "row 0 (request 1, draft token 0)",
        "row 1 (request 1, draft token 1)",
        "row 2 (unused tail)",
        "row 3 (unused tail)",
    ]


def test_prefill_tables_have_one_row_a_request() -> None:
    """In EXTEND a page table is indexed by request, as are the bounds of its queries."""
    sent = batch(ForwardMode.EXTEND, 5, 2, new=(2, 1))

    def spoil(cells: torch.Tensor) -> None:
        cells[1] += 1

    for name, place in (
        ("page_table_1", "request 1, column 0"),
        ("real_page_table", "request 1, page column 0"),
        ("cu_seqlens_q", "bound before request 1"),
    ):
        found = verdict(observed(sent, in_graph=False, **{name: spoil}))
        assert found is not None
        assert found.place.endswith(place)
        assert "token 1" not in found.place


def test_every_axis_names_itself() -> None:
    named = RowLabels(observed(DECODED))
    for field in FIELDS:
        place = named.place(field, (0,) * len(field.axes))
        assert "0" in place
        assert len(place.split(", ")) >= len(field.axes)
    assert named.at(Axis.PART, 3) == "part 3"
    assert named.at(Axis.ROW, 9) == "row 9 (unused tail)"


FORGOTTEN = case(
    Capture(mode=ForwardMode.DECODE, buckets=(1,)),
    Join(seq_len=3),
    Eager(mode=ForwardMode.DECODE),
    Finish(request=0),
    Join(seq_len=6),
    Replay(mode=ForwardMode.DECODE),
)


def test_replay_that_refreshes_nothing_is_told_by_what_the_graph_read() -> None:
    """It shows the metadata of the eager call, whose buffers are others; none has moved."""
    with pytest.raises(OracleFailure) as caught:
        judge(FORGOTTEN, factory_of(replays.RefreshesNothing), CPU)
    finding = caught.value.finding
    assert (finding.kind, finding.field, finding.got, finding.expected) == (Kind.VALUE, "cache_seqlens_int32", "1", "6")
    assert f"request 0 ({AS_CAPTURED}): got 1" in finding.sentence()


def test_buffer_that_moved_with_the_right_content_is_told_as_moved() -> None:
    with pytest.raises(OracleFailure) as caught:
        judge(FORGOTTEN, factory_of(replays.RebuildsMetadata), CPU)
    assert caught.value.finding.kind is Kind.ADDRESS
