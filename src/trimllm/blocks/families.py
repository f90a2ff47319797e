"""What is known about the decoder blocks of model families, in one place and as data: a new family is a new row.

`FAMILIES` says what a block of a `model_type` is made of. A family without a row is cut by the general rules (whole
blocks only). What happens to the entries of its config is in `config_rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


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
    left_padding: bool = True
    """Prompts in a batch may be padded on the left: no state takes the pads in."""
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
GENERAL = Family(
    layers=None,
    whole="its blocks have no row in the table of families",
    resumable=False,
    branching=False,
    left_padding=False,
)
RECURRENT = replace(GENERAL, whole="its blocks do not split into attention and MLP", left_padding=True)
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
    **_rows("nemotron_h zamba", RECURRENT),
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
        reason="its linear attention decays at a rate set by the layer's number among all layers",
        branching=False,
        left_padding=False,
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
    "recurrent_gemma": replace(RECURRENT, left_padding=False),
    "rwkv": replace(
        RECURRENT,
        reason="transformers scales its weights by the layer's number at the first forward pass",
        left_padding=False,
    ),
    "vaultgemma": Family(mlp=("pre_feedforward_layernorm", "mlp")),
    "xlstm": replace(MAMBA, own_cache=True, left_padding=False),
    "zamba2": replace(RECURRENT, since="5.15.0"),
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
