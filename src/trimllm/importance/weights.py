"""Evidence that comes from weights and gradients instead of trial deletion: Taylor and magnitude, per candidate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from trimllm.blocks import decoder
from trimllm.blocks.layout import Unit
from trimllm.evaluation import forward
from trimllm.evaluation.batches import Batch, Batches
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import scores
from trimllm.importance.scores import Array


def evidence(strategy: str, model: Any, scorer: Scorer, candidates: Sequence[Unit]) -> dict[str, Array]:
    """What the strategy needs of the weights: `taylor` or `magnitude`, both (n,), or nothing."""
    needed, found = scores.needs(strategy), dict[str, Array]()
    if "taylor" in needed:
        found["taylor"] = taylor(model, scorer, candidates)
    if "magnitude" in needed:
        found["magnitude"] = magnitude(model, candidates)
    return found


def parameters(model: Any, unit: Unit) -> Iterable[torch.nn.Parameter]:
    """The parameters that leave with the unit."""
    i = unit.index
    if unit.kind == "block":
        return [parameter for place in unit.blocks for parameter in decoder.blocks(model)[place].parameters()]
    if unit.kind == "pair":
        return [*decoder.parameters_of(model, "mlp", i), *decoder.parameters_of(model, "attention", i + 1)]
    return list(decoder.parameters_of(model, unit.kind, i))


@torch.no_grad()
def magnitude(model: Any, candidates: Sequence[Unit]) -> Array:
    """(n,) L1 norm of each candidate's weights."""
    return np.array([sum(float(p.abs().sum(dtype=torch.float64)) for p in parameters(model, u)) for u in candidates])


def taylor(model: Any, scorer: Scorer, candidates: Sequence[Unit]) -> Array:
    """(n,) sum of |weight * dL/dw|, with the gradients of `gradients`."""
    with gradients(model, scorer), torch.no_grad():
        sums = ([first_order(p).sum(dtype=torch.float64) for p in parameters(model, unit)] for unit in candidates)
        return np.array([sum(map(float, each)) for each in sums])


def first_order(parameter: torch.nn.Parameter) -> torch.Tensor:
    """|weight * dL/dw| of every weight, by the gradients that are there; zeros where there are none."""
    return torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()


def _add_up(model: Any, batches: Batches) -> int:
    """Add up the gradients of all batches, and return of how many tokens. Where memory runs out, a part of a batch may
    be in them, so that all begins again, in batches of the size that fits.

    Raises:
        NoRoomError: if not even one row fits.
    """
    begun, counts = 0, list[int]()

    def backward(batch: Batch) -> int:
        nonlocal begun
        begun += 1
        logprobs, _ = forward.target_logprobs(model, batch)
        (-logprobs.sum()).backward()
        return logprobs.numel()

    while begun == 0 or begun > len(counts):
        model.zero_grad(set_to_none=True)
        begun, counts = 0, []
        for number in range(len(batches)):
            counts += batches.compute(number, backward)
    return sum(counts)


@contextmanager
def gradients(model: Any, scorer: Scorer) -> Iterator[None]:
    """Within, the gradients of L: the mean loss per token of the right continuations of all the scorer's items.

    The model's gradients, `requires_grad` flags and mode are afterwards what they were.
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    was_training = model.training
    model.eval().requires_grad_(True)
    model.zero_grad(set_to_none=True)
    try:
        count = _add_up(model, scorer.right_only(model).batches)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        model.train(was_training)
