"""Names of rows, requests, columns and slots in reports."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nsa_oracle.harness.content.content import Content
from nsa_oracle.harness.engine.observations import Observation
from nsa_oracle.harness.engine.passes import Pass
from nsa_oracle.harness.fields import Axis, Field
from nsa_oracle.harness.findings import Owner
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.reference.types import ForwardMode


class RowLabels:
    """Names the rows, requests and columns of one observation."""

    def __init__(self, seen: Observation) -> None:
        self.raw_bs = seen.raw_bs
        self.extends = seen.batch.mode is ForwardMode.EXTEND
        self.rows: list[str] = []
        per_request = _rows_per_request(seen)
        for request, count in enumerate(per_request):
            self.rows += [f"{self.request(request)}, draft token {token}" for token in range(count)]

    def request(self, number: int) -> str:
        return f"{'padding request' if number >= self.raw_bs else 'request'} {number}"

    def row(self, number: int) -> str:
        return f"row {number} ({self.rows[number] if number < len(self.rows) else 'unused tail'})"

    def at(self, axis: Axis, number: int) -> str:
        match axis:
            case Axis.REQUEST:
                return self.request(number)
            case Axis.ROW:
                return self.row(number)
            case _:
                return f"{axis.value} {number}"

    def axes(self, field: Field) -> tuple[Axis, ...]:
        """The axes of a field in the mode of the observation."""
        return field.extend_axes or field.axes if self.extends else field.axes

    def place(self, field: Field, index: Sequence[int]) -> str:
        return ", ".join(self.at(axis, int(i)) for axis, i in zip(self.axes(field), index, strict=True))

    def owner(self, axis: Axis, number: int) -> Owner:
        """Whose the cells at ``number`` along ``axis`` are."""
        match axis:
            case Axis.REQUEST:
                return Owner.PADDING if number >= self.raw_bs else Owner.REQUEST
            case Axis.ROW:
                if number >= len(self.rows):
                    return Owner.TAIL
                return Owner.PADDING if self.rows[number].startswith("padding") else Owner.REQUEST
            case _:
                return Owner.NOBODY


def _rows_per_request(seen: Observation) -> Sequence[int]:
    match seen.batch.mode:
        case ForwardMode.EXTEND:
            return seen.batch.extend_lens
        case ForwardMode.DRAFT_EXTEND:
            return seen.batch.accept_lengths
        case _:
            rows = len(seen.steps[0].tensors.get("seqlens_expanded", ()))
            return [rows // max(1, seen.batch.size)] * seen.batch.size


class SlotLabels:
    """Names the rows of a pass, and the slots of a layer's caches with the request whose token they hold."""

    def __init__(self, world: World, page_size: int, content: Content) -> None:
        self.world = world
        self.page_size = page_size
        self.content = content

    def row(self, a_pass: Pass, row: int) -> str:
        return f"row {row} (request {a_pass.requests[row]}, draft token {a_pass.tokens[row]})"

    def slot(self, slot: int) -> str:
        if slot < 0:
            return str(slot)
        page, offset = divmod(slot, self.page_size)
        for number, request in enumerate(self.world.running):
            if page in request.pages:
                position = request.pages.index(page) * self.page_size + offset
                return f"slot {slot} (running request {number}, position {position})"
        return f"slot {slot} (no running request)"

    def origin(self, value: torch.Tensor) -> str:
        """The slot that an output [kv_lora_rank] was read from, in a regime where one key has all the weight."""
        origin = self.content.decode(value)
        return " (no single key's value)" if origin is None else f" (the value of {self.slot(origin.slot)})"
