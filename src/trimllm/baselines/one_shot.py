"""All blocks at once by one score, then the training that a progressive run has in all: the usual baseline.

Scan of TrimLLM (https://arxiv.org/abs/2412.11242); block influence, ShortGPT (https://arxiv.org/abs/2403.03853);
angular distance of a contiguous run, Gromov et al. (https://arxiv.org/abs/2403.17887); perplexity, Taylor and
magnitude, Shortened LLaMA (https://arxiv.org/abs/2402.02834); a seeded random order. All parameters train, for all
alike (their papers train nothing, or low-rank adapters); after the scan of TrimLLM those that its sparse update takes.
"""

from __future__ import annotations

from trimllm.baselines.job import Job, Product


def run(job: Job) -> Product:
    how = {"strategy": job.command.strategy, **job.cell.method.settings}
    return job.trim(job.full, one_shot=True, warmup_epochs=0, **how)
