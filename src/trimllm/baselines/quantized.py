"""Weights in 8 or 4 bits by bitsandbytes: LLM.int8() (https://arxiv.org/abs/2208.07339) of the fully fine-tuned model,
and of the trimmed one; int4 is NF4 (https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import shutil
import time
from typing import Literal

from trimllm.baselines.job import Job, Product
from trimllm.config import ExportConfig
from trimllm.handover import quantized


def run(job: Job) -> Product:
    name = job.cell.method.name
    source = job.earlier("full" if name == "llm-int8" else "trim")
    target, started = job.folder / "model", time.perf_counter()
    shutil.rmtree(target, ignore_errors=True)
    to: Literal["int4", "int8"] = "int4" if name == "trim-int4" else "int8"
    own_code = job.command.trust_remote_code
    command = ExportConfig(source=str(source), to=to, output=str(target), trust_remote_code=own_code)
    said = quantized.write(source, target, command)
    return Product(target, compress_seconds=time.perf_counter() - started, note=said)
