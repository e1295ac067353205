"""The kinds of edge-case keys."""

from __future__ import annotations

import enum


class KeyKind(enum.Enum):
    """What the chosen tiles of a key contain."""

    NAN = "NaN"
    INFINITE = "infinities"
    ZEROS = "zeros of both signs"
    DENORMAL = "denormals"
    LARGEST = "largest number"
    HALFWAY = "half-way between codes"
    EQUAL = "one magnitude"
