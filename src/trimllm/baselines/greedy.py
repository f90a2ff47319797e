"""Greedy removal without training in between, then all the training of a progressive run.

SLEB (https://arxiv.org/abs/2402.09025) drops the block whose removal raises the loss least, and looks again;
BlockPruner (https://arxiv.org/abs/2406.10594) does so with attention and MLP apart. Here its units are the pairs that
leave a stock checkpoint.
"""

from __future__ import annotations

from trimllm.baselines.job import Job, Product


def run(job: Job) -> Product:
    # One stage follows the drops: its epochs are those of all of them.
    return job.trim(
        job.full,
        strategy="loss",
        warmup_epochs=0,
        drops_per_stage=job.drops,
        final_epochs=job.command.final_epochs + (job.drops - 1) * job.command.epochs_per_drop,
        sparse_update="off",
        **job.cell.method.settings,
    )
