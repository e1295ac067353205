"""A toy server that records what it gives to its backend. The backend forgets to refresh one table.

Run it with a file to record to:

    .venv/bin/python -m docs.examples.staging server.jsonl
"""

from __future__ import annotations

import sys

import torch

from docs.examples.my_backend import MyBrokenBackend
from nsa_oracle.harness import record
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, SpecInfo

CONFIG = BackendConfig(
    page_size=16, max_context_len=128, index_topk=32, speculative_num_steps=2, speculative_num_draft_tokens=3
)
BUCKETS, ROWS = (2, 4), 8
GRAPHS = (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND)


class Server:
    """Requests are pool rows with a length. Each row has pages of its own, those of row 5 behind all others."""

    def __init__(self, file: str) -> None:
        self.req_to_token = torch.arange(ROWS * 128, dtype=torch.int32).view(ROWS, 128) + 16
        backend = MyBrokenBackend(CONFIG, self.req_to_token)
        self.backend = record(backend, file, config=CONFIG, req_to_token=self.req_to_token, tables="whole")
        self.lengths: dict[int, int] = {}
        self.backend.init_cuda_graph_state(max(BUCKETS), max(BUCKETS) * 3)
        for mode in GRAPHS:
            for bs in BUCKETS:
                self.backend.init_forward_metadata_capture_cuda_graph(self.batch(mode, {}, bs))

    def batch(
        self, mode: ForwardMode, accepted: dict[int, int], bs: int | None = None, rows: list[int] | None = None
    ) -> ForwardBatch:
        """The batch of ``rows``, padded to ``bs`` requests."""
        rows = list(self.lengths) if rows is None else rows
        padding = max(0, (bs or 0) - len(rows))
        lengths = [self.lengths[row] for row in rows] + [1] * padding
        accepts = [accepted.get(row, 1) for row in rows] + [1] * padding
        new = tuple(lengths) if mode is ForwardMode.EXTEND else None
        return ForwardBatch(
            forward_mode=mode,
            batch_size=len(lengths),
            req_pool_indices=torch.tensor(rows + [0] * padding),
            seq_lens=torch.tensor(lengths),
            seq_lens_cpu=torch.tensor(lengths),
            seq_lens_sum=sum(lengths),
            spec_info=SpecInfo(torch.tensor(accepts)) if mode is ForwardMode.DRAFT_EXTEND else None,
            extend_seq_lens=None if new is None else torch.tensor(new),
            extend_prefix_lens=None if new is None else torch.zeros(len(rows), dtype=torch.int64),
            extend_seq_lens_cpu=new,
            extend_prefix_lens_cpu=None if new is None else (0,) * len(rows),
            extend_num_tokens=None if new is None else sum(new),
        )

    def prefill(self, row: int, length: int) -> None:
        """A request joins."""
        self.lengths[row] = length
        self.backend.init_forward_metadata(self.batch(ForwardMode.EXTEND, {}, rows=[row]))

    def cycle(self, accepted: dict[int, int]) -> None:
        """Draft, verify and extend the draft by what was accepted."""
        bs = next(bucket for bucket in BUCKETS if bucket >= len(self.lengths))
        for mode in GRAPHS:
            if mode is ForwardMode.DRAFT_EXTEND:
                self.lengths = {row: length + accepted[row] for row, length in self.lengths.items()}
            self.backend.init_forward_metadata_replay_cuda_graph(self.batch(mode, accepted, bs), bs)


def main(file: str) -> Server:
    """Serve three requests, and record it."""
    server = Server(file)
    server.prefill(5, 40)
    server.cycle({5: 2})
    server.prefill(2, 31)
    server.cycle({5: 3, 2: 1})
    del server.lengths[5]
    server.prefill(7, 16)
    server.cycle({2: 2, 7: 0})
    return server


if __name__ == "__main__":
    main(sys.argv[1])
