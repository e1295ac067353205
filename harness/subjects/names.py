"""The two sets of names under which a backend may have its methods (see ``harness.protocol``)."""

from __future__ import annotations

from collections.abc import Sequence

from nsa_oracle.harness.protocol import MultiStepBackend, PreparesOutOfGraph, SingleStepBackend

OLDER = (
    "init_forward_metadata",
    "init_cuda_graph_state",
    "init_forward_metadata_capture_cuda_graph",
    "init_forward_metadata_replay_cuda_graph",
)
TODAYS = tuple(name for name in vars(PreparesOutOfGraph) if name.startswith("init_"))

BuiltBackend = MultiStepBackend | SingleStepBackend | PreparesOutOfGraph
"""What a factory may return: N single-step backends behind one set of methods, or one single-step backend."""


def has_older_names(backend: object) -> bool:
    """Whether the backend is called by the older names."""
    return not _lacking(backend, OLDER)


def attn_backends_of(backend: object) -> Sequence[object] | None:
    """The single-step backends of a multi-step backend; None for a single-step backend."""
    steps: Sequence[object] | None = getattr(backend, "attn_backends", None)
    return steps


def protocol_meant(backend: object, older: type) -> type:
    """The protocol whose methods ``backend`` must have: the one by which it is called, if it has one set completely.

    Else today's if it begins that set alone, and otherwise ``older``. Some of the older methods beside all of today's
    are no part of the protocol: such a backend is called by today's names.
    """
    if has_older_names(backend):
        return older
    begins_todays = begins_todays_names(backend) and not methods_left(backend)
    return PreparesOutOfGraph if begins_todays or not todays_lacking(backend) else older


def methods_left(backend: object) -> list[str]:
    """The methods of ``backend`` that only the older set has."""
    return [name for name in OLDER if name not in TODAYS and hasattr(backend, name)]


def begins_todays_names(backend: object) -> bool:
    """Whether the backend has the method by which today's set is known."""
    return hasattr(backend, "init_forward_metadata_out_graph")


def todays_lacking(backend: object) -> list[str]:
    """The methods of today's set that ``backend`` lacks."""
    return _lacking(backend, TODAYS)


def _lacking(backend: object, names: Sequence[str]) -> list[str]:
    return [name for name in names if not callable(getattr(backend, name, None))]
