"""Lets processes that work side by side share the GPUs of a machine that has several."""

from __future__ import annotations

import os

import torch


def take_one(number: int) -> None:
    """Of the GPUs that this process sees, leave it number ``number``, counted round.

    Before anything uses CUDA, which looks once. Nothing changes where there is one GPU or none.
    """
    count = torch.cuda.device_count()  # asks the driver's library, and starts no CUDA
    if count < 2:
        return
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(index) for index in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[number % count]
