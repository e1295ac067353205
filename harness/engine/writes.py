"""Writes to memory that judged code must not write to: around its buffers, and to inputs."""

from __future__ import annotations

from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.scenarios.scenario import Event


def stray_write(engine: Engine) -> Finding | None:
    """A write around a buffer of the backend or the layer, or to an input of the layer, or None."""
    overrun = engine.guards.overrun()
    if overrun is not None:
        holders = [instance.backend for instance in engine.instances.all]
        owner = engine.guards.owner(overrun, [*holders, *([] if engine.layer is None else [engine.layer.driver.layer])])
        buffer = f"buffer of shape {list(overrun.shape)} made by {overrun.operation}"
        return Finding(
            Kind.GUARD, f"{owner}, a {buffer}" if owner else buffer, "a written guard band", "no write around it"
        )
    modified = engine.modified_input_of_layer()
    return None if modified is None else Finding(Kind.INPUT, modified, "changed content", "the engine's content")


def modified_input(engine: Engine, event: Event | None = None) -> Finding | None:
    """A write to an input of the backend, or None. event: in which the backend was called."""
    modified, written = engine.modified_input(), engine.instances.written.first
    if modified is None and written is None:
        return None
    by = engine.instances.called_in(event)
    how = f"by {by}" if by else ""
    if written is None or modified not in (None, written.name):
        assert modified is not None
        return Finding(Kind.INPUT, modified, "changed content", "the engine's content", how=how)
    if modified is not None:
        return Finding(Kind.INPUT, modified, "changed content", "the engine's content", place=written.place, how=how)
    return Finding(Kind.INPUT, written.name, written.shown, "no write", place=written.place, how=how)
