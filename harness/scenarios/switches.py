"""The switches of a backend's optimisations that are drawn with a scenario, and how they may be combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nsa_oracle.reference.types import BackendConfig


def _nothing_to_check(names: Sequence[str], config: BackendConfig) -> None:
    """A backend without switches ignores those that a case names."""


@dataclass(frozen=True)
class Switches:
    """Names of switches, as listed in ``Scenario.optimizations``. The default is a backend without switches.

    separate: any subset of these may be on. fused: replace the separate ones; the first alone, or both of them.
    shared_only: may be added if all draft steps share one set of metadata. check: raises ValueError, in one line, for
    names that are unknown or that cannot be combined under a configuration.
    """

    separate: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    shared_only: tuple[str, ...] = ()
    check: Callable[[Sequence[str], BackendConfig], None] = _nothing_to_check

    @property
    def names(self) -> tuple[str, ...]:
        """All switches, in report order."""
        return (*self.separate, *self.fused, *self.shared_only)


NO_SWITCHES = Switches()
