"""The record of one re-created defect: description, source, how to plant it, and the checks that must find it."""

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
    """The area of a serving engine that a defect belongs to. Values are headings of docs/zoo.md, case aside."""

    BUFFERS = "replay buffers"
    PADDING = "padding, buckets, idle"
    ACCEPTS = "accept lengths"
    TABLES = "mirrors, page tables, races"
    LAYER = "indexer, top-k, KV, attention"


@dataclass(frozen=True)
class Bug:
    """One defect.

    name: words joined by hyphens; also the file name of the saved case, ``tests/bugs/NAME.json``.
    sentence: what is wrong, as one sentence that ends with a full stop; docs/zoo.md repeats it word for word.
    reference: the issue or pull request that reported it, such as ``sglang#26019``, or ``REVIEW``.
    trigger: what a case must contain to show the defect.
    caught_by: the bug counts as killed only if one of these checks reports it.
    plant: returns a context manager that plants the bug and yields the subject to judge.
    layer: needs an attention layer behind the metadata. gpu: needs a real GPU.
    cpu: shows only without a GPU, where every access of a kernel is checked.
    faults: leaves the GPU unusable for the process. drawn: False if cases that show it are drawn too rarely to hunt it.
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
    cpu: bool = False
    faults: bool = False
    drawn: bool = True

    def shows_on(self, device: str) -> bool:
        """Whether cases on ``device`` ("cpu" or "cuda") can show the defect."""
        return not self.cpu if device == "cuda" else not self.gpu


def by_mutation(*mutations: Mutation) -> Callable[[], AbstractContextManager[Subject]]:
    """The ``plant`` of a bug that consists of changed source in ``optimized/``."""

    @contextmanager
    def plant() -> Iterator[Subject]:
        with mutated(*mutations):
            yield optimized_subject()

    return plant


def by_wrapping(
    backend: BackendFactory = optimized_backend, layer: LayerFactory = optimized_layer
) -> Callable[[], AbstractContextManager[Subject]]:
    """The ``plant`` of a bug around ``optimized/``: in the engine that drives it, or in how its calls are wired."""

    @contextmanager
    def plant() -> Iterator[Subject]:
        yield Subject(backend, layer, switches=OPTIMIZED_SWITCHES)

    return plant


REVIEW = "kernel review"  # the ``reference`` of a defect that was found in review, before it was published


def layer_bug(
    name: str,
    sentence: str,
    reference: str,
    trigger: str,
    caught_by: Check | frozenset[Check],
    *mutations: Mutation,
    group: Group = Group.LAYER,
    gpu: bool = False,
    cpu: bool = False,
) -> Bug:
    """A ``Bug`` that needs a layer and is planted by ``mutations``. caught_by: one check, or a set of them."""
    checks = caught_by if isinstance(caught_by, frozenset) else frozenset({caught_by})
    return Bug(name, group, sentence, reference, trigger, checks, by_mutation(*mutations), layer=True, gpu=gpu, cpu=cpu)
