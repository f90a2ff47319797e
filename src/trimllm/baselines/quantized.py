"""Weights in 8 or 4 bits by bitsandbytes: LLM.int8() (https://arxiv.org/abs/2208.07339) of the fully fine-tuned model,
and of the trimmed one; int4 is NF4 (https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import shutil
from typing import Literal

from trimllm.baselines.job import Job, Product, Watch
from trimllm.config import ExportConfig
from trimllm.handover import quantized


def run(job: Job) -> Product:
    name = job.cell.method.name
    source = job.earlier("full" if name == "llm-int8" else "trim")
    target, watch = job.folder / "model", Watch()
    shutil.rmtree(target, ignore_errors=True)
    to: Literal["int4", "int8"] = "int4" if name == "trim-int4" else "int8"
    said = quantized.write(source, target, ExportConfig(source=str(source), to=to, output=str(target)))
    return Product(target, compress_seconds=watch.seconds(), note=said)
