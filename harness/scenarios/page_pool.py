"""The pages that requests can take: which are free, in which order, and how many requests hold each."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nsa_oracle.harness.scenarios.rng import Stream
from nsa_oracle.harness.scenarios.setup import PageLayout, Reuse


class PagePool:
    """Pages 1 to ``count``. free: a stack, whose last page is used next. reuse_order: draws for ``reuse``."""

    def __init__(self, count: int, layout: PageLayout, seed: int, reuse: Reuse, reuse_order: Stream) -> None:
        self.free = _pages_in_order(count, layout, seed)
        self._reuse, self._reuse_order = reuse, reuse_order
        self._owners: NDArray[np.int32] = np.zeros(1 + count, dtype=np.int32)  # requests that hold each page

    def take(self, count: int, named: Sequence[int] = ()) -> array[int] | None:
        """``count`` pages for a request: the first of ``named``, whoever else holds them, then free ones.

        None, and nothing is taken, if too few are free. No page if ``count`` is not positive.
        """
        named = named[: max(0, count)]
        missing = max(0, count) - len(named)
        free = self.free
        if named:
            all_free = numbers(free)
            free = array("i", all_free[~np.isin(all_free, named)].tobytes())
        if missing > len(free):
            return None
        self.free, taken = free, array("i", named)
        if missing:
            taken.extend(free[-missing:][::-1])
            del free[-missing:]
        self.hold(taken)
        return taken

    def hold(self, pages: array[int]) -> None:
        """One more request holds each of ``pages``."""
        self._owners[numbers(pages)] += 1

    def shared_among(self, pages: array[int]) -> NDArray[np.intp]:
        """The places in ``pages`` of those that several requests hold."""
        return np.flatnonzero(self._owners[numbers(pages)] > 1)

    def release(self, pages: array[int]) -> None:
        """Take one owner from each of ``pages``. Those without another are free at once, as ``Reuse`` says."""
        released = numbers(pages)
        self._owners[released] -= 1
        freed = array("i", released[self._owners[released] == 0][::-1].tobytes())
        match self._reuse:
            case Reuse.STACK:
                self.free.extend(freed)  # the first one last, to be used first
            case Reuse.QUEUE:
                self.free = freed + self.free
            case Reuse.SHUFFLED:
                mixed = 2 * len(freed) + 8  # with some others; to shuffle all pages of a large pool takes long
                self.free.extend(freed)
                self.free[-mixed:] = array("i", shuffled(self.free[-mixed:], self._reuse_order))


def shuffled(given: Sequence[int], order: Stream) -> list[int]:
    """The numbers in an order that ``order`` draws."""
    return [given[i] for i in order.permutation(len(given))]


def numbers(pages: array[int]) -> NDArray[np.int32]:
    """``pages`` as numpy sees them, without a copy."""
    return np.frombuffer(pages, dtype=np.int32)


def _pages_in_order(count: int, layout: PageLayout, seed: int) -> array[int]:
    """All pages, as a stack: the last one is used first."""
    pages = np.arange(1, count + 1, dtype=np.int32)
    match layout:
        case PageLayout.CONTIGUOUS:
            ordered = pages
        case PageLayout.DESCENDING:
            ordered = pages[::-1]
        case PageLayout.INTERLEAVED:
            ordered = np.concatenate([pages[start::3] for start in range(3)])
        case PageLayout.SHUFFLED:
            ordered = pages[Stream(seed, "pages").order(count)]
    return array("i", ordered[::-1].tobytes())
