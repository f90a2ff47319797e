"""Post-training compression by llm-compressor of the fully fine-tuned model: 2:4 sparsity, and weights of 4 bits.

SparseGPT (https://arxiv.org/abs/2301.00774), Wanda (https://arxiv.org/abs/2306.11695), GPTQ
(https://arxiv.org/abs/2210.17323), AWQ (https://arxiv.org/abs/2306.00978). As in the papers, the linear layers of the
blocks change, not embeddings and output head; nothing trains. What they calibrate on are rows of train.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from trimllm.baselines.job import Job, Product
from trimllm.blocks import decoder
from trimllm.checkpoints import export, folders, loading
from trimllm.errors import InputError, TrimError, one_line
from trimllm.handover import copy_companions, quantized

CALIBRATION_ROWS = 128
"""Most rows that are calibrated on, as in the papers; half of them domain text if there is one."""
BATCH_TOKENS = 2048
GROUPS = (128, 64, 32, 16)
"""Weights of a row that share a scale: 128 in the papers; less where the rows' lengths are no multiples."""


def run(job: Job) -> Product:
    """Compress, save, reload and compare.

    Raises:
        InputError: if the model has no layers that the method takes.
        TrimError: if llm-compressor cannot compress it, or what it saved is not what it made.
    """
    name = job.cell.method.name
    source = job.earlier("full")
    loaded = job.load(source, training=False)
    layers = linears(loaded.model)
    if not layers:
        raise InputError("nothing to compress: the model's blocks have no linear layers (torch.nn.Linear)")
    widths = {layer.in_features for layer in layers.values()}
    ignored = [key for key, each in loaded.model.named_modules() if isinstance(each, nn.Linear) and key not in layers]
    sparse = name in ("sparsegpt", "wanda")
    size = 4 if sparse else group_size(widths)
    if sparse and any(width % 4 for width in widths):
        raise InputError(f"2:4 sparsity needs rows of a multiple of 4 weights, this model has rows of {min(widths)}")
    started = time.perf_counter()
    rows = calibration(job, loaded)
    compress(loaded.model, loaded.tokenizer, recipe(name, size, ignored), rows)
    seconds = time.perf_counter() - started
    if sparse:
        target = save_sparse(job, source, layers)
        said = "the zeros are stored: without kernels for 2:4 nothing is smaller or faster"
    else:
        target = save_quantized(job, source, loaded)
        said = f"int4, a scale per {size} weights" + ("" if size == GROUPS[0] else f" ({GROUPS[0]} does not divide)")
        said += "; transformers unpacks them on first use: less on disk, not in memory, and no faster"
    count = sum(len(batch["input_ids"]) for batch in rows)
    said += f"; calibrated on {count} rows of train" + (" and domain text" if job.command.text else "")
    return Product(target, compress_seconds=seconds, note=said)


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the decoder blocks, by name."""
    inside = {id(module) for module in decoder.blocks(model).modules()}
    return {key: each for key, each in model.named_modules() if isinstance(each, nn.Linear) and id(each) in inside}


def group_size(widths: set[int]) -> int:
    """The largest group of weights that divides every row.

    Raises:
        InputError: if none does.
    """
    for size in GROUPS:
        if not any(width % size for width in widths):
            return size
    raise InputError(f"int4 needs rows of a multiple of {GROUPS[-1]} weights, this model has rows of {min(widths)}")


def recipe(name: str, size: int, ignored: list[str]) -> list[Any]:
    """The modifiers of llm-compressor that make up a method."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    exact = {"targets": ["Linear"], "ignore": ignored}
    if name in ("sparsegpt", "wanda"):
        kind = SparseGPTModifier if name == "sparsegpt" else WandaPruningModifier
        return [kind(sparsity=0.5, mask_structure="2:4", **exact)]
    # GPTQ rounds to symmetric ranges, as its common checkpoints and the kernels of engines have them (the paper's are
    # asymmetric), AWQ to ranges with a zero point, as published.
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size, "symmetric": name == "gptq"}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ignored}
    if name == "gptq":
        return [GPTQModifier(**groups)]
    return [AWQModifier(), QuantizationModifier(**groups)]


def calibration(job: Job, loaded: Any) -> list[dict[str, torch.Tensor]]:
    """Batches of rows of train and of domain text; rows of a batch are of one length, so that nothing is padded."""
    task, text = job.examples(loaded, BATCH_TOKENS)
    rng = random.Random(f"calibration:{job.command.seed}")
    drawn = rng.sample(text, min(len(text), CALIBRATION_ROWS // 2))
    drawn += rng.sample(task, min(len(task), CALIBRATION_ROWS - len(drawn)))
    by_length = defaultdict(list)
    for row in drawn:
        by_length[len(row.ids)].append(row.ids)
    batches = []
    for length, same in sorted(by_length.items()):
        step = max(1, BATCH_TOKENS // length)
        for begin in range(0, len(same), step):
            ids = torch.tensor(same[begin : begin + step])
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


def compress(model: Any, tokenizer: Any, modifiers: list[Any], rows: list[dict[str, torch.Tensor]]) -> None:
    """Compress the model in place.

    Raises:
        TrimError: if llm-compressor fails.
    """
    from llmcompressor import oneshot
    from loguru import logger

    for library in ("llmcompressor", "compressed_tensors"):
        logger.disable(library)
    batches: Any = DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    try:
        with _pageable():
            oneshot(
                model=model,
                processor=tokenizer,
                recipe=modifiers,
                dataset=batches,
                num_calibration_samples=len(rows),
                clear_sparse_session=True,
                pipeline="sequential",
            )
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise TrimError(f"llm-compressor cannot compress this model: {one_line(error)}") from error


@contextmanager
def _pageable() -> Iterator[None]:
    """Where there is no accelerator to copy to, llm-compressor's AWQ must not pin memory for it, which fails."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    pin = IntermediatesCache.pin_memory
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin


def save_sparse(job: Job, source: Path, layers: dict[str, nn.Linear]) -> Path:
    """Save the model with the pruned layers in a fresh object, without the library's hooks.

    Raises:
        TrimError: if a layer is not 2:4 sparse.
    """
    fresh = job.load(source, training=False)
    for name, layer in layers.items():
        weight = layer.weight.detach()
        if int((weight.view(-1, 4) != 0).sum(1).max()) > 2:
            raise TrimError(f"{name} is not 2:4 sparse after pruning")
        fresh.model.get_submodule(name).weight.data.copy_(weight)
    return job.save(fresh)


def save_quantized(job: Job, source: Path, loaded: Any) -> Path:
    """Save in the format of compressed-tensors, which stock transformers reads where that library is."""
    target = job.folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    with folders.appearing(target) as scratch:
        with loading.quiet():
            export.save_model(loaded.model, scratch, save_compressed=True)
            loaded.tokenizer.save_pretrained(scratch)
        copy_companions(source, scratch)
        quantized.compare(scratch, loaded.model, trust_remote_code=job.command.trust_remote_code)
    return target
