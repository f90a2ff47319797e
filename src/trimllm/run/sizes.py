"""How large a model is, and the least that drops can leave of it."""

from __future__ import annotations

from typing import Any

import torch

from trimllm.blocks import decoder, families
from trimllm.run.targets import Size


def least_size(model: Any, dtype: torch.dtype) -> Size:
    """The size with the smallest block alone, at the least: blocks may share parameters, and of tables that have a part
    for each of them one part stays."""

    def parameters(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    counts = [parameters(block) for block in decoder.blocks(model)]
    tables = decoder.text_decoder(model)._modules
    names = families.family(decoder.text_config(model)).per_layer_weights
    by_layer = sum(parameters(table) for name in names if (table := tables.get(name)) is not None)
    shrinks = by_layer - by_layer // len(counts)
    count = size(model, dtype).parameters - sum(counts) + min(counts) - shrinks
    return Size(1, count, count * dtype.itemsize)


def size(model: Any, dtype: torch.dtype, speedup: float | None = None) -> Size:
    """Depth, parameters, and bytes as they will be saved in `dtype`."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return Size(decoder.depth(model), count, count * dtype.itemsize, speedup)
