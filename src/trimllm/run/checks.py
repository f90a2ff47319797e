"""What can be known to fail, or is worth saying, before a run computes anything: memory, a floor, the disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimllm.checkpoints import arithmetic, loading, room, verification
from trimllm.checkpoints.dtypes import DTYPES
from trimllm.config import TrimConfig
from trimllm.errors import InputError
from trimllm.files import size
from trimllm.run import targets
from trimllm.run.deciding import Decider
from trimllm.run.rundir import RunDir
from trimllm.tasks.spec import is_accuracy
from trimllm.training import optimizer_state, train, underway


def memory(config: TrimConfig, device: torch.device, *, measured: bool = False) -> list[str]:
    """Notes on memory and arithmetic, before the model is loaded; `measured`: in a run that goes on, the base was
    there beside a smaller model before.

    Raises:
        InputError: if memory has no room for what `--distill` or `--target-speedup` needs.
    """
    weights = room.weights(loading.path_of(config.model), DTYPES.get(config.dtype, torch.float32))
    if config.distill:
        what = f"--distill {config.distill:g} needs the model twice"
        room.check(what, weights and 2 * weights, device, "give a narrower --dtype, or leave it out")
    if config.target_speedup and not measured:
        what = f"--target-speedup {config.target_speedup:g} measures the base beside the model"
        room.check(what, weights and 2 * weights, device, "give a narrower --dtype, or --keep in its place")
    stages = "--warmup-epochs 0, --no-train-embeddings and a small --train-ratio, without --sparse-update off"
    full = config.warmup_epochs or config.sparse_update == "off"
    tight = room.full_training_note(weights, device, stages) if full else None
    slower = arithmetic.asked_note(config.dtype, device, config.mixed_precision)
    rounded = train.rounding_note(config, emulated=slower is not None)
    return [note for note in (tight, rounded, slower) if note]


def floor(config: TrimConfig, metric: str) -> None:
    """Raises InputError for a floor that was meant as a share and not in percent (a likelihood may be so low)."""
    asked = config.min_accuracy or 0.0
    if 0 < asked <= 1 and is_accuracy(metric):
        raise InputError(
            f"--min-accuracy {asked:g} is in percent, so hardly a floor: for a share of {asked:g} give {100 * asked:g}"
        )


def disk(config: TrimConfig, model: Any, decider: Decider, ahead: Sequence[tuple[int, float]]) -> str | None:
    """A note where every depth that is kept may take more than is free; `ahead` as of `targets.stages_ahead`.

    Raises:
        InputError: if the disk cannot hold what the run will write.
    """
    depth, weights = decider.base_depth, verification.weight_bytes(model)
    copies = 3.0 + (config.distill > 0)  # two checkpoints, the result, and a teacher
    if config.keep_checkpoints:  # of every depth; embeddings, which are never cut, make them larger than that
        copies = max(copies, 2 + sum(left for left, _ in ahead) / depth)
    keeps = config.carries_state and len(ahead) != 1  # between stages after drops; of other targets none is known
    state = 2 * optimizer_state.most_bytes(config, model) if keeps else 0  # old and new
    check_space(config.output, round(copies * weights) + state)
    if not config.keep_checkpoints or ahead:
        return None
    depths = range(depth, targets.least_depth(config, depth) - 1, -config.drops_per_stage * decider.length)
    return space_note(config.output, round((1 + sum(depths) / depth) * weights) + state)  # 1: the result


def check_space(output: str | Path, needed: int) -> None:
    """Raises InputError if the disk cannot hold so many bytes in all, of which some may be there."""
    free, needed = _space(output, needed)
    if free < needed:
        raise InputError(f"--output {output}: {size(free)} free, about {size(needed)} needed: free some space")


def space_note(output: str | Path, most: int) -> str | None:
    """One line if the disk cannot hold so many bytes, which every depth that is kept takes if the run goes to the
    last."""
    free, most = _space(output, most)
    if free >= most:
        return None
    sizes = f"up to {most / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    return f"--keep-checkpoints needs {sizes}: a full disk interrupts the run"


def _space(output: str | Path, needed: int) -> tuple[int, int]:
    """Bytes that are free, with those of a stage under way, which go; and how many of those needed are not there
    yet."""
    run = RunDir(output)
    there = sum(file.stat().st_size for kept in (run.checkpoints, run.model) for file in kept.rglob("*.safetensors"))
    stage = run.underway
    going = sum(file.stat().st_size for file in (stage, *underway.partial(stage)) if file.exists())
    parent = Path(output).absolute()
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free + going, needed - there
