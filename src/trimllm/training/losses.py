"""A loss without all logits at once: the output head and its backward run over a few target positions at a time.

Between the decoder and the logits a family may do more than one matrix product (scales, soft caps). So a chunk goes
through the model's own forward, in which the decoder returns the chunk of its output that was computed before.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trimllm.blocks.decoder import text_decoder
from trimllm.evaluation import forward
from trimllm.training.packing import Packed, target_logits

Loss = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Logits (k, vocabulary), targets (k,) and the number of the first of these positions -> the loss summed over them."""
TOLERANCE = 1e-4
"""What the logits of a chunk may differ by from those of a whole forward pass, relative to the largest."""


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, _begin: int = 0) -> torch.Tensor:
    """Summed over the positions, in nats."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def backward(model: Any, packed: Packed, scale: float, places: int, loss_of: Loss = cross_entropy) -> torch.Tensor:
    """Add the gradients of scale * (summed loss over the targets) to the parameters, and return that loss.

    `places`: the most target positions whose logits are in memory at once (see `places_at_once`).
    """
    if not len(packed.targets):
        return torch.zeros((), device=packed.where.device)
    if len(packed.targets) <= places:
        loss = loss_of(target_logits(model, packed), packed.targets, 0) * scale
        loss.backward()
        return loss.detach()
    hidden, output = decode(model, packed)
    total = torch.zeros((), device=hidden.device)
    gradients: list[Any] = []
    for begin in range(0, len(packed.targets), places):
        states = hidden.detach()[begin : begin + places].requires_grad_(hidden.requires_grad)
        loss = loss_of(logits_of(model, states, output), packed.targets[begin : begin + places], begin) * scale
        loss.backward()
        gradients.append(states.grad)
        total += loss.detach()
    if hidden.requires_grad:
        hidden.backward(torch.cat(gradients))
    return total


def decode(model: Any, packed: Packed) -> tuple[torch.Tensor, Any]:
    """The decoder's output at the targets' positions (k, hidden), and all of it: a forward pass without logits."""
    found: list[Any] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        found.append(output)

    handle = text_decoder(model).register_forward_hook(keep)
    try:
        with forward.head_only_at(model, packed.where[:0]):
            model(**packed.inputs, use_cache=False)
    finally:
        handle.remove()
    (output,) = found
    return output[0].flatten(0, 1).index_select(0, packed.where), output


def logits_of(model: Any, hidden: torch.Tensor, output: Any) -> torch.Tensor:
    """Logits (k, vocabulary) of hidden states (k, hidden), by the model's own forward after its decoder, whose
    `output` they stand in for."""
    chunk = copy.copy(output)
    chunk.last_hidden_state = hidden[None]
    with _decoder_returns(text_decoder(model), chunk):
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits[0]


@contextmanager
def _decoder_returns(decoder: Any, output: Any) -> Iterator[None]:
    decoder.forward = lambda *_args, **_named: output
    try:
        yield
    finally:
        del decoder.forward


@torch.no_grad()
def places_at_once(model: Any, packed: Packed) -> int:
    """How many positions' logits a chunk holds; all of them where this model's logits cannot be computed in chunks.

    Whether they can is found out over `packed`, against a whole forward pass.
    """
    everything = sys.maxsize
    head = model.get_output_embeddings()
    if head is None or not len(packed.targets):
        return everything
    try:
        with forward.evaluating(model):
            apart = logits_of(model, *decode(model, packed)) - (whole := target_logits(model, packed))
    except (*forward.UNFIT, AttributeError):
        return everything
    tolerance = TOLERANCE if model.dtype == torch.float32 else 0.05
    if not apart.abs().max() <= tolerance * whole.abs().max().clamp(min=1):
        return everything
    return forward.chunk(whole.shape[-1])
