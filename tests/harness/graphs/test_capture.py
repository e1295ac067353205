"""What a captured graph keeps and freezes: the same tests for the simulated and for the CUDA graph."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton

from nsa_oracle.harness.graphs.capture import GraphRunner
from tests.support.captures import add_kernel, bump, bump_and_double, floats, ints, launch_in_operator, replay, settle


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


def test_memory_that_only_the_graph_knows_is_found(runner: GraphRunner, device: torch.device) -> None:
    total, scratch = [torch.zeros(8, device=device)], [torch.ones(8, device=device)]

    def body() -> None:
        total[0].add_(scratch[0])

    graph = runner.capture(body)
    view = total[0][2:]
    assert graph.released() is None
    scratch.clear()
    assert (graph.released() or "").startswith("32 bytes, first used by ")
    total.clear()
    assert (graph.released() or "").startswith("32 bytes, first used by ")  # a view holds the total as well
    del view
    assert (graph.released() or "").startswith("64 bytes, first used by ")


def test_memory_that_others_lend_is_theirs(runner: GraphRunner, device: torch.device) -> None:
    """A library that takes tensors by DLPack makes a storage of its own on their memory in each call."""
    total, lent = torch.zeros(8, device=device), torch.ones(8, device=device)
    graph = runner.capture(lambda: total.add_(torch.from_dlpack(lent)))
    assert graph.released() is None
    graph.replay()
    assert total.tolist() == [2.0] * 8
    assert lent.tolist() == [1.0] * 8


def test_host_memory_that_was_looked_at_is_no_part_of_the_graph(runner: GraphRunner, device: torch.device) -> None:
    x = torch.zeros(8, device=device)
    mirror = [torch.tensor([3])]

    def body() -> None:
        x.add_(int(mirror[0][0]))

    graph = runner.capture(body, host_tensors=mirror)
    mirror.clear()
    assert graph.released() is None
