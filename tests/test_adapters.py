"""Adapters are merged before a cut, or the cut is refused; never cut with their layers mixed up."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import helpers_run as h
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny import build
from transformers import AutoTokenizer

from trimllm import cli
from trimllm.bench import benching
from trimllm.blocks import adapters, decoder
from trimllm.blocks.layout import whole
from trimllm.blocks.surgery import apply_layout, drop_layers
from trimllm.blocks.trial import trial
from trimllm.checkpoints import loading, models
from trimllm.checkpoints.export import save_trimmed
from trimllm.checkpoints.loading import load_model, load_tokenizer
from trimllm.config import BenchConfig, DropConfig, EvalConfig
from trimllm.errors import InputError

IDS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(3))
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "some layers": {"layers_to_transform": [1, 3]},
    "dora": {"use_dora": True},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 7]},
}


def adapt(model: Any, **changes: Any) -> PeftModel:
    """A LoRA whose every part matters."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | changes)
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def bypassed(model: PeftModel, layers: set[int], ids: torch.Tensor = IDS) -> torch.Tensor:
    """The reference: the adapted model, some of whose blocks return what they were given."""
    blocks = decoder.blocks(model.get_base_model())
    hooks = [blocks[i].register_forward_hook(lambda module, inputs, output: inputs[0]) for i in layers]
    try:
        return logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()


def saved(root: Path, family: str = "llama", **changes: Any) -> tuple[Path, PeftModel]:
    """The folder of an adapter on a base beside it, and the adapted model."""
    h.save_model(build(family, 6), root / "base")
    wrapped = adapt(load_model(root / "base"), **changes)
    wrapped.save_pretrained(root / "adapter")
    return root / "adapter", wrapped


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_cut_is_the_adapted_model_with_bypassed_layers(kind: str, tmp_path: Path) -> None:
    folder, reference = saved(tmp_path, **KINDS[kind])
    model = load_model(folder)
    assert not any(type(module).__module__.startswith("peft") for module in model.modules())
    plain = load_model(tmp_path / "base")
    assert (logits(reference) - logits(plain)).abs().max() > 0.01, "the adapter matters"
    assert torch.allclose(logits(model), logits(reference), atol=1e-5)
    drop_layers(model, [1, 4])
    assert torch.allclose(logits(model), bypassed(reference, {1, 4}), atol=1e-5)
    save_trimmed(model, tmp_path / "out")
    assert torch.allclose(logits(load_model(tmp_path / "out")), bypassed(reference, {1, 4}), atol=1e-5)


NAMES = {"llama-tied": ("q_proj", "embed_tokens"), "gpt2": ("c_attn", "wte"), "gemma3": ("q_proj", "embed_tokens")}
"""A projection, and the embeddings, which the output head shares."""


def saved_on_tied(root: Path, family: str, **changes: Any) -> tuple[Path, PeftModel]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that merging is not easy
        return saved(root, family, fan_in_fan_out=family == "gpt2", **changes)


def tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("where", ["embeddings", "head", "both", "both alike"])
@pytest.mark.parametrize("family", NAMES)
def test_embeddings_and_head_that_were_tied_each_take_what_the_adapter_adds_to_them(
    family: str, where: str, tmp_path: Path
) -> None:
    projection, embeddings = NAMES[family]
    names = {"head": ["lm_head"], "both": [embeddings, "lm_head"]}.get(where, [embeddings])
    alike = where == "both alike"
    targets = [projection, *names]
    folder, reference = saved_on_tied(tmp_path, family, target_modules=targets, ensure_weight_tying=alike)
    plain = load_model(tmp_path / "base")
    assert tied(plain)
    model = load_model(folder)
    assert torch.allclose(logits(model), logits(reference), atol=1e-5)
    old = plain.get_input_embeddings().weight
    if where in ("embeddings", "head"):
        for kind, module in (("embeddings", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
            assert torch.equal(module.weight, old) is (where != kind)
    assert not tied(model)
    assert not model.config.tie_word_embeddings
    drop_layers(model, [1, 4])
    assert torch.allclose(logits(model), bypassed(reference, {1, 4}), atol=1e-5)
    save_trimmed(model, tmp_path / "out", verify=False)
    again = load_model(tmp_path / "out")
    assert not tied(again)
    assert torch.allclose(logits(again), bypassed(reference, {1, 4}), atol=1e-5)


def test_tied_embeddings_cannot_be_parted_where_blocks_are_tied_by_the_same_entry(tmp_path: Path) -> None:
    folder, _ = saved_on_tied(tmp_path, "zamba", target_modules=["q_proj", "lm_head"])
    with pytest.raises(InputError, match=r"zamba shares their weight together with .*: train one that targets neither"):
        load_model(folder)


def test_an_adapter_is_not_quantized_on_the_way(tmp_path: Path) -> None:
    folder, _ = saved_on_tied(tmp_path, "llama-tied", target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"cannot quantize .*, an adapter: merge it first"):
        load_model(folder, quantization=object())


def test_an_adapter_of_which_peft_leaves_a_part_is_refused(tmp_path: Path) -> None:
    more = {"trainable_token_indices": [5, 7]}
    folder, _ = saved_on_tied(tmp_path, "llama-tied", target_modules=["q_proj", "lm_head"], **more)
    with pytest.raises(InputError, match=r"cannot merge the adapter: PEFT leaves \S+ as it is"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["projection", "tokens"])
@pytest.mark.parametrize("family", NAMES)
def test_what_was_tied_stays_so_where_the_adapter_does_not_part_it(family: str, kind: str, tmp_path: Path) -> None:
    more = {"trainable_token_indices": [5, 7]} if kind == "tokens" else {}
    folder, reference = saved_on_tied(tmp_path, family, target_modules=[NAMES[family][0]], **more)
    model = load_model(folder)
    assert tied(model)
    assert model.config.tie_word_embeddings
    assert torch.allclose(logits(model), logits(reference), atol=1e-5)
    save_trimmed(drop_layers(model, [1, 4]), tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert tied(again)
    assert torch.allclose(logits(again), bypassed(reference, {1, 4}), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_objects_with_an_unmerged_adapter_are_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    wrapped = adapt(build("llama", 6), **KINDS[kind])
    before = logits(wrapped)
    for model in (wrapped, wrapped.get_base_model()):
        for attempt in (
            lambda model=model: drop_layers(model, [1]),
            lambda model=model: apply_layout(model, whole(6)[1:]),
            lambda model=model: save_trimmed(model, tmp_path / "out"),
        ):
            with pytest.raises(InputError, match=r"not merged.*model\.merge_and_unload\(\)"):
                attempt()
    assert torch.equal(logits(wrapped), before)
    assert not (tmp_path / "out").exists()
    expected = bypassed(wrapped, {1})
    assert torch.allclose(logits(drop_layers(wrapped.merge_and_unload(), [1])), expected, atol=1e-5), "the remedy"


def test_prompt_tuning_and_adapters_of_transformers_are_refused_too(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = get_peft_model(build("llama", 4), config)
    with pytest.raises(InputError, match="not merged"):
        drop_layers(prompted, [1])
    h.save_model(build("llama", 4), tmp_path / "base")
    prompted = get_peft_model(load_model(tmp_path / "base"), config)
    prompted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"PROMPT_TUNING is no change of weights"):
        load_model(tmp_path / "adapter")
    own = build("llama", 4)
    own.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="not merged"):
        drop_layers(own, [1])


def test_adapter_trained_after_the_cut_loads_on_the_saved_checkpoint(tmp_path: Path) -> None:
    save_trimmed(drop_layers(build("llama", 6), [1, 4]), tmp_path / "cut")
    wrapped = adapt(load_model(tmp_path / "cut"), layers_to_transform=[0, 3])
    wrapped.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_model(tmp_path / "cut"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(wrapped))
    assert torch.allclose(logits(load_model(tmp_path / "adapter")), logits(wrapped), atol=1e-5)


def test_adapter_of_the_uncut_model_on_the_cut_one_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    save_trimmed(drop_layers(load_model(tmp_path / "base"), [1, 4]), tmp_path / "cut")
    point_to(folder, tmp_path / "cut")
    with pytest.raises(InputError, match=r"does not fit its base: 8 weights are missing or left over.*layers\.4"):
        load_model(folder)


def point_to(folder: Path, base: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base and str(base)}))


def test_unusable_adapters_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved(tmp_path)

    def message() -> str:
        with pytest.raises(InputError) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    point_to(folder, tmp_path / "absent")
    assert "absent is not there: put the right path into base_model_name_or_path" in message()
    point_to(folder, None)
    assert "names no base_model_name_or_path" in message()
    shutil.copytree(folder, tmp_path / "other")
    point_to(folder, tmp_path / "other")
    assert "is an adapter, too" in message()
    point_to(folder, tmp_path / "base")
    (folder / "config.json").write_text("{}")
    assert "holds a model and an adapter" in message()
    (folder / "config.json").unlink()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:100])
    assert "cannot use adapter" in message()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    monkeypatch.setattr(peft, "PeftModel", None)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert "pip install 'trimllm[peft]'" in message()


def test_pickled_adapter_is_refused(tmp_path: Path) -> None:
    folder, wrapped = saved(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    wrapped.save_pretrained(folder, safe_serialization=False)
    assert (folder / "adapter_model.bin").exists()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors.*--allow-pickle"):
        load_model(folder)
    assert torch.allclose(logits(load_model(folder, allow_pickle=True)), logits(wrapped), atol=1e-5)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter")
    h.save_base(root / "base", depth=4)
    adapt(load_model(root / "base")).save_pretrained(root / "lora")
    return root / "lora"


def test_drop_merges_says_so_and_records_base_and_adapter(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cut"
    assert cli.main(["drop", "--model", str(adapter), "--layers", "1", "--output", str(out)]) == 0
    base = str(adapter.parent / "base")
    assert f"{adapter} is an adapter: merged into its base {base}" in capsys.readouterr().err
    assert json.loads((out / "plan.json").read_text())["base"] == {"name": base, "adapter": str(adapter)}
    assert f"`{base}`, with the adapter `{adapter}` merged" in (out / "README.md").read_text()
    reference = PeftModel.from_pretrained(load_model(base), adapter)
    assert torch.allclose(logits(load_model(out)), bypassed(reference, {1}), atol=1e-5)
    assert len(load_tokenizer(adapter)) == len(load_tokenizer(base)), "the adapter has none of its own"


def test_an_adapter_on_the_hub_brings_its_own_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, there = [], {"adapter_config.json", "tokenizer_config.json"}
    monkeypatch.setattr(adapters, "base_of", lambda name: "someone/base" if name == "someone/adapter" else None)
    monkeypatch.setattr(adapters, "cached_file", lambda _, file, **more: file if file in there else None)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **more: asked.append(name))
    load_tokenizer("someone/adapter")
    there.discard("tokenizer_config.json")
    load_tokenizer("someone/adapter")
    assert asked == ["someone/adapter", "someone/base"]


def test_streaming_an_adapter_is_refused(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["drop", "--model", str(adapter), "--layers", "1", "--streaming", "--output", str(tmp_path / "cut")]
    assert cli.main(words) == 2
    assert "merge the adapter into its base first" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


def test_trim_eval_and_resume_work_on_an_adapter(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    h.fast(monkeypatch)
    task, out = h.save_task(tmp_path / "task"), tmp_path / "run"
    words = h.arguments(h.settings(adapter, task, out, depth=3, epochs_per_drop=0.2, warmup_epochs=0))
    assert cli.main(["trim", *words]) == 0
    err = capsys.readouterr().err
    assert "is an adapter: merged into its base" in err
    base = h.result(out)["base"]
    assert (base["name"], base["adapter"]) == (str(adapter.parent / "base"), str(adapter))
    assert json.loads((out / "plan.json").read_text())["base"] == {k: base[k] for k in ("name", "adapter")}
    assert cli.main(["trim", "--output", str(out), "--resume"]) == 0, "the base counts as unchanged"
    assert cli.main(["eval", "--model", str(adapter), "--task", str(task)]) == 0
    assert "is an adapter: merged" in capsys.readouterr().err


def test_an_adapter_is_timed_as_its_merged_model(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = BenchConfig(models=(str(adapter),), sequence=16, new_tokens=4, device="cpu")
    benching._check(asked)
    monkeypatch.setattr(benching, "_HERE", {})
    assert benching.load(str(adapter), asked)["layers"] == 4


def test_fingerprint_changes_with_adapter_and_base_and_not_with_the_merge(adapter: Path, tmp_path: Path) -> None:
    def mark(folder: Path) -> str:
        return models.load(EvalConfig(model=str(folder), task="x", device="cpu")).fingerprint

    first = mark(adapter)
    assert mark(adapter) == first
    shutil.copytree(adapter, tmp_path / "lora")
    wrapped = adapt(load_model(adapter.parent / "base"), r=2)
    wrapped.save_pretrained(tmp_path / "lora")
    assert mark(tmp_path / "lora") != first
    assert first != loading.fingerprint(adapter)
    assert first != loading.fingerprint(adapter.parent / "base")


def test_dtype_of_the_result_is_that_of_the_base(adapter: Path, tmp_path: Path) -> None:
    h.save_base(tmp_path / "base", depth=4, dtype=torch.bfloat16)
    shutil.copytree(adapter, tmp_path / "lora")
    point_to(tmp_path / "lora", tmp_path / "base")
    loaded = models.load(DropConfig(model=str(tmp_path / "lora"), layers=(1,), output="o", device="cpu"))
    assert loaded.saved == loaded.model.dtype == torch.bfloat16


def test_a_model_without_adapters_is_not_touched() -> None:
    adapters.check_merged(build("llama", 4))
    with trial(build("llama", 4), whole(4)[1:]):
        pass
