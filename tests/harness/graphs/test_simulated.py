"""What a captured graph keeps, freezes and refuses: the same tests for the simulated and for the CUDA graph."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from nsa_oracle.harness.graphs.capture import CaptureError, GraphRunner
from nsa_oracle.harness.graphs.cuda import CudaGraphRunner
from nsa_oracle.harness.graphs.runner import graph_runner
from nsa_oracle.harness.graphs.simulated import SimulatedGraphRunner
from nsa_oracle.harness.graphs.storages import StorageWatch

# Without a GPU the raw launches run in Triton's interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

Body = Callable[[], None]


@pytest.fixture
def runner(device: torch.device) -> GraphRunner:
    return graph_runner(device)


@triton.jit
def add_kernel(target_ptr, amount_ptr, increment, n, BLOCK: tl.constexpr):  # noqa: N803
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < n
    value = tl.load(target_ptr + offset, mask=inside) + tl.load(amount_ptr + offset, mask=inside) + increment
    tl.store(target_ptr + offset, value, mask=inside)


@torch.library.custom_op("graph_test::bump", mutates_args=("target",))
def bump(target: torch.Tensor, amount: int) -> None:
    target.add_(amount)


@torch.library.custom_op("graph_test::bump_and_double", mutates_args=("target",))
def bump_and_double(target: torch.Tensor) -> torch.Tensor:
    target.add_(1)
    return target * 2


@torch.library.custom_op("graph_test::launch", mutates_args=("target",))
def launch_in_operator(target: torch.Tensor, amount: torch.Tensor) -> None:
    add_kernel[(1,)](target, amount, 1, target.numel(), BLOCK=8)


@torch.library.custom_op("graph_test::peek", mutates_args=("target",))
def peek(target: torch.Tensor, lengths: torch.Tensor) -> None:
    target.fill_(lengths.max().item())


opaque_library = torch.library.Library("graph_test_opaque", "DEF")
opaque_library.define("reset(Tensor(a!) x) -> ()")


def ints(device: torch.device, *values: int) -> torch.Tensor:
    return torch.tensor(values, device=device)


def floats(device: torch.device, n: int = 4) -> torch.Tensor:
    return torch.arange(n, device=device, dtype=torch.float32)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def replay(graph: object, device: torch.device, times: int = 1) -> None:
    for _ in range(times):
        graph.replay()  # type: ignore[attr-defined]
    settle(device)


def assert_refused(
    runner: GraphRunner, body: Body, *names: str, host_tensors: tuple[torch.Tensor, ...] = ()
) -> CaptureError:
    """The capture fails, names one of the operations `names`, and names the line inside `body`."""
    with pytest.raises(CaptureError) as caught:
        runner.capture(body, host_tensors=host_tensors)
    error = caught.value
    assert any(name in error.operation for name in names), error
    assert error.where.startswith("test_graph.py:"), error
    assert error.reason
    assert str(error) == f"{error.operation} at {error.where}: {error.reason}"
    assert "\n" not in str(error)
    return error


def test_runner_by_device() -> None:
    assert isinstance(graph_runner(torch.device("cpu")), SimulatedGraphRunner)
    assert isinstance(graph_runner(torch.device("cuda", 0)), CudaGraphRunner)
    with pytest.raises(ValueError, match="meta"):
        graph_runner(torch.device("meta"))


class TestReplay:
    def test_warm_up_counts_once_and_capture_not_at_all(self, runner: GraphRunner, device: torch.device) -> None:
        x = ints(device, 0, 10)

        def body() -> None:
            x.add_(1)

        graph = runner.capture(body)
        settle(device)
        assert x.tolist() == [1, 11]
        replay(graph, device)
        assert x.tolist() == [2, 12]
        replay(graph, device, times=50)
        assert x.tolist() == [52, 62]

    def test_python_of_the_body_runs_for_warm_up_and_capture_only(
        self, runner: GraphRunner, device: torch.device
    ) -> None:
        calls: list[int] = []
        x = ints(device, 0)

        def body() -> None:
            calls.append(len(calls))
            x.fill_(len(calls))

        graph = runner.capture(body)
        replay(graph, device, times=3)
        assert calls == [0, 1]
        assert x.item() == 2

    def test_chained_functional_operations(self, runner: GraphRunner, device: torch.device) -> None:
        x, out = floats(device), floats(device)

        def body() -> None:
            out.copy_(((x * 2 + 1).cumsum(0) - x).relu())

        graph = runner.capture(body)
        x.copy_(ints(device, 5, 0, 3, 1))
        replay(graph, device)
        assert out.tolist() == ((x * 2 + 1).cumsum(0) - x).tolist()

    def test_output_tensor_is_refilled_in_its_own_storage(self, runner: GraphRunner, device: torch.device) -> None:
        x = floats(device)
        made: list[torch.Tensor] = []

        def body() -> None:
            made.append(x + 1)

        graph = runner.capture(body)
        address = made[-1].data_ptr()
        for value in (3.0, 8.0):
            x.fill_(value)
            replay(graph, device)
            assert made[-1].tolist() == [value + 1] * 4
        assert made[-1].data_ptr() == address

    def test_views_alias(self, runner: GraphRunner, device: torch.device) -> None:
        table = torch.zeros(3, 4, dtype=torch.int64, device=device)

        def body() -> None:
            table.t()[1:3].reshape(-1)  # a copy that nobody uses
            table[1].view(2, 2)[0].add_(1)
            table[:, 3].copy_(table[:, 0] + 7)

        graph = runner.capture(body)
        table.zero_()
        replay(graph, device, times=2)
        assert table.tolist() == [[0, 0, 0, 7], [2, 2, 0, 9], [0, 0, 0, 7]]

    def test_shape_changed_in_place_after_use(self, runner: GraphRunner, device: torch.device) -> None:
        x, out = floats(device), floats(device)

        def body() -> None:
            y = x.view(2, 2) + 1
            flat = y.view(-1)
            y.t_()
            out.copy_(flat)

        graph = runner.capture(body)
        x.copy_(ints(device, 5, 6, 7, 8))
        replay(graph, device)
        assert out.tolist() == [6.0, 7.0, 8.0, 9.0]

    def test_factories_refill(self, runner: GraphRunner, device: torch.device) -> None:
        out = torch.zeros(5, 4, dtype=torch.int64, device=device)

        def body() -> None:
            zeros = torch.zeros(4, dtype=torch.int64, device=device)
            zeros.add_(1)
            empty = torch.empty_like(zeros)
            empty.fill_(9)
            out[0].copy_(zeros)
            out[1].copy_(torch.full((4,), 6, device=device))
            out[2].copy_(torch.arange(4, device=device))
            out[3].copy_(empty)
            out[4].copy_(zeros.new_ones(4))

        graph = runner.capture(body)
        replay(graph, device, times=3)
        assert out.tolist() == [[1] * 4, [6] * 4, [0, 1, 2, 3], [9] * 4, [1] * 4]

    def test_several_outputs_and_lists(self, runner: GraphRunner, device: torch.device) -> None:
        x = torch.tensor([[3.0, 1.0, 2.0], [0.0, 9.0, 4.0]], device=device)
        values, indices = torch.zeros(2, 2, device=device), torch.zeros(2, 2, dtype=torch.int64, device=device)
        joined = torch.zeros(4, 3, device=device)

        def body() -> None:
            top = x.topk(2, dim=1)
            values.copy_(top.values)
            indices.copy_(top.indices)
            first, second = x.split([1, 1])
            joined.copy_(torch.cat([second, first, *torch.unbind(x[None].expand(1, 2, 3))]))
            torch._foreach_add_([values, joined], 1)

        graph = runner.capture(body)
        x.copy_(torch.tensor([[1.0, 5.0, 0.0], [7.0, 8.0, 9.0]], device=device))
        replay(graph, device)
        assert values.tolist() == [[6.0, 2.0], [10.0, 9.0]]
        assert indices.tolist() == [[1, 0], [2, 1]]
        assert joined.tolist() == [[8.0, 9.0, 10.0], [2.0, 6.0, 1.0], [2.0, 6.0, 1.0], [8.0, 9.0, 10.0]]

    def test_out_arguments(self, runner: GraphRunner, device: torch.device) -> None:
        x, out = floats(device), floats(device)

        def body() -> None:
            torch.add(x, 1, out=out)

        graph = runner.capture(body)
        x.fill_(2)
        replay(graph, device)
        assert out.tolist() == [3.0] * 4

    def test_order_of_operations(self, runner: GraphRunner, device: torch.device) -> None:
        x, y = ints(device, 1), ints(device, 0)

        def body() -> None:
            x.mul_(2)
            y.copy_(x)
            x.add_(3)

        graph = runner.capture(body)
        x.fill_(1)
        replay(graph, device, times=3)  # 1 -> 2,5 -> 10,13 -> 26,29
        assert (x.item(), y.item()) == (29, 26)

    def test_two_graphs_share_a_storage(self, runner: GraphRunner, device: torch.device) -> None:
        x = ints(device, 0)

        def add() -> None:
            x.add_(1)

        def double() -> None:
            x.mul_(2)

        adding, doubling = runner.capture(add), runner.capture(double)
        x.fill_(3)
        replay(adding, device)
        replay(doubling, device)
        replay(adding, device)
        assert x.item() == 9

    def test_lazily_made_buffer_is_made_by_the_warm_up(self, runner: GraphRunner, device: torch.device) -> None:
        cache: dict[str, torch.Tensor] = {}

        def body() -> None:
            if "count" not in cache:
                cache["count"] = torch.zeros(1, dtype=torch.int64, device=device)
            cache["count"].add_(1)

        graph = runner.capture(body)
        replay(graph, device, times=4)
        assert cache["count"].item() == 5  # no captured zeros() between them


class TestFrozen:
    def test_host_value_stays_stale(self, runner: GraphRunner, device: torch.device) -> None:
        host = SimpleNamespace(length=3)
        x = torch.zeros(4, dtype=torch.int64, device=device)

        def body() -> None:
            x.fill_(host.length)

        graph = runner.capture(body)
        host.length = 4
        x.zero_()
        replay(graph, device)
        assert x.tolist() == [3] * 4

    def test_value_read_from_a_host_mirror_stays_stale(self, runner: GraphRunner, device: torch.device) -> None:
        """Reading the host's own mirror is legal in a capture, and freezes what it said."""
        mirror = torch.tensor([2, 5])
        x = ints(device, 0)

        def body() -> None:
            x.fill_(mirror.max().item())

        graph = runner.capture(body, host_tensors=(mirror,))
        mirror.fill_(9)
        replay(graph, device)
        assert x.item() == 5

    def test_host_scalar_tensor_is_frozen(self, runner: GraphRunner, device: torch.device) -> None:
        mirror = torch.tensor([2, 5])
        x, out = ints(device, 1, 2), ints(device, 0, 0)

        def body() -> None:
            out.copy_(x + mirror[1])

        graph = runner.capture(body, host_tensors=(mirror,))
        mirror.fill_(9)
        replay(graph, device)
        assert out.tolist() == [6, 7]

    def test_device_value_does_not(self, runner: GraphRunner, device: torch.device) -> None:
        length, x = ints(device, 3), torch.zeros(4, dtype=torch.int64, device=device)

        def body() -> None:
            x.copy_(torch.arange(4, device=device) < length)

        graph = runner.capture(body)
        for value in (1, 4, 2):
            length.fill_(value)
            replay(graph, device)
            assert x.sum().item() == value

    @pytest.mark.parametrize(("captured", "later"), [(2, 4), (4, 2)], ids=["growing", "small-after-large"])
    def test_slice_keeps_its_shape(self, runner: GraphRunner, device: torch.device, captured: int, later: int) -> None:
        host = SimpleNamespace(rows=captured)
        source, target = ints(device, 1, 2, 3, 4), torch.zeros(4, dtype=torch.int64, device=device)

        def body() -> None:
            target[: host.rows].copy_(source[: host.rows])

        graph = runner.capture(body)
        host.rows = later
        target.zero_()
        replay(graph, device)
        assert torch.count_nonzero(target).item() == captured

    def test_list_argument_is_copied(self, runner: GraphRunner, device: torch.device) -> None:
        sizes = [1, 3]
        x, out = floats(device), floats(device)

        def body() -> None:
            first, second = x.split(sizes)
            out.copy_(torch.cat([second, first]))

        graph = runner.capture(body)
        sizes.reverse()
        replay(graph, device)
        assert out.tolist() == [1.0, 2.0, 3.0, 0.0]

    def test_rebinding_leaves_the_graph_on_the_old_storage(self, runner: GraphRunner, device: torch.device) -> None:
        state = SimpleNamespace(length=ints(device, 1))
        x, old = ints(device, 0), state.length

        def body() -> None:
            x.copy_(state.length)

        graph = runner.capture(body)
        state.length = ints(device, 8)
        replay(graph, device)
        assert x.item() == 1
        old.fill_(5)
        replay(graph, device)
        assert x.item() == 5


class TestOperatorsAndLaunches:
    def test_mutating_operator(self, runner: GraphRunner, device: torch.device) -> None:
        x = ints(device, 0, 1)
        host = SimpleNamespace(amount=3)

        def body() -> None:
            bump(x, host.amount)
            torch.ops.graph_test.bump(x, 1)

        graph = runner.capture(body)
        host.amount = 100
        x.zero_()
        replay(graph, device, times=2)
        assert x.tolist() == [8, 8]

    def test_mutating_operator_with_a_result(self, runner: GraphRunner, device: torch.device) -> None:
        x, out = ints(device, 0, 1), ints(device, 0, 0)

        def body() -> None:
            out.copy_(bump_and_double(x) + 1)

        graph = runner.capture(body)
        x.zero_()
        replay(graph, device, times=2)
        assert (x.tolist(), out.tolist()) == ([2, 2], [5, 5])

    def test_raw_launch(self, runner: GraphRunner, device: torch.device) -> None:
        x, amount = torch.zeros(20, dtype=torch.int64, device=device), torch.arange(20, device=device)
        host = SimpleNamespace(increment=1, n=20)

        def body() -> None:
            grid = lambda meta: (triton.cdiv(host.n, meta["BLOCK"]),)  # noqa: E731
            add_kernel[grid](x, amount, host.increment, host.n, BLOCK=8)

        graph = runner.capture(body)
        settle(device)
        assert x.tolist() == list(range(1, 21))
        host.increment, host.n = 50, 3
        x.zero_()
        replay(graph, device, times=2)
        assert x.tolist() == [2 * i + 2 for i in range(20)]

    def test_launch_feeds_operations_and_the_other_way_round(self, runner: GraphRunner, device: torch.device) -> None:
        x, out = floats(device, 8), floats(device, 8)

        def body() -> None:
            scratch = torch.zeros_like(x)
            add_kernel[(1,)](scratch, x * 2, 1, 8, BLOCK=8)
            out.copy_(scratch + x)

        graph = runner.capture(body)
        x.fill_(3)
        replay(graph, device)
        assert out.tolist() == [10.0] * 8

    def test_launch_inside_an_operator_runs_once(self, runner: GraphRunner, device: torch.device) -> None:
        x, amount = torch.zeros(8, dtype=torch.int64, device=device), torch.ones(8, dtype=torch.int64, device=device)

        def body() -> None:
            launch_in_operator(x, amount)

        graph = runner.capture(body)
        settle(device)
        assert x.tolist() == [2] * 8
        replay(graph, device, times=3)
        assert x.tolist() == [8] * 8

    def test_launch_hook_is_gone_after_capture(self, runner: GraphRunner, device: torch.device) -> None:
        x = torch.zeros(8, dtype=torch.int64, device=device)
        graph = runner.capture(lambda: add_kernel[(1,)](x, x, 1, 8, BLOCK=8))
        add_kernel[(1,)](x, x, 1, 8, BLOCK=8)  # 0 -> 1 at warm-up -> 3
        replay(graph, device)
        assert x.tolist() == [7] * 8


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
        assert error.where == f"test_graph.py:{line} in length_on_host"

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


class TestSimulationOnly:
    """What only the simulation can show."""

    def test_audit(self) -> None:
        x, y, unused = floats(torch.device("cpu")), floats(torch.device("cpu"), 8), floats(torch.device("cpu"), 2)

        def body() -> None:
            unused.view(-1)
            y[:4].copy_(x + 1)

        graph = SimulatedGraphRunner().capture(body)
        assert graph.storages_read == {(x.data_ptr(), 16)}
        assert graph.storages_written == {(y.data_ptr(), 32)}
        assert graph.allocations == 1

    @pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="launches on CPU tensors need the interpreter"
    )
    def test_audit_of_a_launch(self) -> None:
        x, y = torch.zeros(8), torch.ones(8)
        graph = SimulatedGraphRunner().capture(lambda: add_kernel[(1,)](x, y, 1, 8, BLOCK=8))
        assert graph.storages_read == graph.storages_written == {(x.data_ptr(), 32), (y.data_ptr(), 32)}
        assert graph.allocations == 0

    def test_capture_result_is_poisoned_until_the_first_replay(self) -> None:
        x = torch.ones(3)
        made: list[torch.Tensor] = []
        graph = SimulatedGraphRunner().capture(lambda: made.append(x + 1))
        assert made[1].isnan().all()
        graph.replay()
        assert made[1].tolist() == [2.0] * 3

    def test_graph_keeps_its_tensors_alive(self) -> None:
        state = SimpleNamespace(source=torch.ones(1000), target=torch.zeros(1000))
        target = state.target
        graph = SimulatedGraphRunner().capture(lambda: (state.target.copy_(state.source), None)[1])
        state.source = None
        target.zero_()
        junk = [torch.full((1000,), 7.0) for _ in range(8)]
        graph.replay()
        assert target.tolist() == [1.0] * 1000
        del junk

    def test_random_state_counts_the_warm_up_only(self) -> None:
        x = torch.zeros(2)
        torch.manual_seed(1)
        torch.rand(2)
        expected = torch.rand(1)
        torch.manual_seed(1)
        SimulatedGraphRunner().capture(lambda: (x.copy_(torch.rand_like(x)), None)[1])
        assert torch.equal(torch.rand(1), expected)

    def test_operator_without_visible_inside_is_recorded_whole(self) -> None:
        opaque_library.impl("reset", lambda x: (x.untyped_storage().fill_(0), None)[1], "CPU")
        x = torch.ones(3)
        graph = SimulatedGraphRunner().capture(lambda: torch.ops.graph_test_opaque.reset(x))
        x.fill_(5)
        graph.replay()
        assert x.tolist() == [0.0] * 3

    def test_watch_does_not_prolong_intermediates(self) -> None:
        with StorageWatch() as watch:
            made = torch.zeros(4) + 1
            assert not watch.existed(made)
        assert not watch.found


def test_memory_that_only_the_graph_knows_is_found(runner: GraphRunner, device: torch.device) -> None:
    total, scratch = [torch.zeros(8, device=device)], [torch.ones(8, device=device)]

    def body() -> None:
        total[0].add_(scratch[0])

    graph = runner.capture(body)
    view = total[0][2:]
    assert graph.dangling_bytes() == 0
    scratch.clear()
    assert graph.dangling_bytes() == 32
    total.clear()
    assert graph.dangling_bytes() == 32  # a view holds the total as well
    del view
    assert graph.dangling_bytes() == 64


def test_host_memory_that_was_looked_at_is_no_part_of_the_graph(runner: GraphRunner, device: torch.device) -> None:
    x = torch.zeros(8, device=device)
    mirror = [torch.tensor([3])]

    def body() -> None:
        x.add_(int(mirror[0][0]))

    graph = runner.capture(body, host_tensors=mirror)
    mirror.clear()
    assert graph.dangling_bytes() == 0
