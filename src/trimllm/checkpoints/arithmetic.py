"""How fast a device computes in 16 bits: a CPU without instructions for it is several times slower than in 32.

Most checkpoints are saved in bfloat16. Whether a CPU multiplies such matrices quickly (AVX512-BF16, AMX, newer ARM) or
emulates it is measured by products in both, since no name of an instruction says what torch makes of it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from typing import Any

import torch

from trimllm.checkpoints import room
from trimllm.checkpoints.dtypes import HALF, name_of

SLOW = 2.0
"""Times float32's time from which a dtype counts as slow. Real instructions take less than 1, emulation 5 to 20."""
ACTIVATIONS = 1.25
"""Memory that a model takes in evaluation, over its weights: about."""
_ROWS, _COLUMNS = 256, 512
"""Sizes of the product that is measured: tokens of a short prompt, a small model's hidden size."""


def slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """How many times float32's time a product of matrices takes in `dtype`; 1 where it is not emulated."""
    if dtype not in HALF or device.type != "cpu":
        return 1.0
    measured = _measured(dtype)
    return measured if measured >= SLOW else 1.0


@functools.cache
def _measured(dtype: torch.dtype) -> float:
    """How many times float32's time a product takes on one thread, which waits for no other: the least of a few times
    in turn, so that a busy machine does not decide.

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


def _emulates(names: str, times: float) -> str:
    return f"this CPU emulates {names}, and multiplies matrices {times:.0f} times slower than in float32"


def reason_for_float32(model: Any, asked: str, copies: int = 1) -> str | None:
    """Why to compute in float32, as a line for the user, or None: where the model's dtype is fast or was asked for
    (`asked` is a --dtype), where the model is quantized, or where memory has no room for the wider weights of so many
    processes."""
    if getattr(model, "is_quantized", False) or asked in ("bfloat16", "float16"):
        return None
    half = [one for one in model.parameters() if one.dtype in HALF and one.device.type == "cpu"]
    times = {kind: slowdown(kind, torch.device("cpu")) for kind in {one.dtype for one in half}}
    slowest = max(times, key=lambda kind: times[kind], default=torch.float32)
    if times.get(slowest, 1) == 1:
        return None
    free = room.free_bytes(torch.device("cpu"), swap=False)
    needed = copies * ACTIVATIONS * sum(4 * one.numel() for one in half)
    if free is not None and needed >= free:
        return None
    return f"computed in float32: {_emulates(name_of(slowest), times[slowest])}"


def asked_note(dtype: str, device: torch.device, mixed_precision: str = "no") -> str | None:
    """A line for the user where what was asked for computes slower than float32 does (--dtype, --mixed-precision)."""
    if mixed_precision == "bf16":
        option, kind, rest = "--mixed-precision bf16", torch.bfloat16, ""
    elif dtype in ("bfloat16", "float16"):
        option, kind, rest = f"--dtype {dtype}", getattr(torch, dtype), " where memory allows"
    else:
        return None
    times = slowdown(kind, device)
    return None if times == 1 else f"{option}: {_emulates(name_of(kind), times)}: leave it out{rest}"


def bench_note(known: Iterable[dict[str, Any]]) -> str | None:
    """A line for the user where models (of bench.json) were timed in 16 bits that the CPU emulates."""
    slow = [model for model in known if model["slowdown"] > 1]
    if not slow:
        return None
    names = ", ".join(dict.fromkeys(model["model"] for model in slow))
    dtypes = " and ".join(sorted({model["dtype"] for model in slow}))
    most = max(model["slowdown"] for model in slow)
    return f"{names}: {_emulates(dtypes, most)}: prefill is faster with --dtype float32"


def evaluation_note(dtype: torch.dtype, asked: str, device: torch.device) -> str | None:
    """A line for the user before several checkpoints that were saved in `dtype` are evaluated (`asked`: a --dtype)."""
    times = slowdown(dtype, device)
    if asked != "auto" or times == 1:
        return asked_note(asked, device)
    return f"accuracies are computed in float32, where memory has room: {_emulates(name_of(dtype), times)}"
