"""The input tensors that a backend receives: at fixed addresses, between poison, of any integer width and stride."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.engine.recycled import Recycled
from nsa_oracle.harness.engine.stress import Delivery
from nsa_oracle.harness.interpreter.bounds import hand_out
from nsa_oracle.harness.memory.banded import BandedInput
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.setup import Inputs, IntDtype, Setup
from nsa_oracle.reference.types import ForwardBatch, ForwardMode, SpecInfo

INT_DTYPES = {IntDtype.INT32: torch.int32, IntDtype.INT64: torch.int64}


class StaticInput:
    """One input tensor at a fixed address: a column of a [capacity, columns] tensor."""

    def __init__(
        self, name: str, dtype: IntDtype, capacity: int, columns: int, sentinel: int, delivery: Delivery
    ) -> None:
        self.name = name
        self._banded = BandedInput((capacity, columns), INT_DTYPES[dtype], sentinel, delivery.device)
        self._delivery = delivery
        self._column = columns // 2
        self._views: dict[int, torch.Tensor] = {}  # what was returned, by its length

    def write(self, numbers: Sequence[int]) -> torch.Tensor:
        """Write ``numbers`` to the front and return that part. Entries after it keep the values of earlier batches.

        It is one tensor object for each length, which the engine refreshes in place.
        """
        count, banded = len(numbers), self._banded
        banded.content[:count, self._column] = torch.tensor(numbers, dtype=banded.content.dtype)
        self._delivery.send(banded.memory, banded.expected)
        written = banded.tensor[:count, self._column]
        hand_out(written, banded.memory)
        before = self._views.setdefault(count, written)
        return before if _is_same_view(before, written) else written

    @property
    def memory(self) -> torch.Tensor:
        """All of its memory, the poison around it included."""
        return self._banded.memory

    def is_modified(self) -> bool:
        return self._banded.is_modified()


class StaticInputs:
    """The input tensors of all graphs, at fixed addresses. A smaller batch leaves the other entries unchanged.

    Loaded values reach the device when ``delivery`` delivers them.
    """

    def __init__(
        self, inputs: Inputs, capacity: int, sentinel: int, delivery: Delivery, num_draft_tokens: int = 1
    ) -> None:
        def static(name: str, dtype: IntDtype, columns: int) -> StaticInput:
            return StaticInput(name, dtype, capacity, columns if inputs.strided else 1, sentinel, delivery)

        def positions(rows: int) -> StaticInput:
            return StaticInput("positions", IntDtype.INT64, rows, 1, sentinel, delivery)

        # A strided input is one column of a wider tensor. The widths differ, so that no stride passes for another.
        self.seq_lens = static("seq_lens", inputs.seq_lens, 3)
        self.req_pool_indices = static("req_pool_indices", inputs.req_pool_indices, 2)
        self.accept_length = static("accept_length", inputs.accept_length, 4)
        self.extend_seq_lens = static("extend_seq_lens", inputs.accept_length, 5)
        self.extend_prefix_lens = static("extend_prefix_lens", inputs.accept_length, 6)
        self.num_draft_tokens = num_draft_tokens
        self.positions = positions(capacity * num_draft_tokens)
        self.prefill_positions = self.positions  # a prefill has any number of rows, and no graph
        self._new_positions = positions
        self._mirror: torch.Tensor | None = None  # the host's lengths of the last batch, and what they are
        self._mirrored: tuple[int, ...] = ()
        self._batches, self._spec_infos, self._mirrors = Recycled(), Recycled(), Recycled()

    def load(self, batch: Batch) -> ForwardBatch:
        """Write ``batch`` into the static tensors. Returns it as a backend receives it.

        Objects of earlier calls that nobody else has are used again (see ``engine.recycled``).
        """
        self._mirror = None
        self._batches.release()
        self._spec_infos.release()
        return self._batches.instance(self._loaded(batch))

    def _loaded(self, batch: Batch) -> ForwardBatch:
        mirror = None
        if batch.seq_lens_cpu is not None:
            mirror = self._mirrors.tensor(torch.tensor(batch.seq_lens_cpu, dtype=torch.int64))
        self._mirror, self._mirrored = mirror, batch.seq_lens_cpu or ()
        accept_length = self.accept_length.write(batch.accept_lengths)
        drafts = batch.mode in (ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2)
        forward_batch = ForwardBatch(
            forward_mode=batch.mode,
            batch_size=batch.size,
            req_pool_indices=self.req_pool_indices.write(batch.pool_rows),
            seq_lens=self.seq_lens.write(batch.seq_lens),
            seq_lens_cpu=mirror,
            seq_lens_sum=None if batch.seq_lens_cpu is None else sum(batch.seq_lens_cpu),
            spec_info=self._spec_infos.instance(SpecInfo(accept_length)) if drafts else None,
        )
        if batch.mode.is_decode_or_idle:
            positions = self.positions.write(batch.seq_lens)
            return dataclasses.replace(forward_batch, extend_num_tokens=batch.size, positions=positions)
        new = _new_tokens(batch, self.num_draft_tokens)
        verifies = batch.mode is ForwardMode.TARGET_VERIFY
        before = [length if verifies else length - n for length, n in zip(batch.seq_lens, new, strict=True)]
        cached = tuple(max(0, length) for length in before)
        rows = [max(0, length + i) for length, n in zip(before, new, strict=True) for i in range(n)]
        if batch.mode is ForwardMode.EXTEND:
            self.prefill_positions = self._new_positions(max(1, len(rows)))
        positions = (self.prefill_positions if batch.mode is ForwardMode.EXTEND else self.positions).write(rows)
        return dataclasses.replace(
            forward_batch,
            extend_seq_lens=self.extend_seq_lens.write(new),
            extend_prefix_lens=self.extend_prefix_lens.write(cached),
            extend_seq_lens_cpu=new,
            extend_prefix_lens_cpu=cached,
            extend_num_tokens=sum(new),
            positions=positions,
        )

    def modified(self) -> str | None:
        """The name of an input whose memory differs from what the engine wrote, or None."""
        if self._mirror is not None and self._mirror.tolist() != list(self._mirrored):
            return "seq_lens_cpu"
        return next((static.name for static in self._static() if static.is_modified()), None)

    def memory(self) -> list[tuple[str, torch.Tensor]]:
        """The name and the memory of each input, as it is now."""
        mirror = [] if self._mirror is None else [("seq_lens_cpu", self._mirror)]
        return [*mirror, *((static.name, static.memory) for static in self._static())]

    def _static(self) -> list[StaticInput]:
        return [value for value in vars(self).values() if isinstance(value, StaticInput)]


class PoolInput:
    """``req_to_token`` at a fixed address: dense, a view of a wider tensor, or with far rows, as the setup says."""

    def __init__(self, setup: Setup, sentinel: int, delivery: Delivery) -> None:
        margin = 3 if setup.inputs.wide_req_to_token else 0  # columns of the wider tensor on either side
        width = setup.max_context_len
        far = setup.inputs.far_req_to_token and setup.pool_size > 1
        shape = (setup.pool_size, width + 2 * margin)
        self._banded = BandedInput(shape, torch.int32, sentinel, delivery.device, far)
        self._columns = slice(margin, margin + width)
        self._delivery = delivery
        self.tensor = self._banded.tensor[:, self._columns]  # [pool_size, max_context_len] int32
        hand_out(self.tensor, self._banded.memory)

    def send(self, req_to_token: NDArray[np.int32]) -> None:
        """Set the content that the table has from the next delivery on."""
        self._banded.content[:, self._columns] = torch.from_numpy(req_to_token)
        self._delivery.send(self._banded.memory, self._banded.expected)

    def memory(self) -> list[tuple[str, torch.Tensor]]:
        """Its name and all of its memory."""
        return [("req_to_token", self._banded.memory)]

    def is_modified(self) -> bool:
        return self._banded.is_modified()


def _is_same_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the object ``one`` still stands for what ``other`` does: judged code may have reshaped it in place."""
    return (one.shape, one.stride(), one.data_ptr()) == (other.shape, other.stride(), other.data_ptr())


def _new_tokens(batch: Batch, num_draft_tokens: int) -> tuple[int, ...]:
    """The number of rows of each request, in a mode other than DECODE and IDLE."""
    match batch.mode:
        case ForwardMode.EXTEND:
            return batch.extend_lens
        case ForwardMode.DRAFT_EXTEND:
            return batch.accept_lengths
        case _:
            return (num_draft_tokens,) * batch.size
