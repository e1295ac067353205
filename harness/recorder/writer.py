"""Writes lines to a record from a thread of its own, one system call each, so that a killed process loses few."""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import threading
import time
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.destinations import device_at
from nsa_oracle.harness.recorder.staging import Copies, _done

VERSION = 1
MAX_BYTES = 256 << 20
MOST_WAITING = 1 << 12  # calls whose numbers are not in the file yet; more are counted and left out
BEHIND = 16  # cells of a row of the table that are written behind its length: room for drafts
PAUSE = 0.005  # seconds between two looks: to wake the thread at each call would hand it Python's lock in the call
PATIENCE = 5.0  # seconds in which an earlier recorder of this process, which has ended, lets its file go
_LOG = logging.getLogger("nsa_oracle.harness.recorder")


class NoRecord(Exception):
    """Nothing can be recorded to a file. The message is one clause that says why and how to mend it."""


class Writer:
    """Appends to ``file``, and moves it to ``file`` + ".1" when it has half of ``max_bytes``.

    The head and the captures are repeated in the new file. A file is locked, so that it has one writer at a time;
    devices are neither locked nor moved. ended: nothing is recorded any more. closing: nothing more will come, because
    the backend is gone; what waits is still written.
    """

    def __init__(self, file: Path, max_bytes: int) -> None:
        self.file = file
        self.max_bytes = max_bytes
        self.process = os.getpid()
        self.ended = self.closing = False
        self.waiting: deque[tuple[dict[str, Any], Copies | None]] = deque()
        self._repeated: dict[tuple[Any, ...], bytes] = {}
        self._head = b""
        self._written = self._put = self._dropped = 0
        self._bytes = 0
        self._descriptor = -1
        self._is_device = False

    def begin(self, head: dict[str, Any]) -> None:
        """Open the file, write ``head`` and start the thread. Raises NoRecord or OSError if it cannot be written."""
        self._head = _line(head)
        try:
            self._open()
            self._write(self._head)
            threading.Thread(target=_run, args=(self,), name="nsa-oracle-record", daemon=True).start()
        except BaseException:
            self.close_file()
            raise
        atexit.register(_flush_at_exit, weakref.ref(self))

    def put(self, line: dict[str, Any], copies: Copies | None = None) -> None:
        """Write ``line``, with what ``copies`` yields, behind all earlier ones and when its copies are done."""
        if self._dropped:
            line["dropped"], self._dropped = self._dropped, 0
        self._put += 1
        self.waiting.append((line, copies))

    def has_room(self) -> bool:
        """Whether another call may wait for its copies."""
        return len(self.waiting) < MOST_WAITING

    def drop(self) -> None:
        """Count a call that is left out."""
        self._dropped += 1

    def flush(self, timeout: float) -> bool:
        """Wait until everything so far is written. Returns whether it is."""
        deadline = time.monotonic() + timeout
        while not self.ended and self._written < self._put and time.monotonic() < deadline:
            time.sleep(0.001)
        return not self.ended and self._written >= self._put

    def end(self, error: Exception) -> None:
        """End the recording, with one warning."""
        if not self.ended:
            self.ended = True
            self.waiting.clear()
            kind = "" if isinstance(error, NoRecord) else f"{type(error).__name__}: "
            _LOG.warning("%s: the recording has ended: %s%s", self.file, kind, error)

    def close(self) -> None:
        """Let the thread write what waits, and end."""
        self.closing = True

    def close_file(self) -> None:
        """Called by the thread at its end, and where there is none. Lets go of the lock."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
            _OPEN.remove(self)

    def work(self) -> None:
        """Write what waits and is ready. Never raises an Exception."""
        try:
            while self.waiting and not self.ended:
                line, copies = self.waiting[0]
                ready, numbers = copies or (_done, dict)
                if not ready():
                    return
                self.waiting.popleft()
                found: dict[str, Any] = numbers()
                if "table" in found:
                    ends = (found["seq_lens"] + BEHIND).tolist()
                    rows = zip(found["table"].numpy(), ends, strict=True)
                    found["table"] = [_runs(row[:end]) for row, end in rows]
                text = _line(line | found)
                self._write(text)
                if line.get("act") == "capture" or "sizes" in line:
                    self._repeated[line["call"], line.get("mode"), line.get("bs")] = text
                self._written += 1
        except Exception as error:
            self.end(error)

    def _open(self) -> None:
        earlier = self._descriptor
        try:
            device = device_at(self.file)
            self._descriptor = self._locked() if device is None else device
        except OSError as error:
            reason = f"it cannot be written: {error.strerror or error}; name a file in a folder that can"
            raise NoRecord(reason) from None
        self._is_device = device is not None
        if earlier >= 0:
            os.close(earlier)  # the file that was moved: locked until this one is
        else:
            _OPEN.append(self)
        self._bytes = 0 if self._is_device else os.fstat(self._descriptor).st_size
        if self._bytes:  # an earlier process may have been killed within a line
            self._write(b"\n")

    def _locked(self) -> int:
        """A descriptor of the file, locked against other recorders. Raises NoRecord if another one writes to it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            if _lock(descriptor, self.file):
                return descriptor
            os.close(descriptor)
            if time.monotonic() > deadline or not any(writer.ended or writer.closing for writer in tuple(_OPEN)):
                own = self.file.with_stem(f"{self.file.stem}-{os.getpid()}").name
                raise NoRecord(f"another recorder writes to it; give each one a file of its own, such as {own}")
            time.sleep(PAUSE)

    def _write(self, text: bytes) -> None:
        while text:
            count = os.write(self._descriptor, text)
            self._bytes, text = self._bytes + count, text[count:]
        if self._bytes > self.max_bytes // 2 and self._head and not self._is_device:
            self.file.replace(self.file.with_name(self.file.name + ".1"))
            self._open()
            head, self._head = self._head, b""  # no second move within this one
            self._write(head + b"".join(self._repeated.values()))
            self._head = head


_OPEN: list[Writer] = []  # of this process


def _lock(descriptor: int, file: Path) -> bool:
    """Lock ``descriptor`` against other recorders. Returns False if one has it, or has moved it away from ``file``.

    The lock ends with the descriptor, however the process ends. An import does not ask for it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks: two recorders are not told there
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _let_go_in_fork() -> None:
    """A fork records nothing, and must not keep the lock of a server that has ended."""
    for writer in tuple(_OPEN):
        writer.ended = True
        writer.close_file()


os.register_at_fork(after_in_child=_let_go_in_fork)


def _run(writer: Writer) -> None:
    while not writer.ended and not (writer.closing and not writer.waiting):
        writer.work()
        time.sleep(PAUSE)
    writer.close_file()


def _flush_at_exit(reference: weakref.ref[Writer]) -> None:
    writer = reference()
    if writer is not None and os.getpid() == writer.process:
        writer.flush(2.0)


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), default=_plain).encode() + b"\n"


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, torch.Tensor) else str(value).removeprefix("torch.")


def _runs(row: NDArray[np.int32]) -> list[list[int]]:
    """A row of a table as runs of neighbouring slots: [first slot, number of slots]."""
    slots = row.astype(np.int64)
    starts = np.flatnonzero(np.diff(slots, prepend=slots[:1] - 2) != 1)
    runs: list[list[int]] = np.stack([slots[starts], np.diff(starts, append=len(slots))], 1).tolist()
    return runs
