"""Layer dropping before fine-tuning by position or contribution, Sajjad et al. (https://arxiv.org/abs/2004.03844).

Top, bottom, alternate and symmetric are places; contribution drops the layers whose output is most like their input
(cosine), which is block influence measured on the base. The base is cut, then fine-tuned for the warm-up and all that
a progressive run trains.
"""

from __future__ import annotations

from trimllm.baselines.job import Job, Product
from trimllm.checkpoints import loading


def run(job: Job) -> Product:
    more = job.command.final_epochs + job.command.warmup_epochs
    return job.trim(
        loading.path_of(job.command.model),
        one_shot=True,
        warmup_epochs=0,
        final_epochs=more,
        **job.cell.method.settings,
    )
