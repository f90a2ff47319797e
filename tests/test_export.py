"""What is on disk is what was in memory, or nothing is on disk."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import helpers_run as h
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build
from transformers import GenerationConfig

from trimllm import compare
from trimllm.blocks import decoder
from trimllm.blocks.layout import Block, whole
from trimllm.blocks.surgery import apply_layout, drop_layers, layout_of
from trimllm.checkpoints import models, verification
from trimllm.checkpoints.export import save_trimmed
from trimllm.checkpoints.loading import fingerprint, load_model, load_tokenizer, path_of
from trimllm.checkpoints.verification import verify
from trimllm.config import EvalConfig
from trimllm.errors import InputError, TrimError

IDS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(3))


class Tokenizer:
    """Stands for a tokenizer: it can save itself."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("{{ messages }}")


def trimmed(name: str = "llama") -> Any:
    return drop_layers(build(name), [0, 3])


def test_export_is_a_stock_checkpoint_with_its_plan(tmp_path: Path) -> None:
    model = trimmed("llama-tied")
    layout = tuple(Block(i, i) for i in (1, 2, 4, 5))
    report = save_trimmed(
        model, tmp_path / "a" / "out", tokenizer=Tokenizer(), layout=layout, base="org/base", card="# Card\n"
    )
    assert report is not None
    assert report.plain == report.cached == report.static == 0.0
    assert report.parameters == sum(p.numel() for p in model.parameters())
    out = tmp_path / "a" / "out"
    assert report.bytes == (out / "model.safetensors").stat().st_size
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    plan = json.loads((out / "plan.json").read_text())
    assert plan["base"] == "org/base"
    assert plan["layers"] == [1, 2, 4, 5]
    assert plan["blocks"][0] == {"attention": 1, "mlp": 1}
    assert (out / "README.md").read_text() == "# Card\n"
    assert (out / "chat_template.jinja").exists()
    again = load_model(out)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert fingerprint(again) == fingerprint(model)
    assert fingerprint(out) != fingerprint(model)
    assert verify(out, model) == report


def test_plan_of_shifted_pairs_has_no_list_of_layers(tmp_path: Path) -> None:
    model = build("llama", depth=2)
    save_trimmed(model, tmp_path / "out", layout=(Block(0, 1), Block(2, 2)))
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["layers"] is None
    assert plan["blocks"] == [{"attention": 0, "mlp": 1}, {"attention": 2, "mlp": 2}]


def test_a_layout_may_be_written_as_users_see_it(tmp_path: Path) -> None:
    model = drop_layers(build("llama", depth=3), [1])
    layouts: list[Any] = [[(0, 0), (2, 2)], [{"attention": 0, "mlp": 0}, {"attention": 2, "mlp": 2}]]
    for number, layout in enumerate(layouts):
        save_trimmed(model, tmp_path / str(number), layout=layout, verify=False)
        assert json.loads((tmp_path / str(number) / "plan.json").read_text())["layers"] == [0, 2]


def test_the_plan_says_what_is_left_after_several_cuts(tmp_path: Path) -> None:
    model = drop_layers(drop_layers(build("llama", depth=6), [3, 5]), [0])
    for place, cut in (("whole", model), ("copied", copy.deepcopy(model))):
        save_trimmed(cut, tmp_path / place, verify=False)
        assert json.loads((tmp_path / place / "plan.json").read_text())["layers"] == [1, 2, 4]
    apply_layout(model, [(0, 0), (1, 2)])
    assert layout_of(model) == (Block(1, 1), Block(2, 4))
    assert layout_of(load_model(tmp_path / "whole")) == whole(3), "what is loaded begins anew"
    del decoder.blocks(model)[1]
    assert layout_of(model) == whole(1), "what is known is of another depth"


def test_there_must_be_something_to_verify(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        verify("no-such-folder", build("llama", depth=1))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=f"give {tmp_path}/model"):
        verify(tmp_path, build("llama", depth=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reloads_in_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """`.to(dtype)` also rounds the frequencies of RoPE, which a reload computes anew: that is no difference."""
    model = trimmed("gemma2").to(dtype)
    report = save_trimmed(model, tmp_path / "out")
    assert report is not None
    assert report.plain == 0.0
    assert next(load_model(tmp_path / "out").parameters()).dtype == dtype


def test_training_mode_and_generation_config_are_left_alone(tmp_path: Path) -> None:
    model = trimmed()
    model.train()
    model.model.layers[1].eval()
    model.generation_config.dola_layers = "high"
    model.generation_config.assistant_early_exit = 5
    model.generation_config.cache_implementation = "hybrid"
    model.generation_config.max_new_tokens = 7
    save_trimmed(model, tmp_path / "out")
    assert model.generation_config.dola_layers == "high"
    assert model.training
    assert not model.model.layers[1].training
    assert model.model.layers[2].mlp.training
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["max_new_tokens"] == 7
    assert not any(saved.get(name) for name in ("dola_layers", "assistant_early_exit", "cache_implementation"))


@pytest.mark.parametrize("changed", [False, True])
def test_an_inconsistent_generation_config_is_saved(tmp_path: Path, changed: bool) -> None:
    """Releases of transformers differ in which of them they refuse."""
    model = trimmed()
    settings = {"temperature": 0.6, "top_p": 0.9, "cache_implementation": "hybrid"}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    if changed:
        model.generation_config.top_p = 0.8
    save_trimmed(model, tmp_path / "out")
    assert model.generation_config.temperature == 0.6
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"]) == (0.6, 0.8 if changed else 0.9)
    assert "cache_implementation" not in saved


def test_target_in_use_is_refused_and_an_earlier_export_only_replaced_on_request(tmp_path: Path) -> None:
    model, out = trimmed(), tmp_path / "out"
    out.mkdir()
    save_trimmed(model, out, verify=False)
    with pytest.raises(InputError, match="earlier export"):
        save_trimmed(model, out)
    drop_layers(model, [0])
    save_trimmed(model, out, overwrite=True)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        save_trimmed(model, other, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        save_trimmed(model, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other", "out"]


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trimmed()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", fail)
        with pytest.raises(TrimError, match="the disk is full"):
            save_trimmed(model, tmp_path / "out")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1))
        with pytest.raises(TrimError, match="the disk is full"):
            save_trimmed(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_break_each_part_of_a_checkpoint_and_verification_fails(tmp_path: Path) -> None:
    model, out = trimmed("gemma2"), tmp_path / "out"

    def broken(message: str) -> None:
        with pytest.raises(TrimError, match=message):
            verify(out, model)
        shutil.rmtree(out)
        save_trimmed(model, out, verify=False)

    save_trimmed(model, out)
    edit_config(out, num_hidden_layers=6, layer_types=["full_attention"] * 6)
    broken("missing keys")
    edit_config(out, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    broken("unexpected keys")
    edit_config(out, num_hidden_layers=6)
    broken("cannot be loaded again")
    edit_config(out, layer_types=["sliding_attention"] * 4)
    broken("logits differ")
    edit_config(out, intermediate_size=40)
    broken("mismatched keys|cannot be loaded")
    edit_weights(out, lambda tensors: {k: v for k, v in tensors.items() if "layers.2.mlp.up" not in k})
    broken("missing keys")
    edit_weights(out, lambda tensors: {k: v + 0.1 if "layers.2.mlp.up" in k else v for k, v in tensors.items()})
    broken("logits differ")
    verify(out, model)


@pytest.mark.parametrize(("kind", "named"), [("plain", "plain"), ("cached", "cached"), ("static", "static-cache")])
@pytest.mark.parametrize("differs", ["a little", "not supported"])
def test_each_way_of_decoding_is_compared(
    kind: str, named: str, differs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, logits = trimmed("gemma2"), verification._logits
    save_trimmed(model, tmp_path / "out")

    def other(one: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor | None]:
        found = logits(one, tokens)
        if one is not model:
            found[kind] = None if differs == "not supported" else found[kind] + 1e-3
        return found

    monkeypatch.setattr(verification, "_logits", other)
    by = "nan" if differs == "not supported" else "0.00"
    with pytest.raises(TrimError, match=rf": {named} logits differ by {by}"):
        verify(tmp_path / "out", model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_weight_of_half_precision_is_found(dtype: torch.dtype, tmp_path: Path) -> None:
    model, out = trimmed("gemma2").to(dtype), tmp_path / "out"
    save_trimmed(model, out)
    edit_weights(out, lambda tensors: {k: v + 0.1 if "layers.2.mlp.up" in k else v for k, v in tensors.items()})
    with pytest.raises(TrimError, match="logits differ"):
        verify(out, model)


def test_wrong_surgery_never_reaches_the_disk(tmp_path: Path) -> None:
    """Cut as naive code does it: the list of layers, or the count, or neither index nor config."""
    only_list = build("llama")
    del only_list.model.layers[1]
    with pytest.raises(TrimError):
        save_trimmed(only_list, tmp_path / "out")
    stale_index = build("llama")
    del stale_index.model.layers[0]
    stale_index.config.num_hidden_layers = 5
    with pytest.raises(TrimError, match="cache"):
        save_trimmed(stale_index, tmp_path / "out")
    baked = build("gpt2-inverse")
    del baked.transformer.h[1]
    baked.config.num_hidden_layers = 5
    for place, block in enumerate(baked.transformer.h):
        block.attn.layer_idx = place
    with pytest.raises(TrimError, match="logits differ"):
        save_trimmed(baked, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_wrong_decoding_names_the_release_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = verification._decode
    monkeypatch.setattr(verification, "_decode", lambda *given: decode(*given) + 100)
    with pytest.raises(TrimError, match=r"decodes wrongly with a cache: logits differ by 100 .*try another release of"):
        save_trimmed(trimmed(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_load_errors_are_one_line_and_say_what_to_do(tmp_path: Path) -> None:
    def message(path: Any, **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            load_model(path, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such folder" in message(tmp_path / "absent")
    assert "no config.json" in message(tmp_path)
    (tmp_path / "file").write_text("")
    assert "it is a file" in message(tmp_path / "file")
    folder = tmp_path / "model"
    save_trimmed(build("llama", depth=2), folder, verify=False)
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(folder)
    edit_config(folder, num_hidden_layers=4)
    assert "lacks 18 weights" in message(folder)
    edit_config(folder, num_hidden_layers=2)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "--allow-pickle (in Python: allow_pickle=True)" in message(folder)
    assert load_model(folder, allow_pickle=True, dtype=torch.bfloat16).dtype == torch.bfloat16
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "not a causal language model" in message(folder)
    (folder / "config.json").write_text("{")
    assert "config.json: it is not JSON" in message(folder)


def test_only_a_checkpoint_without_safetensors_is_told_to_allow_pickle(tmp_path: Path) -> None:
    folder = tmp_path / "safetensors"
    save_trimmed(build("llama", depth=2), folder, verify=False)
    whole = (folder / "model.safetensors").read_bytes()
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "a-1.safetensors")}
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"the folder has no model\.safetensors; give the folder"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError) as cut:
        load_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as shard:
        load_model(folder)
    assert "pickle" not in f"{cut.value} {shard.value}"


def test_code_of_a_checkpoint_is_refused_with_the_option_that_allows_it(tmp_path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("")
    with pytest.raises(InputError, match=r"give --trust-remote-code \(in Python: trust_remote_code=True\)"):
        load_model(tmp_path)


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_trimmed(build("llama", depth=2), tmp_path / "m", verify=False)
    load_tokenizer(path_of("demo")).save_pretrained(tmp_path / "m")
    assert load_model("~/m").config.num_hidden_layers == 2
    assert len(load_tokenizer("~/m")) == len(load_tokenizer(path_of("demo")))
    assert path_of("~/m") == str(tmp_path / "m")


def test_demo_is_the_embedded_model_whatever_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_trimmed(build("llama", depth=2), tmp_path / "demo", verify=False)
    load_tokenizer(path_of("demo")).save_pretrained(tmp_path / "demo")
    said = "demo is the embedded model: what has this name here would be ./demo"
    assert said in models.load(EvalConfig(model="demo", task="t")).notes
    other = models.load(EvalConfig(model="./demo", task="t"))
    assert (said in other.notes, other.model.config.num_hidden_layers) == (False, 2)


def test_a_model_of_the_hub_has_the_fingerprint_of_the_folder_that_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever shards, and whatever lies beside them."""
    folder = tmp_path / "cache" / "models--org--name" / "snapshots" / ("a" * 40)
    build("llama", depth=2).save_pretrained(folder, max_shard_size="20KB")
    load_tokenizer(path_of("demo")).save_pretrained(folder)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    local = shutil.copytree(folder, tmp_path / "local")
    save_file({"x": torch.zeros(3)}, local / "consolidated.safetensors")
    one, other = (models.load(EvalConfig(model=name, task="x", device="cpu")) for name in ("org/name", str(local)))
    assert one.fingerprint == other.fingerprint == fingerprint(folder) != fingerprint(one.model)


@pytest.mark.parametrize("named", [True, False])
def test_a_base_is_saved_in_the_dtype_of_its_weights_where_its_config_names_none(tmp_path: Path, named: bool) -> None:
    h.save_base(tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config if named else config | {"dtype": None}))
    loaded = models.load(EvalConfig(model=str(tmp_path), task="x", device="cpu"), training=True)
    assert (loaded.model.dtype, loaded.saved) == (torch.float32, torch.bfloat16)


def test_a_base_of_which_a_part_was_downloaded_has_no_mark(tmp_path: Path) -> None:
    build("llama", depth=2).save_pretrained(tmp_path, max_shard_size="20KB")
    assert compare.weights_mark(str(tmp_path)) == fingerprint(tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    assert compare.weights_mark(str(tmp_path)) == ""


def test_demo_is_the_embedded_model_and_a_path_never_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut = load_model("demo")
    assert cut.config.num_hidden_layers == 16
    drop_layers(cut, [3])
    save_trimmed(cut, "demo", tokenizer=load_tokenizer("demo"))
    assert [load_model(name).config.num_hidden_layers for name in ("demo", "./demo", Path("demo"))] == [16, 15, 15]
