"""Limits as a backend or a layer declares them, and cases drawn within a scale."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from nsa_oracle.harness.scenarios.limits import LAYER_FIELDS, Limits, declared
from nsa_oracle.harness.scenarios.scales import Scale
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Finish, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Inputs, Layer, Setup
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.search import drawing
from nsa_oracle.reference.types import ForwardMode
from tests.support.metadata_cases import DECODE, VERIFY


def limits(**sizes: Sequence[Any]) -> Limits:
    return declared(SimpleNamespace(sizes=sizes), LAYER_FIELDS, "neither a layer nor its setup")


def only(*modes: ForwardMode) -> Limits:
    return Limits(modes=tuple(mode for mode in ForwardMode if mode in modes))


def drawn(scale: Scale, count: int = 25) -> list[Scenario]:
    return drawing.drawn(scenarios(scale), count, seed=0)


def values(scenario: Scenario) -> dict[str, Any]:
    setup = scenario.setup
    return {**dict(setup), **dict(setup.inputs), **dict(setup.layer or ())}


CASE = Scenario(
    setup=Setup(
        page_size=16,
        max_context_len=33,
        index_topk=8,
        num_steps=2,
        num_draft_tokens=2,
        pool_size=2,
        inputs=Inputs(strided=True),
        layer=Layer(num_heads=3),
    ),
    events=(
        Capture(mode=DECODE, buckets=(2,)),
        Join(seq_len=3),
        Replay(mode=DECODE),
        Eager(mode=VERIFY),
        Finish(request=0),
    ),
)
