"""TrimLLM (https://arxiv.org/abs/2412.11242): scan, drop one, train, again; by blocks, or by pairs that re-pack."""

from __future__ import annotations

from typing import Any

from trimllm.baselines.job import Job, Product, cost
from trimllm.config import ExportConfig
from trimllm.handover.source import save_depth
from trimllm.run.rundir import RunDir


def run(job: Job) -> Product:
    """A run of `trimllm trim` from the fully fine-tuned model; one gives every depth where no training waits for
    the last drop."""
    own: dict[str, Any] = {"strategy": job.command.strategy, "warmup_epochs": 0, **job.cell.method.settings}
    if not job.every_depth_at_once:
        return job.trim(job.full, **own)
    keep = min(job.command.keep)
    shared = job.root / "runs" / f"{job.cell.method.name}-{keep:g}"
    least = job.trim(job.full, shared, keep=keep, keep_checkpoints=True, **own)
    if job.cell.keep == keep:
        return least
    depth = job.depth - job.drops
    target = job.folder / "model"
    if not target.exists():
        save_depth(ExportConfig(source=str(shared), depth=depth, output=str(target)), target)
    return cost(target, RunDir(shared), depth)
