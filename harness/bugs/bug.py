"""One re-created defect: what it is, where it happened, how it is planted, and which check is meant to find it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from nsa_oracle.harness.bugs.mutate import Mutation, mutated
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.protocol import BackendFactory, LayerFactory
from nsa_oracle.harness.subjects.default import OPTIMIZED_SWITCHES, optimized_backend, optimized_layer
from nsa_oracle.harness.subjects.subject import Subject, optimized_subject


class Group(enum.Enum):
    """Where in a serving engine such defects live."""

    BUFFERS = "replay buffers"
    PADDING = "padding, buckets, idle"
    ACCEPTS = "accept lengths"
    TABLES = "mirrors, page tables, races"
    LAYER = "indexer, top-k, KV, attention"


@dataclass(frozen=True)
class Bug:
    """A defect. Names are words joined by hyphens; they name the saved case of the bug too.

    sentence: what is wrong. reference: where it happened, such as ``sglang#26019``. trigger: what makes it visible.
    caught_by: the checks of which one must find it; another one that does so by accident does not count.
    layer: whether it needs an attention layer behind the metadata. gpu: whether it needs a real GPU. faults: whether it
    leaves the GPU unusable for the process. drawn: whether scenarios that show it are drawn often enough to hunt it.
    """

    name: str
    group: Group
    sentence: str
    reference: str
    trigger: str
    caught_by: frozenset[Check]
    plant: Callable[[], AbstractContextManager[Subject]]
    layer: bool = False
    gpu: bool = False
    faults: bool = False
    drawn: bool = True


def by_mutation(*mutations: Mutation) -> Callable[[], AbstractContextManager[Subject]]:
    """A bug that is a changed line of ``optimized/``."""

    @contextmanager
    def plant() -> Iterator[Subject]:
        with mutated(*mutations):
            yield optimized_subject()

    return plant


def by_wrapping(
    backend: BackendFactory = optimized_backend, layer: LayerFactory = optimized_layer
) -> Callable[[], AbstractContextManager[Subject]]:
    """A bug around ``optimized/``: in the engine that drives it, or in how its calls are wired."""

    @contextmanager
    def plant() -> Iterator[Subject]:
        yield Subject(backend, layer, switches=OPTIMIZED_SWITCHES)

    return plant


REVIEW = "kernel review"  # seen in review before it went anywhere


def layer_bug(
    name: str,
    sentence: str,
    reference: str,
    trigger: str,
    caught_by: Check | frozenset[Check],
    *mutations: Mutation,
    group: Group = Group.LAYER,
    gpu: bool = False,
) -> Bug:
    checks = caught_by if isinstance(caught_by, frozenset) else frozenset({caught_by})
    return Bug(name, group, sentence, reference, trigger, checks, by_mutation(*mutations), layer=True, gpu=gpu)
