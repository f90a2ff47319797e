"""Does a model fit into memory: estimated from headers and configs, before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trimllm.blocks import adapters
from trimllm.checkpoints import shards
from trimllm.checkpoints.dtypes import FLOATS
from trimllm.checkpoints.loading import on_disk, quiet
from trimllm.errors import InputError

GB = 1e9
STATES = 4
"""Numbers in memory for every parameter that trains: itself, its gradient, and the two moments of AdamW."""
_OWN_GROUPS = Path("/proc/self/cgroup")
_CGROUP = Path("/sys/fs/cgroup")
_FILES = {
    "": ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
}
"""Of control groups of version 2 and 1, by their folder: files of the limit, of what is used and of what that consists
of, and its entry for file contents that can go."""


def free_bytes(device: torch.device, *, swap: bool = True) -> int | None:
    """Bytes that can still be allocated there, on a CPU in swap space, too; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type not in ("cpu", "mps"):
        return None
    machine = psutil.virtual_memory().available + (psutil.swap_memory().free if swap else 0)
    return min(machine, _container() or machine)


def _container() -> int | None:
    """What the limits of this process's control group, and of those around it, leave; None where there are none."""
    return min((left for group in _groups() if (left := _left(*group)) is not None), default=None)


def _groups() -> Iterator[tuple[Path, tuple[str, str, str, str]]]:
    """Folders of control groups that may limit this process, each with its files: its own as the kernel says, those
    around it, and the outermost, which is its own where a container sees no other."""
    try:
        own = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # no such system
        own = []
    for line in ("0::/", "0:memory:/", *own):
        _, kinds, path = line.split(":", 2)
        for kind in _FILES.keys() & kinds.split(","):
            inner = PurePosixPath(path.lstrip("/"))
            for folder in (inner, *inner.parents):
                yield _CGROUP / kind / folder, _FILES[kind]


def _left(folder: Path, files: tuple[str, str, str, str]) -> int | None:
    """What the limit of a control group leaves; cached file contents are given up for it."""
    *names, cached = files
    try:
        limit, used, stat = ((folder / name).read_text(encoding="ascii") for name in names)
        known = dict(line.split() for line in stat.splitlines())
        return max(1, int(limit) - int(used) + int(known[cached]))
    except (OSError, ValueError, KeyError):  # no such group, or no limit: "max"
        return None


def weights(path: str, dtype: torch.dtype | None) -> int | None:
    """Bytes of a checkpoint's weights, loaded in `dtype` (None: as saved), by the headers of its files.

    Of an adapter in a folder its base counts; what is no float (quantized weights, indices) stays as it is. None where
    there are no safetensors files on this disk.
    """
    tensors = _tensors(path)
    if tensors is None:
        return None
    return sum(
        math.prod(tensor.shape) * dtype.itemsize if dtype and tensor.dtype in FLOATS else tensor.size
        for tensor in tensors
    )


def dtype_of_weights(path: str) -> torch.dtype | None:
    """The floating-point dtype that most bytes of a checkpoint's weights have; None as for `weights`, or where there is
    none."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in _tensors(path) or []:
        if tensor.dtype in FLOATS:
            dtype = FLOATS[tensor.dtype]
            sizes[dtype] = sizes.get(dtype, 0) + tensor.size
    return max(sizes, key=sizes.__getitem__, default=None)


def _tensors(path: str) -> list[shards.Tensor] | None:
    """What the headers say of a checkpoint, or of the base of an adapter in a folder; None where this disk has none."""
    base = adapters.base_of(path) if Path(path).is_dir() else None
    folder = on_disk(base or path)
    if folder is None or not shards.present(folder):
        return None
    try:
        return shards.read(folder)[0]
    except InputError:  # loading says so, after what else may be wrong with the folder
        return None


def weights_of_config(file: str, dtype: torch.dtype | None, *, trust_remote_code: bool = False) -> int | None:
    """Bytes of the model that a config.json describes; None where no model can be built from it."""
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(Path(file).expanduser(), trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # loading says what is wrong with it
        return None
    size = (dtype or config.dtype or torch.float32).itemsize
    return sum(parameter.numel() for parameter in model.parameters()) * size


def check(what: str, needed: int | None, device: torch.device, remedy: str) -> None:
    """Raises InputError if `needed` bytes of weights exceed what is free on the device."""
    have = free_bytes(device)
    if needed is not None and have is not None and needed > have:
        sizes = f"the weights alone take {needed / GB:.1f} GB, and {have / GB:.1f} GB are free on {device}"
        raise InputError(f"{what}: {sizes}: {remedy}")


def check_training(trained: int, device: torch.device, remedy: str) -> None:
    """Raises InputError if what training takes beside weights of so many bytes exceeds what is free on the device;
    activations come on top."""
    needed, have = (STATES - 1) * trained, free_bytes(device)
    if have is not None and needed > have:
        sizes = f"{needed / GB:.1f} GB for gradients and optimizer, and {have / GB:.1f} GB are free on {device}"
        raise InputError(f"training all parameters takes, beside the weights, {sizes}: {remedy}")


def full_training_note(needed: int | None, device: torch.device, remedy: str) -> str | None:
    """A line for the user if full fine-tuning of weights of so many bytes cannot fit; activations come on top.

    `remedy` lowers weights and states in full precision; only after it a narrower dtype is named, which rounds steps.
    """
    have = free_bytes(device)
    if needed is None or have is None or not needed <= have < STATES * needed:  # what cannot be loaded is an error
        return None
    return (
        f"full fine-tuning takes {STATES * needed / GB:.1f} GB for weights, gradients and optimizer, and "
        f"{have / GB:.1f} GB are free on {device}: if memory runs out, try {remedy}; --dtype bfloat16 halves it, and "
        "rounds small steps away (--gradient-checkpointing is about activations, which come on top)"
    )
