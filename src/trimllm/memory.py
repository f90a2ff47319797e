"""What to do when a device runs out of memory: recognize the error, and give memory back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

T = TypeVar("T")

TEXTS = ("can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What the CPU's allocator, Apple's and cuBLAS say."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that memory ran out; not every allocator has a class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in TEXTS)


def attempt(compute: Callable[[], T]) -> T | None:
    """What `compute` returns, or None if memory ran out on the way; what it held is freed."""
    try:
        return compute()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    release()  # outside of the handler: the traceback keeps the tensors alive
    return None


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    clear_device_cache()
