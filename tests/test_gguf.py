"""A GGUF file holds the trimmed model: read back by transformers' own loader, which shares no code with the writer.

What llama.cpp itself computes from such files is compared by `make check-llamacpp`, on the same cases.
"""

from __future__ import annotations

import errno
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import gguf_cases
import numpy as np
import pytest
import tiny
import torch
from gguf_cases import CASES, FULL, SLIDING, VOCAB
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import trimllm
from trimllm import commands, handover
from trimllm.blocks.layout import Unit, remove, whole
from trimllm.checkpoints import loading
from trimllm.config import ExportConfig
from trimllm.errors import InputError, TrimError
from trimllm.handover import gguf_families, gguf_tensors, gguf_tokenizer

IDS = torch.tensor([[1, *range(20, 60)]])
READ = (
    *("llama", "llama-tied", "llama-biases", "mistral", "qwen2", "qwen3"),
    *("gemma2", "gemma2-out-of-step", "gemma3-out-of-step", "gemma3-untied"),
)
ROUNDING = {"f16": (3e-4, 6e-3), "q8_0": (1e-2, 0.15), "q4_0": (0.1, 1.5)}
"""Largest difference of a logit relative to the largest logit, in the tiny model of `test_types_...`; measured: 1.1e-3,
0.026 and 0.56. Below the lower bound the weights would not have been rounded at all."""


@pytest.fixture(autouse=True)
def _one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of the 8000 texts with which splits are compared: enough to tell those apart that we know."""
    some = list(gguf_tokenizer.probes())
    monkeypatch.setattr(gguf_tokenizer, "probes", lambda: iter(some[:4] + some[4::41]))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Case -> folder of its checkpoint, built once."""
    root, made = tmp_path_factory.mktemp("gguf"), {}

    def folder(name: str) -> Path:
        if name not in made:
            model, tokenizer = gguf_cases.build(name), gguf_cases.tokenizer_of(CASES[name].tokenizer)
            made[name] = gguf_cases.save(model, root / name, tokenizer)
        return made[name]

    return folder


def export(folder: Path, target: Path, quant: str = "f32") -> str:
    return handover.write(folder, target, ExportConfig(source=str(folder), to="gguf", quant=quant))


def refusal(folder: Path, target: Path, quant: str = "f32") -> str:
    with pytest.raises(InputError) as caught:
        export(folder, target, quant)
    assert "\n" not in str(caught.value)
    assert list(target.parent.glob("*.gguf*")) == []
    return str(caught.value)


def keys(path: Path) -> dict[str, Any]:
    return {name: entry.contents() for name, entry in gguf.GGUFReader(path).fields.items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", READ)
def test_file_holds_the_trimmed_model(name: str, checkpoints: Any, tmp_path: Path) -> None:
    folder = checkpoints(name)
    export(folder, tmp_path / "model.gguf")
    # The config is given, because the loader does not read rope scaling, windows, biases and caps from a file.
    config = AutoConfig.from_pretrained(folder)
    if name == "mistral":  # a Llama with a window that no text here fills
        config = AutoConfig.for_model("llama", **CASES[name].values, num_hidden_layers=4)
    if name.startswith(("gemma2", "gemma3")):
        config.query_pre_attn_scalar = config.head_dim  # as llama.cpp scales; the rest is in the weights
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert distance(logits(read), logits(stock)) < 1e-5


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "qwen2"]
)  # of Qwen 3 the loader does not read the size of a head
def test_file_alone_is_the_model(name: str, checkpoints: Any, tmp_path: Path) -> None:
    folder = checkpoints(name)
    export(folder, tmp_path / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert read.config.num_hidden_layers == 4
    assert distance(logits(read), logits(stock)) < 1e-5


def head_of_its_own(folder: Path) -> torch.Tensor:
    """Give a checkpoint whose config says that head and embeddings are one a head that differs; returns it."""
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return head


def test_a_head_that_the_config_calls_tied_is_written(checkpoints: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("llama-tied"), tmp_path / "own")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    head = head_of_its_own(folder)
    export(folder, tmp_path / "model.gguf")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    np.testing.assert_array_equal(found["output.weight"], head.float().numpy())
    model = loading.load_model(folder)
    assert model.config.tie_word_embeddings is False, "as it was read, for whoever goes by the config"
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert loading.load_model(checkpoints("llama-tied")).config.tie_word_embeddings is True


def test_a_head_of_its_own_is_refused_where_the_family_has_none(checkpoints: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("gemma2"), tmp_path / "own")
    head_of_its_own(folder)
    assert "llama.cpp has no place for 'lm_head.weight'" in refusal(folder, tmp_path / "model.gguf")


def test_gemma_tensors_are_those_of_the_checkpoint(checkpoints: Any, tmp_path: Path) -> None:
    """transformers has no loader for Gemma 1."""
    export(checkpoints("gemma"), tmp_path / "model.gguf")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    model = AutoModelForCausalLM.from_pretrained(checkpoints("gemma"), dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA, 4)
    assert len(found) == len(list(model.parameters()))
    for name, weight in model.named_parameters():
        want = weight.detach().numpy() + ("norm" in name)
        np.testing.assert_array_equal(found[names.get_name(name, (".weight",))], want)


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_types_round_as_little_as_they_can(quant: str, checkpoints: Any, tmp_path: Path) -> None:
    folder = checkpoints("llama")
    line = export(folder, tmp_path / "model.gguf", quant)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if quant in ROUNDING:
        low, high = ROUNDING[quant]
        assert low < distance(logits(read), logits(stock)) < high
    error = total = 0.0
    for (name, got), want in zip(read.named_parameters(), stock.parameters(), strict=True):
        if want.dim() == 1:
            assert torch.equal(got, want), name
            continue
        blocks, off = want.detach().reshape(-1, 32), (got - want).detach().reshape(-1, 32).abs()
        span = blocks.abs().amax(-1, keepdim=True)
        kind = "q8_0" if name == "lm_head.weight" and quant.startswith(("q4", "q5")) else quant
        width = blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)
        # half a step; the scale itself is float16; q4_0 and q5_0 clip one end of their range by up to a step
        steps = {"q8_0": span / 254, "q5_1": width / 62, "q4_1": width / 30, "q5_0": span / 16, "q4_0": span / 8}
        step = steps.get(kind, blocks.abs() * (2.0**-11 if quant == "f16" else 2.0**-8))
        assert bool((off <= step * 1.01 + span / 500 * (kind in steps) + 1e-7).all()), name
        error, total = error + float(off.square().sum()), total + float(blocks.square().sum())
    stated = float(line.split("rounded by ")[1].split(" %")[0])
    assert stated == pytest.approx(100 * (error / total) ** 0.5, rel=0.06)


def test_slices_do_not_show(checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are converted some rows at a time; here all are, and the file is the same."""
    export(checkpoints("llama"), tmp_path / "whole.gguf", "q4_0")
    monkeypatch.setattr(gguf_tensors, "SLICE", 1)
    export(checkpoints("llama"), tmp_path / "sliced.gguf", "q4_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "sliced.gguf").read_bytes()


def test_rows_that_no_block_divides_stay_f16(tokenizer: Any, tmp_path: Path) -> None:
    """The MLP of `tiny.py` is 48 wide, so that rows of `down_proj` are."""
    trimllm.save_trimmed(tiny.build("llama", 2), tmp_path / "model", tokenizer=tokenizer, verify=False)
    line = export(tmp_path / "model", tmp_path / "model.gguf", "q4_0")
    assert "2 matrices stayed f16" in line
    assert "the output matrix is q8_0" in line
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.1.ffn_down.weight"] == "F16"
    assert types["blk.1.ffn_up.weight"] == "Q4_0"
    assert types["blk.1.ffn_norm.weight"] == "F32"


def test_weights_beyond_float16_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    model = gguf_cases.build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = 1e5
    folder = gguf_cases.save(model, tmp_path / "model", gguf_cases.tokenizer_of("gpt-2"))
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder, tmp_path / "model.gguf", "q8_0")
    export(folder, tmp_path / "model.gguf", "bf16")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    folder = gguf_cases.save(model, tmp_path / "nan", gguf_cases.tokenizer_of("gpt-2"))
    assert "holds nan" in refusal(folder, folder / "model.gguf", "q8_0")


def test_llama3_frequencies_are_the_published_formula(checkpoints: Any, tmp_path: Path) -> None:
    export(checkpoints("llama-llama3"), tmp_path / "model.gguf")
    (found,) = (t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight")
    rope = gguf_cases.LLAMA3_ROPE
    for i, factor in enumerate(found):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * i / 16)
        smooth = (rope["original_max_position_embeddings"] / wavelength - 1.0) / (4.0 - 1.0)
        smooth = min(1.0, max(0.0, smooth))
        assert factor == pytest.approx(1 / ((1 - smooth) / 8.0 + smooth), rel=1e-5)
    assert found.min() == 1.0
    assert found.max() == 8.0


def test_rope_scaling_and_bases_are_written(checkpoints: Any, tmp_path: Path) -> None:
    found = {}
    for name in ("llama-linear", "llama-yarn-attention", "gemma3-linear", "llama"):
        export(checkpoints(name), tmp_path / f"{name}.gguf")
        read = keys(tmp_path / f"{name}.gguf")
        found[name] = {key.split(".", 2)[2]: value for key, value in read.items() if ".rope." in key}
    assert found["llama"] == {"dimension_count": 16, "freq_base": 10000.0}
    assert found["llama-linear"] == {**found["llama"], "scaling.type": "linear", "scaling.factor": 2.0}
    assert found["llama-yarn-attention"] == {
        **found["llama"],
        "scaling.type": "yarn",
        "scaling.factor": 4.0,
        "scaling.original_context_length": 64,
        "scaling.attn_factor": pytest.approx(1.3 / (0.1 * np.log(4) + 1)),
    }
    assert found["gemma3-linear"] == {**found["llama-linear"], "freq_base_swa": 100.0}


def test_file_says_where_it_comes_from(tmp_path: Path) -> None:
    """Shifted pairs: the attention of one layer, the MLP of the next."""
    model = tiny.build("llama")
    layout = remove(whole(6), Unit("pair", 2))
    trimllm.apply_layout(model, layout)
    tokenizer = gguf_cases.byte_level("gpt-2")
    model.resize_token_embeddings(VOCAB)
    card = "---\nlicense: apache-2.0\nlanguage: en\n---\n"
    trimllm.save_trimmed(
        model,
        tmp_path / "model",
        tokenizer=tokenizer,
        layout=layout,
        base={"name": "org/base"},
        card=card,
        verify=False,
    )
    export(tmp_path / "model", tmp_path / "model.gguf")
    found = keys(tmp_path / "model.gguf")
    assert found["general.name"] == "base, 5 blocks"
    assert found["general.base_model.0.name"] == "base"
    assert found["general.license"] == "apache-2.0"
    assert found["trimllm.kept.attention"] == [block.attention for block in layout]
    assert found["trimllm.kept.mlp"] == [block.mlp for block in layout]
    assert found["trimllm.kept.attention"] != found["trimllm.kept.mlp"]


def test_cut_of_whole_periods_needs_no_list(checkpoints: Any, tmp_path: Path) -> None:
    for name in ("gemma2", "gemma3"):
        line = export(checkpoints(name), tmp_path / f"{name}.gguf")
        found = keys(tmp_path / f"{name}.gguf")
        assert f"{name}.attention.sliding_window_pattern" not in found
        assert found[f"{name}.attention.sliding_window"] == 8
        assert "--keep-pattern" not in line


def test_cut_out_of_step_lists_its_windows_and_says_so(checkpoints: Any, tmp_path: Path) -> None:
    for name in ("gemma2-out-of-step", "gemma3-out-of-step", "gemma3-sliding"):
        line = export(checkpoints(name), tmp_path / f"{name}.gguf")
        kinds = AutoConfig.from_pretrained(checkpoints(name)).layer_types
        pattern = keys(tmp_path / f"{name}.gguf")[f"{name.partition('-')[0]}.attention.sliding_window_pattern"]
        assert [SLIDING if windowed else FULL for windowed in pattern] == list(kinds)
        assert "--keep-pattern" in line
    assert set(kinds) == {SLIDING}


def test_models_without_windows_get_none(checkpoints: Any, tmp_path: Path) -> None:
    export(checkpoints("gemma3-full"), tmp_path / "3.gguf")
    assert not [key for key in keys(tmp_path / "3.gguf") if "sliding" in key]
    export(checkpoints("gemma2-full"), tmp_path / "2.gguf")  # Gemma 2 has windows in llama.cpp, so as long as all
    assert keys(tmp_path / "2.gguf")["gemma2.attention.sliding_window"] == 256


def test_context_ends_at_windows_that_llamacpp_has_not(checkpoints: Any, tmp_path: Path) -> None:
    for name, arch in (("mistral", "llama"), ("qwen2-sliding", "qwen2")):
        assert "context 64" in export(checkpoints(name), tmp_path / f"{name}.gguf")
        assert keys(tmp_path / f"{name}.gguf")[f"{arch}.context_length"] == 64


@pytest.mark.parametrize(("window", "context"), [(64, 64), (256, None), (300, None)])
def test_windows_as_long_as_the_context_are_none(window: int, context: int | None) -> None:
    config = AutoConfig.for_model("mistral", **gguf_cases.SHAPE, sliding_window=window)
    described = gguf_families.describe(config)
    assert (described.notes == []) is (context is None)
    assert described.metadata["context_length"] == (context or 256)


@pytest.mark.parametrize(
    ("family", "depth", "scale"),
    [("gemma2", 45, 32), ("gemma2", 46, 16), ("gemma3_text", 61, 32), ("gemma3_text", 62, 16)],
)
def test_queries_make_up_for_the_scale_that_llamacpp_guesses(family: str, depth: int, scale: int) -> None:
    """At the depth of the largest Gemma it takes hidden size / heads (16 here), else the size of a head (32)."""
    values = {**gguf_cases.TIED, "head_dim": 32, "query_pre_attn_scalar": 40}
    config = AutoConfig.for_model(family, num_hidden_layers=depth, **values)
    assert gguf_families.describe(config).query_scale == pytest.approx((scale / 40) ** 0.5)


@pytest.mark.parametrize("name", ["llama", "llama-linear", "qwen2", "llama-biases", "gemma2"])
def test_tokenizer_of_the_file_is_the_same(name: str, checkpoints: Any, tmp_path: Path) -> None:
    export(checkpoints(name), tmp_path / "model.gguf")
    own = AutoTokenizer.from_pretrained(checkpoints(name))
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    lines = [*gguf_cases.TEXT.split("\n"), gguf_cases.TEXT, "x</s>y", "12345 it'LL 🙂 \u0301e", "</s>a</s>"]
    for line in (line for line in lines if line and not line.startswith(" ")):
        bare = own(line, add_special_tokens=False).input_ids
        if "</s>" in line and CASES[name].tokenizer == "spm-prefix":
            continue  # transformers' class for such files prefixes a space at the start only; llama.cpp as ours
        assert read(line, add_special_tokens=False).input_ids == bare, line
    found = keys(tmp_path / "model.gguf")
    assert found["tokenizer.ggml.add_bos_token"] == (own("a").input_ids[0] == 1)
    assert not found["tokenizer.ggml.add_eos_token"]
    assert [found[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "padding")] == [1, 2, 0]


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokens_merges_and_types_are_written(kind: str, tmp_path: Path) -> None:
    tokenizer = gguf_cases.byte_level(kind)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer.save_pretrained(tmp_path)
    found = gguf_tokenizer.describe(tmp_path, VOCAB)
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", kind)
    assert found["ggml.merges"] == [" ".join(pair) for pair in stated["model"]["merges"]]
    vocabulary = tokenizer.get_vocab()
    assert {token: number for number, token in enumerate(found["ggml.tokens"][: len(vocabulary)])} == vocabulary
    types = found["ggml.token_type"]
    assert types[:3] == [3, 3, 3]
    assert types[vocabulary["<think>"]] == 4
    assert set(types[3 : vocabulary["<think>"]]) == {1}
    assert set(types[len(vocabulary) :]) == {5}
    assert len(types) == len(found["ggml.tokens"]) == len(set(found["ggml.tokens"])) == VOCAB
    assert found["chat_template"] == tokenizer.chat_template


def greedy_merges(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """As llama.cpp merges a SentencePiece text: the neighbours that make the token of best score, leftmost first."""
    numbers = {token: number for number, token in enumerate(tokens)}
    parts = list(text)
    while True:
        found = [(-scores[numbers[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in numbers]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [
        number
        for part in parts
        for number in ([numbers[part]] if part in numbers else [numbers[f"<0x{byte:02X}>"] for byte in part.encode()])
    ]


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_merge_as_the_merges_do(prefix: bool, tmp_path: Path) -> None:
    tokenizer = gguf_cases.sentencepiece(prefix)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer.save_pretrained(tmp_path)
    found = gguf_tokenizer.describe(tmp_path, VOCAB)
    assert found["ggml.add_space_prefix"] == prefix
    assert found["ggml.token_type"][3] == 2
    assert set(found["ggml.token_type"][4:260]) == {6}
    for line in [*gguf_cases.TEXT.split("."), "a   b    c", "🙂 the the"]:
        spelled = "▁" * prefix + line.replace(" ", "▁")
        own = tokenizer(line, add_special_tokens=False).input_ids
        assert greedy_merges(spelled, found["ggml.tokens"], found["ggml.scores"]) == own


def test_known_splits_are_told_apart() -> None:
    for name in gguf_tokenizer.SPLITS:
        own = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(e), "isolated") for e in gguf_tokenizer.SPLITS[name][0]),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        same = [other for other, (e, _) in gguf_tokenizer.SPLITS.items() if gguf_tokenizer._same_split(own, e)]
        assert same == [name]


def _change(tokenizer: Any, **changes: Any) -> Any:
    for name, value in changes.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    return tokenizer


def _missing_merge() -> Any:
    from tokenizers import Tokenizer

    tokenizer = gguf_cases.sentencepiece(False)
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    del stated["model"]["merges"][0]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(stated))
    return tokenizer


def _added(**flags: bool) -> Any:
    tokenizer = gguf_cases.byte_level("gpt-2")
    tokenizer.add_tokens([AddedToken("<mask>", **flags)])
    return tokenizer


TOKENIZERS = {
    "pre-tokenizer": lambda: _change(gguf_cases.byte_level("gpt-2"), pre_tokenizer=pre_tokenizers.ByteLevel()),
    "normalizer Lowercase": lambda: _change(gguf_cases.byte_level("gpt-2"), normalizer=normalizers.Lowercase()),
    "spelling": lambda: _change(gguf_cases.sentencepiece(False), normalizer=normalizers.Strip()),
    "lstrip": lambda: _added(lstrip=True),
    "they lack": _missing_merge,
}


@pytest.mark.parametrize("reason", TOKENIZERS)
def test_tokenizers_that_cannot_be_rebuilt_are_refused(reason: str, tmp_path: Path) -> None:
    folder = gguf_cases.save(gguf_cases.build("llama"), tmp_path / "model", TOKENIZERS[reason]())
    message = refusal(folder, tmp_path / "model.gguf")
    assert reason in message
    assert "--to onnx" in message


def test_ignored_merges_matter_only_where_they_make_no_token() -> None:
    """llama.cpp ignores merges with the split of Llama 3, and follows them with that of Qwen."""
    tokenizer = gguf_cases.byte_level("llama-bpe")
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    stated["model"]["ignore_merges"] = False
    assert gguf_tokenizer.split_name(tokenizer.backend_tokenizer, stated) == "llama-bpe"
    stated["model"]["merges"] = stated["model"]["merges"][:-1]  # the last token can no longer be made
    with pytest.raises(InputError, match="ignore_merges"):
        gguf_tokenizer.split_name(tokenizer.backend_tokenizer, stated)


ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "mixtral": ("mixtral", {}),
    "gpt2": ("gpt2", {}),
    "gelu_new": ("llama", {"hidden_act": "gelu_new"}),
    "tie_word_embeddings": ("gemma", {"tie_word_embeddings": False}),
    "null": ("gemma2", {"attn_logit_softcapping": None, "tie_word_embeddings": True}),
    "attn_logit_softcapping": ("gemma3_text", {"attn_logit_softcapping": 30.0}),
    "use_bidirectional_attention": ("gemma3_text", {"use_bidirectional_attention": True}),
    "'llama3'": ("qwen2", {"rope_parameters": {**gguf_cases.LLAMA3_ROPE}}),
    "'dynamic'": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "beta_fast 16": ("llama", {"rope_parameters": {**ROPE, "beta_fast": 16}}),
    "with windows": ("gemma3_text", {"rope_parameters": {SLIDING: gguf_cases.LINEAR, FULL: gguf_cases.LOCAL}}),
    "query rows": ("qwen2", {"head_dim": 32}),
}


@pytest.mark.parametrize("reason", CONFIGS)
def test_what_llamacpp_cannot_express_is_refused_by_name(reason: str) -> None:
    family, values = CONFIGS[reason]
    config = AutoConfig.for_model(family, **{"hidden_size": 64, "num_attention_heads": 4, **values})
    with pytest.raises(InputError) as caught:
        gguf_families.describe(config)
    assert reason in str(caught.value)
    assert "--to " in str(caught.value)
    if reason in ("mixtral", "gpt2"):
        assert all(name in str(caught.value) for name in gguf_families.FAMILIES)


def test_tensors_without_a_place_and_lost_ones_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    """Biases of attention, which Qwen 3 has not in llama.cpp; a checkpoint of fewer blocks than its config."""
    from safetensors.torch import load_file, save_file

    folder = gguf_cases.save(gguf_cases.build("qwen3"), tmp_path / "model", gguf_cases.tokenizer_of("qwen2"))
    weights = load_file(folder / "model.safetensors")
    bias = "model.layers.1.self_attn.q_proj.bias"
    save_file(weights | {bias: torch.zeros(128)}, folder / "model.safetensors", {"format": "pt"})
    assert bias in refusal(folder, tmp_path / "model.gguf")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "blk.2.ffn_up.weight" in refusal(folder, tmp_path / "model.gguf")


FULL_DISK = [OSError(errno.ENOSPC, "No space left on device"), OSError("4096 requested and 0 written")]


@pytest.mark.parametrize("error", FULL_DISK, ids=["system", "numpy"])
def test_file_appears_whole_or_not_at_all(
    error: OSError, checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, tensor: Any, **_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
        with pytest.raises(TrimError, match="the disk is full"):
            export(checkpoints("llama"), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []
    export(checkpoints("llama"), tmp_path / "model.gguf")
    before = (tmp_path / "model.gguf").read_bytes()
    with pytest.raises(InputError, match="it exists"):
        export(checkpoints("llama"), tmp_path / "model.gguf", "q8_0")
    assert (tmp_path / "model.gguf").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_file_that_does_not_hold_what_was_planned_is_not_kept(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(checkpoints("llama"), tmp_path / "other.gguf", "q8_0")
    found = gguf.GGUFReader(tmp_path / "other.gguf")
    monkeypatch.setattr(gguf, "GGUFReader", lambda _: found)
    with pytest.raises(TrimError, match="was not written as planned"):
        export(checkpoints("llama"), tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


def test_missing_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "trimllm.handover.gguf", raising=False)  # it may not have been imported yet
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'trimllm\[gguf\]'"):
        export(tmp_path, tmp_path / "model.gguf")


def test_command_writes_the_file_and_one_line(checkpoints: Any, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "sub" / "model.gguf"
    command = ExportConfig(source=str(checkpoints("llama")), to="gguf", output=str(target))
    commands.carry_out("export", command)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith(f"{target}: f16, 4 blocks, ")
    assert keys(target)["general.file_type"] == 1
