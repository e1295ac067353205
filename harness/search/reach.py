"""How far the cases of a survey reached: what was judged, and the largest of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nsa_oracle.harness.errors import counted
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.reference.types import Metadata


@dataclass
class Reach:
    """Counts of judged calls, and their largest numbers.

    cases: that were surveyed. replays, eager_calls: by mode. requests: of the largest batch. rows: the most of a call,
    padding included. context: tokens of the longest request. heads, topk: of the layers; 0 without one.
    """

    cases: int = 0
    replays: Counter[str] = field(default_factory=Counter)
    eager_calls: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    rows: int = 0
    context: int = 0
    heads: int = 0
    topk: int = 0

    def note_layer(self, setup: Setup) -> None:
        """Count the sizes of a judged layer."""
        assert setup.layer is not None
        self.heads = max(self.heads, setup.layer.num_heads)
        self.topk = max(self.topk, setup.index_topk)

    def note(self, batch: Batch, raw_bs: int, in_graph: bool, metadata: Sequence[Metadata]) -> None:
        """Count a call of ``batch``, whose first ``raw_bs`` requests are real. metadata: of the reference, by step."""
        calls = self.replays if in_graph else self.eager_calls
        calls[batch.mode.value] += 1
        self.requests = max(self.requests, raw_bs)
        self.rows = max(self.rows, *(step.seqlens_expanded.shape[0] for step in metadata), 0)
        self.context = max(self.context, *batch.seq_lens[:raw_bs], 0)

    @property
    def largest(self) -> list[str]:
        """The number of cases and the largest numbers, for people; nothing if no call was judged."""
        if not self.replays and not self.eager_calls:
            return []
        return [
            counted(self.cases, "case"),
            f"largest batch {counted(self.requests, 'request')}",
            f"at most {counted(self.rows, 'row')} in a call",
            f"longest context {counted(self.context, 'token')}",
            *((f"at most {counted(self.heads, 'head')}, K {self.topk:,}",) if self.heads else ()),
        ]

    @property
    def calls(self) -> list[str]:
        """The number of replays and of eager calls, by mode, for people."""
        return [_told(self.replays, "replay"), _told(self.eager_calls, "eager call")]

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "cases": self.cases,
            "replays": dict(sorted(self.replays.items())),
            "eager calls": dict(sorted(self.eager_calls.items())),
            "largest batch": self.requests,
            "most rows": self.rows,
            "longest context": self.context,
            **({"most heads": self.heads, "largest K": self.topk} if self.heads else {}),
        }


def _told(calls: Mapping[str, int], what: str) -> str:
    by_mode = ", ".join(f"{mode} {number:,}" for mode, number in sorted(calls.items()))
    return counted(sum(calls.values()), what) + (f" ({by_mode})" if by_mode else "")
