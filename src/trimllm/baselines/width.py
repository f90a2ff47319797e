"""The width of decoder blocks: which groups of KV heads and MLP channels count, and blocks with fewer of them.

A group goes with all that reads or writes it alone: a channel is a row of gate and up and a column of down; a KV head,
with its query heads, is rows of q, k and v and columns of o.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimllm.blocks import decoder
from trimllm.errors import InputError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("q_norm", "k_norm")
CONFIG = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
EVEN, WIDE = 8, 512
"""Channels of MLPs of at least so many are kept in multiples: odd widths are slow on GPUs."""


@dataclass(frozen=True)
class Widths:
    """Widths of a block: query heads per KV head, KV heads, and MLP channels."""

    per: int
    heads: int
    channels: int


def block_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in decoder.blocks(model).parameters())


def widths(model: Any) -> Widths:
    """What every block is made of.

    Raises:
        InputError: if that is not one attention with separate projections and one gated MLP, alike in all blocks.
    """
    config = decoder.text_config(model)
    found = {_widths(block) for block in decoder.blocks(model)}
    told = tuple(getattr(config, name, None) for name in CONFIG)
    one = found.pop()
    if found or one is None or (one.per * one.heads, one.heads, one.channels) != told:
        kind = config.model_type
        raise InputError(f"model type {kind} has other layers than those of Llama's family, which LLM-Pruner cuts")
    return one


def _widths(block: Any) -> Widths | None:
    parts = [part for part in (getattr(block, "self_attn", None), getattr(block, "mlp", None)) if part is not None]
    named = [(name, m) for part in parts for name, m in part.named_children() if list(m.parameters())]
    linear = {name for name, module in named if isinstance(module, nn.Linear)}
    # Norms of queries and keys may be there where all heads share them; anything else could belong to a head.
    size = getattr(parts[0], "head_dim", 0) if len(parts) == 2 else 0
    shared = [m for name, m in named if name in NORMS and all(p.shape == (size,) for p in m.parameters())]
    own = [p for part in parts for p in part.parameters(recurse=False)]
    if linear != {*ATTENTION, *MLP} or len(named) != len(linear) + len(shared) or own or not size:
        return None
    (q, k), o, down = layers(block, ATTENTION[:2]), block.self_attn.o_proj, block.mlp.down_proj
    queries, heads = q.out_features // size, k.out_features // size
    return Widths(queries // heads, heads, down.in_features) if o.in_features == q.out_features else None


def layers(block: Any, names: Sequence[str]) -> list[Any]:
    """The linear layers of these names."""
    return [getattr(block.self_attn if name in ATTENTION else block.mlp, name) for name in names]


def wanted(model: Any, keep: float) -> Widths:
    """What the blocks are to be made of, so that about `keep` of their parameters are left.

    Raises:
        InputError: if the family is refused (see `widths`), or a block cannot be made so small.
    """
    old, hidden = widths(model), decoder.text_config(model).hidden_size
    block: Any = decoder.blocks(model)[0]
    total = sum(parameter.numel() for parameter in block.parameters())

    def each(names: tuple[str, ...], closing: str, count: int) -> int:
        opening = sum(p.numel() for layer in layers(block, names) for p in layer.parameters())
        return (opening + layers(block, (closing,))[0].weight.numel()) // count

    head, channel = each(ATTENTION[:3], "o_proj", old.heads), each(MLP[:2], "down_proj", old.channels)
    rest = total - old.heads * head - old.channels * channel
    # Configs of most families ask for a number of heads that divides the hidden size.
    fitting = [n for n in range(1, old.heads) if hidden % (n * old.per) == 0] + [old.heads]
    heads = min(fitting, key=lambda n: (abs(n - keep * old.heads), n))
    even = EVEN if old.channels >= WIDE and old.channels % EVEN == 0 else 1
    channels = even * round((keep * total - rest - heads * head) / channel / even)
    if channels < 1:
        least = (rest + heads * head + channel) / total
        raise InputError(f"--keep {keep:g}: with {heads} KV heads a block cannot get below {least:.0%}: keep more")
    new = Widths(old.per, heads, min(channels, old.channels))
    if not expressible(model, new):
        kind = decoder.text_config(model).model_type
        raise InputError(f"model type {kind} derives its heads' size from their number, so none of them can go")
    return new


def expressible(model: Any, new: Widths) -> bool:
    """Whether the family's config can say these widths: builds a model from it, without weights."""
    config, block = copy.deepcopy(model.config), list[Any](decoder.blocks(model))[0]
    describe(config.get_text_config(decoder=True), new, block.self_attn.head_dim)
    with torch.device("meta"):
        stock: Any = decoder.blocks(type(model)(config))[0]
    return _widths(stock) == new and bool(stock.self_attn.head_dim == block.self_attn.head_dim)


@torch.no_grad()
def prune(model: Any, scores: list[tuple[torch.Tensor, torch.Tensor]], new: Widths) -> None:
    """Keep the groups of largest importance in every block, in their order, and say so in the config."""
    config, blocks = decoder.text_config(model), list[Any](decoder.blocks(model))
    for block, (heads, channels) in zip(blocks, scores, strict=True):
        size = block.self_attn.head_dim
        head, channel = heads.topk(new.heads).indices.sort()[0], channels.topk(new.channels).indices.sort()[0]
        for name, width in zip(ATTENTION, (new.per * size, size, size, new.per * size), strict=True):
            inside = (head[:, None] * width + torch.arange(width, device=head.device)).flatten()
            _cut(getattr(block.self_attn, name), inside, columns=name == "o_proj")
        for name in MLP:
            _cut(getattr(block.mlp, name), channel, columns=name == "down_proj")
    describe(config, new, blocks[0].self_attn.head_dim)
    for part in (part for block in blocks for part in (block.self_attn, block.mlp)):
        part.__dict__.update({name: getattr(config, name) for name in CONFIG if name in vars(part)})
        if "num_heads" in vars(part):
            part.num_heads = config.num_attention_heads


def describe(config: Any, new: Widths, head_dim: int) -> None:
    """Say the widths in a text config."""
    told = zip(CONFIG, (new.per * new.heads, new.heads, new.channels), strict=True)
    for name, value in {"head_dim": head_dim, **dict(told)}.items():
        setattr(config, name, value)


def _cut(layer: Any, kept: torch.Tensor, *, columns: bool) -> None:
    layer.weight = nn.Parameter(layer.weight.index_select(int(columns), kept))
    if columns:
        layer.in_features = len(kept)
        return
    layer.out_features = len(kept)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[kept])
