"""Tiny models and tokenizers for the GGUF hand-over: every family that it serves, with every setting that it writes.

    model = build("gemma3-out-of-step")     # rows are multiples of 32, so that all types can hold them
    save(model, folder, tokenizer_of("gemma3-out-of-step"))

Used by `test_gguf.py`, which reads the files with transformers, and by `benchmarks/llamacpp.py`, which runs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import trimllm

VOCAB = 448
TEXT = (
    "the cat sat on the mat. a dog ran to the cat; the man had no hat? In 1984, Anna's 12 cats didn't eat 3.50 kg of "
    "fish — naïve café, Größe, 中文 字, привет мир!\n\n\tdef f(x):\n        return x  # twice\n it's they'll WE'RE"
)
SPECIAL = ("<pad>", "<s>", "</s>")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
NO_HEAD = {name: value for name, value in SHAPE.items() if name != "head_dim"}
TIED = {**SHAPE, "tie_word_embeddings": True}
SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}


class Case(NamedTuple):
    """A model type, its config, how deep it is, and which layers go."""

    family: str
    values: dict[str, Any]
    depth: int = 6
    dropped: tuple[int, ...] = (1, 4)
    tokenizer: str = "gpt-2"


def _period(period: int, depth: int) -> list[str]:
    return [SLIDING if (i + 1) % period else FULL for i in range(depth)]


GEMMA2 = {**TIED, "sliding_window": 8, "layer_types": _period(2, 6)}
GEMMA3 = {**TIED, "sliding_window": 8, "layer_types": _period(6, 12), "query_pre_attn_scalar": 40}
CASES = {
    "llama": Case("llama", SHAPE, tokenizer="llama-bpe"),
    "llama-tied": Case("llama", TIED, tokenizer="smollm"),
    "llama-biases": Case("llama", {**SHAPE, "attention_bias": True, "mlp_bias": True}, tokenizer="spm-prefix"),
    "llama-llama3": Case("llama", {**SHAPE, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear": Case("llama", {**SHAPE, "rope_parameters": LINEAR}),
    "llama-yarn": Case("llama", {**SHAPE, "rope_parameters": YARN}),
    "llama-yarn-attention": Case("llama", {**SHAPE, "rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "mistral": Case("mistral", {**SHAPE, "head_dim": 32, "sliding_window": 64}, tokenizer="spm-prefix"),
    "qwen2": Case("qwen2", NO_HEAD, tokenizer="qwen2"),
    "qwen2-sliding": Case(
        "qwen2",
        {**NO_HEAD, "use_sliding_window": True, "sliding_window": 64, "layer_types": _period(2, 6)},
        tokenizer="qwen2",
    ),
    "qwen3": Case("qwen3", {**TIED, "head_dim": 32}, tokenizer="qwen2"),
    "gemma": Case("gemma", TIED, tokenizer="spm"),
    "gemma2": Case("gemma2", GEMMA2, dropped=(2, 3), tokenizer="spm"),
    "gemma2-out-of-step": Case("gemma2", {**GEMMA2, "query_pre_attn_scalar": 32}, tokenizer="spm"),
    "gemma2-full": Case("gemma2", {**GEMMA2, "layer_types": [FULL] * 6}, tokenizer="spm"),
    "gemma2-46": Case("gemma2", {**GEMMA2, "layer_types": _period(2, 48), "head_dim": 32}, 48, (2, 3), "spm"),
    "gemma3": Case("gemma3_text", GEMMA3, 12, tuple(range(6)), "spm"),
    "gemma3-out-of-step": Case("gemma3_text", GEMMA3, 12, (0, 3, 5, 8), "spm"),
    "gemma3-full": Case("gemma3_text", GEMMA3, 12, tuple(i for i in range(12) if i not in (5, 11)), "spm"),
    "gemma3-sliding": Case("gemma3_text", GEMMA3, 12, (5, 11), "spm"),
    "gemma3-linear": Case(
        "gemma3_text", {**GEMMA3, "rope_parameters": {SLIDING: LOCAL, FULL: LINEAR}}, 12, (0, 3, 8), "spm"
    ),
    "gemma3-untied": Case("gemma3_text", {**GEMMA3, "tie_word_embeddings": False}, 12, (6, 7, 8), "spm"),
    "gemma3-62": Case(
        "gemma3_text", {**GEMMA3, "layer_types": _period(6, 68), "head_dim": 32}, 68, tuple(range(6)), "spm"
    ),
}


def build(name: str, seed: int = 0) -> Any:
    """The trimmed model of a case, in float32."""
    case = CASES[name]
    config = AutoConfig.for_model(case.family, num_hidden_layers=case.depth, **case.values)
    torch.manual_seed(seed)
    model = tiny.randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)
    return trimllm.drop_layers(model, list(case.dropped))


def save(model: Any, folder: Path, tokenizer: Any) -> Path:
    """A checkpoint that llama.cpp's readers also find a name and a licence in."""
    card = "---\nlicense: apache-2.0\n---\n# A tiny model\n"
    trimllm.save_trimmed(model, folder, tokenizer=tokenizer, verify=False, base="tiny/base", card=card)
    return folder


def tokenizer_of(kind: str) -> Any:
    """A tokenizer with `VOCAB` ids at most: of a split of `gguf_tokenizer.SPLITS`, or "spm", "spm-prefix"."""
    return sentencepiece(kind == "spm-prefix") if kind.startswith("spm") else byte_level(kind)


def byte_level(kind: str, **changes: Any) -> Any:
    """Byte-level BPE whose alphabet is all bytes."""
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splits = {
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), byte]),
    }
    raw = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    raw.pre_tokenizer = changes.get("pre_tokenizer", splits.get(kind))
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 8, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    raw.train_from_iterator([TEXT] * 4, trainer)
    raw.add_tokens([AddedToken("<think>", normalized=False)])
    if kind == "llama-bpe":
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


def sentencepiece(prefix: bool) -> Any:
    """BPE as the SentencePiece models of Llama (with a prefixed space) and Gemma (without) are converted to it."""
    rough = Tokenizer(models.BPE())
    rough.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    rough.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=150))
    learned = sorted(rough.get_vocab(), key=rough.get_vocab().get)
    names = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned, "▁▁", "▁▁▁"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(names))}
    pairs = [
        (token[:cut], token[cut:])
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] if prefix else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.add_special_tokens([AddedToken("<unk>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
