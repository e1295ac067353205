"""What the comparison of a layer's stages reports first, counts, accepts from the other run, and leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.engine.observations import Feed, LayerObservation, dense_copy
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.protocol import STAGES
from nsa_oracle.harness.scenarios.scenario import Accept, Eager, Join
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference import attention
from nsa_oracle.reference.types import StepSemantics
from tests.support.layer_cases import FP8, case
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, DRAFT_EXTEND_V2, EXTEND
from tests.support.seen_layers import MADE_UP, RANDOM_LAYER, TWO, copied_step, put, replayed, seen, verified

# Nothing is wrong


@pytest.mark.parametrize("feed", [Feed.ISOLATED, Feed.CHAIN])
@pytest.mark.parametrize("regime", Regime)
def test_clean_layer_is_clean(regime: Regime, feed: Feed) -> None:
    tally = LayerTally()
    assert verified(regime, FP8, feed).judged(tally=tally) is None
    compared = {name for name in STAGES if name != "topk_ragged" and (feed is Feed.ISOLATED or name != "topk_indices")}
    assert set(tally.stages) == compared


def test_numbers_are_counted_by_how_they_are_compared() -> None:
    tally = LayerTally()
    assert verified(feed=Feed.ISOLATED).judged(tally=tally) is None
    counts = {name: (stage.exact, stage.bounded, stage.weaker) for name, stage in tally.stages.items()}
    slots = (1 + 3 * 5 + 2) * 4
    assert counts == {
        "kv_cache": (2 * (slots - 4) * 80 * 2, 0, 0),  # once more after the store of made-up keys
        "index_k_cache": (2 * (slots - 4) * 36, 0, 0),
        "logits": (4 * 13, 0, 0),
        "topk_indices": ((4 + MADE_UP) * 4, 0, 0),
        "indices": ((4 + MADE_UP) * 4, 0, 0),
        "out": (4 * 2 * 64, 0, 0),
        "lse": (0, 4 * 2, 0),
    }


# What is said


def test_first_step_that_is_wrong_is_named() -> None:
    advancing = StepSemantics.ADVANCING
    clean = seen(case(*TWO, Eager(mode=DECODE), num_steps=3, step_semantics=advancing))
    assert clean.judged() is None
    for step in (2, 1):
        finding = clean.found(put("lse", (0, 0), 9, step=step))
        assert (finding.step, finding.field) == (step, "lse")

    def both(layer: LayerObservation) -> None:
        put("logits", (0, 0), 99, step=2)(layer)
        put("lse", (0, 0), 9, step=1)(layer)

    finding = clean.found(both)
    assert (finding.step, finding.field) == (1, "lse")


def test_first_stage_that_is_wrong_is_named() -> None:
    """In a chain each stage is judged by the layer's own result of the stage before."""
    clean = verified(Regime.LATTICE)
    broken: list[tuple[str, Callable[[LayerObservation], None]]] = [
        ("lse", put("lse", (0, 0), 99)),
        ("out", put("out", (0, 0, 0), 99)),
        ("indices", put("indices", (0, 0), 1)),
        ("logits", put("logits", (0, 0), -99)),
        ("index_k_cache", lambda layer: layer.steps[0].caches.index_k[4].fill_(0)),
        ("kv_cache", lambda layer: layer.steps[0].caches.kv[-1].fill_(0)),
    ]
    for number, (name, _) in enumerate(broken):

        def change(layer: LayerObservation, number: int = number) -> None:
            for _, tamper in broken[: number + 1]:
                tamper(layer)

        assert clean.found(change).field == name


def test_stage_is_judged_by_the_stage_before() -> None:
    """Wrong slots are one failure: what attention makes of them is right."""
    clean = verified(Regime.LATTICE)
    expected = clean.layer_engine.expected
    a_pass = clean.layer.load.passes[0]
    indices = clean.layer.steps[0].outputs.indices.clone()
    indices[0, 0] = 7  # a token that the row sees and did not choose
    rows = expected.rows(a_pass, clean.metadata[0], dense_copy(clean.layer.load.caches))
    out, lse = expected.attention(rows, indices)

    def change(layer: LayerObservation) -> None:
        layer.steps[0].outputs.indices.copy_(indices)
        layer.steps[0].outputs.out.copy_(out)
        layer.steps[0].outputs.lse.copy_(lse)

    finding = clean.found(change)
    assert (finding.field, finding.differing) == ("indices", 1)


# Form


@pytest.mark.parametrize("name", ["logits", "indices", "out", "lse"])
def test_wrong_dtype_and_shape_are_reported(name: str) -> None:
    clean = verified()
    right = getattr(clean.layer.steps[0].outputs, name)

    def with_tensor(tensor: torch.Tensor) -> Finding | None:
        step = clean.layer.steps[0]
        changed = replace(step, outputs=replace(step.outputs, **{name: tensor}))
        layer = dataclasses.replace(clean.layer, steps=(changed,))
        return clean.judge().compare(layer, clean.metadata)

    other = torch.float64 if right.is_floating_point() else torch.int64
    finding = with_tensor(right.to(other))
    assert finding is not None
    assert (finding.kind, finding.field) == (Kind.DTYPE, name)
    assert (finding.got, finding.expected) == (str(other), str(right.dtype))

    shape = list(right.shape)
    for wrong, want in (
        (right[:-1], shape),
        (right[..., :-1], shape),
        (torch.cat([right, right], dim=1), shape),
        (right.unsqueeze(1), shape),
    ):
        finding = with_tensor(wrong)
        assert finding is not None
        assert (finding.kind, finding.field) == (Kind.SHAPE, name)
        assert (finding.got, finding.expected) == (str(list(wrong.shape)), str(want))
    assert with_tensor(torch.cat([right, right[:1]])) is None, "rows behind the batch are nobody's"


@pytest.mark.parametrize("name", ["topk_indices", "topk_ragged"])
def test_wrong_form_of_a_single_stage_is_reported(name: str) -> None:
    clean = seen(case(*TWO, Eager(mode=EXTEND, extend_lens=(2,))), Feed.ISOLATED)
    attribute = {"topk_indices": "positions", "topk_ragged": "ragged"}[name]
    step = clean.layer.steps[0]
    right = getattr(step, attribute)
    narrow = right[:, :-1]
    for wrong, form in (
        (right.long(), (Kind.DTYPE, "torch.int64", "torch.int32")),
        (narrow, (Kind.SHAPE, str(list(narrow.shape)), str(list(right.shape)))),
    ):
        layer = dataclasses.replace(clean.layer, steps=(replace(step, **{attribute: wrong}),))
        finding = clean.judge().compare(layer, clean.metadata)
        assert finding is not None
        assert finding.field == name
        assert (finding.kind, finding.got, finding.expected) == form


# The scenario's other run


def test_pass_that_gives_the_same_bits_again_is_as_right(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = verified(Regime.RANDOM, feed=Feed.ISOLATED)
    first, again = LayerTally(), LayerTally()
    judge = clean.judge(tally=first)
    assert judge.compare(clean.layer, clean.metadata) is None
    known = judge.judged
    assert len(known) == 1

    def unneeded(*_: object, **__: object) -> None:
        raise AssertionError("computed once more")

    with monkeypatch.context() as patch:
        patch.setattr(attention, "unrounded", unneeded)
        repeated = clean.judge(tally=again)
        assert repeated.compare(clean.layer, clean.metadata, known) is None
    assert again.stages == first.stages, "and is counted as often"
    assert [judged.tally.stages for judged in repeated.judged] == [judged.tally.stages for judged in known]


@pytest.mark.parametrize("name", ["logits", "indices", "out", "lse", "topk_indices", "topk_ragged"])
def test_pass_that_gives_other_bits_is_judged_anew(name: str) -> None:
    clean = seen(case(*TWO, Eager(mode=EXTEND, extend_lens=(2,)), layer=RANDOM_LAYER), Feed.ISOLATED)
    judge = clean.judge()
    assert judge.compare(clean.layer, clean.metadata) is None
    before = judge.judged

    def compare(change: Callable[[LayerObservation], None]) -> Finding | None:
        copy = dataclasses.replace(clean.layer, steps=tuple(copied_step(step) for step in clean.layer.steps))
        change(copy)
        return clean.judge().compare(copy, clean.metadata, before)

    assert compare(lambda layer: None) is None
    finding = compare(put(name, (0,) * (3 if name == "out" else 2), 99))
    assert finding is not None
    assert finding.field == name


# Rows that a graph has and the batch has not


@pytest.mark.parametrize(
    ("name", "place", "number", "expected"),
    [
        ("logits", (2, 5), 0.0, "-inf"),
        ("indices", (2, 0), 0, "-1"),
        ("out", (3, 1, 9), 0.5, "0"),
        ("out", (3, 1, 9), torch.nan, "0"),
        ("lse", (2, 1), 0.0, "-inf"),
    ],
)
def test_unused_tail_sees_no_key(name: str, place: tuple[int, ...], number: float, expected: str) -> None:
    """2 requests in a graph of 4 rows, of which one had both its drafts accepted and the other none."""
    clean = replayed(DRAFT_EXTEND, 2, *TWO, Accept(accept_lengths=(2, 0)))
    assert clean.layer.load.passes[0].rows == 2
    assert clean.judged() is None
    finding = clean.found(put(name, place, number))
    assert (finding.kind, finding.field, finding.expected) == (Kind.VALUE, name, expected)
    assert (finding.place, finding.differing, finding.how) == (f"row {place[0]} (unused tail)", 1, "captured chain")


def test_rows_of_padding_may_hold_anything() -> None:
    """A padded request of one token is a row of its own, of unspecified content."""
    clean = replayed(DECODE, 3, *TWO)
    assert len(clean.layer.steps[0].outputs.lse) == 3

    def change(layer: LayerObservation) -> None:
        for tensor in vars(layer.steps[0].outputs).values():
            tensor[2:] = 77

    assert clean.judged(change) is None
    assert clean.judged(put("lse", (1, 0), 77)) is not None


def test_padding_between_live_rows_and_the_tail_may_hold_anything() -> None:
    """DRAFT_EXTEND: rows of the batch, one of each padded request, then the tail."""
    clean = replayed(DRAFT_EXTEND, 2, Join(seq_len=11), Accept(accept_lengths=(1,)))
    assert clean.judged(put("lse", (1, 0), 77)) is None, "the padded request's"
    assert clean.found(put("lse", (2, 0), 77)).place == "row 2 (unused tail)"
    assert clean.found(put("lse", (0, 0), 77)).place == "row 0 (request 0, draft token 0), head 0"


def test_row_without_a_key_is_compared() -> None:
    clean = seen(case(Join(seq_len=1), Eager(mode=DRAFT_EXTEND_V2)))
    outputs_ = clean.layer.steps[0].outputs
    assert (outputs_.out[0] == 0).all()
    assert (outputs_.lse[0] == -torch.inf).all()
    assert (outputs_.indices[0] == -1).all()
    assert clean.found(put("lse", (0, 0), 0)).expected == "-inf"
    assert clean.found(put("out", (0, 0, 0), 1)).expected.startswith("0")
    assert clean.found(put("indices", (0, 0), 4)).expected == "-1"
