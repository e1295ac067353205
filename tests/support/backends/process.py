"""Backends that do something to the process which judges them."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from contextlib import suppress

from nsa_oracle.reference.types import ForwardBatch, Metadata
from tests.support.backends.seams import Step, backend_of


@backend_of
class SignalsItself(Step):
    """Sends its process what a user's Ctrl-C sends."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        super().refresh(buffers, batch)


@backend_of
class ClosesFiles(Step):
    """Closes what it did not open."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        os.closerange(3, 64)
        super().refresh(buffers, batch)


@backend_of
class LimitsTheStack(Step):
    """Leaves so few calls within calls that nothing else can run."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        sys.setrecursionlimit(90)
        super().refresh(buffers, batch)


@backend_of
class AllowsMoreStack(Step):
    """Allows more calls within calls than Python does, and puts the limit back."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(2 * before)
        super().refresh(buffers, batch)
        sys.setrecursionlimit(before)


LEFT_OPEN: list[int] = []


@backend_of
class LeavesFilesOpen(Step):
    """Opens files and forgets them."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        LEFT_OPEN.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(20))
        super().refresh(buffers, batch)


@backend_of
class AsksForItself(Step):
    """Clean: looks whether its own process is alive."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        os.kill(os.getpid(), 0)
        super().refresh(buffers, batch)


@backend_of
class ChangesFolder(Step):
    """Leaves its process in another folder."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        os.chdir("/")
        super().refresh(buffers, batch)


@backend_of
class ReturnsTwice(Step):
    """Returns in a fork of its process as well."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        os.fork()


@backend_of
class ClosesStdout(Step):
    """Closes what its process prints to."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        sys.stdout.close()


@backend_of
class ClosesDescriptorOne(Step):
    """Closes the file behind ``sys.stdout``."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        with suppress(OSError):  # it has done so before
            os.close(1)


@backend_of
class ClosesDescriptorTwo(Step):
    """Closes the file behind ``sys.stderr``."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        with suppress(OSError):
            os.close(2)


@backend_of
class DropsStderr(Step):
    """Takes away what its process prints errors to."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        sys.stderr = None  # type: ignore[assignment]


@backend_of
class ReplacesStdout(Step):
    """Clean: prints to another stream, which works."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        sys.stdout = io.StringIO()
        print("refreshed", flush=True)
        super().refresh(buffers, batch)


@backend_of
class LosesAThread(Step):
    """Clean: a thread of its own ends with an exception that changes nothing."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        thread = threading.Thread(target=self.fail)
        thread.start()
        thread.join()

    def fail(self) -> None:
        raise ValueError("in a thread")


@backend_of
class LosesAThreadAndIsWrong(LosesAThread.step):
    """The same, and what the thread was to do is missing."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        buffers.cache_seqlens_int32.zero_()


@backend_of
class StopsItself(Step):
    """Sends its process the signal that stops it."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        super().refresh(buffers, batch)


@backend_of
class LeavesAFork(Step):
    """A child of its own never ends, and holds whatever its process had open."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        os.fork() or time.sleep(1e9)  # type: ignore[func-returns-value]
