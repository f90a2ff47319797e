"""LLM-Pruner (https://arxiv.org/abs/2305.11627): width instead of depth, then LoRA.

Coupled structures go together: an MLP channel (a row of gate and up, a column of down), and a KV head with its query
heads (rows of q, k and v, columns of o). Their importance is the first-order Taylor term |w dL/dw|, summed over the
group, on the calibration rows. What is left is recovered by LoRA of rank 8 on all linear layers of the blocks.

Every block loses as many groups as any other (the paper spares the first and last blocks), so that the checkpoint is a
stock one; heads go in groups that its config can express, and channels make up the rest of the wanted share. It starts
from the fully fine-tuned model, and LoRA trains as long as other methods, at the paper's rate or --lr if that is more.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from trimllm.baselines import width
from trimllm.baselines.job import Job, Product
from trimllm.blocks import adapters, decoder
from trimllm.checkpoints import models
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import weights
from trimllm.training import train

RANK, ALPHA, RATE = 8, 16, 1e-4
"""Rank, scale and learning rate of LoRA, as published."""


def run(job: Job) -> Product:
    loaded, started = job.load(job.full), time.perf_counter()
    model, keep = loaded.model, job.cell.keep
    assert keep is not None
    old, new, before = width.widths(model), width.wanted(model, keep), width.block_parameters(model)
    scorer, _ = job.calibration(loaded)
    width.prune(model, importance(model, scorer), new)
    left = f"{width.block_parameters(model) / before:.1%} of the blocks' parameters left"
    note = f"{new.heads} of {old.heads} KV heads, {new.channels} of {old.channels} MLP channels: {left}"
    if new.heads == old.heads:
        note += "; heads cannot be cut at this share, so more channels went"
    seconds = time.perf_counter() - started
    report = recover(job, loaded)
    saved = job.save(loaded)
    return Product(saved, report.seconds, compress_seconds=seconds, tokens=report.tokens, note=note)


def importance(model: Any, scorer: Scorer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per block the importance of its KV heads (heads,) and of its MLP channels (channels,)."""
    old, found = width.widths(model), list[tuple[torch.Tensor, torch.Tensor]]()
    blocks: Any = decoder.blocks(model)
    with weights.gradients(model, scorer), torch.no_grad():
        for block in blocks:
            sums = []
            for opening, closing, count in (
                (width.ATTENTION[:3], "o_proj", old.heads),
                (width.MLP[:2], "down_proj", old.channels),
            ):
                total = torch.zeros(count, dtype=torch.float64, device=block.self_attn.o_proj.weight.device)
                for parameter in (p for layer in width.layers(block, opening) for p in layer.parameters()):
                    total += weights.first_order(parameter).double().reshape(count, -1).sum(1)
                columns = weights.first_order(width.layers(block, (closing,))[0].weight).T
                total += columns.double().reshape(count, -1).sum(1)
                sums.append(total)
            found.append((sums[0], sums[1]))
    return found


def recover(job: Job, loaded: models.Loaded) -> train.StageReport:
    """LoRA on all linear layers of the blocks, merged at the end."""
    import peft

    model, before = loaded.model, set(vars(loaded.model))
    places = {id(module) for block in decoder.blocks(model) for module in block.modules()}
    layers = [name for name, m in model.named_modules() if id(m) in places and isinstance(m, nn.Linear)]
    torch.manual_seed(job.command.seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    epochs, rate = job.epochs, max(RATE, job.command.lr)
    report = job.tune(loaded, epochs, stage=1, parameters=trained, lr=rate)
    adapters.unload(wrapped, before)
    return report
