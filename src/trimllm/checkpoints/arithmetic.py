"""How fast a device computes in 16 bits: a CPU without instructions for it is several times slower than in 32.

Most checkpoints are saved in bfloat16. Whether a CPU multiplies such matrices quickly (AVX512-BF16, AMX, newer ARM) or
emulates it is measured by one product, since no name of an instruction says what torch makes of it.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from trimllm.checkpoints import room

HALF = (torch.float16, torch.bfloat16)
SLOW = 2.0
"""Times float32's time from which a dtype counts as slow. Real instructions take less than 1, emulation 5 to 20."""
_ROWS, _COLUMNS = 256, 512
"""Of the product that is measured: tokens of a short prompt, a small model's hidden size."""


def slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """How many times float32's time a product of matrices takes in `dtype`; 1 where it is not emulated."""
    if dtype not in HALF or device.type != "cpu":
        return 1.0
    measured = _measured(dtype)
    return measured if measured >= SLOW else 1.0


@functools.cache
def _measured(dtype: torch.dtype) -> float:
    """On one thread, which waits for no other, the least of a few times in turn: a busy machine does not decide.

    Once per process.
    """
    sizes = (_ROWS, _COLUMNS), (_COLUMNS, _COLUMNS)
    matrices = {kind: [torch.ones(size, dtype=kind) for size in sizes] for kind in (torch.float32, dtype)}
    least = dict.fromkeys(matrices, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(6):  # the first one also chooses and warms the kernel
            for kind, (tokens, weights) in matrices.items():
                began = time.perf_counter()
                torch.nn.functional.linear(tokens, weights)
                least[kind] = min(least[kind], time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return least[dtype] / least[torch.float32]


def wider(model: Any) -> float | None:
    """How many times faster the model computes in float32 than in the 16 bits it is in; None where it is not, where
    it is quantized, or where memory has no room for the wider weights."""
    if getattr(model, "is_quantized", False):
        return None
    half = [one for one in model.parameters() if one.dtype in HALF and one.device.type == "cpu"]
    gain = max((slowdown(kind, torch.device("cpu")) for kind in {one.dtype for one in half}), default=1.0)
    free = room.free(torch.device("cpu"))
    needed = 1.25 * sum(4 * one.numel() for one in half)
    return gain if gain > 1 and (free is None or needed < free) else None


def training_note(mixed_precision: str, dtype: str, device: torch.device) -> str | None:
    """A line for the user where what was asked for trains slower than float32 does (--mixed-precision, --dtype)."""
    if mixed_precision == "bf16":
        option, kind = "--mixed-precision bf16", torch.bfloat16
    elif dtype in ("bfloat16", "float16"):
        option, kind = f"--dtype {dtype}", getattr(torch, dtype)
    else:
        return None
    times = slowdown(kind, device)
    if times == 1:
        return None
    slower = f"this CPU emulates it, and multiplies matrices {times:.0f} times slower than in float32"
    return f"{option}: {slower}: leave it out"


def bench_note(dtypes: set[str], device: torch.device) -> str | None:
    """A line for the user where models are timed in 16 bits that the CPU emulates."""
    slow = {name: times for name in dtypes if (times := slowdown(getattr(torch, name), device)) > 1}
    if not slow:
        return None
    name, times = max(slow.items(), key=lambda pair: pair[1])
    return (
        f"this CPU emulates {name}, and multiplies matrices {times:.0f} times slower than in "
        "float32: prefill is faster with --dtype float32"
    )
