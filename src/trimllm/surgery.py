"""Take decoder blocks out of a model: for good (`apply_layout`, `drop_layers`) or on trial (`trial`).

Modules and config change in one operation, since masks are chosen from the config by place while windows and scales are
baked into the modules by their old index. The order is: explicit config -> is it legal -> list of blocks -> `layer_idx`
-> weights with one slice per layer -> scales baked from the index -> config, `num_hidden_layers` last.

    from trimllm.surgery import drop_layers
    drop_layers(model, [3, 7, 8])
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimllm import families
from trimllm.errors import InputError
from trimllm.layout import Block, Layout, whole, without

INDEX_NAMES = ("layer_idx", "layer_id", "layer_number")
HALVES = ("attention", "mlp")


# ---- where things are ------------------------------------------------------------------------------------------------


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder (for a vision-language model, of its text tower)."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def _container(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that owns the list of decoder blocks, and the list's name in it."""
    config = text_config(model)
    row = families.family(config)
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
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
    owner, name = _container(model)
    return owner._modules[name]  # type: ignore[return-value]


def depth(model: nn.Module) -> int:
    """Number of decoder blocks."""
    return len(blocks(model))


def _half_names(model: nn.Module, half: str, block: nn.Module) -> list[str]:
    row = families.family(text_config(model))
    names = row.attention if half == "attention" else row.mlp
    return [name for name in names if block._modules.get(name) is not None]


def _repackable(model: nn.Module) -> str | None:
    """Why halves of blocks cannot be re-packed, or None where they can."""
    config = text_config(model)
    reason = families.whole_only(config)
    if reason:
        return reason
    for i, block in enumerate(blocks(model)):
        named = {name for half in HALVES for name in _half_names(model, half, block)}
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
    attention, mlp = ([block._modules[name] for name in _half_names(model, half, block)] for half in HALVES)
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
    reason = _repackable(model)
    if reason:
        raise InputError(f"the {half} half of layer {i} cannot be told apart: {reason}")
    return [parameter for name in _half_names(model, half, block) for parameter in block._modules[name].parameters()]  # type: ignore[union-attr]


# ---- changes that can be taken back ----------------------------------------------------------------------------------


class _Changes:
    """A journal of what was overwritten, so that a trial, or a cut that failed half-way, leaves no trace."""

    def __init__(self) -> None:
        self._journal: list[tuple[dict[str, Any], dict[str, Any] | None, str, Any]] = []
        self._handles: list[Any] = []

    def put(self, mapping: dict[str, Any], key: str, value: Any) -> None:
        self._journal.append((mapping, None, key, mapping.get(key, _MISSING)))
        mapping[key] = value

    def snapshot(self, mapping: dict[str, Any]) -> None:
        """Remember all of `mapping`; order included."""
        self._journal.append((mapping, dict(mapping), "", None))

    def hook(self, handle: Any) -> None:
        self._handles.append(handle)

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        for mapping, everything, key, old in reversed(self._journal):
            if everything is not None:
                mapping.clear()
                mapping.update(everything)
            elif old is _MISSING:
                mapping.pop(key, None)
            else:
                mapping[key] = old
        self._journal, self._handles = [], []


_MISSING = object()


def _configs(model: nn.Module) -> list[Any]:
    """Every config object in the model that describes the text decoder: modules may hold copies."""
    main = text_config(model)
    found = {id(main): main}
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        if type(config) is type(main) and config.num_hidden_layers == main.num_hidden_layers:
            found[id(config)] = config
    return list(found.values())


def _describe(model: nn.Module, layout: Layout, changes: _Changes) -> None:
    """Make every config of the text decoder say what `layout` needs."""
    for config in _configs(model):
        changes.snapshot(config.__dict__)
        families.update_config(config, layout)


def _assemble(model: nn.Module, layout: Layout, changes: _Changes) -> list[nn.Module]:
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
        for half, kept in (("attention", attention), ("mlp", mlp)):
            if kept is None:
                changes.snapshot(shell._modules)
                for name in _half_names(model, half, shell):
                    shell._modules[name] = _Bypassed(shell.get_submodule(name), name in row.adds_residual)
        result.append(shell)
    return result


def _check_layout(model: nn.Module, layout: Layout, *, bypass: bool) -> None:
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
    reason = _repackable(model) if broken else None
    if reason:
        raise InputError(f"only whole layers of model type {config.model_type!r} can be dropped: {reason}")
    if any(None in block for block in broken):
        if not bypass:
            raise InputError("a layout with bypassed sub-layers is for trials: no stock checkpoint can hold it")
        if not families.bypassable(config):
            raise InputError(
                f"sub-layers of model type {config.model_type!r} cannot be bypassed: its residual is normalized"
            )
    reason = families.illegal(config, layout)
    if reason:
        raise InputError(reason)


# ---- for good --------------------------------------------------------------------------------------------------------


def drop_layers(model: nn.Module, layers: Iterable[int]) -> nn.Module:
    """Remove whole decoder blocks in place.

    Args:
        model: a causal language model of transformers.
        layers: indices of the blocks to remove, 0-based, in the model as it is.

    Returns:
        The same model.

    Raises:
        InputError: if a layer does not exist, none would remain, or the family cannot be cut there exactly.
    """
    return apply_layout(model, without(whole(depth(model)), layers))


def apply_layout(model: nn.Module, layout: Layout) -> nn.Module:
    """Turn the model into `layout` in place, modules and config in one operation; on an error nothing has changed.

    Args:
        model: a causal language model of transformers.
        layout: in terms of the model's present blocks; without bypassed halves.

    Returns:
        The same model.

    Raises:
        InputError: if the family cannot be cut so exactly; the message gives the layers and the reason.
    """
    if layout == whole(depth(model)):
        return model
    reason = refusal(model, layout)
    if reason:
        raise InputError(reason)
    changes = _Changes()
    try:
        _cut_weights(model, layout, changes)
        owner, name = _container(model)
        kept = _assemble(model, layout, changes)
        container = nn.ModuleList(kept)
        container.training = owner.training
        changes.put(owner._modules, name, container)
        _describe(model, layout, changes)
    except BaseException:
        changes.undo()
        raise
    _renumber(kept)
    _fold_scales(model, layout, kept)
    _rename_device_map(model, owner, name, layout)
    return model


def _renumber(kept: list[nn.Module]) -> None:
    for place, block in enumerate(kept):
        for module in block.modules():
            for name in INDEX_NAMES:
                if isinstance(module.__dict__.get(name), int):
                    module.__dict__[name] = place


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


def _cut_weights(model: nn.Module, layout: Layout, changes: _Changes) -> None:
    """Keep the kept layers' slices of weights with one slice per layer (an embedding's columns, a linear's rows)."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    kept = families.places(layout, "attention")
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


# ---- is it legal -----------------------------------------------------------------------------------------------------


def refusal(model: nn.Module, layout: Layout) -> str | None:
    """Why `apply_layout` would refuse, or None.

    Builds the model from its config before and after the cut, without weights, and compares block by block: the shape
    of every weight, and every number and flag that a module took from the config or from its index. A rule that no
    config entry can express shows as a difference.
    """
    try:
        _check_layout(model, layout, bypass=False)
    except InputError as error:
        return str(error)
    old_config = model.config.__class__.from_dict(model.config.to_dict())  # type: ignore[union-attr, operator]
    new_config = copy.deepcopy(old_config)
    try:
        families.update_config(new_config.get_text_config(decoder=True), layout)
        new_config = new_config.__class__.from_dict(new_config.to_dict())
    except InputError as error:
        return str(error)
    except Exception as error:  # a config class may refuse values in any way it likes
        return f"the config of model type {old_config.model_type!r} refuses this cut: {_line(error)}"
    try:
        before = _skeleton(model, old_config)
    except Exception:  # custom code that cannot be built without data: the check at export remains
        return None
    try:
        after = _skeleton(model, new_config)
        return _difference(before, after, layout)
    except Exception as error:
        return f"a model of type {old_config.model_type!r} cannot be built for this cut: {_line(error)}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _skeleton(model: nn.Module, config: Any) -> nn.Module:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _difference(before: nn.Module, after: nn.Module, layout: Layout) -> str | None:
    old, new = blocks(before), blocks(after)
    row = families.family(text_config(before))
    if len(new) != len(layout):
        return f"the config would build {len(new)} layers instead of {len(layout)}"
    for place, (block, built) in enumerate(zip(layout, new, strict=True)):
        shell, donor = old[block.attention], old[block.mlp]  # type: ignore[index]
        expected = _facts(shell)
        if block.attention != block.mlp:
            mlp = tuple(f"{name}." for name in row.mlp) + tuple(f"@{name}" for name in row.mlp_attributes)
            expected = {key: value for key, value in expected.items() if not key.startswith(mlp)}
            expected |= {key: value for key, value in _facts(donor).items() if key.startswith(mlp)}
        found = _facts(built)
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key) and not key.endswith(_exempt(row)):
                source = f"{block.attention}" if block.attention == block.mlp else f"{block.attention}/{block.mlp}"
                return (
                    f"layer {source} cannot become layer {place}: its {key.replace('@', '')} is "
                    f"{expected.get(key)}, and the config can only give {found.get(key)} there"
                )
    return None


def _exempt(row: families.Family) -> tuple[str, ...]:
    """Facts that other rules take care of: scales folded into weights, and who keeps keys and values for others."""
    return ("@store_full_length_kv", *(("@scaling",) if row.inverse_scale else ()))


def _facts(block: nn.Module) -> dict[str, Any]:
    """What a block took from config and index: shapes of its weights, and its modules' types, numbers and flags."""
    facts: dict[str, Any] = {}
    for name, parameter in [*block.named_parameters(), *block.named_buffers()]:
        facts[name] = tuple(parameter.shape)
    for path, module in block.named_modules():
        prefix = f"{path}." if path else ""
        facts[f"{prefix}@type"] = type(module).__name__
        for name, value in module.__dict__.items():
            if not name.startswith("_") and name not in (*INDEX_NAMES, "training") and isinstance(value, _PLAIN):
                facts[f"{prefix}@{name}"] = value
    return facts


_PLAIN = (bool, int, float, str, type(None))


# ---- on trial --------------------------------------------------------------------------------------------------------


class Injection(nn.Module):
    """Stands for the first blocks of a trial: ignores its input and returns `hidden`."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None
        """(batch, seq, hidden): the residual stream after the blocks that are not computed."""
        self._returns_tuple = returns_tuple

    def stand_for(self, block: nn.Module) -> None:
        """Take over the plain attributes that a model may read from its blocks."""
        for name, value in block.__dict__.items():
            if not name.startswith("_") and name != "hidden" and isinstance(value, _PLAIN):
                self.__dict__[name] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.hidden is None:
            raise ValueError("set injection.hidden before the forward pass")
        return (self.hidden, None) if self._returns_tuple else self.hidden


_STRUCTURE: weakref.WeakKeyDictionary[nn.Module, tuple[int, int]] = weakref.WeakKeyDictionary()
"""What a module returns: the length of its tuple (0: a tensor) and the last dimension."""


class _Bypassed(nn.Module):
    """Stands for a submodule of a half that is bypassed: zeros in the structure the submodule returns.

    The structure is learnt from the first call, which does run the submodule. A submodule that adds the residual itself
    returns that residual.
    """

    def __init__(self, module: nn.Module, adds_residual: bool) -> None:
        super().__init__()
        self._original = (module,)  # in a tuple: not a submodule
        self._adds_residual = adds_residual

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self._original[0]
        if module not in _STRUCTURE:
            output = module(*args, **kwargs)
            first = output[0] if isinstance(output, tuple) else output
            _STRUCTURE[module] = (len(output) if isinstance(output, tuple) else 0, first.shape[-1])
        length, width = _STRUCTURE[module]
        stream = args[0] if args else kwargs["hidden_states"]
        zeros = args[1] if self._adds_residual else stream.new_zeros(*stream.shape[:-1], width)
        return (zeros, *[None] * (length - 1)) if length else zeros


@contextmanager
def trial(model: nn.Module, layout: Layout, resume_from: int = 0) -> Iterator[Injection]:
    """Within the context, `model(..., use_cache=False)` computes `layout`; on exit all is as it was, bit for bit.

    Nothing is copied: a trial costs its forward pass.

    Args:
        model: a causal language model of transformers.
        layout: in terms of the model's present blocks; halves may be None (bypassed).
        resume_from: do not compute this many leading blocks of `layout`: one module that returns `injection.hidden`
            stands for them.

    Yields:
        The injection. With `resume_from > 0` set its `.hidden` (batch, seq, hidden) before the forward pass.

    Raises:
        ValueError: if this family's forward pass cannot be resumed: use a plain trial.
        InputError: if the layout cannot be tried on this family.
    """
    _check_layout(model, tuple(block for block in layout if block != (None, None)), bypass=True)
    row = families.family(text_config(model))
    injection = Injection(row.block_returns_tuple)
    if resume_from and not row.resumable:
        raise ValueError(f"the forward pass of model type {text_config(model).model_type!r} cannot be resumed")
    if not 0 <= resume_from <= len(layout):
        raise ValueError(f"resume_from is {resume_from}: the layout has {len(layout)} blocks")
    rest = tuple(block for block in layout[resume_from:] if block != (None, None))
    changes = _Changes()
    try:
        owner, name = _container(model)
        effective = rest
        computed = _assemble(model, rest, changes)
        if resume_from:
            # The config describes every block by its place: the injected one passes as any block that is not in use.
            place = next(i for i in (*layout[resume_from - 1], 0) if i is not None)
            effective = (Block(place, place), *rest)
            injection.stand_for(blocks(model)[place])
            computed = [injection, *computed]
        _select_slices(model, effective, changes)
        container = nn.ModuleList(computed)
        container.training = owner.training
        changes.put(owner._modules, name, container)
        _describe(model, effective, changes)
        yield injection
    finally:
        changes.undo()


def _select_slices(model: nn.Module, layout: Layout, changes: _Changes) -> None:
    """On trial, keep the kept layers' slices of what per-layer weights give, instead of cutting the weights."""
    row = families.family(text_config(model))
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    kept, count = families.places(layout, "attention"), depth(model)

    def select(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.unflatten(-1, (count, -1))[..., kept, :].flatten(-2)

    for name in row.per_layer_weights:
        if decoder._modules.get(name) is not None:
            changes.hook(decoder._modules[name].register_forward_hook(select))  # type: ignore[union-attr]
