"""Progressive layer dropping, Zhang & He (https://arxiv.org/abs/2010.13369): faster training, at full depth.

In every forward pass of the training block l of L is kept with probability 1 - l/L (1 - theta(t)); theta falls from 1
to 1/2 as (1 - 1/2) exp(-100 t / T) + 1/2 over the T steps. A skipped block costs nothing, and what a kept one adds is
divided by its probability. Nothing is skipped afterwards: the checkpoint has all its blocks.

The paper pre-trains BERT, and divides the output of each of the two sub-layers; here a decoder is fine-tuned, from the
base, for the warm-up and all the epochs of a progressive run, and the block's sum of both is divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from trimllm.baselines.job import Job, Product
from trimllm.blocks import decoder, families
from trimllm.errors import InputError

THETA = 0.5
"""The limit of theta: the probability with which the last block is kept, late in the training."""
STEEPNESS = 100.0
"""Gamma times the steps of the training."""


def run(job: Job) -> Product:
    loaded = job.load()
    epochs = job.command.warmup_epochs + job.epochs
    with dropping(loaded.model, seed=job.command.seed) as drops:
        report = job.tune(loaded, epochs, stage=0, on_step=drops.progress)
    skipped = f"{drops.skipped / max(1, drops.drawn):.0%} of the blocks' passes in training were skipped"
    return Product(job.save(loaded), train_seconds=report.seconds, tokens=report.tokens, note=skipped)


def theta(share: float, limit: float) -> float:
    """What theta is when this share of the steps is done."""
    return (1 - limit) * math.exp(-STEEPNESS * share) + limit


class Drops:
    """Which blocks the present forward pass keeps, drawn from a generator of its own."""

    def __init__(self, depth: int, seed: int, limit: float) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.depth, self.limit, self.theta = depth, limit, 1.0
        self.kept = [True] * depth
        self.drawn = self.skipped = 0

    @property
    def probabilities(self) -> list[float]:
        return [1 - (place + 1) / self.depth * (1 - self.theta) for place in range(self.depth)]

    def draw(self) -> None:
        numbers = torch.rand(self.depth, generator=self.generator).tolist()
        self.kept = [number < p for number, p in zip(numbers, self.probabilities, strict=True)]
        self.drawn += self.depth
        self.skipped += self.kept.count(False)

    def progress(self, done: int, total: int) -> None:
        self.theta = theta(done / total, self.limit)


@contextmanager
def dropping(model: Any, *, seed: int, limit: float | None = None) -> Iterator[Drops]:
    """Within, the model skips blocks at random in training mode, and none in evaluation mode; `limit` is of theta.

    Raises:
        InputError: if blocks of the family need more of those before them than the hidden states.
    """
    row = families.family(decoder.text_config(model))
    if not row.resumable:
        kind = decoder.text_config(model).model_type
        raise InputError(f"blocks of model type {kind} cannot be skipped: later ones need more than their output")
    blocks = decoder.blocks(model)
    drops = Drops(len(blocks), seed, THETA if limit is None else limit)

    def embed(_module: Any, _args: Any, _output: Any) -> None:
        # Embeddings are looked up once per forward pass; with gradient checkpointing blocks may run twice, alike.
        if model.training:
            drops.draw()

    with ExitStack() as stack:
        stack.callback(model.get_input_embeddings().register_forward_hook(embed).remove)
        for place, block in enumerate(blocks):
            block.forward = _skipping(block.forward, block, place, drops, row.block_returns_tuple)
            stack.callback(block.__dict__.pop, "forward")
        yield drops


def _skipping(
    plain: Callable[..., Any], block: torch.nn.Module, place: int, drops: Drops, returns_tuple: bool
) -> Callable[..., Any]:
    """The block's forward that obeys `drops`."""

    def forward(*args: Any, **named: Any) -> Any:
        if not block.training:
            return plain(*args, **named)
        stream = decoder.hidden_argument(args, named)
        if not drops.kept[place]:
            return (stream, None) if returns_tuple else stream
        output, probability = plain(*args, **named), drops.probabilities[place]
        if probability == 1:
            return output
        if returns_tuple:
            return (stream + (output[0] - stream) / probability, *output[1:])
        return stream + (output - stream) / probability

    return forward
