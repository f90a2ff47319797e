"""What a model of each family is in a GGUF file, as llama.cpp computes it: metadata, tensors, what it cannot express.

Read from the source of llama.cpp as llama-cpp-python 0.3.36 builds it (`src/models/*.cpp`, `src/llama-hparams.h`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimllm.errors import InputError

NORMS = ("attn_norm.weight", "ffn_norm.weight")
MATRICES = tuple(f"{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "attn_output"))
MLP = tuple(f"{name}.weight" for name in ("ffn_gate", "ffn_up", "ffn_down"))
QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
BIASES = (*QKV_BIASES, "attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
QK_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
POST_NORMS = ("post_attention_norm.weight", "post_ffw_norm.weight")
STOCK = (*NORMS, *MATRICES, *MLP)


@dataclass(frozen=True)
class Family:
    """How llama.cpp names and computes a model type of transformers."""

    arch: str
    block: tuple[str, ...]
    """Tensors of a block."""
    optional: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu",)
    permuted: bool = False
    """Rotary pairs are neighbours there, and halves apart in transformers: rows of queries and keys change places."""
    norm_offset: float = 0.0
    """What transformers adds to the weights of norms when it computes."""
    tied: bool = False
    """There is no output matrix beside the embeddings."""
    period: int = 0
    """Blocks with a sliding window, and one without, in turn: unless the file has a list. 0: no windows at all."""
    large: int = 0
    """At this depth the scale of the queries is taken from the hidden size, else from the size of a head. 0: never."""


GEMMA = ("gelu_pytorch_tanh", "gelu")
"""llama.cpp takes the first for both, as Gemma's authors do, whose first configs say the second."""
FAMILIES = {
    "llama": Family("llama", STOCK, BIASES, permuted=True),
    "mistral": Family("llama", STOCK, permuted=True),
    "qwen2": Family("qwen2", (*STOCK, *QKV_BIASES)),
    "qwen3": Family("qwen3", (*STOCK, *QK_NORMS)),
    "gemma": Family("gemma", STOCK, activations=GEMMA, norm_offset=1.0, tied=True),
    "gemma2": Family(
        "gemma2", (*STOCK, *POST_NORMS), activations=GEMMA, norm_offset=1.0, tied=True, period=2, large=46
    ),
    "gemma3_text": Family(
        "gemma3", (*STOCK, *QK_NORMS, *POST_NORMS), activations=GEMMA, norm_offset=1.0, period=6, large=62
    ),
}
"""Model type -> family."""


@dataclass
class Described:
    """A model as the file will have it."""

    family: Family
    metadata: dict[str, Any]
    """Keys that follow the name of the architecture; numbers, texts or lists."""
    query_scale: float = 1.0
    """What queries are multiplied by, so that the scale of llama.cpp becomes the model's."""
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    """Tensors that no checkpoint has."""
    notes: list[str] = field(default_factory=list)
    """What the user should know."""

    def tensors(self, depth: int, tied: bool) -> tuple[set[str], set[str]]:
        """Names that a checkpoint of `depth` blocks must give, and those it may give besides."""
        names = {f"blk.{i}.{name}" for i in range(depth) for name in self.family.block}
        names |= {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
        return names, {f"blk.{i}.{name}" for i in range(depth) for name in self.family.optional}


def describe(config: Any) -> Described:
    """What to write for a model with this config of transformers.

    Raises:
        InputError: if llama.cpp has no such model, naming the value and what else can be done.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(
            f"--to gguf: {config.model_type} is not among the families that are checked with llama.cpp "
            f"({', '.join(FAMILIES)}): take --to onnx, openvino, int8 or int4"
        )
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    described = Described(
        family,
        {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": heads,
            "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
            "attention.key_length": head,
            "attention.value_length": head,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "vocab_size": config.vocab_size,
            "rope.dimension_count": head,
        },
    )
    _check(config, family, heads * head)
    _rope(config, described, head)
    _windows(config, described)
    if family.period:
        _gemma(config, described, head)
    return described


def _refuse(setting: str, why: str) -> InputError:
    return InputError(
        f"--to gguf: {setting} of this model: llama.cpp {why}: take --to onnx or openvino, or the checkpoint"
    )


def _check(config: Any, family: Family, width: int) -> None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in family.activations:
        raise _refuse(f"activation {activation!r}", f"computes {family.activations[0]} in this family")
    if family.tied and not config.tie_word_embeddings:
        raise _refuse("tie_word_embeddings: false", "has no output matrix beside the embeddings in this family")
    if family.arch == "qwen2" and width != config.hidden_size:
        raise _refuse(f"{width} query rows", f"expects as many as the hidden size ({config.hidden_size})")
    if getattr(config, "use_bidirectional_attention", None):
        raise _refuse("use_bidirectional_attention", "attends to the past only")


def _rope(config: Any, described: Described, head: int) -> None:
    """Bases and scaling of the rotary positions."""
    rope = config.rope_parameters
    if described.family.arch == "gemma3":
        local = rope["sliding_attention"]
        if local["rope_type"] != "default":
            raise _refuse(f"rope_type {local['rope_type']!r} with windows", "scales positions of the other blocks only")
        if local["rope_theta"] != 10000.0:  # what earlier releases of llama.cpp take without a look at the file
            described.metadata["rope.freq_base_swa"] = float(local["rope_theta"])
        rope = rope["full_attention"]
    described.metadata["rope.freq_base"] = float(rope["rope_theta"])
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refuse("partial_rotary_factor", "rotates whole heads in this family")
    if kind == "linear":
        described.metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        described.metadata |= _yarn(rope)
    elif kind == "llama3" and described.family.arch == "llama":
        described.extra["rope_freqs.weight"] = _llama3_factors(config, head)
    elif kind != "default":
        raise _refuse(f"rope_type {kind!r}", "has no such scaling of positions in this family")


def _yarn(rope: dict[str, Any]) -> dict[str, Any]:
    """YaRN (arXiv:2309.00071) as transformers and llama.cpp both compute it."""
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}
    for name, value in usual.items():
        if rope.get(name) not in (None, value):
            raise _refuse(f"{name} {rope[name]} of yarn", f"takes {value}")
    factor = float(rope["factor"])
    usual_attention = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    attention = rope.get("attention_factor")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
    } | ({} if attention is None else {"rope.scaling.attn_factor": attention / usual_attention})


def _llama3_factors(config: Any, head: int) -> np.ndarray:
    """What llama.cpp divides the frequencies by, (head / 2,): from the frequencies that transformers computes."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, head, 2, dtype=np.float64) / head)
    return (plain / frequencies.double().numpy()).astype(np.float32)


def _windows(config: Any, described: Described) -> None:
    """Which blocks see how far back; where llama.cpp knows no windows, contexts end where the first one would close."""
    window = getattr(config, "sliding_window", None)
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    windowed = window is not None and (kinds is None or "sliding_attention" in kinds)
    if not described.family.period:
        if windowed and window < config.max_position_embeddings:
            described.metadata["context_length"] = window
            described.notes.append(f"context {window}, the sliding window, which llama.cpp has not in this family")
        return
    assert kinds is not None
    if not windowed:
        if described.family.arch == "gemma3":
            return  # without the key there are no windows, nor their base of positions
        # Windows as long as the context are none.
        window, kinds = config.max_position_embeddings, usual(len(kinds), described.family.period)
    described.metadata["attention.sliding_window"] = window
    if list(kinds) != usual(len(kinds), described.family.period):
        described.metadata["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in kinds]
        described.notes.append(
            f"windows out of llama.cpp's period of {described.family.period}, so the file lists them (read as of "
            "llama-cpp-python 0.3.36; releases that ignore the list answer wrongly: trim with --keep-pattern for those)"
        )


def usual(depth: int, period: int) -> list[str]:
    """The blocks as llama.cpp takes them by itself: every `period`-th has no window."""
    return ["sliding_attention" if i % period < period - 1 else "full_attention" for i in range(depth)]


def _gemma(config: Any, described: Described, head: int) -> None:
    """Soft caps, and the scale of the queries, of Gemma 2 and 3."""
    attention, final = config.attn_logit_softcapping, config.final_logit_softcapping
    arch, depth = described.family.arch, config.num_hidden_layers
    if arch == "gemma2":
        if not attention or not final:
            raise _refuse("attn_logit_softcapping or final_logit_softcapping: null", "always caps in Gemma 2")
        described.metadata["attn_logit_softcapping"] = float(attention)
    elif attention:
        raise _refuse("attn_logit_softcapping", "caps no attention in Gemma 3")
    if final:
        described.metadata["final_logit_softcapping"] = float(final)
    # llama.cpp guesses by the depth which release of Gemma this is, and scales accordingly.
    assumed = config.hidden_size // config.num_attention_heads if depth == described.family.large else head
    described.query_scale = math.sqrt(assumed / config.query_pre_attn_scalar)
