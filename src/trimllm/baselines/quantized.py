"""Weights in 8 or 4 bits by bitsandbytes: LLM.int8() (https://arxiv.org/abs/2208.07339) of the fully fine-tuned model,
and of the trimmed one; int4 is NF4 (https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import shutil
import time

from trimllm.baselines.job import Job, Product
from trimllm.config import ExportConfig
from trimllm.handover import quantized


def run(job: Job) -> Product:
    method, own_code = job.cell.method, job.command.trust_remote_code
    source = job.earlier(method.after[0])
    target, started = job.folder / "model", time.perf_counter()
    shutil.rmtree(target, ignore_errors=True)
    command = ExportConfig(source=str(source), output=str(target), trust_remote_code=own_code, **method.settings)
    said = quantized.write(source, target, command)
    return Product(target, compress_seconds=time.perf_counter() - started, note=said)
