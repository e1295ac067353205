"""The choices that a scenario makes among a few kinds: of pages, reuse, host mirror, order, drive and dtype."""

from __future__ import annotations

import enum


class PageLayout(enum.Enum):
    """Order in which free pages are handed to requests."""

    CONTIGUOUS = "contiguous"
    DESCENDING = "descending"
    INTERLEAVED = "interleaved"  # neighbouring pages belong to different requests
    SHUFFLED = "shuffled"


class Reuse(enum.Enum):
    """Order in which rows and pages that requests have left are handed out again."""

    STACK = "stack"  # what was left last comes first, so that the next request gets the same row and pages
    QUEUE = "queue"  # rows as above; pages only after all others, so that the same row gets other pages
    SHUFFLED = "shuffled"  # free rows in any order; pages too, those left last among those that were next


class Mirror(enum.Enum):
    """State of the host copy ``seq_lens_cpu``, and with it of ``seq_lens_sum``, when the backend is called."""

    EQUAL = "equal"
    STALE = "stale"  # from before the last accept
    AHEAD = "ahead"  # as if every draft token had been accepted
    ABSENT = "absent"


class Order(enum.Enum):
    """Order of the running requests within a batch."""

    JOINED = "joined"
    REVERSED = "reversed"
    SHUFFLED = "shuffled"


class Drive(enum.Enum):
    """Whose methods the engine calls: the N-step backend's, or those of each of its single-step backends."""

    MULTI_STEP = "multi_step"
    SINGLE_STEP = "single_step"


class IntDtype(enum.Enum):
    INT32 = "int32"
    INT64 = "int64"
