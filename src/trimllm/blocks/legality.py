"""Is a cut legal: what a model, or the config of its family, cannot express is refused with layer and reason."""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import torch
from torch import nn

from trimllm.blocks import config_rules, families
from trimllm.blocks.decoder import (
    INDEX_NAMES,
    REFERENCE_NAMES,
    blocks,
    container,
    depth,
    plain_attributes,
    repacking_refused,
    text_config,
)
from trimllm.blocks.layout import HALVES, Layout, places
from trimllm.errors import InputError, one_line


def check_layout(model: nn.Module, layout: Layout, *, bypass: bool) -> None:
    """Raise InputError for a layout that this model, whatever its config can say, cannot take."""
    config = text_config(model)
    count = depth(model)
    if not layout:
        raise InputError(f"cannot drop all {count} layers: leave at least one")
    for half in HALVES:
        order = [getattr(block, half) for block in layout if getattr(block, half) is not None]
        if any(not 0 <= i < count for i in order):
            raise InputError(f"the layout asks for {half} {max(order, key=abs)}: the model has layers 0 to {count - 1}")
        if any(a >= b for a, b in itertools.pairwise(order)):
            raise InputError(f"the layout takes {half} halves in the order {order}: keep the model's order, each once")
    broken = [block for block in layout if block.attention != block.mlp]
    reason = repacking_refused(model) if broken else None
    if reason:
        raise InputError(f"only whole layers of model type {config.model_type!r} can be dropped: {reason}")
    if any(None in block for block in broken):
        if not bypass:
            raise InputError("a layout with bypassed sub-layers is for trials: no stock checkpoint can hold it")
        if not families.bypassable(config):
            raise InputError(
                f"sub-layers of model type {config.model_type!r} cannot be bypassed: its residual is normalized"
            )
    reason = config_rules.illegal(config, layout)
    if reason:
        raise InputError(reason)


def refusal(model: Any, layout: Layout) -> str | None:
    """Why `apply_layout` would refuse, or None.

    Builds the model from its config before and after the cut, without weights, and compares block by block: the shape
    of every weight, and every number, flag and list that a module took from the config or from its index; then what the
    owner of the blocks holds. A rule that no config entry can express shows as a difference.
    """
    try:
        check_layout(model, layout, bypass=False)
    except InputError as error:
        return str(error)
    try:
        key = (type(model), model.config.to_json_string(use_diff=False), tuple(layout))
    except Exception:  # a config of custom code may hold what JSON cannot
        return _built_refusal(model, layout)
    if key not in _JUDGED:
        while len(_JUDGED) >= 1024:
            del _JUDGED[next(iter(_JUDGED))]
        _JUDGED[key] = _built_refusal(model, layout)
    return _JUDGED[key]


_JUDGED: dict[tuple[type, str, Layout], str | None] = {}
"""What `refusal` found for a class, a config and a layout: a run asks for the same cuts at every drop."""


def _built_refusal(model: Any, layout: Layout) -> str | None:
    config: Any = model.config
    kind = text_config(model).model_type
    try:
        wanted = copy.deepcopy(config)
        config_rules.update_config(wanted.get_text_config(decoder=True), layout)
        wanted = config.__class__.from_dict(wanted.to_diff_dict())  # as on disk
    except InputError as error:
        return str(error)
    except Exception as error:  # a config class may refuse values in any way it likes
        return f"the config of model type {kind!r} refuses this cut: {one_line(error)}"
    try:
        before = _built_facts(type(model), config)
    except Exception:  # custom code that cannot be built without data: the check at export remains
        return None
    try:
        after = _built_facts(type(model), wanted)
    except Exception as error:
        return f"a model of type {kind!r} cannot be built for this cut: {one_line(error)}"
    reason = _difference(families.family(text_config(model)), before.blocks, after.blocks, layout)
    return reason or _stale(text_config(model), before.owner, after.owner, layout)


Facts = dict[str, Any]


class Built(NamedTuple):
    """What a config builds."""

    blocks: tuple[Facts, ...]
    owner: Facts
    """lists and dicts of the module that owns the blocks"""


_BUILT: dict[tuple[type, str], Built] = {}


def _built_facts(model_class: Any, config: Any) -> Built:
    """Facts of the model that this config builds, without weights. Those of the few that were last asked for are kept:
    the uncut one is among them."""
    key = (model_class, config.to_json_string(use_diff=False))
    if key in _BUILT:
        found = _BUILT.pop(key)
    else:
        with torch.device("meta"):
            built = model_class(config.__class__.from_dict(config.to_diff_dict()))
        while len(_BUILT) >= 4:
            del _BUILT[next(iter(_BUILT))]
        text = text_config(built)
        found = Built(tuple(_facts(block, text) for block in blocks(built)), _held(container(built)[0], text))
    _BUILT[key] = found
    return found


def _difference(row: families.Family, old: tuple[Facts, ...], new: tuple[Facts, ...], layout: Layout) -> str | None:
    if len(new) != len(layout):
        return f"the config would build {len(new)} layers instead of {len(layout)}"
    mlp = tuple(f"{name}." for name in row.mlp) + tuple(f"@{name}" for name in row.mlp_attributes)
    for place, (block, found) in enumerate(zip(layout, new, strict=True)):
        expected = old[block.attention]  # type: ignore[index]
        if block.attention != block.mlp:
            expected = {key: value for key, value in expected.items() if not key.startswith(mlp)}
            expected |= {key: value for key, value in old[block.mlp].items() if key.startswith(mlp)}  # type: ignore[index]
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key) and not key.endswith(_exempt(row)):
                source = f"{block.attention}" if block.attention == block.mlp else f"{block.attention}/{block.mlp}"
                return (
                    f"layer {source} cannot become layer {place}: its {key.replace('@', '')} is "
                    f"{expected.get(key)}, and the config can only give {found.get(key)} there"
                )
    return None


def _stale(config: Any, old: Facts, new: Facts, layout: Layout) -> str | None:
    """Why what the owner of the blocks holds would not be what it holds after a load, or None."""
    expected = old | config_rules.per_layer_lists(old, config, layout)
    for name in sorted(expected.keys() | new.keys()):
        if expected.get(name) != new.get(name):
            return (
                f"model type {config.model_type!r} cannot be cut to the layers {places(layout, 'attention')}: "
                f"no rule says what becomes of {name} in its decoder"
            )
    return None


def run_length(model: nn.Module, unit: str, *, keep_pattern: bool) -> int:
    """How many adjacent blocks go at a time: 1, or with `keep_pattern` a period of the pattern of layer types.

    Raises:
        InputError: if there is no pattern to keep, or `unit` would break it.
    """
    if not keep_pattern:
        return 1
    found = config_rules.period(text_config(model))
    if found is None:
        raise InputError("--keep-pattern: the types of the layers follow no pattern that repeats: leave it out")
    if found > 1 and unit != "block":
        raise InputError(f"--keep-pattern drops {found} blocks at a time: leave out --unit {unit}")
    return found


def _exempt(row: families.Family) -> tuple[str, ...]:
    """Facts that other rules take care of: scales folded into weights, and who keeps keys and values for others."""
    return (
        "@store_full_length_kv",
        *(f"@{name}" for name in REFERENCE_NAMES),
        *(("@scaling",) if row.inverse_scale else ()),
    )


def _copied(name: str, value: Any, config: Any) -> bool:
    """Whether a module's attribute is an entry of the config as a whole: surgery keeps the two alike."""
    return isinstance(value, list | tuple | dict) and value == config.__dict__.get(name)


def _held(owner: nn.Module, config: Any) -> Facts:
    """The lists and dicts of the module that owns the blocks, but for those that the config or transformers gives."""
    return {
        name: value
        for name, value in plain_attributes(owner).items()
        if isinstance(value, list | tuple | dict)
        and name != "all_tied_weights_keys"
        and not _copied(name, value, config)
    }


def _facts(block: nn.Module, config: Any) -> Facts:
    """What a block took from config and index: shapes of its weights, its modules' types, numbers, flags and lists."""
    facts: Facts = {}
    for name, parameter in [*block.named_parameters(), *block.named_buffers()]:
        facts[name] = tuple(parameter.shape)
    for path, module in block.named_modules():
        prefix = f"{path}." if path else ""
        facts[f"{prefix}@type"] = type(module).__name__
        for name, value in plain_attributes(module).items():
            if name not in (*INDEX_NAMES, "training") and not _copied(name, value, config):
                facts[f"{prefix}@{name}"] = value
    return facts
