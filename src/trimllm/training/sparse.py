"""Sparse update: which parameters train. Only the blocks most likely to stay do; the rest is frozen.

Source: TrimLLM (arXiv 2412.11242), sparse update with r = 1/4.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch

from trimllm.blocks import decoder
from trimllm.blocks.layout import HALVES, Layout


def count(ratio: float, depth: int) -> int:
    """How many blocks train: r * N, at least one."""
    return max(1, math.ceil(ratio * depth - 1e-9))


def choose(
    mode: str, order: Sequence[int], count: int, before: Collection[int] | None, staying: Collection[int]
) -> list[int] | None:
    """Original indices of the blocks that train after a drop, ascending; None trains all.

    Args:
        mode: "filled", "static", "dynamic" or "off" (--sparse-update).
        order: original indices of the blocks that are left, by the latest scan, the most important first.
        count: how many are to train.
        before: the blocks that trained so far, if any.
        staying: original indices of the blocks of which at least a half is left.
    """
    held = [i for i in before or () if i in staying]
    if mode == "static" and held:
        return sorted(before or ())
    if mode == "off" or count >= len(order):
        return None
    if mode != "filled":
        held = []
    more = [i for i in order if i not in held]
    return sorted(held + more[: count - len(held)])


def freeze(
    model: Any, layout: Layout, chosen: Collection[int] | None, *, embeddings: bool = True
) -> list[torch.nn.Parameter]:
    """Set `requires_grad` everywhere, and return the parameters that train, each once (tied ones too).

    Args:
        layout: the original index of each half of the model's present blocks.
        chosen: original indices of the blocks that train; None trains all. A re-packed block trains by halves.
        embeddings: whether everything outside the blocks (embeddings, final norm, head) trains.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(embeddings)
        parameter.grad = None
    for place, (block, source) in enumerate(zip(decoder.blocks(model), layout, strict=True)):
        if source.attention == source.mlp:
            block.requires_grad_(chosen is None or source.attention in chosen)
            continue
        for half in HALVES:
            trains = chosen is None or getattr(source, half) in chosen
            for parameter in decoder.parameters_of(model, half, place):
                parameter.requires_grad_(trains)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
