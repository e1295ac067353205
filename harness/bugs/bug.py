"""One re-created defect: what it is, where it happened, how it is planted, and which check is meant to find it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from nsa_oracle.harness import fields
from nsa_oracle.harness.bugs.mutate import Mutation, mutated
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.protocol import BackendFactory, LayerFactory, optimized_backend, optimized_layer
from nsa_oracle.harness.search.explore import Subject


class Check(enum.Enum):
    """What the oracle looks at. A finding belongs to exactly one."""

    METADATA = "metadata"  # live cells of the metadata against the reference
    SHAPE = "shape"  # shapes, dtypes, devices, presence, host scalars
    ADDRESS = "address"  # buffers that moved after capture
    CAPTURE = "capture"  # what a graph cannot hold, and what it must not
    COMPILATION = "compilation"  # kernels compiled for every size
    BOUNDS = "bounds"  # writes outside buffers, and into inputs
    STORE = "store"  # every byte of the caches
    LOGITS = "logits"
    SELECTION = "selection"  # top-k and its transforms
    ATTENTION = "attention"  # out and lse
    RELATION = "relation"  # what must not change a bit
    CRASH = "crash"  # an exception out of the backend

    @staticmethod
    def of(finding: Finding) -> Check:
        by_kind = {
            Kind.ADDRESS: Check.ADDRESS,
            Kind.CAPTURE: Check.CAPTURE,
            Kind.FROZEN: Check.CAPTURE,
            Kind.VARIANTS: Check.COMPILATION,
            Kind.GUARD: Check.BOUNDS,
            Kind.INPUT: Check.BOUNDS,
            Kind.RELATION: Check.RELATION,
            Kind.CRASH: Check.CRASH,
        }
        if finding.kind in by_kind:
            return by_kind[finding.kind]
        if finding.kind not in (Kind.VALUE, Kind.BOUND):
            return Check.SHAPE
        if finding.field in {field.name for field in fields.FIELDS}:
            return Check.METADATA
        match finding.field:
            case "kv_cache" | "index_k_cache":
                return Check.STORE
            case "logits":
                return Check.LOGITS
            case "out" | "lse":
                return Check.ATTENTION
            case _:
                return Check.SELECTION


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
            yield Subject(optimized_backend)

    return plant


def by_wrapping(
    backend: BackendFactory = optimized_backend, layer: LayerFactory = optimized_layer
) -> Callable[[], AbstractContextManager[Subject]]:
    """A bug around ``optimized/``: in the engine that drives it, or in how its calls are wired."""

    @contextmanager
    def plant() -> Iterator[Subject]:
        yield Subject(backend, layer)

    return plant
