"""Builds C files into shared libraries, and keeps these in a folder of the user's for later processes.

A library is named by the hash of all that it depends on: its source, the compiler with its version, the flags. It ends
in a hash of its own bytes. It is written under another name and renamed, so that several processes can share the
folder; ``write`` and ``read`` do the same for what else is kept there.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path

import torch

from nsa_oracle.harness.errors import BackendError, one_line

FLAGS = (
    "-Og",  # -O1 takes twice the time to compile and saves a sixth of a launch; most libraries run few launches
    "-std=gnu11", "-shared", "-fPIC", "-w",
    "-ffp-contract=off",  # a product and a sum are rounded one by one, unless the kernel says fma
    "-fwrapv", "-fno-strict-aliasing", "-fno-math-errno",
)  # fmt: skip

MOST_LIBRARIES = 8192  # of some 30 kB each; a run of all mutants makes a few thousand. As many files of other kinds
_DIGEST_BYTES = 32


class BuildError(BackendError):
    """There is no C compiler, or it refused a source. The message is one line."""


def build(source: str) -> Path:
    """The shared library of a C source, from the cache if it is there. Raises BuildError.

    If the cache cannot be written to, the library lies in a folder of this process, and a line on stderr says so once.
    """
    digest = hashlib.sha256("\0".join([source, *toolchain()]).encode()).hexdigest()
    library = cache_folder() / f"{digest[:32]}.so"
    if read(library) is not None:
        return library
    try:
        built = _built(source)
        try:
            write(library, built)
        except OSError:
            library = _own_folder() / library.name
            write(library, built)
    except OSError as error:
        raise BuildError(f"{library}: cannot be written: {error.strerror or error}") from error
    return library


def cache_complaint() -> str:
    """Why nothing can be kept in the cache, in one line; empty if it can."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        named = "NSA_ORACLE_CACHE" if os.environ.get("NSA_ORACLE_CACHE") else "the cache of kernels"
        reason = "is a file" if isinstance(error, FileExistsError) else error.strerror or str(error)
        told = f"{named}: {one_line(str(folder))} cannot be written to ({reason})"
        return f"{told}; each process builds its kernels anew: name another folder in NSA_ORACLE_CACHE"


@functools.cache
def _own_folder() -> Path:
    """A folder of this process, which says once that the cache cannot be used. It is removed at the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # judged code may have closed it
        sys.stderr.write(f"WARNING: {cache_complaint()}\n")
    folder = tempfile.mkdtemp(prefix="nsa-oracle-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=0)  # a child runs these alone
    return Path(folder)


def toolchain() -> tuple[str, ...]:
    """The compiler, its version, and its flags. Raises BuildError if there is no compiler."""
    return (*_compiler(), *FLAGS, *_processor_flags())


def read(file: Path) -> bytes | None:
    """The content of a file that ``write`` has written; None if it is not there, or not as it was written."""
    try:
        content = file.read_bytes()
        content, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            return None
    except OSError:
        return None
    with contextlib.suppress(OSError):  # of a folder that others fill
        os.utime(file)  # it is of use
    return content


def write(file: Path, content: bytes) -> None:
    """Write a file of the cache with a hash of its content at its end: all of it, or nothing. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="building-") as folder:
        made = Path(folder, file.name)
        made.write_bytes(content + hashlib.sha256(content).digest())
        made.replace(file)
    _prune(file)


def _prune(latest: Path) -> None:
    """Remove the half of the files of a kind that were not used for longest, if there are too many.

    A library that a process has loaded stays mapped there.
    """
    files = list(latest.parent.glob(f"*{latest.suffix}"))
    if len(files) <= MOST_LIBRARIES:
        return
    for file in sorted(files, key=_last_used)[: len(files) // 2]:
        file.unlink(missing_ok=True)


def _last_used(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # another process removed it
        return 0.0


def _built(source: str) -> bytes:
    compiler, flags = _compiler()[0], (*FLAGS, *_processor_flags())
    with tempfile.TemporaryDirectory(prefix="nsa-oracle-") as folder:
        file, made = Path(folder, "kernel.c"), Path(folder, "kernel.so")
        file.write_text(source, encoding="utf-8")
        done = subprocess.run([compiler, *flags, "-o", str(made), str(file), "-lm"], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise BuildError(f"{compiler} refuses the kernel: {(errors or ['no message'])[0]}")
        return made.read_bytes()


def cache_folder() -> Path:
    """NSA_ORACLE_CACHE if it is set, else a folder among the user's caches."""
    if named := os.environ.get("NSA_ORACLE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nsa-oracle" / "kernels"


@functools.cache
def _compiler() -> tuple[str, str]:
    """The C compiler and its version: that of CC, as for Triton, or the first that is installed."""
    for name in filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")):
        if path := shutil.which(name):
            done = subprocess.run([path, "--version"], capture_output=True, text=True)
            return path, done.stdout
    raise BuildError("there is no C compiler: install gcc, or name one in CC")


@functools.cache
def _processor_flags() -> tuple[str, ...]:
    """Fused multiply-add in hardware, and wide vectors, where the processor has them."""
    has_them = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return ("-march=x86-64-v3",) if platform.machine() == "x86_64" and has_them else ()
