"""One batch of the serving engine in plain numbers, and what pads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from nsa_oracle.reference.types import ForwardMode

PAD_SEQ_LEN = 1  # the length that engines give to padding requests
PAD_REQ_POOL_INDEX = 0


@dataclass(frozen=True)
class Padding:
    """What an engine gives a request that only pads a batch.

    accept_length: None for as many as the mode has rows for such a request: 1, or all draft tokens in DRAFT_EXTEND_V2.
    "all" for all draft tokens. seq_len: a number, or "all" for the number of draft tokens.
    """

    seq_len: int | Literal["all"] = PAD_SEQ_LEN
    pool_row: int = PAD_REQ_POOL_INDEX
    accept_length: int | Literal["all"] | None = None


@dataclass(frozen=True)
class Batch:
    """What the engine sends for one replay or eager call, before padding. All tuples have one entry per request.

    seq_lens_cpu: the host mirror, or None if it is absent; it may disagree with ``seq_lens``.
    extend_lens: new tokens of each request; empty unless the mode is EXTEND. draft_steps: how many of the draft steps
    run, the first ones; None for all.
    """

    mode: ForwardMode
    pool_rows: tuple[int, ...]
    seq_lens: tuple[int, ...]
    seq_lens_cpu: tuple[int, ...] | None
    accept_lengths: tuple[int, ...]
    extend_lens: tuple[int, ...] = ()
    draft_steps: int | None = None

    @property
    def size(self) -> int:
        return len(self.seq_lens)

    def of_requests(self, order: Sequence[int]) -> Batch:
        """The batch of the requests with the indices ``order``, in that order."""

        def pick(numbers: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(numbers[i] for i in order) if numbers else ()

        return Batch(
            self.mode,
            pick(self.pool_rows),
            pick(self.seq_lens),
            None if self.seq_lens_cpu is None else pick(self.seq_lens_cpu),
            pick(self.accept_lengths),
            pick(self.extend_lens),
            self.draft_steps,
        )

    def padded(self, bs: int, num_draft_tokens: int, padding: Padding | None = None) -> Batch:
        """The batch filled up to the bucket ``bs`` with the values that engines use for padding requests."""
        missing, padding = bs - self.size, padding or Padding()
        accept = num_draft_tokens if self.mode is ForwardMode.DRAFT_EXTEND_V2 else 1
        if padding.accept_length is not None:
            accept = num_draft_tokens if padding.accept_length == "all" else padding.accept_length
        seq_len = num_draft_tokens if padding.seq_len == "all" else padding.seq_len
        mirror = self.seq_lens_cpu
        return Batch(
            self.mode,
            self.pool_rows + (padding.pool_row,) * missing,
            self.seq_lens + (seq_len,) * missing,
            None if mirror is None else mirror + (seq_len,) * missing,
            self.accept_lengths + (accept,) * missing,
            draft_steps=self.draft_steps,
        )


def choose_bucket(wanted: int | None, size: int, captured: Collection[int]) -> int | None:
    """The captured bucket for ``size`` requests: ``wanted`` if it fits, else the smallest that does, else None."""
    fitting = [bucket for bucket in captured if bucket >= size]
    return wanted if wanted in fitting else min(fitting, default=None)
