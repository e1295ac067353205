"""Checks the guard bands around the buffers that a backend and a layer allocate."""

from __future__ import annotations

from collections.abc import Sequence

from nsa_oracle.harness import fields
from nsa_oracle.harness.memory.poison import GuardedBuffer, overrun
from nsa_oracle.reference.types import Metadata


class GuardWatch:
    """Checks buffers that the backend still holds repeatedly, and the buffers of a single call once."""

    def __init__(self) -> None:
        self._held: list[GuardedBuffer] = []
        self._overrun: GuardedBuffer | None = None  # the first buffer found with a changed band

    def keep(self, buffers: Sequence[GuardedBuffer]) -> None:
        """Check ``buffers`` in each later call of ``overrun``."""
        self._held += buffers

    def check(self, buffers: Sequence[GuardedBuffer]) -> None:
        """Check ``buffers`` once, now."""
        self._overrun = self._overrun or overrun(buffers)

    def check_and_keep(self, buffers: list[GuardedBuffer], metadata: Sequence[Metadata]) -> None:
        """Check ``buffers``, and keep checking those that ``metadata`` still uses. Empties the list."""
        self.check(buffers)
        used = {t.untyped_storage().data_ptr() for step in metadata for t in fields.tensors(step).values()}
        self.keep([buffer for buffer in buffers if buffer.address in used])
        buffers.clear()  # other buffers must live no longer than the backend holds them

    def overrun(self) -> GuardedBuffer | None:
        """A buffer with a changed guard band, or None."""
        return self._overrun or overrun(self._held)
