"""A trimmed checkpoint means the same to another engine: CTranslate2, which shares no model code with transformers.

Its converter reads the folder that `save_trimmed` wrote; its own C++ computes the logits. Three tables say where it can
be compared: families that agree, families that it cannot convert, and settings that it computes otherwise. The last two
are asserted on the *uncut* model: it is not the cut that breaks them, and the tables stay true.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import ctranslate2
import numpy as np
import pytest
import tiny
import torch
from conftest import make_tokenizer
from ctranslate2.converters import TransformersConverter
from ctranslate2.converters import transformers as converters
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import trimllm
from trimllm.blocks.layout import Unit, remove, whole

DEPTH, NEW = 6, 8
IDS = torch.randint(3, tiny.VOCAB, (3, 12), generator=torch.Generator().manual_seed(3))
TOLERANCE = 2e-5
"""Largest difference of log-probabilities (all tokens of the vocabulary at all positions), float32. The
largest measured is 4.3e-6."""
DIFFERENT = 1e-3
"""What is more than this is no rounding."""

Values = dict[str, Any]
WIDE: Values = {"sliding_window": 32}
"""A window that no text here fills: CTranslate2 gives no logits of a text longer than the window."""
SCALE: Values = {"query_pre_attn_scalar": 8}
"""The size of a head, as in Gemma 2 2B and 9B and most of Gemma 3; CTranslate2 does not read it."""
NO_CAPS: Values = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
LONG_ROPE: Values = {
    "max_position_embeddings": 65536,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
PLAIN_GEMMA4: Values = {**WIDE, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}


class Wrong(NamedTuple):
    """A family (of `tiny.py`), settings, what the converter's error says if it raises one, and the reason in words."""

    family: str
    values: Values
    error: str
    reason: str


AGREE: dict[str, Values] = {
    "llama": {},
    "llama-tied": {},
    "mistral": WIDE,
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {**WIDE, **SCALE, **NO_CAPS},
    "gemma3_text": {**WIDE, **SCALE},
    "gpt2": {},
    "gpt_bigcode": {},
    "gptj": {},
    "codegen": {},
    "opt": {},
    "opt-post": {},
    "bloom": {},
    "falcon": {},
    "falcon-sequential": {},
    "falcon-new": {"multi_query": False},
    "falcon-alibi": {},
}
PARALLEL = ("gptj", "codegen", "falcon", "falcon-new", "falcon-alibi")
"""Attention and MLP read the same input: there are no shifted pairs."""

UNCONVERTIBLE = [
    Wrong("phi", {}, "n_layer", "reads a config of Microsoft's former code"),
    Wrong("phi3", {}, "'type'", "reads `type` of the rope parameters, now `rope_type`"),
    Wrong("gpt_neox", {}, "rotary_pct", "reads `rotary_pct`, now `partial_rotary_factor`"),
    Wrong("gpt_neox-sequential", {}, "rotary_pct", "the same"),
    Wrong("gemma4_text", PLAIN_GEMMA4, "head_dim", "reads one `head_dim`; it is now one per layer"),
    Wrong("falcon-new", {}, "input_layer_norm", "two norms a block, and `multi_query` left at its default"),
    Wrong("falcon", {"multi_query": False}, "layer_norm", "one norm a block, and keys of every head"),
    Wrong("mpt", {}, "No conversion is registered", "knows the former `MPTConfig`, not `MptConfig`"),
    Wrong("starcoder2", {}, "No conversion is registered", "has no converter"),
]
OTHERWISE = [
    Wrong("gemma2", {**WIDE, **SCALE}, "", "leaves out soft caps"),
    Wrong("gemma3_text", WIDE, "", "scales queries by the size of a head, not by `query_pre_attn_scalar`"),
    Wrong("qwen2-sliding", {}, "", "leaves out windows"),
    Wrong("gemma2", {**SCALE, **NO_CAPS}, "", "leaves out windows"),
    Wrong("gpt2-inverse", {}, "", "leaves out `scale_attn_by_inverse_layer_idx`"),
    Wrong("bloom-post", {}, "", "leaves out `apply_residual_connection_post_layernorm`"),
    Wrong("gemma", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "", "takes 10,000 as the base"),
    Wrong("llama", LONG_ROPE, "", "leaves positions unscaled with `rope_type` llama3"),
]


@pytest.fixture(autouse=True)
def _collect_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter collects garbage after every layer, which takes ten times as long as all the rest."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`tiny.build`, with other values in the config."""

    def built(family: str, values: Values) -> Any:
        monkeypatch.setitem(tiny.CONFIGS, family, {**tiny.CONFIGS[family], **values})
        return tiny.build(family, DEPTH)

    return built


def save(model: Any, folder: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.unk_token = "<pad>"  # CTranslate2 wants one; the tokenizer has 64 ids with it as without
    trimllm.save_trimmed(model, folder, tokenizer=tokenizer, verify=False)
    return folder


def convert(checkpoint: Path) -> Any:
    converted = TransformersConverter(str(checkpoint)).convert(str(checkpoint / "ctranslate2"))
    return ctranslate2.Generator(converted, device="cpu", compute_type="float32", intra_threads=1, inter_threads=1)


@torch.no_grad()
def expected(model: Any) -> Any:
    return model(input_ids=IDS).logits.log_softmax(-1).numpy()


def measured(engine: Any) -> Any:
    return np.array(engine.forward_batch(IDS.tolist(), return_log_probs=True))


def distance(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max())


def greedy(model: Any, prompts: torch.Tensor) -> list[list[int]]:
    settings: Values = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    return out[:, prompts.shape[1] :].tolist()


def greedy_by(engine: Any, prompts: torch.Tensor) -> list[list[int]]:
    tokenizer = make_tokenizer()
    tokens = [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts.tolist()]
    out = engine.generate_batch(tokens, max_length=NEW, min_length=NEW, sampling_topk=1, include_prompt_in_result=False)
    return [result.sequences_ids[0] for result in out]


def cut(model: Any, how: str) -> Any:
    if how == "blocks":
        return trimllm.drop_layers(model, [1, 4])
    return trimllm.apply_layout(model, remove(remove(whole(DEPTH), Unit("pair", 1)), Unit("pair", 3)))


CUTS = [(family, "blocks") for family in AGREE] + [(family, "pairs") for family in AGREE if family not in PARALLEL]


@pytest.mark.parametrize(("family", "how"), CUTS)
def test_trimmed_checkpoint_means_the_same(family: str, how: str, build: Any, tmp_path: Path) -> None:
    model = build(family, AGREE[family])
    uncut = expected(model)
    engine = convert(save(cut(model, how), tmp_path / "out"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert stock.config.num_hidden_layers == 4
    got = measured(engine)
    assert distance(got, expected(stock)) < TOLERANCE
    assert distance(got, uncut) > 0.1
    assert greedy_by(engine, IDS[:, :5]) == greedy(stock, IDS[:, :5])


@pytest.mark.parametrize(("family", "values"), [("mistral", {}), ("gemma3_text", SCALE)])
@pytest.mark.parametrize("how", ["blocks", "pairs"])
def test_windows_bind_while_generating(family: str, values: Values, how: str, build: Any, tmp_path: Path) -> None:
    """A window of 4: the prompt fills it, and each of the 8 new tokens moves it on."""
    model = build(family, values)
    engine = convert(save(cut(model, how), tmp_path / "out"))
    assert greedy_by(engine, IDS[:, :4]) == greedy(model, IDS[:, :4])
    wide = cut(build(family, {**values, **WIDE}), how)
    assert greedy(wide, IDS[:, :4]) != greedy(model, IDS[:, :4])


@pytest.mark.parametrize(("family", "values"), [("mistral", {}), ("gemma3_text", SCALE)])
def test_prompt_longer_than_the_window_is_otherwise_uncut_too(
    family: str, values: Values, build: Any, tmp_path: Path
) -> None:
    model = build(family, values)
    engine = convert(save(model, tmp_path / "out"))
    assert greedy_by(engine, IDS) != greedy(model, IDS)


@pytest.mark.parametrize("case", UNCONVERTIBLE, ids=lambda case: case.family)
def test_what_cannot_be_converted_cannot_be_uncut_either(case: Wrong, build: Any, tmp_path: Path) -> None:
    model = build(case.family, case.values)
    with pytest.raises(Exception, match=case.error):
        convert(save(model, tmp_path / "uncut"))
    with pytest.raises(Exception, match=case.error):
        convert(save(cut(model, "blocks"), tmp_path / "cut"))


@pytest.mark.parametrize("case", OTHERWISE, ids=lambda case: case.family)
def test_what_is_computed_otherwise_is_so_uncut_too(case: Wrong, build: Any, tmp_path: Path) -> None:
    model = build(case.family, case.values)
    assert distance(measured(convert(save(model, tmp_path / "out"))), expected(model)) > DIFFERENT


def test_no_family_with_a_converter_is_left_out() -> None:
    kinds = {family.partition("-")[0] for family in tiny.CONFIGS} & set(CONFIG_MAPPING)
    convertible = {kind for kind in kinds if CONFIG_MAPPING[kind].__name__ in converters._MODEL_LOADERS}
    tested = {family.partition("-")[0] for family in [*AGREE, *(case.family for case in UNCONVERTIBLE)]}
    assert convertible <= tested
    assert tested - convertible == {"mpt", "starcoder2"}
