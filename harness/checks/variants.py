"""Counts the compiled variants of kernels, and finds a kernel that is compiled anew for every size it meets.

A stride or a length that selects compiled code (a ``tl.constexpr``, in Triton) gives a server thousands of kernels,
each compiled in the middle of serving. What may select code takes few values: flags, dtypes, whether a number is 1 or a
multiple of 16, a tile rounded up to a power of two, the batch size of a graph. So eager calls are compared that agree
in all of that, and differ in nothing but lengths: if each of many needs a variant that none before it used, the
variants follow the lengths.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.scenarios.world import Batch

WARM_UP = 2  # calls of a kind whose variants say nothing yet
FRESH = 8  # calls in a row, after those, that must all need new ones

Launched = Mapping[str, frozenset[int]]
"""By the name of a kernel: the handles of the compiled functions that were launched."""


class VariantCounter:
    """Notes what Triton launches, while it is ``counting``. Nothing is, in the interpreter: it compiles nothing."""

    def __init__(self) -> None:
        self._launched: dict[str, set[int]] = defaultdict(set)

    @contextmanager
    def counting(self) -> Iterator[None]:
        knobs = sys.modules.get("triton.knobs")
        chain: Any = getattr(getattr(knobs, "runtime", None), "launch_enter_hook", None)
        if not hasattr(chain, "add"):  # another version's
            yield
            return
        chain.add(self._note)
        try:
            yield
        finally:
            chain.remove(self._note)

    def take(self) -> Launched:
        """What was launched since the last time."""
        taken = {name: frozenset(handles) for name, handles in self._launched.items()}
        self._launched.clear()
        return taken

    def _note(self, metadata: Any) -> None:
        known: Mapping[str, Any] = getattr(metadata, "data", {})
        if "name" in known and "function" in known:
            self._launched[known["name"]].add(known["function"])


@dataclass
class _Calls:
    """Eager calls that agree in all that may select code. new: by kernel, whether each call needed a new variant."""

    lengths: list[tuple[int, ...]] = field(default_factory=list)
    new: dict[str, list[bool]] = field(default_factory=dict)


class VariantGrowth:
    """The variants that the calls of one scenario used, in their order."""

    def __init__(self) -> None:
        self._used: dict[str, set[int]] = defaultdict(set)
        self._calls: dict[Hashable, _Calls] = defaultdict(_Calls)

    def note(self, launched: Launched) -> None:
        """Launches that are no eager call's: what they use is new to nobody after them."""
        for name, handles in launched.items():
            self._used[name] |= handles

    def note_eager(self, batch: Batch, launched: Launched) -> None:
        """One eager call of ``batch``. A batch of lengths that were called before says nothing."""
        calls = self._calls[_kind_of(batch)]
        lengths = batch.seq_lens + batch.extend_lens
        if lengths not in calls.lengths:
            number = len(calls.lengths)
            calls.lengths.append(lengths)
            for name, handles in launched.items():
                # A kernel that sits out a call does not grow with it.
                history = calls.new.setdefault(name, [])
                history += [False] * (number - len(history)) + [bool(handles - self._used[name])]
        self.note(launched)

    def finding(self) -> Finding | None:
        """A kernel that needed a new variant for each of many like calls, or None."""
        for calls in self._calls.values():
            for name, new in calls.new.items():
                last = new[WARM_UP:]
                if len(new) == len(calls.lengths) and len(last) >= FRESH and all(last):
                    lengths = ", ".join(" ".join(map(str, lengths)) for lengths in calls.lengths[-3:])
                    return Finding(
                        Kind.VARIANTS,
                        name,
                        f"a new variant for each of {len(last)} calls, such as those at lengths {lengths}",
                        "variants that do not follow the lengths",
                    )
        return None


def _kind_of(batch: Batch) -> Hashable:
    """All that may select code: the mode, the batch size, accepts, and of each length its size to a power of two."""
    sizes = tuple((n.bit_length(), n % 16 == 0, n == 1) for n in batch.seq_lens + batch.extend_lens)
    return batch.mode, batch.accept_lengths, sizes
