"""What a run must have visited: all that its cases were drawn for, and nothing that the subject cannot reach."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from nsa_oracle.harness.report.records import not_visited
from nsa_oracle.harness.scenarios.classes import LAYER_CLASSES, METADATA_CLASSES, switch_classes
from nsa_oracle.harness.scenarios.coverage import classes_of
from nsa_oracle.harness.search.drawing import PROFILES, Profile
from nsa_oracle.harness.search.quota import unvisited
from nsa_oracle.harness.search.stream import CaseStream
from nsa_oracle.harness.subjects.default import OPTIMIZED_SWITCHES, optimized_backend
from nsa_oracle.harness.subjects.subject import Subject, optimized_subject
from tests.support.limits import limits, only
from tests.support.metadata_cases import DECODE, EXTEND, VERIFY

CPU = torch.device("cpu")
DEV = PROFILES["dev"]
LIMITED = {
    "all": optimized_subject(),
    "few sizes": Subject(
        optimized_backend, limits=limits(page_size=(64,), num_steps=(1,)), layer_limits=limits(num_heads=(3,))
    ),
    "graph modes": Subject(optimized_backend, limits=only(DECODE, VERIFY)),
    "prefill": Subject(optimized_backend, limits=only(EXTEND)),
    "one row": Subject(optimized_backend, limits=limits(pool_size=(1,), max_context_len=(20,), page_size=(16,))),
}


def visited_by(subject: Subject, with_layer: bool, numbers: range, seed: int = 0) -> Counter[str]:
    """The classes of these cases, as a run that judges them counts them."""
    stream = CaseStream(subject.scale(CPU, with_layer), subject.switches, seed)
    return Counter(name for drawn in stream.cases(numbers) for name in classes_of(drawn.scenario))


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("with_layer", [False, True], ids=["metadata", "layer"])
@pytest.mark.parametrize("subject", LIMITED.values(), ids=LIMITED)
def test_run_that_judged_all_its_cases_has_visited_all(subject: Subject, with_layer: bool, seed: int) -> None:
    seen = visited_by(subject, with_layer, range(DEV.layer_cases if with_layer else DEV.cases), seed)
    assert unvisited(seen, subject, CPU, DEV, with_layer, seed) == []


def test_without_limits_every_class_is_asked_for() -> None:
    subject = optimized_subject()
    assert set(unvisited((), subject, CPU, DEV, False, 0)) == {*METADATA_CLASSES, *switch_classes(OPTIMIZED_SWITCHES)}
    assert set(unvisited((), subject, CPU, DEV, True, 0)) == set(LAYER_CLASSES)
    assert set(unvisited((), subject, CPU, PROFILES["nightly"], True, 3)) == set(LAYER_CLASSES)


def test_run_that_ended_early_has_a_gap() -> None:
    subject = optimized_subject()
    for with_layer in (False, True):
        missing = unvisited(visited_by(subject, with_layer, range(8)), subject, CPU, DEV, with_layer, 0)
        assert missing
        assert not set(missing) & set(visited_by(subject, with_layer, range(8)))


def test_a_class_that_is_left_out_is_named() -> None:
    subject = optimized_subject()
    seen = visited_by(subject, False, range(DEV.cases))
    del seen["eager after the longest left"]
    assert unvisited(seen, subject, CPU, DEV, False, 0) == ["eager after the longest left"]


def test_only_the_shards_of_the_run_are_asked_for() -> None:
    subject = optimized_subject()
    for shard in (0, 3):
        seen = visited_by(subject, False, DEV.share(shard, with_layer=False))
        assert unvisited(seen, subject, CPU, DEV, False, 0, shards=(shard,)) == []
        assert unvisited(seen, subject, CPU, DEV, False, 0)


def test_a_short_profile_is_only_asked_for_its_own_cases() -> None:
    subject, short = optimized_subject(), Profile(3, 2, False)
    for with_layer, count in ((False, 3), (True, 2)):
        assert unvisited(visited_by(subject, with_layer, range(count)), subject, CPU, short, with_layer, 0) == []
        assert unvisited((), subject, CPU, short, with_layer, 0)


def test_what_cannot_be_reached_is_not_asked_for() -> None:
    missing = unvisited((), LIMITED["graph modes"], CPU, DEV, False, 0)
    assert "replay DECODE, N > 1" in missing
    assert not any("EXTEND" in name or "prefill" in name for name in missing)


def test_the_line_names_the_first_few() -> None:
    assert (
        not_visited(["a", "b"], False)
        == "NOT VISITED: 2 classes of cases of metadata alone (a, b); give the run more time"
    )
    assert not_visited([*"abcdefgh"], True) == (
        "NOT VISITED: 8 classes of cases with a layer (a, b, c, d, e, f and 2 more); give the run more time"
    )
