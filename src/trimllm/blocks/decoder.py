"""Where things are in a causal language model: its decoder blocks, the attention half and the MLP half of each, and the
hidden states in what goes in and comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimllm.blocks import families
from trimllm.blocks.layout import HALVES
from trimllm.errors import InputError

INDEX_NAMES = ("layer_idx", "layer_id", "layer_number")
"""Attributes in which modules keep the number of their layer."""
REFERENCE_NAMES = ("kv_shared_layer_index",)
"""Attributes in which modules keep the number of another layer, whose keys and values they reuse."""


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder (for a vision-language model, of its text tower)."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def takes_masks(model: nn.Module) -> bool:
    """Whether attention takes a mask that says of every two positions if they see each other. FlashAttention, which may
    come as `kernels-community/flash-attn2`, reads every mask as one of padding."""
    return "flash" not in str(text_config(model)._attn_implementation)


def text_decoder(model: nn.Module) -> nn.Module:
    """The module that computes the text decoder's hidden states: `get_decoder()`, or the base model where transformers
    returns a module without blocks, such as an output layer."""
    found: nn.Module = model.get_decoder()  # type: ignore[operator]
    if any(isinstance(module, nn.ModuleList) for module in found.modules()):
        return found
    return model.base_model  # type: ignore[return-value]


def container(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that owns the list of decoder blocks, and the list's name in it."""
    config = text_config(model)
    row = families.family(config)
    decoder = text_decoder(model)
    if row.layers is not None:
        parent, _, name = row.layers.rpartition(".")
        owner = decoder.get_submodule(parent)
        if isinstance(owner._modules.get(name), nn.ModuleList):
            return owner, name
    depth = getattr(config, "num_hidden_layers", None)
    found = [
        name for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    found = [name for name in found if name.count(".") == min(other.count(".") for other in found)]
    if len(found) != 1:
        what = "no list" if not found else f"{len(found)} lists ({', '.join(found)})"
        raise InputError(f"model type {config.model_type!r} cannot be cut: it has {what} of {depth} decoder blocks")
    parent, _, name = found[0].rpartition(".")
    return decoder.get_submodule(parent), name


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal language model.

    Raises:
        InputError: if they cannot be told from other modules.
    """
    owner, name = container(model)
    return owner._modules[name]  # type: ignore[return-value]


def depth(model: nn.Module) -> int:
    """Number of decoder blocks."""
    return len(blocks(model))


def half_names(model: nn.Module, half: str, block: nn.Module) -> list[str]:
    """The names of the half's submodules that `block` has, in order of execution."""
    row = families.family(text_config(model))
    names = row.attention if half == "attention" else row.mlp
    return [name for name in names if block._modules.get(name) is not None]


def repacking_refused(model: nn.Module) -> str | None:
    """Why halves of blocks cannot be re-packed, or None where they can."""
    config = text_config(model)
    reason = families.whole_only(config)
    if reason:
        return reason
    for i, block in enumerate(blocks(model)):
        named = {name for half in HALVES for name in half_names(model, half, block)}
        for name, child in block.named_children():
            if name not in named and any(True for _ in child.parameters()):
                return f"{name} of layer {i} belongs to neither half"
        if any(True for _ in block.parameters(recurse=False)) or any(True for _ in block.buffers(recurse=False)):
            return f"layer {i} has weights of its own outside its two halves"
    return None


def halves(model: nn.Module, i: int) -> tuple[list[nn.Module], list[nn.Module]] | None:
    """The submodules of the attention half and of the MLP half of block `i`, each in order of execution.

    None where the two are not one after the other (parallel blocks) or not known.
    """
    if families.whole_only(text_config(model)):
        return None
    block = blocks(model)[i]
    attention, mlp = ([block._modules[name] for name in half_names(model, half, block)] for half in HALVES)
    return attention, mlp  # type: ignore[return-value]


def mid_block(model: nn.Module, i: int) -> nn.Module | None:
    """The module of block `i` whose input is the residual stream between attention and MLP, or None (parallel)."""
    split = halves(model, i)
    return split[1][0] if split else None


def parameters_of(model: nn.Module, half: str, i: int) -> list[nn.Parameter]:
    """Parameters of one half ("attention" or "mlp") of block `i`, or of all of it ("block").

    Raises:
        InputError: where the family's blocks have no such halves.
    """
    block = blocks(model)[i]
    if half == "block":
        return list(block.parameters())
    reason = repacking_refused(model)
    if reason:
        raise InputError(f"the {half} half of layer {i} cannot be told apart: {reason}")
    return [parameter for name in half_names(model, half, block) for parameter in block._modules[name].parameters()]  # type: ignore[union-attr]


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a block, or of a module in it."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a block, or a module in it, returns."""
    return output[0] if isinstance(output, tuple) else output


class LeftError(Exception):
    """Raised by a hook to leave a forward pass whose rest is not wanted."""


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The numbers, flags and names among a module's attributes, also in lists, tuples and dicts: what it took from the
    config or from its index."""
    return {name: value for name, value in module.__dict__.items() if not name.startswith("_") and _plain(value)}


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_plain, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, bool | int | float | str | None)
