"""The workers of a Dask cluster, as a run sees them: calls go out, and answers come back in any order."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from nsa_oracle.harness.errors import BackendError, ModuleMissing, error_line

LOCAL = "local"
_POLL_SECONDS = 0.05
_SECONDS_TO_CONNECT = 30.0


class PoolLost(Exception):
    """The scheduler cannot be reached any more. The message is one line."""


class WorkersDied(Exception):
    """Each worker that was given a call has died. The message is one line."""


class Pool(Protocol):
    """Workers that call functions. The last argument of each call is the number of the worker."""

    def size(self) -> int:
        """How many workers there are now."""

    def submit(self, function: Callable[..., Any], *arguments: object, urgent: bool = False) -> object:
        """Have a worker call ``function``. Returns a name for the call. urgent: before all that waits."""

    def next(self, timeout: float) -> tuple[object, Any] | None:
        """A call that is done, with its result or the exception that it raised, or None after ``timeout`` seconds.

        Raises PoolLost.
        """

    def cancel(self) -> None:
        """Forget all calls."""


class DaskPool:
    """The workers of a Dask scheduler. gpu: calls only go to workers with the resource GPU, one at a time each.

    elsewhere: they may run in other environments than this process, so errors of loading name them.
    """

    def __init__(self, client: Any, gpu: bool, elsewhere: bool = False) -> None:
        self._client = client
        self._completed: Any = _distributed().as_completed(raise_errors=False)
        self._resources = {"GPU": 1} if gpu else None
        self._elsewhere = elsewhere

    def size(self) -> int:
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def submit(self, function: Callable[..., Any], *arguments: object, urgent: bool = False) -> object:
        future = self._client.submit(
            _called, function, arguments, self._elsewhere, pure=False, priority=int(urgent), resources=self._resources
        )
        self._completed.add(future)
        return future.key

    def next(self, timeout: float) -> tuple[object, Any] | None:
        ends = time.monotonic() + timeout
        while not self._completed.has_ready():
            if self._client.status != "running":
                raise PoolLost("the scheduler cannot be reached any more")
            if time.monotonic() > ends:
                return None
            time.sleep(_POLL_SECONDS)
        future = next(self._completed)
        if future.status not in ("finished", "error"):
            raise PoolLost("the scheduler has lost a call, and perhaps others")
        try:
            answer = future.result()
        except _distributed().KilledWorker as error:
            answer = WorkersDied(f"{error.allowed_failures + 1} workers died")
        except Exception as error:
            answer = error
        future.release()
        return future.key, answer

    def cancel(self) -> None:
        with contextlib.suppress(Exception):  # nobody may be there any more
            self._client.cancel(list(self._completed.futures))
        self._completed.clear()


def _called(function: Callable[..., Any], arguments: tuple[object, ...], elsewhere: bool) -> Any:
    worker = _distributed().get_worker()
    number = str(worker.name).rpartition("-")[2]
    try:
        return function(*arguments, int(number) if number.isdecimal() else 0)
    except BackendError as error:
        if not elsewhere:
            raise
        mend = "; start workers where it can be imported" if isinstance(error, ModuleMissing) else ""
        raise BackendError(f"{error} (on worker {worker.name}, {worker.address}{mend})") from None


def _check_environments(client: Any, address: str) -> None:
    """Raises BackendError, in one line, if the scheduler or a worker cannot import what it is to call."""
    needed = f"{_called.__module__}:__name__"
    found = {"the scheduler": _answer(lambda: client.run_on_scheduler(pkgutil.resolve_name, needed))}
    found |= {
        f"worker {one}": said for one, said in client.run(pkgutil.resolve_name, needed, on_error="return").items()
    }
    for who, said in found.items():
        if isinstance(said, Exception):
            reason = f"{who} cannot import nsa_oracle as this process does: {error_line(said)}"
            raise BackendError(f"--scheduler {address}: {reason}; start it where it is installed, or on PYTHONPATH")


def _answer(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return error


def _distributed() -> Any:
    return importlib.import_module("distributed")  # late: it is an extra


@contextmanager
def connected(address: str, workers: int, gpu: bool | None) -> Iterator[tuple[DaskPool, bool]]:
    """The workers of the scheduler at ``address``, or ``workers`` processes of this machine if it is LOCAL.

    gpu: whether cases run on GPUs; None: if the workers have the resource GPU, or this machine has one. Yields that as
    well. Raises BackendError, in one line, if Dask is not installed, or there is no such scheduler.
    """
    try:
        dask, distributed = importlib.import_module("dask"), _distributed()
    except ImportError:
        raise BackendError("dask's distributed is not installed: pip install 'nsa-oracle[cluster]'") from None
    # A worker that dies, or a lost scheduler, is the run's to tell.
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "distributed"]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    settings = {"distributed.worker.daemon": False, "distributed.scheduler.allowed-failures": 2}
    with dask.config.set(settings), contextlib.ExitStack() as stack:
        if address == LOCAL:
            on_gpu = torch.cuda.device_count() > 0 if gpu is None else gpu
            cluster = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    dashboard_address=":0",  # None would take the port that all clusters of a machine ask for
                    resources={"GPU": 1} if on_gpu else None,
                    local_directory=os.environ.get("TMPDIR"),
                    silence_logs=logging.CRITICAL,
                )
            )
            client = stack.enter_context(distributed.Client(cluster))
        else:
            try:
                client = stack.enter_context(distributed.Client(address, timeout=_SECONDS_TO_CONNECT))
                client.wait_for_workers(1, timeout=_SECONDS_TO_CONNECT)
            except (OSError, TimeoutError, ValueError) as error:
                raise BackendError(f"--scheduler {address}: {error_line(error)}") from None
            _check_environments(client, address)
            known = client.scheduler_info(n_workers=-1)["workers"].values()
            on_gpu = any("GPU" in worker.get("resources", {}) for worker in known) if gpu is None else gpu
        yield DaskPool(client, on_gpu, elsewhere=address != LOCAL), on_gpu
