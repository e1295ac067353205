"""Counts the compiled variants of kernels, and finds a kernel that is compiled anew for each size.

A stride or a length that selects compiled code (a ``tl.constexpr`` in Triton) gives a server thousands of variants,
each compiled while it serves requests. What may select code has few values: flags, dtypes, whether a number is 1 or a
multiple of 16, a tile size rounded up to a power of two, the batch size of a graph. The module therefore compares eager
calls that agree in all of these and differ only in lengths. If each of many such calls needs a variant that no call
before it used, the variants depend on the lengths.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.scenarios.batch import Batch

WARM_UP = 2  # first calls of a kind, which are not judged
FRESH = 8  # number of calls after those, all with new variants, that makes a finding

Launched = Mapping[str, frozenset[int]]
"""The handles of the compiled functions that were launched, by name of the kernel."""


class VariantCounter:
    """Records what Triton launches inside ``counting``: nothing in the interpreter, which does not compile."""

    def __init__(self) -> None:
        self._launched: dict[str, set[int]] = defaultdict(set)

    @contextmanager
    def counting(self) -> Iterator[None]:
        knobs = sys.modules.get("triton.knobs")
        chain: Any = getattr(getattr(knobs, "runtime", None), "launch_enter_hook", None)
        if not hasattr(chain, "add"):  # another version of Triton
            yield
            return
        chain.add(self._note)
        try:
            yield
        finally:
            chain.remove(self._note)

    def take(self) -> Launched:
        """What was launched since the last call of this method."""
        taken = {name: frozenset(handles) for name, handles in self._launched.items()}
        self._launched.clear()
        return taken

    def _note(self, metadata: Any) -> None:
        known: Mapping[str, Any] = getattr(metadata, "data", {})
        if "name" in known and "function" in known:
            self._launched[known["name"]].add(known["function"])


@dataclass
class _Calls:
    """Eager calls that agree in all that may select code. new: whether each call needed a new variant, by kernel."""

    lengths: list[tuple[int, ...]] = field(default_factory=list)
    new: dict[str, list[bool]] = field(default_factory=dict)


class VariantGrowth:
    """The variants that the calls of one scenario use, in order of the calls."""

    def __init__(self) -> None:
        self._used: dict[str, set[int]] = defaultdict(set)
        self._calls: dict[Hashable, _Calls] = defaultdict(_Calls)

    def note(self, launched: Launched) -> None:
        """Add launches outside eager calls: the variants they use are not new in later calls."""
        for name, handles in launched.items():
            self._used[name] |= handles

    def note_eager(self, batch: Batch, launched: Launched) -> None:
        """Add an eager call of ``batch``. Lengths that were called before are not counted again."""
        calls = self._calls[_kind_of(batch)]
        lengths = batch.seq_lens + batch.extend_lens
        if lengths not in calls.lengths:
            number = len(calls.lengths)
            calls.lengths.append(lengths)
            for name, handles in launched.items():
                # A call that does not launch the kernel counts as one without a new variant.
                history = calls.new.setdefault(name, [])
                history += [False] * (number - len(history)) + [bool(handles - self._used[name])]
        self.note(launched)

    def finding(self) -> Finding | None:
        """A kernel that needed a new variant for each of many calls of one kind, or None."""
        for calls in self._calls.values():
            for name, new in calls.new.items():
                last = new[WARM_UP:]
                if len(new) == len(calls.lengths) and len(last) >= FRESH and all(last):
                    lengths = ", ".join(" ".join(map(str, lengths)) for lengths in calls.lengths[-3:])
                    return Finding(
                        Kind.VARIANTS,
                        name,
                        f"a new variant for each of {len(last)} calls, such as those at lengths {lengths}",
                        "variants that do not depend on the lengths",
                    )
        return None


def _kind_of(batch: Batch) -> Hashable:
    """All that may select code: mode, batch size, accept lengths, number of draft steps; bit length and divisibility by
    16 of each length.
    """
    sizes = tuple((n.bit_length(), n % 16 == 0, n == 1) for n in batch.seq_lens + batch.extend_lens)
    return batch.mode, batch.accept_lengths, batch.draft_steps, sizes
