"""Tiny random models of many families, for tests: hidden 32, vocabulary 64, windows of 4 so that they bind.

    model = build("qwen3")          # 6 layers
    model = build("gpt2", depth=4)

Weights are seeded, and large enough that dropping or mixing up a layer shows in the logits; norms and biases are random
too, so that no part of a block is an identity by accident.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

VOCAB = 64

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""A config.json, as `trimllm bench` takes it."""
PLAIN = {k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "head_dim")}
NO_HEAD_DIM = {k: v for k, v in COMMON.items() if k != "head_dim"}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 2,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 16,
}
ZAMBA = {**PLAIN, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_expand": 2, "use_mamba_kernels": False}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}


def _cycle(*kinds: Any) -> Any:
    return lambda depth: [kinds[i % len(kinds)] for i in range(depth)]


SLIDING = {"sliding_window": 4, "layer_types": _cycle("sliding_attention", "full_attention", "full_attention")}
DSA = {
    **MLA,
    "qk_rope_head_dim": 8,
    "n_group": 1,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "indexer_types": _cycle("full", "shared"),
}
HYBRID = {"layer_types": _cycle("linear_attention", "full_attention", "linear_attention")}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "tie_word_embeddings": False},
    "llama-tied": {**COMMON, "tie_word_embeddings": True},
    "mistral": {**COMMON, "sliding_window": 4},
    "qwen2": NO_HEAD_DIM,
    "qwen2-sliding": {**NO_HEAD_DIM, "use_sliding_window": True, **SLIDING},
    "qwen3": COMMON,
    "gemma": COMMON,
    "gemma2": {**COMMON, **SLIDING},
    "gemma3_text": {**COMMON, **SLIDING},
    "phi": NO_HEAD_DIM,
    "phi3": NO_HEAD_DIM,
    "gpt2": GPT2,
    "gpt2-inverse": {**GPT2, "scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode": GPT2,
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "window_size": 4,
        "attention_types": lambda depth: [[["global", "local"], depth // 2]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gptj": {**GPT2, "rotary_dim": 4},
    "codegen": {**GPT2, "rotary_dim": 4},
    "gpt_neox": PLAIN,
    "gpt_neox-sequential": {**PLAIN, "use_parallel_residual": False},
    "opt": {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt-post": {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_head": 4},
    "bloom-post": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "n_head": 4,
        "apply_residual_connection_post_layernorm": True,
    },
    "mpt": {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "falcon": {**PLAIN, "num_attention_heads": 4},
    "falcon-sequential": {**PLAIN, "parallel_attn": False},
    "falcon-new": {**PLAIN, "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon-alibi": {**PLAIN, "alibi": True},
    "stablelm": {**NO_HEAD_DIM},
    "stablelm-parallel": {**NO_HEAD_DIM, "use_parallel_residual": True},
    "starcoder2": {**NO_HEAD_DIM, "sliding_window": 4},
    "olmo": NO_HEAD_DIM,
    "olmo2": NO_HEAD_DIM,
    "olmo3": {**NO_HEAD_DIM, **SLIDING},
    "olmoe": {**NO_HEAD_DIM, **MOE},
    "granite": {**NO_HEAD_DIM, "residual_multiplier": 0.5},
    "granitemoe": {**NO_HEAD_DIM, **MOE},
    "glm": COMMON,
    "glm4": COMMON,
    "cohere": NO_HEAD_DIM,
    "cohere2": {**NO_HEAD_DIM, **SLIDING},
    "smollm3": {**NO_HEAD_DIM, "no_rope_layers": _cycle(1, 1, 0), "use_sliding_window": True, **SLIDING},
    "mixtral": {**NO_HEAD_DIM, **MOE},
    "qwen2_moe": {**NO_HEAD_DIM, **MOE, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2},
    "qwen3_moe": {**COMMON, **MOE, "mlp_only_layers": [1]},
    "qwen3_next": {**COMMON, **MOE, **LINEAR, **HYBRID, "mlp_only_layers": [1]},
    "qwen3_5_text": {**COMMON, **LINEAR, **HYBRID},
    "qwen3_5_moe_text": {**COMMON, **MOE, **LINEAR, **HYBRID},
    "deepseek_v2": {**COMMON, **MLA},
    "deepseek_v3": {**COMMON, **MLA},
    "gpt_oss": {**COMMON, **MOE, **SLIDING},
    "llama4_text": {
        **COMMON,
        **MOE,
        "intermediate_size_mlp": 40,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 4,
        "no_rope_layers": _cycle(1, 1, 0),
        "num_experts_per_tok": 1,
    },
    "lfm2": {
        **NO_HEAD_DIM,
        "layer_types": _cycle("conv", "full_attention", "conv"),
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        **NO_HEAD_DIM,
        **MOE,
        "layer_types": _cycle("conv", "full_attention", "conv"),
        "num_dense_layers": 2,
    },
    "gemma3n_text": {
        **COMMON,
        "sliding_window": 4,
        "layer_types": _cycle("sliding_attention", "full_attention"),
        "intermediate_size": lambda depth: [48 + 8 * (i % 2) for i in range(depth)],
        "activation_sparsity_pattern": lambda depth: [0.5 if i < 2 else 0.0 for i in range(depth)],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {
        **COMMON,
        "sliding_window": 4,
        "layer_types": _cycle("sliding_attention", "full_attention"),
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCAB,
        "global_head_dim": 16,
    },
    "exaone4": {**COMMON, **SLIDING},
    "exaone_moe": {**COMMON, **MOE, **SLIDING, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
    "ministral": {**COMMON, **SLIDING},
    "ministral3": COMMON,
    "granitemoehybrid": {
        **NO_HEAD_DIM,
        **MOE,
        **MAMBA,
        "layer_types": _cycle("mamba", "attention", "mamba"),
        "shared_intermediate_size": 24,
        "position_embedding_type": "rope",
    },
    "glm4_moe": {
        **COMMON,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "jamba": {
        **NO_HEAD_DIM,
        **MOE,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
    },
    "nemotron_h": {
        **COMMON,
        "layers_block_type": _cycle("mamba", "attention", "mlp"),
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "nemotron_h-moe": {
        **COMMON,
        **MOE,
        "layers_block_type": _cycle("mamba", "attention", "moe"),
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "dbrx": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "n_heads": 4,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "hunyuan_v1_dense": COMMON,
    "hunyuan_v1_moe": {**COMMON, "num_experts": 4, "moe_topk": 2},
    "ernie4_5": COMMON,
    "ernie4_5_moe": {
        **NO_HEAD_DIM,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 2,
        "moe_num_shared_experts": 1,
    },
    "nanochat": NO_HEAD_DIM,
    "falcon_h1": {**COMMON, **MAMBA, "mamba_d_ssm": 64},
    "apertus": NO_HEAD_DIM,
    "arcee": COMMON,
    "bitnet": NO_HEAD_DIM,
    "cwm": {**COMMON, **SLIDING},
    "diffllama": COMMON,
    "dots1": {
        **COMMON,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "flex_olmo": {**NO_HEAD_DIM, **MOE},
    "helium": COMMON,
    "minimax": {
        **COMMON,
        **MOE,
        "layer_types": _cycle("linear_attention", "full_attention", "linear_attention"),
        "block_size": 4,
        "mlp_alpha_factor": 1.5,
        "linear_attn_alpha_factor": 1.25,
    },
    "minimax_m2": {**COMMON, **MOE},
    "nemotron": NO_HEAD_DIM,
    "persimmon": PLAIN,
    "phimoe": {**NO_HEAD_DIM, **MOE},
    "seed_oss": COMMON,
    "solar_open": {
        **COMMON,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "vaultgemma": {**COMMON, **SLIDING},
    "jais2": COMMON,
    "hy_v3": {**COMMON, **MOE},
    "mamba": {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8},
    "mamba2": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "recurrent_gemma": {**COMMON, "lru_width": 32, "attention_window_size": 4},
    "olmo_hybrid": {**NO_HEAD_DIM, **LINEAR, "layer_types": _cycle("linear_attention", "full_attention")},
    "laguna": {**COMMON, **MOE, **SLIDING, "num_attention_heads_per_layer": _cycle(4, 2)},
    "mimo_v2_flash": {
        **COMMON,
        **SLIDING,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "afmoe": {**COMMON, **MOE, **SLIDING, "num_dense_layers": 2},
    "granite_swa": {**NO_HEAD_DIM, **SLIDING},
    "xglm": {"vocab_size": VOCAB, "d_model": 32, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64},
    "biogpt": PLAIN,
    "granitemoe_swa": {**NO_HEAD_DIM, **MOE, **SLIDING},
}
"""Family (a model type, with a variant after a dash) -> values of its config; a function is called with the depth."""


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TOWERS: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "text_config": {"model_type": "llama", **COMMON},
    },
    "gemma3": {"vision_config": {"model_type": "siglip_vision_model", **VISION}, "text_config": {**COMMON, **SLIDING}},
    "qwen2_vl": {"vision_config": QWEN_VISION, "text_config": {**NO_HEAD_DIM, "rope_parameters": M_ROPE}},
    "qwen3_vl": {
        "vision_config": {
            **QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0, 1],
        },
        "text_config": {**COMMON, "rope_parameters": M_ROPE},
    },
}
"""Vision-language models whose text decoder is cut: model type -> values of its config."""

CUT_ONLY: dict[str, dict[str, Any]] = {
    "falcon_mamba": {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8},
    "glm_moe_dsa": {**COMMON, **DSA},
    "hy_v4": {**COMMON, **DSA},
    "modernbert-decoder": {**NO_HEAD_DIM, **SLIDING, "local_attention": 8},
    "xlstm": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_heads": 1,
        "qk_dim_factor": 1.0,
        "chunk_size": 8,
        "num_blocks": lambda depth: depth,
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
    },
    "zamba": {
        **ZAMBA,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 2,
        "layers_block_type": _cycle("linear_attention", "hybrid", "hybrid"),
    },
    "zamba2": {
        **ZAMBA,
        "n_mamba_heads": 4,
        "chunk_size": 8,
        "adapter_rank": 4,
        "use_shared_attention_adapter": True,
        "layers_block_type": _cycle("linear_attention", "hybrid", "linear_attention"),
    },
    "mistral_large4": {
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8},
        "text_config": {
            **COMMON,
            **DSA,
            "indexer_types": _cycle("full"),
            "kv_source_layers": [0, 0, 2, 3, 3, 5],
            "no_rope_layers": _cycle(1),
        },
    },
    "molmo2": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "image_default_input_size": [8, 8],
            "image_patch_size": 4,
            "image_num_pos": 4,
        },
        "adapter_config": {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 24,
            "text_hidden_size": 32,
            "vision_feature_layer": [-1, -2],
        },
        "text_config": {
            **COMMON,
            "additional_vocab_size": 2,
            "rope_scaling_layers": [1, 4],
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
    },
}
"""Families and vision-language models of which whole blocks are cut; nothing else is tested of them."""


SINCE = {
    "dbrx": "5.15.0",
    "gemma3n_text": "5.6.0",
    "gemma4_text": "5.5.2",
    "glm_moe_dsa": "5.11.0",
    "nemotron_h": "5.6.0",
    "zamba2": "5.15.0",
}
"""The first release of transformers that has the family as it is tested here, where its name came earlier."""


def model_type(family: str) -> str:
    """The model type of a family: its name without the variant."""
    return family if family in CONFIG_MAPPING else family.partition("-")[0]


def absent(family: str) -> str | None:
    """Why the installed transformers cannot build this family, or None."""
    have, kind = transformers.__version__, model_type(family)
    if kind not in CONFIG_MAPPING:
        return f"transformers {have} has no {kind}"
    if Version(have) < Version(SINCE.get(family, "0")):
        return f"transformers {have} has no {family} as it is since {SINCE[family]}"
    return None


def build(family: str, depth: int = 6, seed: int = 0) -> PreTrainedModel:
    """A tiny model of `family` with `depth` layers, random weights, in evaluation mode on CPU in float32.

    Where the installed transformers has no such family, the test is skipped by name.
    """
    if reason := absent(family):
        pytest.skip(reason)
    entries = {**CONFIGS, **TOWERS, **CUT_ONLY}[family]
    if "text_config" in entries:
        return _build_tower(family, entries, depth, seed)
    values = {k: v(depth) if callable(v) else v for k, v in entries.items()}
    name = "n_layers" if family.startswith(("mpt", "dbrx")) else "num_hidden_layers"
    name = {"gpt_neo": "num_layers", "xglm": "num_layers"}.get(family, name)
    config = AutoConfig.for_model(model_type(family), **{name: depth}, **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return randomize(model, seed)


def _build_tower(family: str, values: dict[str, Any], depth: int, seed: int) -> PreTrainedModel:
    text = {k: v(depth) if callable(v) else v for k, v in values["text_config"].items()}
    tokens = {"image_token_id": 63, "image_token_index": 63, "video_token_id": 62, "vision_start_token_id": 61}
    config = AutoConfig.for_model(
        family,
        **{name: value for name, value in values.items() if name != "text_config"},
        text_config={**text, "num_hidden_layers": depth},
        **(
            tokens | {"boi_token_index": 60, "eoi_token_index": 59, "mm_tokens_per_image": 4, "vision_end_token_id": 58}
        ),
    )
    torch.manual_seed(seed)
    return randomize(AutoModelForImageTextToText.from_config(config, dtype=torch.float32), seed)


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Perturb all weights, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.15 if parameter.dim() > 1 else 0.2
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()
