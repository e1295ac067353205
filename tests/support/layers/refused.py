"""Layers that are not judged: what they declare, or lack, is refused."""

from __future__ import annotations

from typing import ClassVar

from nsa_oracle.optimized.layer import SparseAttention as Capturable
from nsa_oracle.reference.types import AttentionConfig, BackendConfig


class WithoutStages:
    """Has no method of a layer."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        pass


class ForSevenHeads(Capturable):
    """Is made for a size that is never drawn."""

    sizes: ClassVar[dict[str, tuple[object, ...]]] = {"num_heads": (7,)}


class ForRedOnes(Capturable):
    """Is made for something that layers do not have."""

    sizes: ClassVar[dict[str, tuple[object, ...]]] = {"colour": ("red",)}
