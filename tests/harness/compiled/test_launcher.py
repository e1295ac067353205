"""Launches that run as C: what is checked, what is left to the interpreter, and what follows a change of the source."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from nsa_oracle.harness.bugs.mutate import Mutation, mutated
from nsa_oracle.harness.checks.variants import VariantCounter
from nsa_oracle.harness.compiled import building, launcher
from nsa_oracle.harness.compiled.building import BuildError
from nsa_oracle.harness.errors import BackendError, CaseTimeout
from nsa_oracle.harness.interpreter.bounds import OutOfBounds
from nsa_oracle.harness.interpreter.promises import BrokenPromise
from nsa_oracle.harness.processes import time_limit
from nsa_oracle.optimized.kernels import copy as copy_kernels
from tests.support import bounded
from tests.support.bounded import add_kernel, load_kernel, memory, store_kernel, through_integers_kernel


def test_what_was_given_may_be_loaded(all_are_compiled: None) -> None:
    _, part = memory()
    target = torch.zeros(1, dtype=torch.int32)
    load_kernel[(1,)](part, target, 0, 4)
    load_kernel[(1,)](part, target, 2, 2)  # the other lanes are masked off
    load_kernel[(1,)](part, target, 5, 0)
    assert target.item() == 1


@pytest.mark.parametrize(
    ("first", "count", "where"),
    [(1, 4, "0 bytes behind the end of source"), (-1, 1, "4 bytes before the beginning of source")],
)
def test_a_load_beyond_the_batch_is_found_even_if_unused(first: int, count: int, where: str) -> None:
    _, part = memory()
    with pytest.raises(OutOfBounds, match=f"a load of 4 bytes that begins {where}.*given 16 bytes") as caught:
        load_kernel[(1,)](part, torch.zeros(1, dtype=torch.int32), first, count)
    frame = caught.traceback[-1]
    file = Path(bounded.__file__)
    assert (frame.path.name, frame.name) == (file.name, "load_kernel")
    assert "tl.load(source + first" in file.read_text().splitlines()[frame.lineno]


def test_stores_and_atomic_operations_are_checked() -> None:
    _, part = memory()
    with pytest.raises(OutOfBounds, match="a store of 4 bytes that begins 0 bytes behind the end of target"):
        store_kernel[(1,)](part, 4)
    with pytest.raises(OutOfBounds, match=r"an? atomic operation of 4 bytes that begins 4 bytes before"):
        add_kernel[(1,)](part, -1)


def test_a_launch_that_makes_pointers_from_integers_is_not_checked(all_are_compiled: None) -> None:
    target, elsewhere = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    through_integers_kernel[(1,)](target, elsewhere[2:].data_ptr())
    assert elsewhere.tolist() == [0, 0, 7, 0]
    assert target.item() == 1


@triton.jit
def promise_kernel(source: tl.tensor, target: tl.tensor, first: tl.tensor, CONTIGUOUS: tl.constexpr) -> None:
    lanes = tl.arange(0, 8)
    cells = source + first + lanes * (1 + first % 2)
    cells = tl.max_contiguous(cells, [4]) if CONTIGUOUS else tl.multiple_of(cells, [16])
    tl.store(target + lanes, tl.load(cells))


def test_promises_are_checked(all_are_compiled: None) -> None:
    source, target = torch.zeros(64, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    for contiguous in (True, False):
        promise_kernel[(1,)](source, target, 4, CONTIGUOUS=contiguous)
    with pytest.raises(
        BrokenPromise, match=r"multiple_of promises .* dimension 0 .* 16 bytes, but lane \[0\] points 8"
    ):
        promise_kernel[(1,)](source, target, 2, CONTIGUOUS=False)
    with pytest.raises(
        BrokenPromise, match=r"max_contiguous promises 4 .* dimension 0, but lane \[1\] points elsewhere"
    ):
        promise_kernel[(1,)](source, target, 5, CONTIGUOUS=True)


@triton.jit
def endless_kernel(target: tl.tensor, n: tl.tensor) -> None:
    number = n
    while number > 0:
        number = tl.load(target)
    tl.store(target, number)


def test_a_kernel_without_an_end_is_interrupted(all_are_compiled: None) -> None:
    endless_kernel[(1,)](torch.ones(1, dtype=torch.int32), -5)  # is compiled before the time counts
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(CaseTimeout), time_limit(0.2):
        endless_kernel[(1,)](torch.ones(1, dtype=torch.int32), 5)
    assert signal.getsignal(signal.SIGALRM) is handler


@triton.jit
def printing_kernel(target: tl.tensor) -> None:
    tl.store(target, 3)
    tl.device_print("target", 3)


def test_what_is_not_supported_runs_in_the_interpreter(compiled: dict[str, str]) -> None:
    target = torch.zeros(1, dtype=torch.int32)
    printing_kernel[(1,)](target)
    assert target.item() == 3
    assert compiled == {"printing_kernel": "tl.device_print"}


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As in a process whose tier is not chosen yet. Returns a list to which each installation is added."""
    entered: list[str] = []

    @contextmanager
    def installed() -> Iterator[None]:
        building._compiler()
        entered.append(launcher.COMPILED_TIER)
        yield

    monkeypatch.setattr(launcher, "is_installed", lambda: False)
    monkeypatch.setattr(launcher, "installed", installed)
    monkeypatch.setattr(launcher, "_refused", "")
    monkeypatch.delenv(launcher.TIER_VARIABLE, raising=False)
    return entered


@pytest.mark.parametrize(("value", "chosen"), [(None, True), ("", True), ("interpreted", False), ("compiled", True)])
def test_the_environment_chooses(
    value: str | None, chosen: bool, not_installed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv(launcher.TIER_VARIABLE, value)
    launcher.install()
    assert not_installed == [launcher.COMPILED_TIER] * chosen
    assert launcher.left_to_the_interpreter() == {}


def test_another_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launcher.TIER_VARIABLE, "compile")
    with pytest.raises(BackendError, match="NSA_ORACLE_KERNELS: there is no 'compile'; choose interpreted or compiled"):
        launcher.install()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    building._compiler.cache_clear()
    yield
    building._compiler.cache_clear()


def test_without_a_compiler_kernels_are_interpreted_and_it_is_said(not_installed: list[str], no_compiler: None) -> None:
    launcher.install()
    assert not_installed == []
    assert launcher.left_to_the_interpreter() == {
        "all kernels": "there is no C compiler: install gcc, or name one in CC"
    }


def test_without_a_compiler_compiled_kernels_are_refused(
    not_installed: list[str], no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launcher.TIER_VARIABLE, "compiled")
    with pytest.raises(BuildError, match="there is no C compiler: install gcc, or name one in CC"):
        launcher.install()


def test_the_cache_forgets_what_was_not_used_for_longest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MOST_LIBRARIES", 3)
    monkeypatch.setenv("NSA_ORACLE_CACHE", str(cache / "small"))
    built = [building.build(f"int number_{number};") for number in range(3)]
    for age, library in zip((30, 20, 10), built, strict=True):
        os.utime(library, (time.time() - age,) * 2)
    assert building.build("int number_0;") == built[0]  # and is now the youngest
    latest = building.build("int number_3;")
    assert sorted((cache / "small").iterdir()) == sorted([built[0], latest])


@triton.jit
def pointers_kernel(memory: tl.tensor) -> None:
    table = memory.to(tl.pointer_type(tl.pointer_type(tl.float32)))
    tl.store(table.to(tl.pointer_type(tl.float32)), 1.0)


def test_a_type_that_the_front_end_does_not_survive_is_left_to_the_interpreter(compiled: dict[str, str]) -> None:
    memory = torch.zeros(4)
    pointers_kernel[(1,)](memory)
    assert memory[0].item() == 1.0
    assert "a pointer to pointers" in compiled["pointers_kernel"]


@pytest.mark.parametrize("compiler", ["false", "a-compiler-that-does-not-exist"])
def test_without_a_working_compiler_kernels_are_interpreted(
    compiler: str, compiled: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) if "exist" in compiler else "/usr/bin:/bin")
    building._compiler.cache_clear()
    monkeypatch.setattr(launcher, "interpreted", compiled)
    target = torch.zeros(8, dtype=torch.int32)
    fresh_kernel[(1,)](target)
    assert target.tolist() == [2] * 8
    assert list(compiled) == ["fresh_kernel"]
    building._compiler.cache_clear()
    function = fresh_kernel.rewrite()
    del function.compiled  # what it remembers of this compiler


@triton.jit
def fresh_kernel(target: tl.tensor) -> None:
    tl.store(target + tl.arange(0, 8), 2)


def test_what_cannot_be_built_is_said_in_one_line() -> None:
    with pytest.raises(BuildError, match=r"refuses the kernel: .*error"):
        building.build("no C")


@pytest.mark.parametrize("cause", ["file", "proc", "below a file"])
def test_a_cache_that_cannot_be_used_is_told_once_and_kernels_are_built_all_the_same(
    cause: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    folder = {"file": tmp_path / "file", "proc": Path("/proc/x"), "below a file": tmp_path / "file" / "deep"}[cause]
    monkeypatch.setenv("NSA_ORACLE_CACHE", str(folder))
    building._own_folder.cache_clear()
    for name in ("works", "works_too"):
        library = building.build(f"int {name};")
        assert ctypes.c_int.in_dll(ctypes.CDLL(str(library)), name).value == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: NSA_ORACLE_CACHE: {folder} cannot be written to (")
    assert line.endswith("; each process builds its kernels anew: name another folder in NSA_ORACLE_CACHE")
    building._own_folder.cache_clear()


def test_libraries_are_kept_in_the_cache(cache: Path, all_are_compiled: None) -> None:
    fresh_kernel[(1,)](torch.zeros(8, dtype=torch.int32))
    before = {file: file.stat().st_ino for file in cache.glob("*.so")}
    del fresh_kernel.rewrite().compiled  # as in another process
    fresh_kernel[(1,)](torch.zeros(8, dtype=torch.int32))
    assert before
    assert {file: file.stat().st_ino for file in cache.glob("*.so")} == before


@triton.jit
def length_kernel(target: tl.tensor, length: tl.tensor, WIDTH: tl.constexpr) -> None:
    lanes = tl.arange(0, 8)
    tl.store(target + lanes, WIDTH, mask=lanes < length)


def test_variants_are_counted_as_on_a_gpu(all_are_compiled: None) -> None:
    counter, target = VariantCounter(), torch.zeros(8, dtype=torch.int32)
    with counter.counting():
        for length in (2, 3, 300):
            length_kernel[(1,)](target, length, WIDTH=1)
        assert [len(handles) for handles in counter.take().values()] == [1]
        for length in (2, 3, 4):
            length_kernel[(1,)](target, length, WIDTH=length)
        assert [len(handles) for handles in counter.take().values()] == [3]


OFFSET = tl.constexpr(5)


@triton.jit
def offset(number: tl.tensor) -> tl.tensor:
    return number + OFFSET


@triton.jit
def offset_kernel(target: tl.tensor) -> None:
    tl.store(target, offset(tl.load(target)))


@triton.jit
def other_offset(number: tl.tensor) -> tl.tensor:
    return number + 100


def test_a_changed_device_function_or_constant_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, all_are_compiled: None
) -> None:
    target = torch.zeros(1, dtype=torch.int32)
    offset_kernel[(1,)](target)
    assert target.item() == 5
    monkeypatch.setitem(globals(), "OFFSET", tl.constexpr(7))
    offset_kernel[(1,)](target)
    assert target.item() == 12
    monkeypatch.setitem(globals(), "offset", other_offset)
    offset_kernel[(1,)](target)
    assert target.item() == 112
    monkeypatch.undo()
    offset_kernel[(1,)](target)
    assert target.item() == 117


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
DTYPE = tl.constexpr(tl.int32 if triton.knobs.runtime.interpret else tl.int64)


@triton.jit
def branching_kernel(target: tl.tensor) -> None:
    value = tl.full([1], 1, DTYPE) << 32
    tl.store(target, tl.sum(value) if not INTERPRETED else -1)


def test_the_code_of_a_gpu_runs(all_are_compiled: None) -> None:
    """Constants that ask whether kernels are interpreted have the value that they have on a GPU."""
    assert INTERPRETED.value
    target = torch.zeros(1, dtype=torch.int64)
    branching_kernel[(1,)](target)
    assert target.item() == 1 << 32


def test_mutated_kernels_are_compiled_as_they_are() -> None:
    kernel = "nsa_oracle.optimized.kernels.copy:copy_steps_kernel"
    original = copy_kernels.copy_steps_kernel
    with mutated(Mutation(kernel, "tl.program_id(0)", "(tl.program_id(0) + 0)")):
        assert copy_kernels.copy_steps_kernel is not original
        assert copy_kernels.copy_steps_kernel.rewrite().compiled is not original.rewrite().compiled
