"""Which token each row of a pass is, and passes of some of the requests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import given, settings

from nsa_oracle.harness.engine.cache_state import query_rows
from nsa_oracle.harness.engine.expected import _as_forward_batch, expected_metadata
from nsa_oracle.harness.engine.passes import Pass
from nsa_oracle.harness.judge import sentinels
from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.scales import SMALL
from nsa_oracle.harness.scenarios.scenario import Accept, Eager, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.reference.cycle import out_cache_loc, query_positions, request_of_row
from nsa_oracle.reference.types import BackendConfig, ForwardMode, Metadata, StepSemantics
from tests.support.layer_cases import case
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, DRAFT_EXTEND_V2, EXTEND, VERIFY
from tests.support.model import Model


def calls(scenario: Scenario) -> Iterator[tuple[World, Batch]]:
    world = World(scenario, sentinels(scenario.setup)[0])
    for event in scenario.events:
        batch = world.apply(event)
        if isinstance(event, Replay | Eager) and batch is not None:
            yield world, batch


def described(config: BackendConfig, world: World, batch: Batch, step: int, metadata: Metadata) -> list[list[int]]:
    """Request, length, position and slot of each row that belongs to a request, by the reference."""
    forward_batch = _as_forward_batch(batch)
    table = torch.from_numpy(world.req_to_token)
    columns = (
        request_of_row(config, forward_batch, metadata),
        metadata.seqlens_expanded,
        query_positions(config, forward_batch, step, metadata),
        out_cache_loc(config, table, forward_batch, step, metadata),
    )
    return [row for row in torch.stack([column.long() for column in columns], dim=1).tolist() if row[0] >= 0]


def slot_of(world: World, batch: Batch, request: int, position: int) -> int:
    return int(world.req_to_token[batch.pool_rows[request], position]) if position >= 0 else 0


@settings(max_examples=80, deadline=None)
@given(scenarios(SMALL))
def test_rows_are_those_of_the_reference(scenario: Scenario) -> None:
    """In every mode and under both semantics, eagerly and padded to a bucket."""
    config, setup = scenario.setup.backend_config(), scenario.setup
    for world, batch in calls(scenario):
        graph = batch.mode is not EXTEND
        for shown, in_graph in (
            (batch, False),
            *([(batch.padded(batch.size + 2, setup.num_draft_tokens), True)] * graph),
        ):
            metadata = expected_metadata(config, world.req_to_token, shown, in_graph)
            for step in range(setup.num_steps):
                rows = [
                    [request, length, max(-1, position), slot_of(world, shown, request, position)]
                    for request, _, length, position in query_rows(shown, config, step)
                ]
                assert rows == described(config, world, shown, step, metadata[step])


def test_every_mode_and_both_semantics_are_met() -> None:
    """The rows of requests of 6 and 2 tokens, as numbers."""

    def rows(
        mode: ForwardMode, step: int = 0, semantics: StepSemantics = StepSemantics.SHARED
    ) -> list[tuple[int, ...]]:
        config = BackendConfig(4, 20, 8, 2, 3, semantics)
        batch = Batch(mode, (0, 1), (6, 2), None, (2, 0), (2, 1) if mode is EXTEND else ())
        return list(query_rows(batch, config, step))

    advancing = StepSemantics.ADVANCING
    # (request, draft token, length seen, position of the own key)
    assert rows(DECODE) == [(0, 0, 6, 6), (1, 0, 2, 2)]
    assert rows(DECODE, 1) == [(0, 0, 6, 7), (1, 0, 2, 3)]
    assert rows(DECODE, 1, advancing) == [(0, 0, 8, 7), (1, 0, 4, 3)]
    verified = [(0, 0, 7, 6), (0, 1, 8, 7), (0, 2, 9, 8), (1, 0, 3, 2), (1, 1, 4, 3), (1, 2, 5, 4)]
    assert rows(VERIFY) == rows(VERIFY, 1, advancing) == verified
    assert rows(DRAFT_EXTEND) == [(0, 0, 5, 4), (0, 1, 6, 5)]
    extended = [(0, 0, 4, 3), (0, 1, 5, 4), (0, 2, 6, 5), (1, 0, 0, -1), (1, 1, 1, 0), (1, 2, 2, 1)]
    assert rows(DRAFT_EXTEND_V2) == extended
    assert rows(EXTEND) == [(0, 0, 5, 4), (0, 1, 6, 5), (1, 0, 2, 1)]


def verify_pass() -> Pass:
    (a_pass,) = Model(case()).run(Join(seq_len=6), Join(seq_len=3), Join(seq_len=9), Eager(mode=VERIFY))
    return a_pass


def test_pass_of_some_requests() -> None:
    whole = verify_pass()
    part = whole.of_requests((2, 0))
    assert (part.requests, part.tokens) == ((0, 0, 1, 1), (0, 1, 0, 1))
    assert (part.seqlens, part.positions) == ((10, 11, 7, 8), (9, 10, 6, 7))
    for name, tensor in vars(part.inputs).items():
        assert torch.equal(as_bytes(tensor), as_bytes(getattr(whole.inputs, name)[[4, 5, 0, 1]])), name
    assert part.step == whole.step


def test_pass_of_all_requests_and_of_none() -> None:
    whole = verify_pass()
    again = whole.of_requests((0, 1, 2))
    assert (again.requests, again.seqlens, again.positions) == (whole.requests, whole.seqlens, whole.positions)
    assert whole.of_requests(()).rows == 0
    assert whole.of_requests(()).inputs.q.shape == (0, *whole.inputs.q.shape[1:])


def test_request_without_rows_is_left_out() -> None:
    (a_pass,) = Model(case()).run(
        Join(seq_len=6), Join(seq_len=3), Accept(accept_lengths=(0, 2)), Eager(mode=DRAFT_EXTEND)
    )
    assert a_pass.requests == (1, 1)
    assert a_pass.of_requests((0,)).rows == 0
    assert a_pass.of_requests((1, 0)).requests == (0, 0)


def test_query_does_not_depend_on_its_place() -> None:
    """What makes relations comparable: the same request, in another batch at the same moment, asks the same."""
    scenario = case(layer={"regime": Regime.RANDOM})
    joins = (Join(seq_len=6), Join(seq_len=3))
    (one,) = Model(scenario).run(*joins, Eager(mode=VERIFY))
    (other,) = Model(scenario).run(*joins, Eager(mode=VERIFY, order="reversed"))
    assert torch.equal(one.of_requests((1, 0)).inputs.q, other.inputs.q)
    assert torch.equal(one.of_requests((1, 0)).inputs.k, other.inputs.k)
