"""References: the base as it is, and full fine-tuning of all its weights, once, or for as long as trimmed models."""

from __future__ import annotations

import shutil

from trimllm.baselines.job import Job, Product
from trimllm.checkpoints import export, loading
from trimllm.checkpoints.origin import Origin
from trimllm.run import licences


def run(job: Job) -> Product:
    """`base` and `full` as named; `full-long` goes on from `full` for as many epochs as a trimmed model gets."""
    name = job.cell.method.name
    if name == "base":
        return Product(loading.path_of(job.command.model))
    if name == "full":
        loaded = job.load()
        report = job.tune(loaded, job.command.warmup_epochs, stage=0, underway=job.underway(loaded.model))
        export.save_model(loaded.model, job.folder / "trained")
        loaded.tokenizer.save_pretrained(job.folder / "trained")
        base = Origin.of(job.command.model)
        for file in filter(None, (*licences.terms(base), licences.card_of(base))):  # whose licence cuts of it name
            shutil.copyfile(file, job.folder / "trained" / file.name)
    else:
        loaded = job.load(job.full)
        report = job.tune(loaded, job.epochs, stage=1, underway=job.underway(loaded.model))
    return Product(job.save(loaded), train_seconds=report.seconds, tokens=report.tokens)
