"""What checks know of the layer that an engine drives: sizes, content, declared comparisons, pages of requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nsa_oracle.harness.content.content import Content
from nsa_oracle.harness.engine.expected import ExpectedLayer
from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.reference.types import AttentionConfig


@dataclass(frozen=True)
class JudgedLayer:
    """The layer that an engine drives: its sizes, its content, and which request holds which page.

    expected: the reference's layer. world: the requests that run now. weaker: the weaker comparisons that the layer
    declares, by stage.
    """

    setup: Setup
    config: AttentionConfig
    expected: ExpectedLayer
    content: Content
    world: World
    device: torch.device
    weaker: Mapping[str, Strictness] = field(default_factory=dict)
