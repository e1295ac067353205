"""The switches of a backend that can be drawn beside the scenario: which there are, and what goes with what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nsa_oracle.reference.types import BackendConfig


def _nothing_to_check(names: Sequence[str], config: BackendConfig) -> None:
    """A backend without switches ignores those that a case names."""


@dataclass(frozen=True)
class Switches:
    """Switches by name, as ``Scenario.optimizations`` lists them. A backend without any has the default.

    separate: any subset of these may be on. fused: instead of those, the first of these, or the first with the next.
    shared_only: on top, if all draft steps share one set of metadata. check: raises ValueError, in one line, for names
    that are unknown or do not go together under a configuration.
    """

    separate: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    shared_only: tuple[str, ...] = ()
    check: Callable[[Sequence[str], BackendConfig], None] = _nothing_to_check

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in the order in which reports list them."""
        return (*self.separate, *self.fused, *self.shared_only)


NO_SWITCHES = Switches()
