"""What only the simulated graph can show."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import pytest
import torch

from nsa_oracle.harness.graphs.recording import Launch
from nsa_oracle.harness.graphs.simulated import SimulatedGraphRunner
from nsa_oracle.harness.graphs.storages import StorageWatch
from nsa_oracle.harness.watching import watch_of_this_process
from tests.support.captures import add_kernel, floats

CPU = torch.device("cpu")
opaque_library = torch.library.Library("graph_test_opaque", "DEF")
opaque_library.define("reset(Tensor(a!) x) -> ()")


class TestSimulationOnly:
    """What only the simulation can show."""

    def test_capture_leaves_memory_as_the_warm_up_left_it(self) -> None:
        """What the capturing run writes is undone, a replay writes it again, and all else is untouched."""
        x, y, unused = floats(CPU), floats(CPU, 8), floats(CPU, 2)
        made: list[torch.Tensor] = []

        def body() -> None:
            unused.view(-1)
            made.append(x + 1)
            y[:4].add_(made[-1])

        graph = SimulatedGraphRunner().capture(body)
        assert y.tolist() == [1.0, 3.0, 5.0, 7.0, 4.0, 5.0, 6.0, 7.0]
        assert made[1].isnan().all(), "made by the capture"
        graph.replay()
        assert y.tolist() == [2.0, 5.0, 8.0, 11.0, 4.0, 5.0, 6.0, 7.0]
        assert made[1].tolist() == [1.0, 2.0, 3.0, 4.0]
        assert (x.tolist(), unused.tolist()) == ([0.0, 1.0, 2.0, 3.0], [0.0, 1.0])

    @pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="launches on CPU tensors need the interpreter"
    )
    def test_launch_of_a_capture_is_undone_and_replayed(self) -> None:
        x, y, beside = torch.zeros(8), torch.ones(8), torch.full((8,), 5.0)
        graph = SimulatedGraphRunner().capture(lambda: add_kernel[(1,)](x, y, 1, 8, BLOCK=8))
        assert x.tolist() == [2.0] * 8, "of the warm-up"
        graph.replay()
        assert x.tolist() == [4.0] * 8
        assert (y.tolist(), beside.tolist()) == ([1.0] * 8, [5.0] * 8)

    def test_capture_result_is_poisoned_until_the_first_replay(self) -> None:
        x = torch.ones(3)
        made: list[torch.Tensor] = []
        graph = SimulatedGraphRunner().capture(lambda: made.append(x + 1))
        assert made[1].isnan().all()
        graph.replay()
        assert made[1].tolist() == [2.0] * 3

    def test_what_a_body_in_inference_mode_makes_and_writes_is_undone_and_replayed(self) -> None:
        x = torch.ones(3)
        made: list[torch.Tensor] = []
        with torch.inference_mode():
            own = torch.zeros(3)

        @torch.inference_mode()
        def body() -> None:
            made.append(x + 1)
            own.add_(made[-1])

        graph = SimulatedGraphRunner().capture(body)
        assert own.tolist() == [2.0] * 3, "of the warm-up"
        x.fill_(4)
        graph.replay()
        assert (made[1].tolist(), own.tolist()) == ([5.0] * 3, [7.0] * 3)

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


def test_a_launch_is_noted_while_it_is_replayed() -> None:
    """A fault of a kernel in a replay passes no line of judged code."""
    noted: list[str] = []

    class Executor:
        fn = staticmethod(lambda: None)

        def __call__(self) -> None:
            noted.append(watch_of_this_process().called)

    Launch(Executor(), (), {}).run()
    assert re.fullmatch(rf"{re.escape(__file__)}:\d+ in <lambda>", noted[0])
    assert watch_of_this_process().called == ""
