"""What happens to a model's config when layers go, and which layers it cannot do without.

Names of config fields mean the same in every family, so the field tables (`PER_LAYER`, `INDICES`, `LEADING`,
`TRAILING`, ...) and the rules that count by index (`RULES`) are shared: a new field is a new entry.
`legality.refusal` compares what the new config builds with what the layout needs, in every block and in the lists of
the module that owns them. What it cannot see is a field in none of these tables that the forward pass reads itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from trimllm.blocks.families import family
from trimllm.blocks.layout import Layout, places
from trimllm.errors import InputError

PER_LAYER: dict[str, str] = {
    "layer_types": "attention",
    "no_rope_layers": "attention",
    "attention_layers": "attention",
    "layer_rope_theta": "attention",
    "indexer_types": "attention",
    "num_attention_heads_per_layer": "attention",
    "layers_block_type": "attention",
    "mlp_layer_types": "mlp",
    "intermediate_size": "mlp",
    "activation_sparsity_pattern": "mlp",
    "num_experts": "mlp",
    "moe_topk": "mlp",
    "num_shared_expert": "mlp",
    "moe_intermediate_size": "mlp",
}
"""Lists with one entry per layer (where they are lists): the kept entries remain."""

INDICES: dict[str, str] = {
    "mlp_only_layers": "mlp",
    "moe_layers": "mlp",
    "full_attn_idxs": "attention",
    "cross_attention_layers": "attention",
    "attn_layer_indices": "attention",
    "rope_scaling_layers": "attention",
    "hybrid_layer_ids": "attention",
}
"""Lists of layer indices: each becomes the new index of that layer."""

SOURCES: dict[str, str] = {"kv_source_layers": "attention"}
"""Lists with the number of the layer, for each, whose keys and values it uses: the kept entries, as new indices."""

LEADING: dict[str, str] = {"first_k_dense_replace": "mlp", "num_dense_layers": "mlp"}
"""How many of the first layers are special: those that remain are counted."""

COUNTS: tuple[str, ...] = ("num_blocks",)
"""Other names for the number of layers."""

TRAILING: dict[str, str] = {"num_kv_shared_layers": "attention"}
"""How many of the last layers are special: those that remain are counted."""

ZEROED: tuple[str, ...] = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Heads that predict further tokens follow the last layer, and are not part of the causal LM that is cut."""


BY_TYPE: tuple[str, ...] = ("rope_parameters",)
"""Entries that may be keyed by layer type: those of types that are gone go too (some releases refuse leftovers)."""


@dataclass(frozen=True)
class Rule:
    """An implicit rule that counts by index."""

    half: str
    read: Callable[[Any], list[Any]]
    """Config -> what each layer is."""
    write: Callable[[list[Any]], dict[str, Any]]
    """What each layer is to be -> entries of the config, in the form that the family has for it."""


def _dense(config: Any) -> list[bool]:
    """`decoder_sparse_step` is a period; layers of `mlp_only_layers` are dense in any case."""
    step, dense = config.decoder_sparse_step, set(config.mlp_only_layers or ())
    return [i in dense or (i + 1) % step != 0 for i in range(config.num_hidden_layers)]


def _write_dense(dense: list[bool]) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": [p for p, is_dense in enumerate(dense) if is_dense]}


def _write_attention_types(kinds: list[str]) -> dict[str, Any]:
    """`attention_types` is the run-length form of `attention_layers`."""
    return {"attention_layers": kinds, "attention_types": [[[kind], 1] for kind in kinds]}


def _cycle(config: Any) -> list[str]:
    cycle = config.block_types
    return [cycle[i % len(cycle)] for i in range(config.num_hidden_layers)]


def _sparse(config: Any) -> list[bool]:
    """Layers from `moe_layer_start_index` to `moe_layer_end_index`, every `moe_layer_interval`-th, are sparse."""
    start, end, step = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
    end = config.num_hidden_layers - 1 if end == -1 else end
    return [(i + 1) % step == 0 and start <= i <= end for i in range(config.num_hidden_layers)]


def _write_sparse(sparse: list[bool]) -> dict[str, Any]:
    if not any(sparse):
        return {"moe_layer_start_index": len(sparse), "moe_layer_end_index": len(sparse), "moe_layer_interval": 1}
    first, last = sparse.index(True), len(sparse) - 1 - sparse[::-1].index(True)
    for interval in range(1, len(sparse) + 1):
        if sparse == [(p + 1) % interval == 0 and first <= p <= last for p in range(len(sparse))]:
            return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": interval}
    raise InputError(_irregular("sparse MLP layers", sparse))


def _period(kind: str, half: str) -> Rule:
    """`{kind}_layer_period` and `{kind}_layer_offset`: layer i is special where i % period == offset."""
    names = (f"{kind}_layer_period", f"{kind}_layer_offset")

    def read(config: Any) -> list[bool]:
        period, offset = (getattr(config, name) for name in names)
        return [i % period == offset for i in range(config.num_hidden_layers)]

    def write(special: list[bool]) -> dict[str, Any]:
        depth = len(special)
        for candidate in range(1, depth + 2):
            for start in range(candidate):
                if special == [p % candidate == start for p in range(depth)]:
                    return dict(zip(names, (candidate, start), strict=True))
        raise InputError(_irregular(f"layers of kind {kind!r}", special))

    return Rule(half, read, write)


def _irregular(what: str, pattern: Sequence[bool]) -> str:
    chosen = [p for p, special in enumerate(pattern) if special]
    return (
        f"this model's config can only say that {what} recur with a period, and after the cut they would be "
        f"{chosen} of {len(pattern)}: drop whole periods instead"
    )


RULES: dict[str, Rule] = {
    "decoder_sparse_step": Rule("mlp", _dense, _write_dense),
    "attention_types": Rule("attention", lambda config: config.attention_layers, _write_attention_types),
    "block_types": Rule("attention", _cycle, lambda kinds: {"block_types": kinds}),
    "moe_layer_interval": Rule("mlp", _sparse, _write_sparse),
    "attn_layer_period": _period("attn", "attention"),
    "expert_layer_period": _period("expert", "mlp"),
}
"""Implicit rules that count by index, by the field that gives them."""

WRITTEN_OUT: dict[str, str] = {"attn_layer_period": "layers_block_type"}
"""Rules that do not apply where the config holds this list."""


def rules(config: Any) -> list[Rule]:
    """The implicit rules that this config follows."""
    values = config.__dict__
    return [
        rule
        for name, rule in RULES.items()
        if values.get(name) is not None and not values.get(WRITTEN_OUT.get(name, ""))
    ]


def config_updates(config: Any, layout: Layout) -> dict[str, Any]:
    """New values of the per-layer entries of a text config, `num_hidden_layers` last.

    Args:
        config: text config of the model before the cut.
        layout: in terms of the model's present blocks.

    Raises:
        InputError: if the config has no way to say what the layout needs.
    """
    values, depth = config.__dict__, config.num_hidden_layers
    updates: dict[str, Any] = {}
    for name, half in PER_LAYER.items():
        value = values.get(name)
        if isinstance(value, list | tuple):
            if len(value) < depth:
                raise InputError(f"config.{name} has {len(value)} entries for {depth} layers")
            updates[name] = type(value)(value[i] for i in places(layout, half))
    for name, half in INDICES.items():
        if isinstance(values.get(name), list | tuple):
            chosen = set(values[name])
            updates[name] = [p for p, i in enumerate(places(layout, half)) if i in chosen]
    for name, half in SOURCES.items():
        if isinstance(values.get(name), list | tuple):
            moved = {i: p for p, i in enumerate(places(layout, half))}
            updates[name] = [moved[values[name][i]] for i in places(layout, half)]
    for name, half in LEADING.items():
        if isinstance(values.get(name), int):
            updates[name] = sum(i < values[name] for i in places(layout, half))
    for name, half in TRAILING.items():
        if isinstance(values.get(name), int):
            updates[name] = sum(i >= depth - values[name] for i in places(layout, half))
    for name in COUNTS:
        if values.get(name) == depth:
            updates[name] = len(layout)
    for name in BY_TYPE:
        value, kinds = values.get(name), values.get("layer_types")
        if value and kinds and set(value) <= set(kinds):
            updates[name] = {kind: value[kind] for kind in value if kind in updates["layer_types"]}
    for name in ZEROED:
        if values.get(name):
            updates[name] = 0
    for rule in rules(config):
        was = rule.read(config)
        updates |= rule.write([was[i] for i in places(layout, rule.half)])
    updates["num_hidden_layers"] = len(layout)
    return updates


def per_layer_lists(attributes: dict[str, Any], config: Any, layout: Layout) -> dict[str, Any]:
    """New values of those attributes of the blocks' owner that are lists with one entry per layer, not of `config`."""
    return {
        name: type(value)(value[i] for i in places(layout, "attention"))
        for name, value in attributes.items()
        if isinstance(value, list | tuple)
        and len(value) == config.num_hidden_layers
        and value != config.__dict__.get(name)
    }


def period(config: Any) -> int | None:
    """After how many layers the pattern of layer types (sliding windows, experts, positions) begins again.

    1 where all layers are alike, None where they follow no pattern. A run of so many adjacent layers can go from any
    place, and the pattern is what it was.
    """
    depth, values = config.num_hidden_layers, config.to_dict()
    lists = [value for name in PER_LAYER if isinstance(value := values.get(name), list) and len(value) == depth]
    named = [value for name in INDICES if isinstance(value := values.get(name), list)]
    lists += [rule.read(config) for rule in rules(config)]
    first = [value for name in LEADING if isinstance(value := values.get(name), int)]
    kinds = [
        (*(str(entry[i]) for entry in lists), *(i in entry for entry in named), *(i < count for count in first))
        for i in range(depth)
    ]
    periods = [p for p in range(1, depth // 2 + 1) if all(kinds[i] == kinds[i % p] for i in range(depth))]
    return periods[0] if periods else None


def update_config(config: Any, layout: Layout) -> None:
    """Write `config_updates` into `config`, with the overrides of single layers (`per_layer_config`) moved along."""
    updates = config_updates(config, layout)
    spec = config.__dict__.get("_heterogeneity_spec")
    for name, value in updates.items():
        setattr(config, name, value)
    if spec is not None:
        moved = {p: spec.per_layer_overrides.get(i) for p, i in enumerate(places(layout, "attention"))}
        config.__dict__.pop("_heterogeneity_spec")
        config.per_layer_config = {p: copy.deepcopy(entry) for p, entry in moved.items() if entry}


def illegal(config: Any, layout: Layout) -> str | None:
    """Why no model of this family can have the layers that `layout` leaves, or None."""
    row = family(config)
    if row.reason:
        return f"model type {config.model_type!r} cannot be cut: {row.reason}"
    if row.since and _release(have := metadata.version("transformers")) < _release(row.since):  # slow to find out
        return f"model type {config.model_type!r} needs transformers {row.since} or newer: {have} computes it wrongly"
    first = places(layout, "attention")[0]
    if first in (config.__dict__.get("cross_attention_layers") or ()):
        return f"layer {first} attends to images, and the cache counts tokens in the first layer: keep one before it"
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        return _lost_source(config, layout)
    kept = [kinds[i] for i in places(layout, "attention")]
    if row.last_layer and kept[-1] != row.last_layer:
        return f"the last layer of model type {config.model_type!r} must be of type {row.last_layer}: keep one last"
    if any(kind in ATTENTION_TYPES for kind in kinds) and not any(kind in ATTENTION_TYPES for kind in kept):
        attention = [i for i, kind in enumerate(kinds) if kind in ATTENTION_TYPES]
        return f"no attention layer would remain, and the cache needs one: keep one of the layers {attention}"
    return _lost_producer(config, layout) or _lost_source(config, layout)


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version: major, minor, patch."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


ATTENTION_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid")
"""Layer types with a key-value cache."""


def _lost_producer(config: Any, layout: Layout) -> str | None:
    """Why the layout breaks cross-layer KV sharing, or None.

    The last `num_kv_shared_layers` layers reuse keys and values of the last layer of their type before them.
    """
    shared = config.__dict__.get("num_kv_shared_layers") or 0
    kept = places(layout, "attention")
    first_shared = config.num_hidden_layers - shared
    for kind in sorted({config.layer_types[i] for i in kept if i >= first_shared}):
        producers = [i for i in range(first_shared) if config.layer_types[i] == kind]
        if producers and producers[-1] not in kept:
            users = [i for i in kept if i >= first_shared and config.layer_types[i] == kind]
            return f"layer {producers[-1]} computes the keys and values that layers {users} reuse: keep it"
    return None


def _lost_source(config: Any, layout: Layout) -> str | None:
    """Why a layer would lack what it takes from one layer before it, named by the config, or None."""
    kept, values = places(layout, "attention"), config.__dict__
    indexers = values.get("indexer_types") or ()
    full = [max((j for j in range(i + 1) if indexers[j] != "shared"), default=i) for i in range(len(indexers))]
    taken = {"choice of tokens": full, "keys and values": values.get("kv_source_layers") or ()}
    for what, sources in taken.items():
        for i in kept:
            if sources and (source := sources[i]) not in kept:
                users = [user for user in kept if sources[user] == source]
                return f"layer {source} computes the {what} that layers {users} reuse: keep it"
    return None
