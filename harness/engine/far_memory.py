"""Memory whose rows lie far apart takes gigabytes of a GPU where rows are many: processes that share one take turns."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from nsa_oracle.harness.memory.far_apart import BEYOND_31_BITS, gpu_bytes, release_unused
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.reference.types import KVCacheDtype

LITTLE = 1 << 30  # bytes of GPU memory that a case takes without waiting for others
_ENGINES = 3  # of one case that hold memory at a time
_PLACE = 8 << 30  # bytes of GPU memory behind each lock
_POLL_INTERVAL = 0.005  # seconds between attempts to lock a place


@contextmanager
def memory_for(setup: Setup, device: torch.device) -> Iterator[None]:
    """Context for judging one case. If it has far memory, that is released afterwards.

    On a GPU, waits until other processes that hold such memory leave as much as the case needs.
    """
    if not setup.is_far:
        yield
    elif device.type == "cpu":
        gc.collect()  # engines are in reference cycles, and each holds a page of memory for every far row
        yield
    else:
        needed = far_bytes(setup)
        with _turn(_lock_files(device), -(-needed // _PLACE) if needed > LITTLE else 0):
            try:
                yield
            finally:
                release_unused()


def far_bytes(setup: Setup) -> int:
    """The memory of a GPU that the far parts of a case take."""
    total = 0
    if setup.inputs.far_req_to_token:
        total += gpu_bytes(setup.pool_size, 4 * setup.max_context_len, 4, BEYOND_31_BITS)
    if setup.layer is not None and setup.layer.far_slots:
        config = setup.layer.attention_config()
        is_fp8 = config.kv_cache_dtype is KVCacheDtype.FP8
        row_bytes, size = (config.kv_token_bytes, 1) if is_fp8 else (2 * config.qk_head_dim, 2)
        total += gpu_bytes(setup.num_slots, row_bytes, size)
        total += gpu_bytes(setup.num_pages, config.index_page_bytes(setup.page_size), 1)
    return _ENGINES * total


def _lock_files(device: torch.device) -> list[Path]:
    """A lock file for each ``_PLACE`` bytes of a GPU that far memory may take: two thirds, so that others have some."""
    properties = torch.cuda.get_device_properties(device)
    name = f"nsa-oracle-{os.getuid()}-{properties.uuid}"
    count = max(1, properties.total_memory * 2 // 3 // _PLACE)
    return [Path(tempfile.gettempdir()) / f"{name}.{place}.lock" for place in range(count)]


@contextmanager
def _turn(places: Sequence[Path], count: int) -> Iterator[None]:
    """Hold the locks of ``count`` of ``places``, or of all. Waits until as many are free.

    A process that dies releases its locks.
    """
    with ExitStack() as held:
        if count:
            # One process at a time collects: two that each hold half of what they need would wait for ever.
            with FileLock(places[0].with_suffix(".order")):
                _collect(places, min(count, len(places)), held)
        yield


def _collect(places: Sequence[Path], count: int, held: ExitStack) -> None:
    """Lock ``count`` of ``places`` until ``held`` is closed."""
    others = deque(places)
    while len(places) - len(others) < count:
        place = others.popleft()
        try:
            held.enter_context(FileLock(place).acquire(timeout=0))
        except Timeout:
            others.append(place)
            time.sleep(_POLL_INTERVAL)
