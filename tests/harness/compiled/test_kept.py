"""What one process has found out about a kernel serves the next one, unless anything has changed that it depends on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl

from nsa_oracle.harness.bugs.mutate import Mutation, mutated
from nsa_oracle.harness.compiled import building, kept, tracing
from nsa_oracle.harness.compiled.dependencies import dependencies
from nsa_oracle.harness.compiled.faults import Race
from nsa_oracle.harness.interpreter.bounds import OutOfBounds
from nsa_oracle.harness.interpreter.promises import BrokenPromise
from nsa_oracle.optimized.kernels import copy as copy_kernels
from tests.support import bounded
from tests.support.bounded import memory, store_kernel

pytestmark = pytest.mark.usefixtures("all_are_compiled", "own_cache")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of entries and libraries."""
    folder = tmp_path / "kept"
    monkeypatch.setenv("NSA_ORACLE_CACHE", str(folder))
    return folder


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are traced."""
    names: list[str] = []
    trace = tracing.trace

    def noting(function: Any, *arguments: Any) -> tracing.Traced:
        names.append(function.__name__)
        return trace(function, *arguments)

    monkeypatch.setattr(tracing, "trace", noting)
    return names


def launch_anew(kernel: Any, *arguments: Any, grid: int = 1, **constants: Any) -> None:
    """Launch a kernel as a new process does, which knows nothing of it."""
    vars(kernel.rewrite()).pop("compiled", None)
    kernel[(grid,)](*arguments, **constants)


def key_of(kernel: Any, signature: str = "*i32", **constants: Any) -> str:
    return kept.Entry.of(dependencies(kernel), {"target": signature}, constants).key


FACTOR = tl.constexpr(3)
INSIDE = ModuleType("inside")
INSIDE.SUMMAND = tl.constexpr(10)  # type: ignore[attr-defined]
STEP = 5


@triton.constexpr_function
def doubled(number: int) -> int:
    return 2 * number + STEP


@triton.jit
def scaled(number: tl.tensor) -> tl.tensor:
    return number * FACTOR


@triton.jit
def scaled_otherwise(number: tl.tensor) -> tl.tensor:
    return number * 100


@triton.jit
def everything_kernel(target: tl.tensor, EXTRA: tl.constexpr) -> None:
    tl.store(target, scaled(tl.load(target)) + INSIDE.SUMMAND + doubled(EXTRA))


def test_a_kernel_is_traced_once_for_all_processes(traced: list[str]) -> None:
    target = torch.ones(1, dtype=torch.int32)
    launch_anew(everything_kernel, target, EXTRA=1)
    assert target.item() == 3 + 10 + 7
    launch_anew(everything_kernel, target, EXTRA=1)
    assert target.item() == 3 * 20 + 10 + 7
    assert traced == ["everything_kernel"]


to = tl.constexpr(2)  # named as an attribute that the kernel uses


@triton.jit
def converting_kernel(target: tl.tensor) -> None:
    tl.store(target, tl.load(target).to(tl.int32) * FACTOR)


def test_a_name_of_the_module_may_be_that_of_an_attribute(traced: list[str]) -> None:
    target = torch.ones(1, dtype=torch.int32)
    for expected in (3, 9):
        launch_anew(converting_kernel, target)
        assert target.item() == expected
    assert traced == ["converting_kernel"]


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "a constant": lambda patch: patch.setitem(globals(), "FACTOR", tl.constexpr(4)),
    "a device function": lambda patch: patch.setitem(globals(), "scaled", scaled_otherwise),
    "what another module has": lambda patch: patch.setattr(INSIDE, "SUMMAND", tl.constexpr(11)),
    "what a function of constants uses": lambda patch: patch.setitem(globals(), "STEP", 6),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_kernel_uses_has_changed(change: str, traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """First in a new process; then, back again, in one that knows the kernel."""
    target = torch.ones(1, dtype=torch.int32)
    launch_anew(everything_kernel, target, EXTRA=1)
    before = target.item()
    CHANGES[change](monkeypatch)
    target.fill_(1)
    launch_anew(everything_kernel, target, EXTRA=1)
    assert target.item() == (117 if change == "a device function" else 21)
    assert (before, len(traced)) == (20, 2)
    monkeypatch.undo()
    target.fill_(1)
    everything_kernel[(1,)](target, EXTRA=1)
    assert target.item() == 20


def test_the_key_has_all_that_a_variant_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key_of(everything_kernel, EXTRA=1), key_of(everything_kernel, EXTRA=2)]
    keys += [key_of(everything_kernel, EXTRA=extra) for extra in (1.0, True, 0.0, -0.0, None, "1", tl.int32)]
    keys += [key_of(everything_kernel, "*i64", EXTRA=1), key_of(scaled)]
    monkeypatch.setattr(triton.knobs.language, "fp32_default", "ieee")
    keys.append(key_of(everything_kernel, EXTRA=1))
    monkeypatch.undo()
    monkeypatch.setattr(building, "FLAGS", (*building.FLAGS, "-g"))
    keys.append(key_of(everything_kernel, EXTRA=1))
    monkeypatch.undo()
    monkeypatch.setattr(kept, "_tools", lambda: ["another version"])
    keys.append(key_of(everything_kernel, EXTRA=1))
    monkeypatch.undo()
    assert len(set(keys)) == len(keys)
    assert "" not in keys
    assert key_of(everything_kernel, EXTRA=1) == keys[0]


def written_kernel(file: Path, number: int) -> Any:
    """A kernel of a file that this writes. It stores ``number``."""
    file.write_text(
        "import triton\nimport triton.language as tl\n\n@triton.jit\ndef written(target):\n"
        f"    tl.store(target, {number})\n"
    )
    os.utime(file, ns=(number, number))
    spec = importlib.util.spec_from_file_location("written_kernel", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.object(sys, "dont_write_bytecode", True):
        spec.loader.exec_module(module)
    return module.written


def test_a_changed_file_is_read(tmp_path: Path, traced: list[str]) -> None:
    target = torch.zeros(1, dtype=torch.int32)
    found = []
    for number in (1, 2, 1):
        launch_anew(written_kernel(tmp_path / "written_kernel.py", number), target)
        found.append(target.item())
    assert found == [1, 2, 1]
    assert traced == ["written", "written"]


def test_what_was_read_before_its_file_changed_is_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "written_kernel.py"
    before = written_kernel(file, 1)
    target, other = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    before[(1,)](target)
    after = written_kernel(file, 2)
    before[(1,)](other)
    assert other.item() == 1, "the front end reads a function once"
    after[(1,)](other)
    assert other.item() == 2


NUMBERS = {"seven": 7}


@triton.jit
def attribute_kernel(target: tl.tensor) -> None:
    tl.store(target, tl.full([], 7, getattr(tl, "int32")))  # noqa: B009


@triton.constexpr_function
def looked_up(name: str) -> int:
    return NUMBERS[name]


@triton.jit
def table_kernel(target: tl.tensor) -> None:
    tl.store(target, looked_up("seven"))


@pytest.mark.parametrize("kernel", [attribute_kernel, table_kernel], ids=["a computed name", "a table"])
def test_what_has_no_digest_is_traced_in_each_process(kernel: Any, traced: list[str], own_cache: Path) -> None:
    for _ in range(2):
        target = torch.zeros(1, dtype=torch.int32)
        launch_anew(kernel, target)
        assert target.item() == 7
    assert len(traced) == 2
    assert not list(own_cache.glob("*.json"))


def damaged(content: bytes) -> list[bytes]:
    return [b"", content[:-1], content[: len(content) // 2], content.replace(b"e", b"f", 1), b"{}", bytes(len(content))]


@pytest.mark.parametrize("suffix", ["json", "so"])
@pytest.mark.parametrize("damage", range(6))
def test_a_damaged_file_is_made_anew(suffix: str, damage: int, traced: list[str], own_cache: Path) -> None:
    target = torch.ones(1, dtype=torch.int32)
    launch_anew(everything_kernel, target, EXTRA=1)
    (file,) = own_cache.glob(f"*.{suffix}")
    before = file.read_bytes()
    changed = damaged(before)[damage]
    assert changed != before
    file.unlink()  # this process has mapped it
    file.write_bytes(changed)
    for _ in range(2):
        target.fill_(1)
        launch_anew(everything_kernel, target, EXTRA=1)
        assert target.item() == 20
    assert len(traced) == 2, "once before, once for the damage"


@pytest.mark.parametrize(
    "change",
    [
        {"key": "of another"}, {"types": None}, {"types": [1]}, {"sites": [["load"]]}, {"sites": 3}, {"written": 5},
        {"sites": [["load", 99, "1", "", []]]}, {"library": 1}, {"library": "absent.so"}, {"is_checked": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_of_another_form_is_made_anew(change: dict[str, Any], traced: list[str], own_cache: Path) -> None:
    target = torch.ones(1, dtype=torch.int32)
    launch_anew(everything_kernel, target, EXTRA=1)
    (file,) = own_cache.glob("*.json")
    content = building.read(file)
    assert content is not None
    building.write(file, json.dumps({**json.loads(content), **change}).encode())
    target.fill_(1)
    launch_anew(everything_kernel, target, EXTRA=1)
    assert target.item() == 20
    assert len(traced) == 2


def test_a_library_that_was_removed_is_built_again(traced: list[str], own_cache: Path) -> None:
    target = torch.ones(1, dtype=torch.int32)
    launch_anew(everything_kernel, target, EXTRA=1)
    (library,) = own_cache.glob("*.so")
    library.unlink()
    launch_anew(everything_kernel, target, EXTRA=1)
    assert library.exists()
    assert len(traced) == 2


@triton.jit
def racing_kernel(target: tl.tensor) -> None:
    tl.store(target, tl.program_id(0))


@triton.jit
def promising_kernel(target: tl.tensor, first: tl.tensor) -> None:
    tl.store(tl.multiple_of(target + first, 16), 1)


FAULTS: dict[str, tuple[Any, tuple[Any, ...], int, type[Exception], str]] = {
    "store": (store_kernel, (4,), 1, OutOfBounds, "a store of 4 bytes that begins 0 bytes behind the end of target"),
    "race": (racing_kernel, (), 2, Race, "program 0 stores byte 0 of target .*, program 1 stores it"),
    "promise": (promising_kernel, (2,), 1, BrokenPromise, "multiple_of promises"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_checked_is_checked_from_the_cache(fault: str, traced: list[str]) -> None:
    kernel, arguments, grid, error, message = FAULTS[fault]
    told = []
    for _ in range(2):
        _, part = memory()
        part.fill_(7)
        with pytest.raises(error, match=message) as caught:
            launch_anew(kernel, part, *arguments, grid=grid)
        frame = caught.traceback[-1]
        told.append((str(caught.value), str(frame.path), frame.lineno, frame.name))
    assert told[0] == told[1]
    assert told[0][1] == (bounded.__file__ if kernel is store_kernel else __file__)
    assert len(traced) == 1


def test_a_planted_bug_is_kept_whatever_its_file_is_called(traced: list[str]) -> None:
    """Each run numbers the files of mutations in another order. A fault names the file of this run."""
    kernel = "nsa_oracle.optimized.kernels.copy:copy_steps_kernel"
    keys, files = [], []
    for _ in range(2):
        with mutated(Mutation(kernel, "tl.program_id(0)", "(tl.program_id(0) + 0)")):
            found = dependencies(copy_kernels.copy_steps_kernel)
            entry = kept.Entry.of(found, {}, {})
            where = f"{found.files[0]}:12"
            assert entry._where(*entry._place(where)) == where
            keys.append(entry.key)
            files.append(found.files[0])
    original = kept.Entry.of(dependencies(copy_kernels.copy_steps_kernel), {}, {})
    assert keys[0] == keys[1] != original.key
    assert files[0] != files[1]


PROGRAM = """
import torch
from nsa_oracle.harness.processes import prepare_process
prepare_process("cpu")
from nsa_oracle.harness.compiled import tier
from tests.support import kept_kernels
for width in range(1, 9):
    target = torch.zeros(width, dtype=torch.int32)
    kept_kernels.filling_kernel[(width,)](target, WIDTH=width)
    assert target.tolist() == [width] * width
assert tier.interpreted == {}
"""


def test_processes_write_at_once(own_cache: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    files = sorted(own_cache.iterdir())
    assert [file.suffix for file in files if building.read(file) is None] == []
    assert [len(list(own_cache.glob(f"*.{suffix}"))) for suffix in ("json", "so")] == [8, 9], "one is for numbers"
    assert len(files) == 17
