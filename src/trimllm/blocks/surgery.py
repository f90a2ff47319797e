"""Take decoder blocks out of a model for good.

Modules and config change in one operation, since masks are chosen from the config by place while windows and scales are
baked into the modules by their old index. The order is: explicit config -> is it legal -> list of blocks -> `layer_idx`
-> weights with one slice per layer -> scales baked from the index -> config, `num_hidden_layers` last.

    from trimllm import drop_layers
    drop_layers(model, [3, 7, 8])
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trimllm.blocks import adapters, config_rules, families
from trimllm.blocks.changes import Changes
from trimllm.blocks.decoder import (
    INDEX_NAMES,
    REFERENCE_NAMES,
    blocks,
    container,
    depth,
    plain_attributes,
    text_config,
    text_decoder,
)
from trimllm.blocks.layout import Layout, as_layout, compose, places, positions, whole, without
from trimllm.blocks.legality import refusal
from trimllm.errors import InputError

LAYOUT = "trimllm_layout"
"""Attribute of a model that was cut: what is left."""


def drop_layers(model: nn.Module, layers: Iterable[int]) -> nn.Module:
    """Remove whole decoder blocks in place.

    Args:
        model: a causal language model of transformers.
        layers: indices of the blocks to remove, 0-based, in the model as it is; negative ones count from the end.

    Returns:
        The same model.

    Raises:
        InputError: if a layer does not exist or is named twice, none would remain, the family cannot be cut there
            exactly, or the model has an adapter that is not merged.
    """
    adapters.check_merged(model)
    count = depth(model)
    return apply_layout(model, without(whole(count), positions(layers, count)))


def apply_layout(model: nn.Module, layout: Iterable[tuple[int | None, int | None]]) -> nn.Module:
    """Turn the model into `layout` in place, modules and config in one operation; on an error nothing has changed.

    Args:
        model: a causal language model of transformers.
        layout: per block that remains, which of the model's present blocks its attention half and its MLP half are of,
            as in `[(0, 0), (1, 2), (3, 3)]`; without bypassed halves.

    Returns:
        The same model.

    Raises:
        InputError: if the family cannot be cut so exactly; the message gives the layers and the reason. Also if the
            model has an adapter that is not merged.
    """
    adapters.check_merged(model)
    cut = as_layout(layout)
    if cut == whole(depth(model)):
        return model
    before = layout_of(model)
    reason = refusal(model, cut)
    if reason:
        raise InputError(reason)
    changes = Changes()
    try:
        _cut_weights(model, cut, changes)
        owner, name = container(model)
        kept = assemble(model, cut, changes)
        install(owner, name, kept, changes)
        describe(model, owner, cut, changes)
    except BaseException:
        changes.undo()
        raise
    _renumber(kept, cut)
    _fold_scales(model, cut, kept)
    _rename_device_map(model, owner, name, cut)
    model.__dict__[LAYOUT] = compose(before, cut)
    return model


def layout_of(model: nn.Module) -> Layout:
    """Which halves the blocks hold of the model as it was made or loaded, by what was cut since."""
    known: Layout | None = model.__dict__.get(LAYOUT)
    return known if known is not None and len(known) == depth(model) else whole(depth(model))


def assemble(model: nn.Module, layout: Layout, changes: Changes) -> list[nn.Module]:
    """The blocks of `layout`, made of present ones: the attention's block is the shell, the MLP half moves into it."""
    present = blocks(model)
    row = families.family(text_config(model))
    original = [dict(block._modules) for block in present]
    attributes = [{name: block.__dict__.get(name) for name in row.mlp_attributes} for block in present]
    result = []
    for attention, mlp in layout:
        at = mlp if attention is None else attention
        shell = present[at]  # type: ignore[index]
        if attention is not None and mlp is not None and attention != mlp:
            donor = original[mlp]
            changes.snapshot(shell._modules)
            for name in row.mlp:
                if name in donor:
                    shell._modules[name] = donor[name]
                else:
                    shell._modules.pop(name, None)
            for name, value in attributes[mlp].items():
                changes.put(shell.__dict__, name, value)
        result.append(shell)
    return result


def install(owner: nn.Module, name: str, kept: list[nn.Module], changes: Changes) -> None:
    """Put a new list of blocks in the place of the present one, which stays as it is."""
    modules = nn.ModuleList(kept)
    modules.training = owner.training
    changes.put(owner._modules, name, modules)


def _configs(model: nn.Module) -> list[Any]:
    """Every config object in the model that describes the text decoder: modules may hold copies."""
    main = text_config(model)
    found = {id(main): main}
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        if type(config) is type(main) and config.num_hidden_layers == main.num_hidden_layers:
            found[id(config)] = config
    return list(found.values())


def describe(model: nn.Module, owner: nn.Module, layout: Layout, changes: Changes) -> None:
    """Make every config of the text decoder, and the lists that its modules hold, say what `layout` needs."""
    main = text_config(model)
    for name, value in config_rules.per_layer_lists(plain_attributes(owner), main, layout).items():
        changes.put(owner.__dict__, name, value)
    for name, value in config_rules.config_updates(main, layout).items():
        old = main.__dict__.get(name)
        if isinstance(old, list | tuple | dict):
            for module in owner.modules():
                copy = module.__dict__.get(name)
                if type(copy) is type(old) and copy == old:
                    changes.put(module.__dict__, name, value)
    for config in _configs(model):
        changes.snapshot(config.__dict__)
        config_rules.update_config(config, layout)


def _renumber(kept: list[nn.Module], layout: Layout) -> None:
    moved = {old: place for place, old in enumerate(places(layout, "attention"))}
    for place, block in enumerate(kept):
        for module in block.modules():
            for name in INDEX_NAMES:
                if isinstance(module.__dict__.get(name), int):
                    module.__dict__[name] = place
            for name in REFERENCE_NAMES:
                if isinstance(module.__dict__.get(name), int):
                    module.__dict__[name] = moved[module.__dict__[name]]


def _rename_device_map(model: nn.Module, owner: nn.Module, name: str, layout: Layout) -> None:
    """Keep the record of which device holds which layer (accelerate's `hf_device_map`) true."""
    device_map = model.__dict__.get("hf_device_map")
    if not device_map:
        return
    path = next(path for path, module in model.named_modules() if module is owner)
    prefix = f"{path}.{name}." if path else f"{name}."
    layers = {key: value for key, value in device_map.items() if key.startswith(prefix)}
    renamed = {key: value for key, value in device_map.items() if key not in layers}
    for place, block in enumerate(layout):
        old = f"{prefix}{block.attention}"
        for key, value in layers.items():
            if key == old or key.startswith(old + "."):
                renamed[f"{prefix}{place}{key[len(old) :]}"] = value
    model.__dict__["hf_device_map"] = renamed


def _cut_weights(model: nn.Module, layout: Layout, changes: Changes) -> None:
    """Keep the kept layers' slices of weights with one slice per layer (an embedding's columns, a linear's rows)."""
    decoder = text_decoder(model)
    kept = places(layout, "attention")
    count = depth(model)
    for name in families.family(text_config(model)).per_layer_weights:
        module = decoder._modules.get(name)
        if module is None:
            continue
        dim = 1 if isinstance(module, nn.Embedding) else 0
        old: Any = module.weight
        width = old.shape[dim] // count
        columns = torch.cat([torch.arange(i * width, (i + 1) * width, device=old.device) for i in kept])
        cut = nn.Parameter(old.detach().index_select(dim, columns), requires_grad=old.requires_grad)
        changes.put(module._parameters, "weight", cut)
        changes.put(module.__dict__, "embedding_dim" if dim else "out_features", width * len(kept))


@torch.no_grad()
def _fold_scales(model: nn.Module, layout: Layout, kept: list[nn.Module]) -> None:
    """GPT-2 can divide attention scores by (layer + 1), anew at each load: put the ratio into the query projection."""
    config = text_config(model)
    rule = families.family(config).inverse_scale
    if rule is None or not getattr(config, rule[0], False):
        return
    for place, (block, shell) in enumerate(zip(layout, kept, strict=True)):
        attention = shell.get_submodule(rule[1])
        query = attention.get_submodule(rule[2])
        ratio = (place + 1) / (block.attention + 1)  # type: ignore[operator]
        width = attention.embed_dim
        query.weight[:, :width] *= ratio  # type: ignore[index, operator]
        query.bias[:width] *= ratio  # type: ignore[index, operator]
        attention.__dict__["scaling"] = attention.scaling / ratio  # type: ignore[operator]
