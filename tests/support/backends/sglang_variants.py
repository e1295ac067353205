"""SGLang's adapter of 0.5.8 with one declaration deleted, or with one that it does not need."""

from __future__ import annotations

from typing import ClassVar

from nsa_oracle.harness.subjects.adapters.sglang import v0_5_8
from nsa_oracle.harness.subjects.declarations import Waiver


class WithoutAbsent(v0_5_8):
    absent: ClassVar = {}


class WithoutOwnFields(v0_5_8):
    own_fields = ()


class WithoutMirrors(v0_5_8):
    mirrors: ClassVar = {}


class WithoutStepBackends(v0_5_8):
    step_backends: ClassVar = "N"


class WithoutEmptyBatches(v0_5_8):
    empty_batches = True


class WaivesForNothing(v0_5_8):
    waivers = (*v0_5_8.waivers, Waiver("DECODE", "cu_seqlens_k", "it might differ one day"))


def __getattr__(name: str) -> type[v0_5_8]:
    """``WithoutWaiver3``: without the waiver of that number."""
    number = name.removeprefix("WithoutWaiver")
    if number == name or not number.isdigit():
        raise AttributeError(name)
    kept = [waiver for place, waiver in enumerate(v0_5_8.waivers) if place != int(number)]
    return type(name, (v0_5_8,), {"waivers": tuple(kept)})
