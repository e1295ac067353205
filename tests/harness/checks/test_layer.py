"""What the comparison of a layer's stages says, counts, forgives where a layer declares it, and leaves out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from planted_layers import Clean
from test_layer_detection import BACKEND, BF16, DECODE, DRAFT_EXTEND, DRAFT_EXTEND_V2, EXTEND, FP8, VERIFY, case

from nsa_oracle.harness.checks.bounds import attention_bound
from nsa_oracle.harness.checks.layer import StageJudge
from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.content.edge_logits import LogitKind
from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.expected import expected_metadata
from nsa_oracle.harness.engine.observations import Feed, LayerObservation, LayerStep, Observation, dense_copy
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import Verdict, sentinels
from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.harness.memory.poison import POISON_BYTES
from nsa_oracle.harness.protocol import STAGES, Strictness
from nsa_oracle.harness.report.summary import summary
from nsa_oracle.harness.scenarios.regime import Regime
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Event, Join, Replay, Scenario
from nsa_oracle.harness.subjects.default import optimized_layer
from nsa_oracle.reference import attention, kv_cache
from nsa_oracle.reference.types import AttentionOutputs, ForwardMode, KVCacheDtype, Metadata, StepSemantics

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TWO = (Join(seq_len=11), Join(seq_len=3))
RANDOM_LAYER = {"regime": Regime.RANDOM}
MADE_UP = len(LogitKind)  # rows of logits that isolated top-k is given beside those of the case


@dataclass(frozen=True)
class Seen:
    """What a clean layer showed in one call, to be tampered with."""

    engine: Engine
    layer: LayerObservation
    metadata: Sequence[Metadata]

    def judged(
        self,
        change: Callable[[LayerObservation], None] = lambda seen: None,
        weaker: Mapping[str, Strictness] | None = None,
        tally: LayerTally | None = None,
    ) -> Finding | None:
        """What is found when ``change`` has been made to a copy of the observation."""
        copy = dataclasses.replace(self.layer, steps=tuple(_copied(step) for step in self.layer.steps))
        change(copy)
        judge = StageJudge(self.engine, weaker or {}, LayerTally() if tally is None else tally)
        return judge.compare(copy, self.metadata)

    def found(self, change: Callable[[LayerObservation], None], **options: Any) -> Finding:
        finding = self.judged(change, **options)
        assert finding is not None
        return finding


def _copied(step: LayerStep) -> LayerStep:
    outputs = AttentionOutputs(**{name: tensor.clone() for name, tensor in vars(step.outputs).items()})
    others = [None if tensor is None else tensor.clone() for tensor in (step.positions, step.ragged)]
    return LayerStep(outputs, dense_copy(step.caches), *others)


def seen(scenario: Scenario, feed: Feed = Feed.CHAIN) -> Seen:
    """The last call of ``scenario``. Only graphs need a layer that can be captured, and a GPU if there is one."""
    graphs = feed is Feed.GRAPH
    layer, device = (optimized_layer, DEVICE) if graphs else (Clean, CPU)
    engine = Engine(scenario, BACKEND, layer, device, sentinels(scenario.setup)[0], POISON_BYTES[0], graphs)
    last, metadata = None, []
    for event in scenario.events:
        for shown in engine.run(event):
            if isinstance(shown, Observation):
                metadata = expected_metadata(engine.config, engine.world.req_to_token, shown.batch, shown.in_graph)
            elif shown.feed is feed:
                last = shown
    assert last is not None
    return Seen(engine, last, metadata)


def verified(regime: Regime = Regime.DOMINATING, dtype: KVCacheDtype = BF16, feed: Feed = Feed.CHAIN) -> Seen:
    """Requests of 11 and 3 tokens and 2 drafts each, that keep 4 keys: rows 2 and 3 are the second one's."""
    return _verified(regime, dtype, feed)


@cache
def _verified(regime: Regime, dtype: KVCacheDtype, feed: Feed) -> Seen:
    layer = {"regime": regime, "kv_cache_dtype": dtype}
    return seen(case(*TWO, Eager(mode=VERIFY), layer=layer, index_topk=4), feed)


def outputs(name: str, change: Callable[[torch.Tensor], None], step: int = 0) -> Callable[[LayerObservation], None]:
    """Changes one tensor of one step."""

    def tamper(layer: LayerObservation) -> None:
        shown = layer.steps[step]
        kept = {"topk_indices": shown.positions, "topk_ragged": shown.ragged}
        tensor = kept[name] if name in kept else getattr(shown.outputs, name)
        assert tensor is not None
        change(tensor)

    return tamper


def put(name: str, place: tuple[int, ...], number: float, step: int = 0) -> Callable[[LayerObservation], None]:
    return outputs(name, lambda tensor: tensor.__setitem__(place, number), step)


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


@pytest.mark.parametrize(
    ("dtype", "byte", "part"),
    [
        (BF16, 0, "latent element 0"),
        (BF16, 127, "latent element 63"),
        (BF16, 128, "RoPE element 0"),
        (BF16, 159, "RoPE element 15"),
        (FP8, 63, "latent element 63"),
        (FP8, 64, "scale 0"),
        (FP8, 79, "scale 3"),
        (FP8, 80, "RoPE element 0"),
        (FP8, 111, "RoPE element 15"),
    ],
)
def test_byte_of_the_cache_has_a_name(dtype: KVCacheDtype, byte: int, part: str) -> None:
    clean = verified(dtype=dtype)
    slot = int(clean.layer.load.passes[0].inputs.out_cache_loc[3])
    before = int(as_bytes(clean.layer.steps[0].caches.kv)[slot, 0, byte])

    def change(layer: LayerObservation) -> None:
        as_bytes(layer.steps[0].caches.kv)[slot, 0, byte] = before ^ 1

    finding = clean.found(change)
    assert (finding.kind, finding.field, finding.how, finding.step) == (Kind.VALUE, "kv_cache", "eager chain", 0)
    assert finding.place == f"slot {slot} (running request 1, position 4), {part}"
    assert (finding.got, finding.expected) == (f"byte {before ^ 1:#04x}", f"byte {before:#04x}")
    assert finding.differing == 1


@pytest.mark.parametrize(
    ("byte", "place"),
    [
        (0, "slot 12 (running request 0, position 8), key element 0"),
        (33, "slot 13 (running request 0, position 9), key element 1"),
        (127, "slot 15 (running request 0, position 11), key element 31"),
        (128, "slot 12 (running request 0, position 8), scale"),
        (143, "slot 15 (running request 0, position 11), scale"),
    ],
)
def test_byte_of_an_index_page_has_a_name(byte: int, place: str) -> None:
    """Page 3: 4 keys of 32 bytes, then 4 scales of 4."""
    finding = verified().found(lambda layer: layer.steps[0].caches.index_k[3].__setitem__(byte, 0x55))
    assert (finding.kind, finding.field, finding.place) == (Kind.VALUE, "index_k_cache", place)


def test_write_into_a_page_of_nobody_is_told() -> None:
    finding = verified().found(lambda layer: layer.steps[0].caches.kv[-1].fill_(1))
    assert finding.place == "slot 71 (nobody's), latent element 0"
    assert finding.differing == 160


def test_dummy_page_is_left_out() -> None:
    def change(layer: LayerObservation) -> None:
        layer.steps[0].caches.kv[:4] = 1
        layer.steps[0].caches.index_k[0] = 1

    assert verified().judged(change) is None
    assert (
        verified()
        .found(lambda layer: layer.steps[0].caches.kv[4].fill_(1))
        .place.startswith("slot 4 (running request 0, ")
    )
    assert verified().found(lambda layer: layer.steps[0].caches.index_k[1].fill_(1)).field == "index_k_cache"


def test_logit_is_told_by_row_and_token() -> None:
    finding = verified().found(put("logits", (2, 3), 7.5))
    assert finding.sentence().startswith(
        "wrong value: logits at step 0, row 2 (request 1, draft token 0), token 3 (eager chain): got 7.5, expected "
    )
    assert (finding.differing, finding.compared) == (1, 4 * 13)
    assert [cell.place for cell in finding.neighbours] == [
        f"row 2 (request 1, draft token 0), token {token}" for token in range(7)
    ]
    assert [cell.got == cell.expected for cell in finding.neighbours] == [token != 3 for token in range(7)]


def test_logit_beyond_the_row_must_be_minus_infinity() -> None:
    finding = verified().found(put("logits", (2, 4), 0))
    assert (finding.got, finding.expected) == ("0", "-inf")


@pytest.mark.parametrize("regime", Regime)
def test_nan_is_never_right(regime: Regime) -> None:
    clean = verified(regime)
    for name, place in (("logits", (0, 0)), ("logits", (2, 12)), ("out", (0, 0, 0)), ("lse", (0, 0))):
        assert clean.found(put(name, place, torch.nan)).got.startswith("nan"), name


def test_zeros_of_either_sign_are_equal() -> None:
    clean = verified(Regime.EQUAL)

    def change(layer: LayerObservation) -> None:
        for name in ("logits", "out"):
            tensor = getattr(layer.steps[0].outputs, name)
            tensor[tensor == 0] = -0.0

    out = clean.layer.steps[0].outputs.out
    assert bool((out == 0).any()), "the case has a zero"
    assert clean.judged(change) is None


def test_position_is_told_by_entry() -> None:
    clean = verified(feed=Feed.ISOLATED)
    positions = clean.layer.steps[0].positions
    assert positions is not None
    wrong = int(positions[3, 1]) + 20
    finding = clean.found(put("topk_indices", (3, 1), wrong))
    assert (finding.field, finding.place) == ("topk_indices", "row 3 (request 1, draft token 1), entry 1")
    assert (finding.got, finding.expected) == (str(wrong), str(int(positions[3, 1])))
    assert len(finding.neighbours) == 4


def test_slot_is_told_with_its_owner() -> None:
    clean = verified()
    indices = clean.layer.steps[0].outputs.indices
    finding = clean.found(put("indices", (3, 2), 9))
    assert finding.field == "indices"
    assert finding.got == "slot 9 (running request 0, position 5)"
    assert finding.expected.startswith(f"slot {int(indices[3, 2])} (running request 1, position ")
    assert clean.found(put("indices", (3, 2), -1)).got == "-1"
    assert clean.found(put("indices", (3, 2), 71)).got == "slot 71 (nobody's)"


def test_place_in_the_concatenated_keys_is_compared() -> None:
    clean = seen(case(*TWO, Eager(mode=EXTEND, extend_lens=(2,))), Feed.ISOLATED)
    ragged = clean.layer.steps[0].ragged
    assert ragged is not None
    assert ragged[2, 0] == 11, "the second request's keys begin behind the first's"
    finding = clean.found(put("topk_ragged", (2, 0), 0))
    assert (finding.field, finding.got, finding.expected) == ("topk_ragged", "0", "11")


def test_output_is_told_by_the_slot_whose_value_it_is() -> None:
    clean = verified()
    keys = kv_cache.load_kv(clean.engine.cache_state.config, clean.layer.steps[0].caches.kv, torch.tensor([6]))
    out = clean.layer.steps[0].outputs.out
    right = clean.engine.cache_state.content.decode(out[2, 1])
    assert right is not None
    finding = clean.found(outputs("out", lambda tensor: tensor[2, 1].copy_(keys[0, :64])))
    assert finding.place.startswith("row 2 (request 1, draft token 0), head 1, element ")
    assert finding.got.endswith(" (the value of slot 6 (running request 0, position 2))")
    assert f"(the value of slot {right.slot} (running request 1, position " in finding.expected

    mixed = clean.found(outputs("out", lambda tensor: tensor[2, 1].mul_(0.5).add_(0.5 * keys[0, :64])))
    assert mixed.got.endswith(" (no one key's value)")


def test_output_of_other_content_has_no_origin() -> None:
    assert "value of" not in verified(Regime.LATTICE).found(put("out", (0, 0, 0), 99)).sentence()


def test_lse_is_told_by_head() -> None:
    finding = verified(Regime.LATTICE).found(put("lse", (1, 1), 9))
    assert (finding.kind, finding.field) == (Kind.BOUND, "lse")
    assert finding.place == "row 1 (request 0, draft token 1), head 1"


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
    expected = clean.engine.expected_layer
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
def test_wrong_dtype_and_shape_are_told(name: str) -> None:
    clean = verified()
    right = getattr(clean.layer.steps[0].outputs, name)

    def with_tensor(tensor: torch.Tensor) -> Finding | None:
        step = clean.layer.steps[0]
        changed = replace(step, outputs=replace(step.outputs, **{name: tensor}))
        layer = dataclasses.replace(clean.layer, steps=(changed,))
        return StageJudge(clean.engine, {}, LayerTally()).compare(layer, clean.metadata)

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
def test_wrong_form_of_a_single_stage_is_told(name: str) -> None:
    clean = seen(case(*TWO, Eager(mode=EXTEND, extend_lens=(2,))), Feed.ISOLATED)
    attribute = {"topk_indices": "positions", "topk_ragged": "ragged"}[name]
    step = clean.layer.steps[0]
    right = getattr(step, attribute)
    for wrong in (right.long(), right[:, :-1]):
        layer = dataclasses.replace(clean.layer, steps=(replace(step, **{attribute: wrong}),))
        finding = StageJudge(clean.engine, {}, LayerTally()).compare(layer, clean.metadata)
        assert finding is not None
        assert (finding.kind, finding.field) == (Kind.SHAPE, name)
        assert finding.expected == f"torch.int32 {list(right.shape)}"


# What a layer may declare

SAME_SET = dict.fromkeys(("topk_indices", "indices", "topk_ragged"), Strictness.SAME_SET)


@pytest.mark.parametrize("name", SAME_SET)
def test_same_set_forgives_the_order(name: str) -> None:
    clean = seen(case(*TWO, Eager(mode=EXTEND, extend_lens=(2,)), index_topk=4), Feed.ISOLATED)
    reverse = outputs(name, lambda tensor: tensor.copy_(tensor.flip(1)))
    assert clean.found(reverse).field == name
    tally = LayerTally()
    assert clean.judged(reverse, weaker={name: Strictness.SAME_SET}, tally=tally) is None
    stage = tally.stages[name]
    assert (stage.exact, stage.weaker) == (0, (4 + (0 if name == "indices" else MADE_UP)) * 4)
    others = (other for other in SAME_SET if other != name)
    assert all(tally.stages[other].weaker == 0 for other in others), "what is not declared stays strict"


def test_same_set_forgives_ties_only() -> None:
    """EQUAL content ties all scores: any members do. LATTICE has a best one that must be there."""
    ties, lattice = verified(Regime.EQUAL, feed=Feed.ISOLATED), verified(Regime.LATTICE, feed=Feed.ISOLATED)
    positions = ties.layer.steps[0].positions
    assert positions is not None
    assert positions[0].tolist() == [0, 1, 2, 3]
    other = outputs("topk_indices", lambda tensor: tensor[0].copy_(torch.tensor([11, 3, 7, 5])))
    assert ties.found(other).field == "topk_indices"
    assert ties.judged(other, weaker=SAME_SET) is None

    logits = lattice.layer.steps[0].outputs.logits[0, :12]
    worst = int(logits.argmin())
    finding = lattice.found(put("topk_indices", (0, 3), worst), weaker=SAME_SET)
    assert (finding.kind, finding.field) == (Kind.VALUE, "topk_indices")
    assert finding.place.startswith("row 0 (request 0, draft token 0), ")


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param([0, 1, 2, 2], id="twice"),
        pytest.param([0, 1, 2, -1], id="one too few"),
        pytest.param([0, 1, 2, 12], id="beyond the row"),
        pytest.param([0, 1, 2, 1000], id="beyond everything"),
        pytest.param([0, 1, 2, -2], id="less than nothing"),
        pytest.param([-1, -1, -1, -1], id="nothing"),
    ],
)
def test_same_set_does_not_forgive(wrong: list[int]) -> None:
    ties = verified(Regime.EQUAL, feed=Feed.ISOLATED)
    change = outputs("topk_indices", lambda tensor: tensor[0].copy_(torch.tensor(wrong)))
    assert ties.found(change, weaker=SAME_SET).field == "topk_indices"


def test_same_set_does_not_forgive_another_requests_slot() -> None:
    ties = verified(Regime.EQUAL)
    assert ties.found(put("indices", (0, 0), 21), weaker=SAME_SET).got == "slot 21 (running request 1, position 1)"


def test_same_set_of_a_short_row_may_have_its_gaps_anywhere() -> None:
    short = seen(case(*TWO, Eager(mode=VERIFY), index_topk=8), Feed.ISOLATED)
    gaps = outputs("topk_indices", lambda tensor: tensor[2].copy_(torch.tensor([-1, 3, -1, 0, 2, 1, -1, -1])))
    assert short.found(gaps).field == "topk_indices"
    assert short.judged(gaps, weaker=SAME_SET) is None


ONE_STEP = {"out": Strictness.ONE_STEP}


def nudged(steps: int, place: tuple[int, ...] = (0, 0, 0)) -> Callable[[LayerObservation], None]:
    """An output that many bf16 numbers further from zero."""

    def change(tensor: torch.Tensor) -> None:
        tensor.view(torch.int16)[place] += steps

    return outputs("out", change)


def test_one_step_of_bf16_is_forgiven_and_two_are_not() -> None:
    clean = verified(Regime.LATTICE)
    assert float(clean.layer.steps[0].outputs.out[0, 0, 0]) != 0
    for steps in (1, -1):
        assert clean.found(nudged(steps)).field == "out"
        tally = LayerTally()
        assert clean.judged(nudged(steps), weaker=ONE_STEP, tally=tally) is None
        assert (tally.stages["out"].exact, tally.stages["out"].weaker) == (0, 4 * 2 * 64)
    for steps in (2, -2):
        finding = clean.found(nudged(steps), weaker=ONE_STEP)
        assert (finding.kind, finding.field, finding.differing) == (Kind.VALUE, "out", 1)


def test_one_step_counts_across_zero() -> None:
    """From the least positive number to 0 is one step, and to the least negative one two."""
    clean = verified(Regime.EQUAL)
    zero = tuple(int(i) for i in (clean.layer.steps[0].outputs.out == 0).nonzero()[0])
    least = torch.tensor([1, -0x7FFF], dtype=torch.int16).view(torch.bfloat16)
    for number in least:
        assert clean.judged(put("out", zero, float(number)), weaker=ONE_STEP) is None
    beyond = torch.tensor([2, -0x7FFE], dtype=torch.int16).view(torch.bfloat16)
    for number in beyond:
        assert clean.found(put("out", zero, float(number)), weaker=ONE_STEP).field == "out"


def test_one_step_does_not_forgive_what_is_no_number() -> None:
    for wrong in (torch.nan, torch.inf, -torch.inf):
        assert verified(Regime.LATTICE).found(put("out", (0, 0, 0), wrong), weaker=ONE_STEP).field == "out"


def test_one_step_of_ordinary_numbers_is_judged_by_their_bound() -> None:
    tally = LayerTally()
    assert verified(Regime.RANDOM).judged(weaker=ONE_STEP, tally=tally) is None
    assert (tally.stages["out"].bounded, tally.stages["out"].weaker) == (4 * 2 * 64, 0)


BOUND = dict.fromkeys(("logits", "out", "lse"), Strictness.BOUND)


def test_bound_is_that_of_ordinary_numbers_and_is_counted_apart() -> None:
    clean = verified(Regime.LATTICE)
    for name in BOUND:
        tally = LayerTally()
        assert clean.judged(weaker={name: Strictness.BOUND}, tally=tally) is None
        stage = tally.stages[name]
        assert (stage.exact, stage.bounded, stage.declared) == (0, 0, "within the error bound")
        assert stage.weaker == getattr(clean.layer.steps[0].outputs, name).numel()
        others = (tally.stages[other] for other in BOUND if other != name)
        assert all(other.weaker == 0 and not other.declared for other in others)


@pytest.mark.parametrize("name", BOUND)
def test_bound_forgives_what_its_numbers_allow_and_no_more(name: str) -> None:
    clean = verified(Regime.LATTICE)
    numbers = getattr(clean.layer.steps[0].outputs, name)[0].float().nan_to_num(neginf=0)
    place = (0, *(int(i) for i in torch.unravel_index(numbers.abs().argmax(), numbers.shape)))
    number = float(numbers[place[1:]])

    def off(fraction: float) -> Callable[[LayerObservation], None]:
        return put(name, place, number * (1 + fraction))

    least = 2.0**-8 if name == "out" else 2.0**-22
    assert clean.judged(off(least), weaker=BOUND) is None
    if name != "lse":
        assert clean.found(off(least)).field == name
    finding = clean.found(off(0.5), weaker=BOUND)
    assert (finding.kind, finding.field) == (Kind.BOUND, name)


def test_what_is_declared_is_told() -> None:
    layers = LayerTally()
    layers.stage("out").count_weaker(1024, Strictness.BOUND)
    layers.stage("out").worst = 0.5
    layers.stage("indices").count_weaker(8, Strictness.SAME_SET)
    told = summary(Verdict(layers=layers), [], 0)
    assert re.search(r"│ out +│ 0 +│ 0 +│ 0.5 +│ 1,024 within the error bound +│", told)
    assert re.search(r"│ indices +│ 0 +│ 0 +│ - +│ 8 the same tokens in any order, ties forgiven +│", told)


# The scenario's other run


def test_pass_that_gives_the_same_bits_again_is_as_right(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = verified(Regime.RANDOM, feed=Feed.ISOLATED)
    first, again = LayerTally(), LayerTally()
    judge = StageJudge(clean.engine, {}, first)
    assert judge.compare(clean.layer, clean.metadata) is None
    known = judge.judged
    assert len(known) == 1

    def unneeded(*_: object, **__: object) -> None:
        raise AssertionError("computed once more")

    with monkeypatch.context() as patch:
        patch.setattr(attention, "unrounded", unneeded)
        repeated = StageJudge(clean.engine, {}, again)
        assert repeated.compare(clean.layer, clean.metadata, known) is None
    assert again.stages == first.stages, "and is counted as often"
    assert [judged.tally.stages for judged in repeated.judged] == [judged.tally.stages for judged in known]


@pytest.mark.parametrize("name", ["logits", "indices", "out", "lse", "topk_indices", "topk_ragged"])
def test_pass_that_gives_other_bits_is_judged_anew(name: str) -> None:
    clean = seen(case(*TWO, Eager(mode=EXTEND, extend_lens=(2,)), layer=RANDOM_LAYER), Feed.ISOLATED)
    judge = StageJudge(clean.engine, {}, LayerTally())
    assert judge.compare(clean.layer, clean.metadata) is None
    before = judge.judged

    def compare(change: Callable[[LayerObservation], None]) -> Finding | None:
        copy = dataclasses.replace(clean.layer, steps=tuple(_copied(step) for step in clean.layer.steps))
        change(copy)
        return StageJudge(clean.engine, {}, LayerTally()).compare(copy, clean.metadata, before)

    assert compare(lambda layer: None) is None
    finding = compare(put(name, (0,) * (3 if name == "out" else 2), 99))
    assert finding is not None
    assert finding.field == name


# Ordinary numbers


def test_worst_fraction_of_the_bound_is_kept() -> None:
    clean = verified(Regime.RANDOM)
    tally = LayerTally()
    assert clean.judged(tally=tally) is None
    before = tally.stages["out"].worst
    assert 0 < before < 0.6, "half of the bound at most is the rounding to bf16"
    assert tally.stages["logits"].worst < 0.1

    logits = clean.layer.steps[0].outputs.logits
    assert clean.judged(outputs("logits", lambda tensor: tensor.mul_(1 + 2**-22)), tally=tally) is None
    assert tally.stages["logits"].worst > 0
    finding = clean.found(outputs("logits", lambda tensor: tensor.mul_(1 + 2**-10)), tally=tally)
    assert (finding.kind, finding.field) == (Kind.BOUND, "logits")
    assert tally.stages["logits"].worst <= 1, "what is beyond the bound is a failure, and no fraction of it"
    assert bool((logits[:, 0] != 0).any())


def test_output_may_use_its_bound_and_no_more() -> None:
    clean = verified(Regime.RANDOM)
    expected = clean.engine.expected_layer
    rows = expected.rows(clean.layer.load.passes[0], clean.metadata[0], dense_copy(clean.layer.load.caches))
    indices = clean.layer.steps[0].outputs.indices
    keys = [kv_cache.load_kv(clean.engine.cache_state.config, rows.caches.kv, row[row >= 0]) for row in indices]
    bound, _ = attention_bound(clean.engine.cache_state.config, rows.inputs.q, keys)
    exact, _ = expected.attention(rows, indices)

    def off(fraction: float) -> Callable[[LayerObservation], None]:
        return outputs("out", lambda tensor: tensor.copy_(exact.double() + fraction * bound))

    tally = LayerTally()
    assert clean.judged(off(0.4), tally=tally) is None
    assert 0.3 < tally.stages["out"].worst <= 1
    finding = clean.found(off(2))
    assert (finding.kind, finding.field) == (Kind.BOUND, "out")
    assert finding.sentence().startswith("beyond the error bound: out at step 0, row 0 (request 0, draft token 0), ")


def test_tallies_add_up() -> None:
    one, other = LayerTally(), LayerTally()
    for tally, worst in ((one, 0.25), (other, 0.5)):
        stage = tally.stage("out")
        stage.exact, stage.bounded, stage.weaker, stage.worst = 1, 2, 3, worst
        tally.count("again")
        tally.replays = 4
    other.stage("lse").exact = 7
    one.add(other)
    assert vars(one.stages["out"]) == {"exact": 2, "bounded": 4, "weaker": 6, "worst": 0.5, "declared": ""}
    assert one.stages["lse"].exact == 7
    assert (one.relations, one.replays) == ({"again": 2}, 8)


# Rows that a graph has and the batch has not


@cache
def replayed(mode: ForwardMode, bucket: int, *events: Event) -> Seen:
    return seen(case(Capture(mode=mode, buckets=(bucket,)), *events, Replay(mode=mode)), Feed.GRAPH)


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
