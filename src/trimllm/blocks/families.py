"""What is known about model families, in one place and as data: a new family is a new row.

Two tables. `FAMILIES` says what a decoder block of a `model_type` is made of. The field tables (`PER_LAYER`, `INDICES`,
`LEADING`, `TRAILING`, ...) say what happens to a config entry when layers go; names of config fields mean the same in
every family, so those tables are shared. A family without a row is cut by the general rules (whole blocks only), and
`legality.refusal` compares what the new config builds with what the layout needs, in every block and in the lists of
the module that owns them. What it cannot see is a field in none of these tables that the forward pass reads itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from trimllm.blocks.layout import Layout, places
from trimllm.errors import InputError


@dataclass(frozen=True)
class Family:
    """One row: the decoder blocks of a `model_type`."""

    attention: tuple[str, ...] = ("input_layernorm", "self_attn")
    """The attention half's submodules in order of execution; names that a block lacks are skipped."""
    mlp: tuple[str, ...] = ("post_attention_layernorm", "mlp")
    """The MLP half's submodules in order of execution. The first is fed the residual stream between the halves."""
    layers: str | None = "layers"
    """Where the blocks are, from the model's text decoder; None: find the list of `num_hidden_layers` modules."""
    whole: str | None = None
    """Why only whole blocks can be dropped; None where the two halves run one after the other."""
    normed_residual: bool = False
    """A half is not `x + f(x)`: it normalizes or scales the stream. Halves re-pack, but none can be bypassed."""
    block_returns_tuple: bool = False
    """The block returns `(hidden, weights)` instead of the hidden state."""
    adds_residual: tuple[str, ...] = ()
    """Submodules that take the residual as second argument and return the sum."""
    mlp_attributes: tuple[str, ...] = ()
    """Attributes of the block itself that belong to its MLP half."""
    resumable: bool = True
    """A forward may start from an injected hidden state: blocks need nothing from the layers before but that."""
    branching: bool = True
    """4-D masks with custom position ids are exact: attention sees masks and position ids, not indices in the row."""
    per_layer_weights: tuple[str, ...] = ()
    """Decoder submodules whose output, and weight, is one slice per layer."""
    inverse_scale: tuple[str, str, str] | None = None
    """(config flag, attention module, its query projection) where scores are divided by the layer number."""
    last_layer: str | None = None
    """The layer type that the config forces on the last layer."""
    cache_argument: str = "past_key_values"
    """The name under which the forward pass takes a cache."""
    own_cache: bool = False
    """The cache is of a kind that the forward pass makes itself, in some releases of transformers."""
    since: str | None = None
    """The first release of transformers whose forward pass is right; None: all that we support."""
    reason: str | None = None
    """Why this family cannot be cut at all."""
    variants: tuple[tuple[str, bool, dict[str, Any]], ...] = ()
    """(config flag, its value, the entries of this row that are different then)."""


PARALLEL = "attention and MLP run in parallel on the same input"
PER_LAYER_INPUT = "its blocks also carry a per-layer input that belongs to neither half"

LLAMA = Family()
GEMMA2 = Family(
    attention=("input_layernorm", "self_attn", "post_attention_layernorm"),
    mlp=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
)
OLMO2 = Family(attention=("self_attn", "post_attention_layernorm"), mlp=("mlp", "post_feedforward_layernorm"))
GPT2 = Family(attention=("ln_1", "attn"), mlp=("ln_2", "mlp"), layers="h")
GPTJ = Family(attention=("ln_1", "attn"), mlp=("mlp",), layers="h", whole=PARALLEL, block_returns_tuple=True)
PHI = Family(mlp=("mlp",), whole=PARALLEL)
OPT = Family(attention=("self_attn_layer_norm", "self_attn"), mlp=("final_layer_norm", "fc1", "activation_fn", "fc2"))
OPT_POST_NORM = {
    "attention": ("self_attn", "self_attn_layer_norm"),
    "mlp": ("fc1", "activation_fn", "fc2", "final_layer_norm"),
    "normed_residual": True,
}
GRANITE_MOE = replace(LLAMA, mlp=("post_attention_layernorm", "block_sparse_moe"))
LFM2 = Family(attention=("operator_norm", "conv", "self_attn"), mlp=("ffn_norm", "feed_forward"), branching=False)
LINEAR = replace(LLAMA, attention=("input_layernorm", "linear_attn", "self_attn"), branching=False)
JAMBA = Family(
    attention=("input_layernorm", "mamba", "self_attn"), mlp=("pre_ff_layernorm", "feed_forward"), branching=False
)
GEMMA3N = Family(
    whole=PER_LAYER_INPUT,
    resumable=False,
    per_layer_weights=("embed_tokens_per_layer", "per_layer_model_projection"),
    since="5.6.0",
)
GENERAL = Family(layers=None, whole="its blocks have no row in the table of families", resumable=False, branching=False)
RECURRENT = replace(GENERAL, whole="its blocks do not split into attention and MLP")
MAMBA = replace(RECURRENT, cache_argument="cache_params")


def _rows(model_types: str, row: Family) -> dict[str, Family]:
    return dict.fromkeys(model_types.split(), row)


FAMILIES: dict[str, Family] = {
    **_rows(
        "arcee bitnet cwm deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5 ernie4_5_moe exaone_moe gemma glm glm4_moe "
        "gpt_oss granite granite_swa helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 jais2 laguna llama mimo_v2_flash "
        "minimax_m2 ministral ministral3 mistral mixtral nanochat nemotron olmo olmoe persimmon phimoe qwen2 "
        "qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_moe qwen3_vl_moe_text qwen3_vl_text seed_oss smollm3 "
        "solar_open starcoder2",
        LLAMA,
    ),
    **_rows("qwen3_next qwen3_5_text qwen3_5_moe_text", LINEAR),
    **_rows("gemma2 gemma3_text", GEMMA2),
    **_rows("olmo2 olmo3 exaone4 flex_olmo", OLMO2),
    **_rows("granitemoe granitemoe_swa", GRANITE_MOE),
    **_rows("cohere cohere2 phi", PHI),
    **_rows("gptj codegen", GPTJ),
    **_rows("lfm2 lfm2_moe", LFM2),
    **_rows("biogpt xglm", OPT),
    **_rows("mamba mamba2 falcon_mamba", MAMBA),
    **_rows("nemotron_h recurrent_gemma zamba zamba2", RECURRENT),
    "afmoe": Family(
        attention=("input_layernorm", "self_attn", "post_attention_layernorm"),
        mlp=("pre_mlp_layernorm", "mlp", "post_mlp_layernorm"),
        mlp_attributes=("moe_enabled",),
    ),
    "apertus": Family(attention=("attention_layernorm", "self_attn"), mlp=("feedforward_layernorm", "mlp")),
    "bloom": Family(
        attention=("input_layernorm", "self_attention"),
        mlp=("post_attention_layernorm", "mlp"),
        layers="h",
        block_returns_tuple=True,
        adds_residual=("self_attention", "mlp"),
        branching=False,
        variants=(("apply_residual_connection_post_layernorm", True, {"normed_residual": True}),),
    ),
    "dbrx": Family(layers="blocks", whole="its second norm is inside the attention module", since="5.15.0"),
    "falcon": Family(
        attention=("input_layernorm", "self_attention"),
        layers="h",
        block_returns_tuple=True,
        variants=(
            ("parallel_attn", True, {"whole": PARALLEL}),
            ("new_decoder_architecture", True, {"whole": PARALLEL}),
            ("alibi", True, {"branching": False}),
        ),
    ),
    "falcon_h1": replace(JAMBA, block_returns_tuple=True),
    "gemma3n_text": GEMMA3N,
    "gemma4_text": replace(GEMMA3N, last_layer="full_attention", since="5.5.2"),
    "glm4": Family(
        attention=("input_layernorm", "self_attn", "post_self_attn_layernorm"),
        mlp=("post_attention_layernorm", "mlp", "post_mlp_layernorm"),
    ),
    "gpt2": replace(GPT2, inverse_scale=("scale_attn_by_inverse_layer_idx", "attn", "c_attn")),
    "gpt_bigcode": GPT2,
    "gpt_neo": replace(GPT2, block_returns_tuple=True, branching=False),  # its windows count indices in the row
    "gpt_neox": Family(
        attention=("input_layernorm", "attention", "post_attention_dropout"),
        mlp=("post_attention_layernorm", "mlp", "post_mlp_dropout"),
        variants=(("use_parallel_residual", True, {"whole": PARALLEL}),),
    ),
    "granitemoehybrid": Family(
        attention=("input_layernorm", "mamba", "self_attn"),
        mlp=("post_attention_layernorm", "block_sparse_moe", "shared_mlp"),
        branching=False,
    ),
    "jamba": JAMBA,
    "llama4_text": Family(mlp=("post_attention_layernorm", "feed_forward"), mlp_attributes=("is_moe_layer",)),
    "minimax": Family(
        reason="its linear attention decays at a rate set by the layer's number among all layers", branching=False
    ),
    "mpt": Family(
        attention=("norm_1", "attn", "resid_attn_dropout"),
        mlp=("norm_2", "ffn"),
        layers="blocks",
        block_returns_tuple=True,
        adds_residual=("ffn",),
        branching=False,
    ),
    "olmo_hybrid": replace(RECURRENT, own_cache=True),
    "openai-gpt": replace(GENERAL, reason="it computes without a cache, and a saved model is checked with one"),
    "opt": replace(OPT, variants=(("do_layer_norm_before", False, OPT_POST_NORM),)),
    "phi3": Family(
        attention=("input_layernorm", "self_attn", "resid_attn_dropout"),
        mlp=("post_attention_layernorm", "mlp", "resid_mlp_dropout"),
    ),
    "stablelm": Family(
        mlp=("post_attention_layernorm", "mlp", "dropout"),
        variants=(("use_parallel_residual", True, {"whole": PARALLEL}),),
    ),
    "rwkv": replace(
        RECURRENT, reason="transformers scales its weights by the layer's number at the first forward pass"
    ),
    "vaultgemma": Family(mlp=("pre_feedforward_layernorm", "mlp")),
    "xlstm": replace(MAMBA, own_cache=True),
}


def family(config: Any) -> Family:
    """The row of a text config (`model.config.get_text_config(decoder=True)`), or the general rules."""
    row = FAMILIES.get(config.model_type, GENERAL)
    for flag, value, entries in row.variants:
        if getattr(config, flag, None) is value:
            row = replace(row, **entries)
    return row


def whole_only(config: Any) -> str | None:
    """Why halves of this model's blocks cannot be taken apart, or None where they can."""
    return family(config).whole


def bypassable(config: Any) -> bool:
    """Whether one half alone can be bypassed exactly: the block is `x + A(x)`, then `x + M(x)`."""
    row = family(config)
    return row.whole is None and not row.normed_residual


def branching(config: Any) -> bool:
    """Whether a row of tokens may be branched with a 4-D mask and custom position ids."""
    return family(config).branching


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
