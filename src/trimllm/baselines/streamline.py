"""LLM-Streamline, layer replacement (https://arxiv.org/abs/2403.19135): a run of blocks becomes one that stands for it.

Of the fully fine-tuned model the run of n + 1 blocks whose output is most like its input (cosine) is replaced by one
block, which begins as the first of them and is trained alone to give, in mean squared error, what the run gives in the
intact model. Then the cut model is fine-tuned as other methods' are.

The paper also replaces runs by plain MLPs, and trains the replacement on general text; here it is a decoder block, so
that the checkpoint is a stock one, and it sees the task's and domain's rows, for a tenth of the epochs of a progressive
run; the others are of the fine-tuning.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch

from trimllm.baselines.job import Job, Product
from trimllm.blocks import decoder, families, legality
from trimllm.blocks.layout import whole, without
from trimllm.blocks.surgery import drop_layers
from trimllm.checkpoints import models
from trimllm.config import TrainedModel
from trimllm.errors import InputError, TrimError
from trimllm.evaluation import encoding
from trimllm.importance.scan import scan
from trimllm.training import packing, train
from trimllm.training.packing import Example, Packed

SHARE = 0.1
"""Of all epochs, those of the replacement."""


def run(job: Job) -> Product:
    loaded, started = job.load(job.full), time.perf_counter()
    model, depth = loaded.model, decoder.depth(loaded.model)
    kind = decoder.text_config(model)
    if not families.family(kind).resumable:
        raise InputError(f"blocks of model type {kind.model_type} cannot be trained apart: they share more than states")
    length = job.drops + 1
    start, cosine = find_run(job, loaded, length)
    found, gone = time.perf_counter(), range(start + 1, start + length)
    note = f"blocks {start} to {gone[-1]} (cosine {cosine:.3f}) became one"
    steps = job.plan(loaded, job.epochs * SHARE, job.command.seed * 1000) if job.epochs else []
    if steps:
        pad = encoding.pad_id(loaded.tokenizer, model)
        replacement, errors = train_replacement(model, start, length, steps, job.command, pad)
        decoder.blocks(model)[start].load_state_dict(replacement.state_dict())
        if len(errors) > 1:
            note += f"; its mean squared error went from {errors[0]:.3g} to {errors[-1]:.3g} in training"
    apart = time.perf_counter() - found
    drop_layers(model, gone)
    report = job.tune(loaded, job.epochs * (1 - SHARE), stage=1)
    tokens = sum(len(row.ids) for rows in steps for row in rows) + report.tokens
    saved = job.save(loaded, without(whole(depth), gone))
    return Product(saved, apart + report.seconds, compress_seconds=found - started, tokens=tokens, note=note)


def find_run(job: Job, loaded: models.Loaded, length: int) -> tuple[int, float]:
    """Where the run begins whose input and output are most alike on the calibration rows, and the mean cosine.

    Raises:
        InputError: if no run of that length can leave the model but for its first block.
    """
    scorer, metric = job.calibration(loaded)
    found = scan(loaded.model, scorer, metric, trials=False, run=length)
    depth = decoder.depth(loaded.model)
    cosines = dict(zip((unit.index for unit in found.candidates), found.run_cosine.tolist(), strict=True))
    refused = {
        start: legality.refusal(loaded.model, without(whole(depth), range(start + 1, start + length)))
        for start, cosine in cosines.items()
        if np.isfinite(cosine)
    }
    legal = [start for start, reason in refused.items() if reason is None]
    if not legal:
        raise InputError(f"no run of {length} blocks can become one: {next(iter(refused.values()), 'it is too long')}")
    best = max(legal, key=lambda start: cosines[start])
    return best, cosines[best]


def train_replacement(
    model: Any, start: int, length: int, steps: Sequence[Sequence[Example]], settings: TrainedModel, pad_id: int
) -> tuple[torch.nn.Module, list[float]]:
    """A block that maps the input of the run to its output in the intact model, and the error of every step.

    AdamW with the rate, the batches and the schedule of a stage; the error is the mean over tokens and dimensions.

    Raises:
        TrimError: if the error is not a finite number.
    """
    way, _ = packing.find_way(model, [row for rows in steps for row in rows], pad_id)
    accelerator = models.accelerator(settings)
    replacement = copy.deepcopy(decoder.blocks(model)[start]).requires_grad_(True)
    optimizer = train.adamw(list(replacement.parameters()), settings, model.device)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: train.schedule(step, len(steps)))
    model.eval()
    errors: list[float] = []
    for rows in steps:
        count, total = sum(row.inputs for row in rows), 0.0
        together = max(1, (settings.micro_batch_size or settings.batch_size) // max(len(row.ids) for row in rows))
        for begin in range(0, len(rows), together):
            packed = packing.pack(rows[begin : begin + together], way, pad_id, model.device)
            with accelerator.autocast():
                found = mean_squared(model, start, length, replacement, packed)
            share = packed.tokens / count
            (found * share).backward()
            total += float(found.detach()) * share
        if not np.isfinite(total):
            raise TrimError(f"the replacement's error became {total} at step {len(errors) + 1}: lower --lr")
        torch.nn.utils.clip_grad_norm_(replacement.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
        errors.append(total)
    return replacement, errors


def mean_squared(model: Any, start: int, length: int, block: torch.nn.Module, packed: Packed) -> torch.Tensor:
    """Mean squared difference, over tokens that are no padding, of the block's output and that of the run."""
    given: list[Any] = []
    wanted: list[torch.Tensor] = []

    def enter(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.extend((args, named))

    def leave(_module: Any, _args: Any, output: Any) -> None:
        wanted.append(decoder.hidden_of(output))
        raise decoder.LeftError

    blocks = decoder.blocks(model)
    with ExitStack() as stack:
        stack.callback(blocks[start].register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(blocks[start + length - 1].register_forward_hook(leave).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(suppress(decoder.LeftError))
        model(**packed.inputs, use_cache=False)
    real = torch.zeros(packed.inputs["input_ids"].shape, dtype=torch.bool, device=wanted[0].device)
    for example, row, begin in packed.spans:
        real[row, begin : begin + example.inputs] = True
    args, named = given
    return torch.nn.functional.mse_loss(decoder.hidden_of(block(*args, **named))[real].float(), wanted[0][real].float())
