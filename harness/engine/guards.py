"""Watches the guard bands around the buffers that a backend and a layer allocate."""

from __future__ import annotations

from collections.abc import Sequence

from nsa_oracle.harness import fields
from nsa_oracle.harness.memory.poison import GuardedBuffer, overrun
from nsa_oracle.reference.types import Metadata


class GuardWatch:
    """Buffers that the backend still holds, looked at again and again; those of one call, looked at once."""

    def __init__(self) -> None:
        self._held: list[GuardedBuffer] = []
        self._overrun: GuardedBuffer | None = None  # the first that was found

    def keep(self, buffers: Sequence[GuardedBuffer]) -> None:
        """Watch ``buffers`` from now on."""
        self._held += buffers

    def check(self, buffers: Sequence[GuardedBuffer]) -> None:
        """Look at ``buffers`` once, while they are there."""
        self._overrun = self._overrun or overrun(buffers)

    def check_and_keep(self, buffers: list[GuardedBuffer], metadata: Sequence[Metadata]) -> None:
        """Look at ``buffers``, and keep watching those that ``metadata`` still uses. Empties the list."""
        self.check(buffers)
        used = {t.untyped_storage().data_ptr() for step in metadata for t in fields.tensors(step).values()}
        self.keep([buffer for buffer in buffers if buffer.address in used])
        buffers.clear()  # what else the call made lives as long as the backend holds it

    def overrun(self) -> GuardedBuffer | None:
        """A buffer that something was written around, or None."""
        return self._overrun or overrun(self._held)
