"""A case in words."""

from __future__ import annotations

import pytest

from nsa_oracle.harness.scenarios.scenario import Capture, Join, Replay
from nsa_oracle.harness.scenarios.story import story
from tests.support.metadata_cases import DECODE, case


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (None, "(bucket 2)"),
        (4, "(bucket 4)"),
        (1, "(bucket 2, since 1 is too small)"),
        (3, "(bucket 2, since 3 was not captured)"),
        (8, "(bucket 2, since 8 was not captured)"),
    ],
)
def test_the_bucket_that_is_used_and_why(wanted: int | None, said: str) -> None:
    events = (
        Capture(mode=DECODE, buckets=(1, 2, 4)),
        Join(seq_len=3, count=2),
        Replay(mode=DECODE, bucket=wanted),
    )
    assert f"Replay DECODE {said}: " in story(case(*events))
