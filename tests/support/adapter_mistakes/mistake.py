"""Mistakes that authors of backends and layers make: a module's source for each, and what must be said about it."""

from __future__ import annotations

from dataclasses import dataclass

PASSES = "passes"  # looks like a mistake, and is right
HEADER = """\
import dataclasses, sys, types
from typing import Any
import numpy as np
import torch
from nsa_oracle.harness.protocol import Strictness; from nsa_oracle.harness.subjects.declarations import Waiver
from nsa_oracle.optimized.layer import SparseAttention as Layer
from nsa_oracle.reference.multi_step import MultiStepBackend as Backend, SingleStepBackend as Step
from nsa_oracle.reference.types import AttentionOutputs, Metadata

"""
# A backend that lets a row put something in the place of its metadata, or of one field of it.
CHANGING = """
class Mine(Backend):
    def init_forward_metadata(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        self.change_all()

    def init_forward_metadata_capture_cuda_graph(self, forward_batch):
        super().init_forward_metadata_capture_cuda_graph(forward_batch)
        self.change_all()

    def init_forward_metadata_replay_cuda_graph(self, forward_batch, bs):
        super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
        self.change_all()

    def change_all(self):
        for step in self.attn_backends:
            step.forward_metadata = self.change(step.forward_metadata)

    def change(self, metadata):
        {body}
"""


@dataclass(frozen=True)
class Mistake:
    """One mistake. says: parts of the line that the author sees, or PASSES. names: how the line names their code."""

    name: str
    source: str
    says: tuple[str, ...]
    spec: str = "{module}:Mine"
    is_layer: bool = False
    names: str = "Mine"

    @property
    def passes(self) -> bool:
        return self.says == (PASSES,)


def backend(name: str, body: str, *says: str, spec: str = "{module}:Mine", names: str = "Mine") -> Mistake:
    return Mistake(name, body, says, spec, names=names)


def init(name: str, body: str, *says: str) -> Mistake:
    """A backend whose constructor ends with ``body``."""
    source = f"class Mine(Backend):\n    def __init__(self, c, r):\n        super().__init__(c, r)\n        {body}\n"
    return Mistake(name, source, says, names=code_of(says))


def code_of(says: tuple[str, ...]) -> str:
    """How a line names the author's code: by file and line where it tells of one, else by class."""
    return "{module}.py:" if any("{module}.py:" in part for part in says) else "Mine"


def field(name: str, body: str, *says: str, names: str = "Mine") -> Mistake:
    """A backend that replaces its metadata or a field of it."""
    return Mistake(name, CHANGING.format(body=body), says, names=names)


def whole(name: str, body: str, *says: str, names: str = "") -> Mistake:
    """A class attribute of a backend."""
    return Mistake(name, f"class Mine(Backend):\n    {body}\n", says, names=names or code_of(says))


def layer(name: str, stage: str, body: str, *says: str, names: str = "") -> Mistake:
    """A layer, a stage of which is ``body``; ``right`` is the result of the reference."""
    source = f"class Mine(Layer):\n    def {stage}(self, *a):\n        right = super().{stage}(*a)\n        {body}\n"
    return Mistake(name, source, says, is_layer=True, names=names or code_of(says))


def layer_class(name: str, source: str, *says: str, names: str = "", spec: str = "{module}:Mine") -> Mistake:
    return Mistake(name, source, says, spec, is_layer=True, names=names or code_of(says))


GOOD = "class Mine(Backend): pass\n"
FILE = "{module}.py"
