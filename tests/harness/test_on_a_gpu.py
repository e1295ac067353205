"""What only a GPU shows: nodes of real graphs, freed memory, streams, compiled variants, lost devices."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_oracle.harness.bugs.catalogue.graphs import (
    DoesNotWaitForInputs,
    IsNotWaitedFor,
    KeepsWhatItLists,
    OnAStream,
    TurnsThroughScratch,
)
from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.checks.variants import VariantCounter
from nsa_oracle.harness.commands.sanitizer import Tool, find_sanitizer, sanitize
from nsa_oracle.harness.engine.stress import Delivery, late_inputs, slow_side_streams
from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.graphs import free_memory
from nsa_oracle.harness.graphs.allocator import Allocator
from nsa_oracle.harness.graphs.cuda import CudaCapturedGraph, CudaGraphRunner
from nsa_oracle.harness.graphs.driver import MemoryAt, driver_bindings
from nsa_oracle.harness.graphs.free_memory import spoil_free_blocks
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.memory import sparse_gpu
from nsa_oracle.harness.scenarios import scenario
from nsa_oracle.harness.scenarios.files import BUG_CASES, CORPUS, load
from nsa_oracle.harness.scenarios.scenario import Eager, Join, Replay
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.reference.types import ForwardBatch, ForwardMode
from tests.support.backends import clean, replays, seams
from tests.support.captures import add_kernel, ints
from tests.support.command_line import environment_of_children
from tests.support.layer_cases import case
from tests.support.metadata_cases import case as metadata_case
from tests.support.metadata_cases import factory_of, one_replay
from tests.support.project import PROJECT


@pytest.fixture(autouse=True)
def gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture
def capture(gpu: torch.device) -> Callable[[Callable[[], object]], CudaCapturedGraph]:
    return lambda body: CudaGraphRunner(gpu).capture(lambda: (body(), None)[1])


Capture = Callable[[Callable[[], object]], CudaCapturedGraph]


class TestAudit:
    def test_clean_graph_is_read_completely(self, capture: Capture, gpu: torch.device) -> None:
        x, amount = ints(gpu, *range(64)), ints(gpu, *range(64))

        def body() -> None:
            add_kernel[(3,)](x, amount, 5, 61, BLOCK=32)
            scratch = x * 2
            x.copy_(scratch)
            amount.zero_()

        graph = capture(body)
        audit = graph.audit()
        assert audit.fault is None
        assert audit.tally.graphs == 1
        assert audit.tally.kernels >= 2
        assert {"copy", "fill"} & set(audit.tally.other_nodes)
        assert audit.tally.addresses >= 2
        assert set(audit.tally.not_audited) <= {"kernels whose parameters cannot be read"}
        launch = next(node for node in graph.host_values() if node.what == "kernel add_kernel")
        assert launch.values["grid"] == "(3, 1, 1)"
        assert {"5", "61", "0 bytes into a buffer"} <= set(launch.values.values())
        before = x.tolist()
        graph.replay()
        torch.cuda.synchronize()
        assert x.tolist() != before

    def test_slice_is_reported_by_where_it_begins(self, capture: Capture, gpu: torch.device) -> None:
        x = ints(gpu, *range(64))
        graph = capture(lambda: add_kernel[(1,)](x[16:], x, 5, 3, BLOCK=32))
        launch = next(node for node in graph.host_values() if node.what == "kernel add_kernel")
        assert "128 bytes into a buffer" in launch.values.values()

    def test_copy_from_pinned_memory(self, capture: Capture, gpu: torch.device) -> None:
        x, pinned = ints(gpu, 1, 2), torch.tensor([3, 4]).pin_memory()
        fault = capture(lambda: x.copy_(pinned, non_blocking=True)).audit().fault
        assert fault is not None
        assert "copies from host memory" in fault.reason

    def test_copy_between_buffers_is_none(self, capture: Capture, gpu: torch.device) -> None:
        x, y = ints(gpu, *range(64)), ints(gpu, *range(64))
        assert capture(lambda: x.copy_(y)).audit().fault is None

    def test_host_function(self, capture: Capture, gpu: torch.device) -> None:
        driver = driver_bindings()
        x = ints(gpu, 1)
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda data: None)
        address = ctypes.cast(function, ctypes.c_void_p).value

        def body() -> None:
            x.add_(1)
            (code,) = driver.cuLaunchHostFunc(
                torch.cuda.current_stream().cuda_stream, driver.CUhostFn(init_value=address), 0
            )
            assert int(code) == 0

        fault = capture(body).audit().fault
        assert fault is not None
        assert fault.part.startswith("host function")

    def test_raw_kernel_on_memory_that_is_dropped_in_the_capture(self, capture: Capture, gpu: torch.device) -> None:
        x = ints(gpu, *range(61))
        scratch = [torch.zeros_like(x)]

        def body() -> None:
            add_kernel[(1,)](x, scratch[0], 5, 61, BLOCK=64)
            if torch.cuda.is_current_stream_capturing():
                scratch.clear()

        fault = capture(body).audit().fault
        assert fault is not None
        assert fault.part.startswith("kernel add_kernel, parameter 1")

    def test_raw_kernel_on_memory_that_is_dropped_later(self, capture: Capture, gpu: torch.device) -> None:
        x = ints(gpu, *range(61))
        scratch = [torch.zeros_like(x)]
        graph = capture(lambda: add_kernel[(1,)](x, scratch[0], 5, 61, BLOCK=64))
        assert graph.audit().fault is None
        assert graph.released() is None
        scratch.clear()
        assert (released := graph.released()) is not None
        assert released.startswith("kernel add_kernel, parameter 1")

    def test_lent_memory_that_its_owner_drops(self, capture: Capture, gpu: torch.device) -> None:
        x = ints(gpu, *range(61))
        lent = [torch.ones_like(x)]
        graph = capture(lambda: x.add_(torch.from_dlpack(lent[0])))
        assert graph.released() is None
        lent.clear()
        assert (released := graph.released()) is not None
        assert released.startswith("aten.")

    def test_memory_of_the_graphs_own_pool_is_none(self, capture: Capture, gpu: torch.device) -> None:
        x = ints(gpu, *range(64))
        graph = capture(lambda: add_kernel[(1,)](x, torch.ones_like(x), 5, 61, BLOCK=64))
        assert graph.audit().fault is None
        assert graph.released() is None

    def test_memory_allocated_behind_the_dispatcher_is_the_graphs_own(
        self, capture: Capture, gpu: torch.device
    ) -> None:
        """As the logits of DeepGEMM are, which makes them by tvm-ffi."""
        x = ints(gpu, *range(64))

        def body() -> None:
            storage = torch.UntypedStorage(x.nbytes, device=gpu)
            scratch = torch.empty(0, dtype=x.dtype, device=gpu).set_(storage)
            x.add_(scratch.fill_(3))

        graph = capture(body)
        assert graph.audit().fault is None
        assert graph.released() is None
        before = x.clone()
        graph.spoil(7)
        graph.replay()
        torch.cuda.synchronize()
        assert x.tolist() == (before + 3).tolist()


class TestFreeMemory:
    def test_freed_memory_is_spoiled_and_held_memory_is_not(self, gpu: torch.device) -> None:
        held, dropped = torch.full((4096,), 3, device=gpu), torch.full((4096,), 4, device=gpu)
        address = dropped.data_ptr()
        del dropped
        allocator = Allocator.now(gpu)
        assert allocator is not None
        assert spoil_free_blocks(allocator, (-1, -1), gpu, 7) >= 4096 * 8
        assert (
            torch.as_tensor(MemoryAt(address, 8192, "<i4"), device=gpu).cpu().eq(7).all()
        )  # on the GPU, the answer would go there
        assert held.eq(3).all()

    def test_scratch_of_a_graph_is_spoiled_between_replays(self, capture: Capture, gpu: torch.device) -> None:
        x, out = torch.ones(4096, device=gpu), torch.zeros(4096, device=gpu)
        addresses: list[int] = []

        def body() -> None:
            scratch = x * 3
            addresses.append(scratch.data_ptr())
            out.copy_(scratch + 1)

        graph = capture(body)
        graph.replay()
        graph.spoil(7)
        assert torch.as_tensor(MemoryAt(addresses[-1], 4096, "<i4"), device=gpu).eq(7).all()
        assert out.eq(4.0).all()
        out.zero_()
        graph.replay()
        assert out.eq(4.0).all()

    def test_scratch_of_a_graph_comes_before_other_free_memory(
        self, capture: Capture, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ones, addresses = [torch.ones(1 << 16, device=gpu)], list[int]()
        graph = capture(lambda: addresses.append((ones[0] * 3).data_ptr()))
        graph.replay()
        ones.clear()  # a free block of the common pool
        monkeypatch.setattr(free_memory, "MOST_SPOILED_BYTES", 2 << 20)  # a segment of the pool: the scratch, freed
        graph.spoil(7)
        assert torch.as_tensor(MemoryAt(addresses[-1], 1 << 16, "<i4"), device=gpu).eq(7).all()


class TestStreams:
    def test_streams_are_as_before_afterwards(self, gpu: torch.device) -> None:
        before, set_stream = torch.cuda.current_stream(), torch.cuda.set_stream
        side, x = torch.cuda.Stream(), torch.zeros(8, device=gpu)
        with slow_side_streams(gpu):
            side.wait_stream(before)
            with torch.cuda.stream(side):
                x.add_(1)
            before.wait_stream(side)
        assert torch.cuda.current_stream() == before
        assert torch.cuda.set_stream is set_stream
        assert x.eq(1).all()

    @pytest.mark.parametrize("held", [late_inputs, lambda delivery: slow_side_streams(delivery.device)])
    def test_host_may_wait_for_what_is_held(self, held: Any, gpu: torch.device) -> None:
        side, x = torch.cuda.Stream(), torch.zeros(8, device=gpu)
        torch.cuda.synchronize(gpu)  # the zeros are there
        with held(Delivery(gpu, late=True)):
            with torch.cuda.stream(side):
                x.add_(1)
            torch.cuda.synchronize(gpu)
        assert x.eq(1).all()

    @pytest.mark.parametrize("slow", [DoesNotWaitForInputs, IsNotWaitedFor])
    def test_slow_host_hides_no_race(self, slow: type[OnAStream], gpu: torch.device) -> None:
        class Slow(slow):  # type: ignore[misc, valid-type]
            def _elsewhere(self, prepare: Callable[..., None]) -> Callable[..., None]:
                elsewhere = super()._elsewhere(prepare)

                def prepare_slowly(*args: Any, **kwargs: Any) -> None:
                    time.sleep(0.01)
                    elsewhere(*args, **kwargs)
                    time.sleep(0.01)

                return prepare_slowly

        bug = ZOO[RACES[slow]]
        with pytest.raises(OracleFailure) as caught:
            judge(load(BUG_CASES / f"{bug.name}.json"), Slow, gpu)
        assert Check.of(caught.value.finding) in bug.caught_by

    @pytest.mark.parametrize("waits", [True, False])
    def test_eager_call_that_waits_for_its_stream_or_not(self, waits: bool, gpu: torch.device) -> None:
        class Step(seams.Step):
            """Fills in the lengths on a stream of its own."""

            def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
                super().init_forward_metadata(forward_batch)
                self.lengths = self.forward_metadata.cache_seqlens_int32
                self.computed = self.lengths.clone()
                self.lengths.zero_()
                engine, side = torch.cuda.current_stream(), torch.cuda.Stream()
                side.wait_stream(engine)
                with torch.cuda.stream(side):
                    self.lengths.copy_(self.computed)
                if waits:
                    engine.wait_stream(side)

        backend = factory_of(seams.backend_of(Step))
        decode = Eager(mode=ForwardMode.DECODE)
        calls = metadata_case(Join(seq_len=5), decode, Join(seq_len=7), decode)
        if waits:
            judge(calls, backend, gpu)
        else:
            with pytest.raises(OracleFailure, match="cache_seqlens_int32"):
                judge(calls, backend, gpu)


RACES = {
    DoesNotWaitForInputs: "prepares-on-an-unordered-stream",
    IsNotWaitedFor: "replay-does-not-wait-for-its-plan",
}


@pytest.mark.parametrize(
    ("backend", "bug"),
    [
        (OnAStream, "prepares-on-an-unordered-stream"),
        (OnAStream, "replay-does-not-wait-for-its-plan"),
        (KeepsWhatItLists, "address-table-outlives-its-buffers"),
        (TurnsThroughScratch, "no-barrier-between-store-and-load"),
    ],
)
def test_clean_twin_of_a_bug_passes_its_case(backend: Any, bug: str, gpu: torch.device) -> None:
    assert judge(load(BUG_CASES / f"{bug}.json"), backend, gpu).cases == 1


def test_every_graph_of_a_saved_case_is_audited(gpu: torch.device) -> None:
    """Nothing is given up as a whole, and nothing clean looks faulty."""
    audit = judge(load(CORPUS / "layer-two-speculative-cycles.json"), _optimized(), gpu).audit
    assert audit.graphs > 0
    assert audit.addresses > audit.kernels
    assert audit.compared == 1
    assert set(audit.not_audited) <= {"kernels whose parameters cannot be read"}


def _optimized() -> Any:
    from nsa_oracle.harness.subjects.default import optimized_backend

    return optimized_backend


def test_compiled_variants_are_counted(gpu: torch.device) -> None:
    x, counter = ints(gpu, *range(64)), VariantCounter()
    used = []
    with counter.counting():
        for block in (32, 64, 32):
            add_kernel[(1,)](x, x, 5, 31, BLOCK=block)
            used.append(counter.take()["add_kernel"])
    assert used[0] == used[2] != used[1]
    assert all(len(handles) == 1 for handles in used)


def test_exploration_goes_on_after_a_fault(gpu: torch.device, tmp_path: Path) -> None:
    """Two shards, each of which meets a kernel that faults: both are reported, the first is shrunk."""
    command = [sys.executable, "-m", "pytest", "tests/test_oracle.py", "-p", "no:cacheprovider", "-q"]
    command += ["-k", "test_scenarios and (0 or 1)", "--oracle-device", "cuda", "--oracle-profile", "dev"]
    command += ["--oracle-backend", "tests.support.backends.crashes:FaultsOnTheGpu", "--oracle-save", str(tmp_path)]
    done = subprocess.run(
        command, cwd=PROJECT, env=environment_of_children(), capture_output=True, text=True, check=False
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "THE GPU FAULTED" in done.stdout
    assert "2 cases FAILED" in done.stdout
    smallest = sorted(tmp_path.glob("*.min.json"), key=lambda path: path.stat().st_size)[0]
    assert len(load(smallest).events) <= 4


@pytest.mark.skipif(find_sanitizer() is None, reason="needs compute-sanitizer")
def test_memcheck_runs_a_saved_case(gpu: torch.device) -> None:
    (outcome,) = sanitize([CORPUS / "one-launch-fills-cu-seqlens-k.json"], [Tool.MEMCHECK], 300)
    if outcome.clean is None and "not supported" in outcome.message:
        pytest.skip(outcome.message)
    assert outcome.clean, outcome.line()


class TestMemory:
    """Of a GPU that several processes share: each may have so much of it, and keeps none."""

    FAR = case(
        scenario.Capture(mode=ForwardMode.DECODE, buckets=(1, 2, 3)),
        Join(seq_len=3),
        Replay(mode=ForwardMode.DECODE),
        layer={"far_slots": True},
    )
    MORE_THAN_TORCH_KEEPS: Mapping[str, int] = {"max_context_len": 65_000, "pool_size": 128}  # a table of 33 MB

    def test_case_that_passes(self, gpu: torch.device) -> None:
        self.forget(gpu)
        judge(self.FAR, optimized_backend, gpu)
        self.nothing_is_left(gpu)

    def test_cases_that_fail(self, gpu: torch.device) -> None:
        self.forget(gpu)
        kept = []
        for _ in range(4):
            with pytest.raises(OracleFailure, match="page_table_1") as caught:
                judge(self.FAR, factory_of(replays.KeepsPageTable), gpu)
            kept.append(caught)
        self.nothing_is_left(gpu)

    def test_harness_without_memory_is_no_finding(self, gpu: torch.device) -> None:
        self.forget(gpu)
        torch.cuda.set_per_process_memory_fraction(0.0)
        try:
            with pytest.raises(ScenarioError, match=r"^the GPU has too little memory left \(CUDA out of memory"):
                judge(one_replay(ForwardMode.DECODE, **self.MORE_THAN_TORCH_KEEPS), optimized_backend, gpu)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def test_backend_without_memory_is_a_finding(self, gpu: torch.device) -> None:
        class Refused(clean.Clean):
            def init_forward_metadata_replay_cuda_graph(self, *_: Any) -> None:
                torch.empty(1 << 50, dtype=torch.uint8, device=gpu)

        with pytest.raises(OracleFailure, match=r"^backend raised: OutOfMemoryError"):
            judge(one_replay(ForwardMode.DECODE), factory_of(Refused), gpu)

    @staticmethod
    def nothing_is_left(gpu: torch.device) -> None:
        assert torch.cuda.max_memory_reserved(gpu) < 1 << 30, "far memory is not torch's"
        assert torch.cuda.memory_reserved(gpu) < 1 << 28
        mappings = [thing for thing in gc.get_objects() if type(thing) is sparse_gpu._Mapping]
        assert not any(mapping._mapped for mapping in mappings)

    @staticmethod
    def forget(gpu: torch.device) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(gpu)
