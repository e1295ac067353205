"""What a capture refuses and what it accepts: the same tests for the simulated and for the CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nsa_oracle.harness.graphs.capture import GraphRunner
from nsa_oracle.harness.graphs.simulated import SimulatedGraphRunner
from tests.support.captures import add_kernel, assert_refused, floats, ints, replay, settle


@torch.library.custom_op("graph_test::peek", mutates_args=("target",))
def peek(target: torch.Tensor, lengths: torch.Tensor) -> None:
    target.fill_(lengths.max().item())


def _set_item(x: torch.Tensor, index: object, value: object) -> None:
    x[index] = value  # type: ignore[index, assignment]


Operands = SimpleNamespace

SYNCHRONISING: dict[str, tuple[Callable[[Operands], object], tuple[str, ...]]] = {
    "item": (lambda o: o.x[0].item(), ("item",)),
    "tolist": (lambda o: o.x.tolist(), ("tolist",)),
    "bool": (lambda o: bool(o.mask[0]), ("bool",)),
    "if": (lambda o: 1 if o.mask.any() else 2, ("bool",)),
    "int": (lambda o: int(o.index[0]), ("int",)),
    "float": (lambda o: float(o.x[0]), ("float",)),
    "index": (lambda o: [1, 2, 3, 4][o.index[0]], ("index",)),
    "range": (lambda o: range(o.index[1]), ("index",)),
    "slice": (lambda o: o.x[: o.index[1]], ("index", "getitem")),
    "max": (lambda o: max(o.x), ("bool",)),
    "in": (lambda o: 3 in o.x, ("contains",)),
    "format": (lambda o: f"{o.x[0]}", ("format",)),
    "cpu": (lambda o: o.x.cpu(), ("cpu",)),
    "to_cpu": (lambda o: o.x.to("cpu"), ("to",)),
    "to_cpu_kwarg": (lambda o: o.x.to(device="cpu", dtype=torch.float64), ("to",)),
    "nonzero": (lambda o: torch.nonzero(o.mask), ("nonzero",)),
    "where_one_argument": (lambda o: torch.where(o.mask), ("where", "nonzero")),
    "argwhere": (lambda o: torch.argwhere(o.mask), ("argwhere", "nonzero")),
    "masked_select": (lambda o: o.x.masked_select(o.mask), ("masked_select",)),
    "mask_read": (lambda o: o.x[o.mask], ("getitem", "index")),
    "mask_write": (lambda o: _set_item(o.x, o.mask, o.x[:3] + 1), ("setitem", "index_put")),
    "unique": (lambda o: torch.unique(o.x), ("unique",)),
    "unique_consecutive": (lambda o: torch.unique_consecutive(o.x), ("unique_consecutive",)),
    "repeat_interleave": (lambda o: torch.repeat_interleave(o.x, o.counts), ("repeat_interleave",)),
    "repeat_interleave_method": (lambda o: o.x.repeat_interleave(o.counts), ("repeat_interleave",)),
    "equal": (lambda o: torch.equal(o.x, o.x + 0), ("equal",)),
    "allclose": (lambda o: torch.allclose(o.x, o.x + 0), ("allclose",)),
    "one_hot_unsized": (lambda o: torch.nn.functional.one_hot(o.index), ("one_hot",)),
    "arange_of_tensor": (lambda o: torch.arange(o.index[1], device=o.device), ("arange",)),
    "inside_an_operator": (lambda o: peek(o.x, o.index), ("item", "peek")),
    "grid": (lambda o: add_kernel[lambda meta: (int(o.index[1]),)](o.x, o.x, 1, 4, BLOCK=8), ("int",)),
}

# `Tensor.numpy()` of a CUDA tensor fails in the warm-up already; these are the simulation's to find.
SYNCHRONISING_ON_CPU_ONLY: dict[str, tuple[Callable[[Operands], object], tuple[str, ...]]] = {
    "numpy": (lambda o: o.x.numpy(), ("numpy",)),
    "asarray": (lambda o: np.asarray(o.x), ("array",)),
}

HOST_COPIES: dict[str, tuple[Callable[[Operands], object], tuple[str, ...]]] = {
    "copy_from_mirror": (lambda o: o.index.copy_(o.mirror), ("copy_",)),
    "copy_from_mirror_slice": (lambda o: o.index[:1].copy_(o.mirror[1:]), ("copy_",)),
    "non_blocking": (lambda o: o.index.copy_(o.mirror, non_blocking=True), ("copy_",)),
    "mirror_to_device": (lambda o: o.mirror.to(o.device), ("to",)),
    "mirror_to_device_kwarg": (lambda o: o.mirror.to(device=o.device, non_blocking=True), ("to",)),
    "slice_assignment": (lambda o: _set_item(o.index, slice(0, 2), o.mirror), ("setitem", "copy_")),
    "tensor_of_list": (lambda o: torch.tensor([1, 2], device=o.device), ("tensor",)),
    "as_tensor_of_list": (lambda o: torch.as_tensor([1, 2], device=o.device), ("as_tensor",)),
    "as_tensor_of_mirror": (lambda o: torch.as_tensor(o.mirror, device=o.device), ("as_tensor",)),
    "tensor_of_scalar": (lambda o: torch.tensor(1.0, device=o.device), ("tensor",)),
    "new_tensor": (lambda o: o.x.new_tensor([1.0, 2.0]), ("new_tensor",)),
    "from_numpy": (lambda o: o.index.copy_(torch.from_numpy(np.array([1, 2]))), ("copy_",)),
    "tensor_then_copy": (lambda o: o.index.copy_(torch.tensor([1, 2])), ("copy_",)),
    "tensor_then_to": (lambda o: torch.tensor([1, 2]).to(o.device), ("to",)),
    "list_index": (lambda o: o.x[[0, 2]], ("getitem", "index")),
    "scalar_through_index_put": (lambda o: _set_item(o.x, o.index, 1.0), ("setitem", "index_put")),
    "scalar_into_one_element": (lambda o: _set_item(o.x, 0, 1.0), ("setitem", "copy_")),
    "copy_back_to_mirror": (lambda o: o.mirror.copy_(o.index), ("copy_",)),
}


def operands(device: torch.device) -> Operands:
    x = floats(device)
    return Operands(
        x=x,
        mask=x > 0,
        index=ints(device, 0, 2),
        counts=ints(device, 1, 0, 2, 1),
        mirror=torch.tensor([1, 3]),
        device=device,
    )


class TestRefused:
    @pytest.mark.parametrize("name", SYNCHRONISING)
    def test_synchronisation(self, runner: GraphRunner, device: torch.device, name: str) -> None:
        act, names = SYNCHRONISING[name]
        given = operands(device)
        assert_refused(runner, lambda: (act(given), None)[1], *names, host_tensors=(given.mirror,))

    @pytest.mark.parametrize("name", SYNCHRONISING_ON_CPU_ONLY)
    def test_synchronisation_by_numpy(self, name: str) -> None:
        act, names = SYNCHRONISING_ON_CPU_ONLY[name]
        given = operands(torch.device("cpu"))
        assert_refused(SimulatedGraphRunner(), lambda: (act(given), None)[1], *names)

    @pytest.mark.parametrize("name", HOST_COPIES)
    def test_copy_from_host_memory(self, runner: GraphRunner, device: torch.device, name: str) -> None:
        act, names = HOST_COPIES[name]
        given = operands(device)
        assert_refused(runner, lambda: (act(given), None)[1], *names, host_tensors=(given.mirror,))

    def test_mirror_is_matched_by_storage(self, runner: GraphRunner, device: torch.device) -> None:
        mirror = np.array([1, 2, 3])
        declared, view = torch.from_numpy(mirror), torch.from_numpy(mirror)
        x = ints(device, 0, 0)
        assert_refused(runner, lambda: (x.copy_(view[:2]), None)[1], "copy_", host_tensors=(declared,))

    def test_resize_that_grows(self, runner: GraphRunner, device: torch.device) -> None:
        x = floats(device)
        address = x.data_ptr()
        assert_refused(runner, lambda: (x.resize_(64), None)[1], "resize_")
        assert (x.data_ptr(), x.tolist()) == (address, [0.0, 1.0, 2.0, 3.0])

    def test_set(self, runner: GraphRunner, device: torch.device) -> None:
        x, other = floats(device), floats(device)
        assert_refused(runner, lambda: (x.set_(other), None)[1], "set_")

    def test_data_assignment(self, runner: GraphRunner, device: torch.device) -> None:
        x, other = floats(device), floats(device)

        def body() -> None:
            x.data = other

        assert_refused(runner, body, "data")

    def test_out_that_is_too_small(self, runner: GraphRunner, device: torch.device) -> None:
        x, out = floats(device), torch.empty(0, device=device)
        assert_refused(runner, lambda: (torch.add(x, 1, out=out), None)[1], "add")

    def test_error_names_operation_and_line(self, runner: GraphRunner, device: torch.device) -> None:
        x = floats(device)

        def length_on_host() -> int:
            return int(x.max().item())

        def body() -> None:
            x.fill_(length_on_host())

        error = assert_refused(runner, body, "item")
        line = length_on_host.__code__.co_firstlineno + 1
        assert error.where == f"test_operators.py:{line} in length_on_host"

    def test_swallowed_error_still_fails_the_capture(self, runner: GraphRunner, device: torch.device) -> None:
        x = floats(device)

        def body() -> None:
            try:
                x.tolist()
            except Exception:
                x.fill_(1)

        assert_refused(runner, body, "tolist")

    def test_refusal_leaves_the_runner_usable(self, runner: GraphRunner, device: torch.device) -> None:
        x = ints(device, 0)

        def bad() -> None:
            x.add_(1)
            torch.rand(3, device=device)
            x.item()

        def good() -> None:
            x.add_(torch.ones(1, dtype=torch.int64, device=device))

        for _ in range(3):
            assert_refused(runner, bad, "item")
        settle(device)
        assert x.item() == 3  # three warm-ups, no trace of the captures
        torch.rand(3, device=device)
        graph = runner.capture(good)
        replay(graph, device, times=2)
        assert x.item() == 6

    def test_exception_of_the_body_passes_unchanged(self, runner: GraphRunner, device: torch.device) -> None:
        x = ints(device, 0)
        calls: list[int] = []

        def body() -> None:
            x.add_(1)
            calls.append(1)
            if len(calls) == 2:
                raise KeyError("second run")

        with pytest.raises(KeyError, match="second run"):
            runner.capture(body)
        settle(device)
        assert x.item() == 1
        replay(runner.capture(lambda: (x.add_(1), None)[1]), device)
        assert x.item() == 3


ACCEPTED: dict[str, Callable[[Operands], object]] = {
    "allocation": lambda o: torch.empty(128, device=o.device).fill_(2) + 1,
    "zeros_like": lambda o: torch.zeros_like(o.x) + o.x.new_full((4,), 2.0),
    "empty_on_tensor_device": lambda o: torch.empty(3, device=o.x.device).zero_(),
    "default_device": lambda o: _with_default_device(o),
    "copy": lambda o: o.x.copy_(o.x.flip(0)),
    "convert": lambda o: o.x.to(torch.int32).long().float().to(o.x).to(o.device),
    "convert_on_device": lambda o: o.x.to(device=o.device, dtype=torch.float64),
    "as_tensor_of_tensor": lambda o: torch.as_tensor(o.x, device=o.device),
    "scalar_operands": lambda o: (o.x * 2 - 1).clamp(min=0, max=3) ** 2,
    "scalar_slice_fill": lambda o: _set_item(o.x, slice(0, 2), 5.0),
    "scalar_mask_fill": lambda o: _set_item(o.x, o.mask, 5.0),
    "masked_fill": lambda o: o.x.masked_fill_(o.mask, -1.0),
    "where": lambda o: torch.where(o.mask, o.x, 0.0),
    "where_tensors": lambda o: torch.where(o.mask, o.x, o.x + 1),
    "gather_by_index": lambda o: o.x[o.index],
    "index_in_2d": lambda o: o.x.view(2, 2)[o.index // 2, o.index // 2],
    "scatter_by_index": lambda o: _set_item(o.x, o.index, o.x[o.index] + 1),
    "index_copy": lambda o: o.x.index_copy_(0, o.index, o.x[:2] + 1),
    "index_fill": lambda o: o.x.index_fill_(0, o.index, 7.0),
    "index_select": lambda o: o.x.index_select(0, o.index),
    "gather_scatter": lambda o: o.x.scatter_(0, o.index, o.x.gather(0, o.index)),
    "scatter_add": lambda o: o.x.scatter_add_(0, o.index, o.x[:2] + 1),
    "none_and_ellipsis": lambda o: o.x[None, ..., 1:].expand(2, -1).contiguous(),
    "repeat_interleave_sized": lambda o: torch.repeat_interleave(o.x, o.counts, output_size=4),
    "repeat_interleave_by_int": lambda o: o.x.repeat_interleave(2),
    "one_hot_sized": lambda o: torch.nn.functional.one_hot(o.index, 4),
    "sort": lambda o: torch.sort(o.x, descending=True).indices,
    "topk": lambda o: torch.topk(o.x, 2),
    "cumsum_pad": lambda o: torch.nn.functional.pad(o.counts.cumsum(0), (1, 0)),
    "searchsorted": lambda o: torch.searchsorted(o.counts.cumsum(0), torch.arange(4, device=o.device), right=True),
    "bucketize": lambda o: torch.bucketize(o.x, o.x),
    "matmul_softmax": lambda o: (o.x.view(2, 2) @ o.x.view(2, 2)).softmax(-1),
    "einsum": lambda o: torch.einsum("ij,kj->ik", o.x.view(2, 2), o.x.view(2, 2)),
    "stack_cat": lambda o: torch.cat([torch.stack([o.x, o.x]), o.x[None]]),
    "all_any_max": lambda o: (o.mask.all(), o.mask.any(), o.x.max(), o.x.amax(0)),
    "iterate": lambda o: [row + 1 for row in o.x.view(2, 2)],
    "bit_views": lambda o: o.x.view(torch.int32).bitwise_and(3),
    "float8": lambda o: o.x.to(torch.float8_e4m3fn).float(),
    "shape_questions": lambda o: (o.x.shape, len(o.x), o.x.numel(), o.x.stride(), o.x.data_ptr(), o.x.is_contiguous()),
    "out_new": lambda o: torch.add(o.x, 1, out=torch.empty(4, device=o.device)),
    "resize_smaller": lambda o: o.x.resize_(4),
    "resize_own": lambda o: torch.empty(0, device=o.device).resize_(16).zero_(),
    "host_arithmetic": lambda o: o.x[: int(o.mirror.max().item())].add_(1),
    "host_list": lambda o: [o.x.narrow(0, start, 1).add_(1) for start in o.mirror.tolist()],
    "host_factory": lambda o: o.x.add_(int(torch.arange(3).sum())),
    "host_tensor_unused": lambda o: torch.tensor([1, 2, 3]).numpy(),
    "host_mirror_to_cpu": lambda o: o.mirror.cpu().to("cpu").numpy(),
    "fill_from_host_scalar": lambda o: o.x.fill_(o.mirror[0]),
    "random": lambda o: o.x.copy_(torch.rand(4, device=o.device)),
}


def _with_default_device(given: Operands) -> torch.Tensor:
    with given.device:
        return given.x + torch.ones(4)


class TestAccepted:
    """A false rejection is as bad as a missed one: what a CUDA capture holds has to pass."""

    @pytest.mark.parametrize("name", ACCEPTED)
    def test_accepted(self, runner: GraphRunner, device: torch.device, name: str) -> None:
        given = operands(device)
        # Something for the graph to hold even where the operation leaves the device nothing to do.
        graph = runner.capture(lambda: (given.x.add_(0), ACCEPTED[name](given), None)[2], host_tensors=(given.mirror,))
        replay(graph, device, times=2)

    @pytest.mark.parametrize("name", [name for name in ACCEPTED if name != "random"])
    def test_replay_equals_eager(self, runner: GraphRunner, device: torch.device, name: str) -> None:
        """A replay after new inputs does to every operand what the body does eagerly."""
        given, eager = operands(device), operands(device)

        def body(held: Operands) -> None:
            held.out = ACCEPTED[name](held)

        graph = runner.capture(lambda: body(given), host_tensors=(given.mirror,))
        for held in (given, eager):
            held.x.copy_(floats(device).flip(0) + 3)
            held.mask.copy_(floats(device) < 2)
            held.index.copy_(ints(device, 3, 1))
            held.counts.copy_(ints(device, 2, 2, 0, 0))
        replay(graph, device)
        body(eager)
        for field in ("x", "mask", "index", "counts", "mirror"):
            assert torch.equal(getattr(given, field), getattr(eager, field)), field
        expected, got = _outputs(eager.out), _outputs(given.out)
        assert len(expected) == len(got)
        for want, have in zip(expected, got, strict=True):
            assert want.dtype == have.dtype
            assert torch.equal(want, have)


def _outputs(tree: object) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
