"""Small cases of metadata alone, and how a class of (config, req_to_token) becomes a backend that is judged."""

from __future__ import annotations

from typing import Any

from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.protocol import BackendFactory
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Event, Finish, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Mirror, Setup
from nsa_oracle.harness.subjects.loading import checked
from nsa_oracle.reference.types import ForwardMode

DECODE, IDLE, VERIFY = ForwardMode.DECODE, ForwardMode.IDLE, ForwardMode.TARGET_VERIFY
DRAFT_EXTEND, DRAFT_EXTEND_V2, EXTEND = ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2, ForwardMode.EXTEND
SIZES: dict[str, Any] = {  # a pool of 3 rows of 4 pages of 4 tokens
    "page_size": 4,
    "max_context_len": 16,
    "index_topk": 8,
    "num_steps": 1,
    "num_draft_tokens": 2,
    "pool_size": 3,
}


def factory_of(build: Any) -> BackendFactory:
    """The factory behind a class of (config, req_to_token), as ``--oracle-backend`` makes it."""
    return lambda config, req_to_token, optimizations: checked(build(config, req_to_token), build.__name__)


def case(*events: Event, **setup: Any) -> Scenario:
    """A scenario with the sizes ``SIZES``, but for ``setup``."""
    return Scenario(setup=Setup(**{**SIZES, **setup}), events=events)


def one_replay(mode: ForwardMode, seq_len: int = 3, **setup: Any) -> Scenario:
    """One request through one graph, captured on a padded request of length 1 in an empty pool."""
    return case(Capture(mode=mode, buckets=(1,)), Join(seq_len=seq_len), Replay(mode=mode), **setup)


def mirror_case(mirror: Mirror) -> Scenario:
    """One request that the host last saw at length 3 and that has 5 tokens now."""
    return case(
        Capture(mode=DECODE, buckets=(1,)),
        Join(seq_len=3),
        Accept(accept_lengths=(2,)),
        Replay(mode=DECODE, mirror=mirror),
    )


TWO_LENGTHS = case(
    Capture(mode=DECODE, buckets=(2,)),
    Join(seq_len=3),
    Join(seq_len=6),
    Replay(mode=DECODE),
    Finish(request=1),
    Replay(mode=DECODE),
)
TWO_REPLAYS = case(Capture(mode=DECODE, buckets=(1,)), Join(seq_len=3), Replay(mode=DECODE, times=2))
ACCEPT_TWO_THEN_ONE = case(
    Capture(mode=DRAFT_EXTEND, buckets=(1,)),
    Join(seq_len=3),
    Accept(accept_lengths=(2,)),
    Replay(mode=DRAFT_EXTEND),
    Accept(accept_lengths=(1,)),
    Replay(mode=DRAFT_EXTEND),
)
ACCEPT_NONE_AND_TWO = case(
    Capture(mode=DRAFT_EXTEND, buckets=(2,)),
    Join(seq_len=3),
    Join(seq_len=6),
    Accept(accept_lengths=(0, 2)),
    Replay(mode=DRAFT_EXTEND),
)
CROWDED = case(
    Capture(mode=DECODE, buckets=(1, 3)),
    Capture(mode=VERIFY, buckets=(2,)),
    Join(seq_len=3),
    Join(seq_len=6),
    Replay(mode=VERIFY),
    Finish(request=1),
    Replay(mode=DECODE, times=2),
    num_steps=2,
)
FAULT = Finding(Kind.CRASH, "AcceleratorError", "CUDA error: an illegal memory access was encountered", "no exception")


def matches(said: str, wanted: str) -> bool:
    """Whether a part of a finding is as wanted: "" is anything, "~x" contains x."""
    return wanted[1:] in said if wanted.startswith("~") else not wanted or said == wanted
