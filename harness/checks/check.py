"""The checks of the oracle. Every finding belongs to exactly one."""

from __future__ import annotations

import enum

from nsa_oracle.harness import fields
from nsa_oracle.harness.findings import Finding, Kind


class Check(enum.Enum):
    """What the oracle checks."""

    METADATA = "metadata"  # live cells of the metadata against the reference
    SHAPE = "shape"  # shapes, dtypes, devices, presence, host scalars
    ADDRESS = "address"  # buffers that moved after capture
    CAPTURE = "capture"  # operations that a capture refuses, and faults of a captured graph
    COMPILATION = "compilation"  # kernels compiled anew for each size
    BOUNDS = "bounds"  # writes outside buffers, and to inputs
    STORE = "store"  # every byte of the caches
    LOGITS = "logits"
    SELECTION = "selection"  # top-k and its transforms
    ATTENTION = "attention"  # out and lse
    RELATION = "relation"  # changes that must not change a bit
    CRASH = "crash"  # an exception of the backend or the layer

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
            Kind.LAYER_CRASH: Check.CRASH,
            Kind.TIMEOUT: Check.CRASH,
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
