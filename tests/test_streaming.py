"""Cutting a checkpoint on disk gives, byte for byte, what loading, cutting and saving it gives."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny import CONFIGS, TOWERS, build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trimllm import cli
from trimllm.blocks.layout import whole, without
from trimllm.blocks.surgery import drop_layers
from trimllm.checkpoints import shards, streaming
from trimllm.checkpoints.export import save_trimmed
from trimllm.checkpoints.renumbering import Numbering, list_paths
from trimllm.checkpoints.streaming import drop_on_disk
from trimllm.errors import InputError, TrimError

DEPTH = 4
LEGAL = {
    "diffllama": (4, (2, 3)),
    "gemma3n_text": (6, (0,)),
    "gemma4_text": (6, (0,)),
    "jamba": (6, (0, 3)),
    "olmo_hybrid": (6, (0, 3)),
    "recurrent_gemma": (6, (0, 3)),
}
"""Depth and layers to drop, where a model of 4 layers cannot lose layers 0 and 2."""
REFUSED = {"minimax": (0,), "jamba": (2,), "diffllama": (0,), "gemma4_text": (2,), "gemma3n_text": (2,)}
"""Layers that models of 6 layers cannot lose."""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def save_tiny(folder: Path, name: str = "llama", depth: int = DEPTH, **options: Any) -> Path:
    build(name, depth=depth).save_pretrained(folder, **options)
    return folder


def in_memory(model: Any, layers: tuple[int, ...], folder: Path, base: str) -> Path:
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    drop_layers(model, layers)
    save_trimmed(model, folder, layout=without(whole(depth), layers), base=base, verify=False)
    return folder


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def restore(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", [name for name in [*CONFIGS, *TOWERS] if name != "minimax"])
def test_every_file_is_what_the_cut_in_memory_writes(name: str, tmp_path: Path) -> None:
    depth, drop = LEGAL.get(name, (DEPTH, (0, 2)))
    model = build(name, depth=depth)
    model.save_pretrained(tmp_path / "source")
    written = in_memory(model, drop, tmp_path / "memory", "base")
    result = drop_on_disk(tmp_path / "source", drop, tmp_path / "disk", base="base")
    assert files(tmp_path / "disk") == files(written)
    assert result.kept == tuple(i for i in range(depth) if i not in drop)
    assert (result.depth, result.shards, result.unused) == (depth, 1, ())


@pytest.mark.parametrize("name", REFUSED)
def test_a_cut_that_memory_refuses_is_refused_with_the_same_words(name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", name, depth=6)
    with pytest.raises(InputError) as refused:
        drop_layers(build(name, depth=6), REFUSED[name])
    with pytest.raises(InputError) as streamed:
        drop_on_disk(source, REFUSED[name], tmp_path / "disk")
    assert str(streamed.value) == str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_layer_1_is_not_layer_10_or_11(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "qwen3", depth=12)
    before = weights(source)
    drop_on_disk(source, [1, -2], tmp_path / "disk")
    after = weights(tmp_path / "disk")
    kept = [0, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    norms = [f"model.layers.{place}.input_layernorm.weight" for place in range(10)]
    assert all(
        torch.equal(after[name], before[f"model.layers.{i}.input_layernorm.weight"])
        for i, name in zip(kept, norms, strict=True)
    )
    assert not [name for name in after if name.startswith(("model.layers.10.", "model.layers.11."))]


def test_shards_in_and_out_hold_each_tensor_once_and_the_index_says_where(tmp_path: Path) -> None:
    model = build("mixtral", depth=6)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    written = in_memory(model, (1, 4), tmp_path / "memory", "base")
    seen: list[tuple[int, int]] = []
    result = drop_on_disk(
        tmp_path / "source",
        [1, 4],
        tmp_path / "disk",
        max_shard_size="30KB",
        progress=lambda done, total, _: seen.append((done, total)),
    )
    index = json.loads((tmp_path / "disk" / shards.INDEX).read_text())
    in_files = {name: p.name for p in (tmp_path / "disk").glob("*.safetensors") for name in load_file(p)}
    assert index["weight_map"] == in_files
    assert len(set(in_files.values())) == result.shards > 2
    sizes = {p.name: sum(t.nbytes for t in load_file(p).values()) for p in (tmp_path / "disk").glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(sizes.values()) == result.bytes
    assert max(sizes.values()) <= 30_000
    assert equal(weights(tmp_path / "disk"), weights(written))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (result.bytes, result.bytes)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "disk").eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_bfloat16_scales_of_gpt2_fold_as_in_memory(tmp_path: Path) -> None:
    model = build("gpt2-inverse", depth=DEPTH).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    written = in_memory(model, (0, 1), tmp_path / "memory", "base")
    drop_on_disk(tmp_path / "source", [0, 1], tmp_path / "disk", base="base")
    assert files(tmp_path / "disk") == files(written)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_names_without_the_base_models_prefix_stay_without(name: str, tmp_path: Path) -> None:
    build(name, depth=DEPTH).base_model.save_pretrained(tmp_path / "source")
    path = {"gpt2": "h", "llama-tied": "layers"}[name]
    before = weights(tmp_path / "source")
    drop_on_disk(tmp_path / "source", [1], tmp_path / "disk")
    after = weights(tmp_path / "disk")
    assert {key for key in before if not key.startswith(f"{path}.3.")} == set(after)
    assert all(torch.equal(after[key], before[key]) for key in after if not key.startswith(f"{path}."))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    expected = drop_layers(build(name, depth=DEPTH), [1])
    assert equal(fresh.state_dict(), expected.state_dict())
    assert AutoConfig.from_pretrained(tmp_path / "disk").architectures == [type(expected).__name__]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_vision_tower_of_the_same_depth_keeps_its_layers(name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", name, depth=2)
    written = in_memory(build(name, depth=2), (0,), tmp_path / "memory", "base")
    drop_on_disk(source, [0], tmp_path / "disk", base="base")
    assert files(tmp_path / "disk") == files(written)


def test_heads_for_further_tokens_go_with_their_count(tmp_path: Path, capsys: Any) -> None:
    source = save_tiny(tmp_path / "source", "deepseek_v3")
    tensors = weights(source)
    extra = {name.replace(".3.", ".4."): t + 1 for name, t in tensors.items() if name.startswith("model.layers.3.")}
    restore(
        source, tensors | extra | {"model.layers.4.eh_proj.weight": torch.ones(4), "mtp.norm.weight": torch.ones(2)}
    )
    edit(source / "config.json", num_nextn_predict_layers=1)
    result = drop_on_disk(source, [2], tmp_path / "disk")
    assert set(result.unused) == {*extra, "model.layers.4.eh_proj.weight", "mtp.norm.weight"}
    assert set(weights(tmp_path / "disk")) == {name for name in tensors if not name.startswith("model.layers.3.")}
    assert json.loads((tmp_path / "disk" / "config.json").read_text())["num_nextn_predict_layers"] == 0

    words = ["drop", "--model", str(source), "--layers", "2", "--streaming", "--output", str(tmp_path / "told")]
    assert cli.main(words) == 0
    told = f"  {len(result.unused)} tensors for which the causal LM has no use, such as {result.unused[0]}: left out"
    assert told in capsys.readouterr().err


def test_frequencies_that_old_files_hold_are_left_out(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(DEPTH)}
    restore(source, weights(source) | old)
    result = drop_on_disk(source, [1], tmp_path / "disk")
    assert set(result.unused) == set(old)
    assert not [name for name in weights(tmp_path / "disk") if "inv_freq" in name]


def test_a_tensor_that_the_model_does_not_know_is_kept(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    restore(source, weights(source) | {"model.layers.3.extra": torch.ones(3), "other": torch.zeros(2)})
    drop_on_disk(source, [0], tmp_path / "disk")
    after = weights(tmp_path / "disk")
    assert torch.equal(after["model.layers.2.extra"], torch.ones(3))
    assert torch.equal(after["other"], torch.zeros(2))


def quantize(folder: Path, leaves: tuple[str, ...], **quantization: Any) -> dict[str, torch.Tensor]:
    """Stand-ins for quantized linear weights: random bytes under the names that the method uses."""
    tensors = {}
    for name, tensor in weights(folder).items():
        if name.endswith("proj.weight"):
            for leaf in leaves:
                raw = torch.randint(0, 256, (tensor.shape[0], 8), dtype=torch.uint8)
                tensors[name.removesuffix("weight") + leaf] = raw.view(torch.float8_e4m3fn) if "fp8" in leaf else raw
        else:
            tensors[name] = tensor
    restore(folder, tensors)
    edit(folder / "config.json", quantization_config=quantization)
    return tensors


METHODS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "fp8"),
    "bitsandbytes": ("weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"),
}


@pytest.mark.parametrize("method", METHODS)
def test_quantized_tensors_keep_their_bytes_under_the_new_names(method: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    before = quantize(source, METHODS[method], quant_method=method, bits=4, group_size=128)
    drop_on_disk(source, [1], tmp_path / "disk")
    after = weights(tmp_path / "disk")
    places = {"0": "0", "2": "1", "3": "2"}
    expected = {}
    for name, tensor in before.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if parts[2] == "1":
                continue
            parts[2] = places[parts[2]]
        expected[".".join(parts)] = tensor
    assert expected.keys() == after.keys()
    assert all(torch.equal(expected[name].view(torch.uint8), after[name].view(torch.uint8)) for name in after)
    config = json.loads((tmp_path / "disk" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": method, "bits": 4, "group_size": 128}


def test_names_of_layers_in_the_quantization_config_are_renumbered(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", depth=12)
    groups = {"group_0": {"targets": ["Linear", "re:.*layers\\.2\\.mlp.*", "re:.*self_attn.*"], "format": "nvfp4-pack"}}
    quantize(
        source,
        METHODS["compressed-tensors"],
        quant_method="compressed-tensors",
        ignore=[
            "lm_head",
            "model.layers.1.mlp.down_proj",
            "model.layers.10.mlp.down_proj",
            "layers.11",
            "model.layers.0",
        ],
        config_groups=groups,
        dynamic={"-:model\\.layers\\.10\\..*": {}, "+:.*\\.1\\..*gate.*|model\\.layers\\.x": {"bits": 8}},
        version="0.10.2",
    )
    (source / "quantize_config.json").write_text(json.dumps({"modules_to_not_convert": ["model.layers.3", None]}))
    with pytest.raises(InputError, match=r"cannot be renumbered.*write the modules out"):
        drop_on_disk(source, [0], tmp_path / "disk")
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    del config["dynamic"]["+:.*\\.1\\..*gate.*|model\\.layers\\.x"]
    edit(source / "config.json", quantization_config=config)
    drop_on_disk(source, [1], tmp_path / "disk")
    new = json.loads((tmp_path / "disk" / "config.json").read_text())["quantization_config"]
    assert new["ignore"] == ["lm_head", "model.layers.9.mlp.down_proj", "layers.10", "model.layers.0"]
    assert new["config_groups"]["group_0"]["targets"] == ["Linear", "re:.*layers\\.1\\.mlp.*", "re:.*self_attn.*"]
    assert new["dynamic"] == {"-:model\\.layers\\.9\\..*": {}}
    assert (new["version"], new["config_groups"]["group_0"]["format"]) == ("0.10.2", "nvfp4-pack")
    old_file = json.loads((tmp_path / "disk" / "quantize_config.json").read_text())
    assert old_file == {"modules_to_not_convert": ["model.layers.2", None]}


def test_entries_of_a_quantization_config_without_a_name_stay() -> None:
    numbering = Numbering(("model.layers",), (0, 2), frozenset({"model.layers.2.mlp"}))
    assert numbering.renumber({"bits": None, "model.layers.1.mlp": None, "model.layers.2.mlp": {"bits": 8}}) == {
        "bits": None,
        "model.layers.1.mlp": {"bits": 8},
    }


def test_experts_within_layers_are_no_list_of_layers_however_many_they_are() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up.weight" for i in range(3) for j in range(3)]
    assert list_paths([*names, "visual.blocks.0.w", "visual.blocks.1.w", "visual.blocks.2.w"], 3) == [
        "model.layers",
        "visual.blocks",
    ]


def test_a_pattern_that_would_select_other_layers_is_refused() -> None:
    modules = frozenset(f"model.layers.{i}.mlp" for i in range(12)) | {"vision.layers.3.mlp"}
    numbering = Numbering(("model.layers",), tuple(i for i in range(12) if i != 2), modules)
    assert numbering.renumber(
        ["re:model\\.layers\\.3\\.mlp", "vision.layers.3.mlp", "model.layers.2.mlp", "re:.*2.mlp2"]
    ) == [
        "re:model\\.layers\\.2\\.mlp",
        "vision.layers.3.mlp",
        "re:.*2.mlp2",
    ]
    assert numbering.renumber(["model.layers.1*", "model.layers.3.*"][1:]) == ["model.layers.2.*"]
    for text in ("re:.*layers\\.(4|5)\\.mlp", "model.layers.1*", "layers.3.mlp"):
        with pytest.raises(InputError, match="cannot be renumbered"):
            numbering.renumber([text])


def test_per_layer_weights_that_are_quantized_are_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "gemma3n_text", depth=6)
    quantize(source, METHODS["gptq"], quant_method="gptq", bits=4)
    tensors = weights(source)
    packed = "model.per_layer_model_projection"
    restore(source, {name.replace(f"{packed}.weight", f"{packed}.qweight"): t for name, t in tensors.items()})
    with pytest.raises(InputError, match=r"per_layer_model_projection holds one slice per layer.*unquantized"):
        drop_on_disk(source, [0], tmp_path / "disk")


def test_metadata_that_names_layers_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    metadata = {"format": "pt", "model.layers.0.mlp.up_proj.weight": "{}"}
    save_file(weights(source), source / "model.safetensors", metadata=metadata)
    with pytest.raises(InputError, match="metadata names layers"):
        drop_on_disk(source, [0], tmp_path / "disk")


def test_the_tokenizer_travels_and_other_weights_do_not(tokenizer: Any, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    tokenizer.save_pretrained(source)
    edit(source / "generation_config.json", dola_layers="high", cache_implementation="static", temperature=0.5)
    for name in ("chat_template.jinja", "preprocessor_config.json", "LICENSE", "README.md", "pytorch_model.bin"):
        (source / name).write_text("{}")
    for name in ("model.gguf", "tokenizer.bin", "trainer_state.json", ".hidden"):
        (source / name).write_text("x")
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_text("x")
    drop_on_disk(source, [1], tmp_path / "disk")
    travelled = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "LICENSE",
    }
    made = {"config.json", "generation_config.json", "model.safetensors", "plan.json"}
    assert {path.name for path in (tmp_path / "disk").iterdir()} == travelled | made
    assert AutoTokenizer.from_pretrained(tmp_path / "disk").get_vocab() == tokenizer.get_vocab()
    generation = json.loads((tmp_path / "disk" / "generation_config.json").read_text())
    assert generation["temperature"] == 0.5
    assert not {"dola_layers", "cache_implementation"} & generation.keys()
    plan = json.loads((tmp_path / "disk" / "plan.json").read_text())
    assert (plan["layers"], plan["base"]) == ([0, 2, 3], str(source))
    assert AutoConfig.from_pretrained(tmp_path / "disk").num_hidden_layers == 3
    assert (tmp_path / "disk").stat().st_mode & 0o777 == (tmp_path / "source").stat().st_mode & 0o777


def test_bad_layers_and_targets_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    for layers, target, words in (
        ([4], "disk", r"layer 4 does not exist: the model has layers 0 to 3 \(or -4 to -1\)"),
        ([-5], "disk", "layer -5 does not exist"),
        ([], "disk", "at least one"),
        ([0, 1, 2, 3], "disk", "cannot drop all 4 layers"),
        ([0], "full", "not empty"),
        ([0], "full/precious", "it is a file"),
    ):
        with pytest.raises(InputError, match=words):
            drop_on_disk(source, layers, tmp_path / target)
    with pytest.raises(InputError, match="max_shard_size"):
        drop_on_disk(source, [0], tmp_path / "disk", max_shard_size="big")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "source"]
    assert files(tmp_path / "full") == {"precious": b"x"}


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", max_shard_size="20KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    whole_file, index = shard.read_bytes(), (source / shards.INDEX).read_text()

    def refused(words: str) -> None:
        with pytest.raises(InputError, match=words):
            drop_on_disk(source, [0], tmp_path / "disk")

    shard.write_bytes(whole_file[:-8])
    refused(
        rf"{shard.name} is torn: its header asks for {len(whole_file)} bytes, and the file has {len(whole_file) - 8}"
    )
    shard.write_bytes(b"\xff" * 100)
    refused(f"{shard.name} is not a safetensors file")
    shard.unlink()
    refused(f"{shard.name} is missing")
    shard.write_bytes(whole_file)
    places = json.loads(index)["weight_map"]
    edit(source / shards.INDEX, weight_map=places | {"model.layers.0.ghost": shard.name})
    refused("ghost.*does not have it")
    edit(source / shards.INDEX, weight_map=dict.fromkeys(places, "../elsewhere.safetensors"))
    refused("same folder")
    (source / shards.INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in places.items() if v != shard.name}}))
    refused("weights are not as its config asks for")
    (source / shards.INDEX).unlink()
    refused("has no model.safetensors")
    (source / "config.json").unlink()
    refused("the folder has no config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(TrimError, match=r"the disk is full \(0.00 GiB needed"):
            drop_on_disk(source, [0], tmp_path / "disk")

    def fail(done: int, total: int, name: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrimError, match=r"disk: the disk is full: free some space"):
        drop_on_disk(source, [0], tmp_path / "disk", progress=fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_files_that_changed_while_they_were_written_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source")
    real = shards.write

    def lossy(folder: Path, groups: Any, wrote: Any) -> None:
        real(folder, [group[:-1] for group in groups], wrote)

    monkeypatch.setattr(streaming.shards, "write", lossy)
    with pytest.raises(TrimError, match="do not hold what was written"):
        drop_on_disk(source, [0], tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_config_that_was_written_wrong_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, copied = save_tiny(tmp_path / "source"), streaming._copy_files

    def wrong(source: Path, folder: Path, *rest: Any) -> None:
        copied(source, folder, *rest)
        edit(folder / "config.json", num_hidden_layers=DEPTH)

    monkeypatch.setattr(streaming, "_copy_files", wrong)
    with pytest.raises(TrimError, match=r"the new checkpoint is wrong: it .*model\.layers\.3\."):
        drop_on_disk(source, [0], tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_rewritten_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    kinds = [torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu]
    kinds += [torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32, torch.float32, torch.float64]
    kinds += [torch.int64, torch.uint32, torch.uint64, torch.complex64]
    tensors = {f"ü{n}.{kind}": torch.zeros(n % 3, 3).to(kind) for n, kind in enumerate(kinds)} | {
        "scalar": torch.ones(())
    }
    (tmp_path / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    stored, metadata = shards.read(tmp_path)
    assert metadata == {"format": "pt"}
    plan = [shards.renamed(tensor, tensor.name) for tensor in reversed(stored)]
    shards.write_file(tmp_path / "new", plan, lambda size, name: None)
    assert (tmp_path / "new").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("chunk", [1, 7, 50, 1 << 24])
def test_slices_are_those_of_torch_whatever_the_size_of_chunks(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK", chunk)
    tensor = torch.randn(15, 10).to(torch.bfloat16)
    save_file({"a": torch.ones(3), "t": tensor}, tmp_path / "model.safetensors")
    stored = next(tensor for tensor in shards.read(tmp_path)[0] if tensor.name == "t")
    plan = [shards.sliced(stored, dim, 5, (0, 3, 4)) for dim in (0, 1)]
    for dim, planned in enumerate(plan):
        shards.write_file(tmp_path / f"{dim}", [planned], lambda size, name: None)
        width = tensor.shape[dim] // 5
        expected = torch.cat([tensor.narrow(dim, i * width, width) for i in (0, 3, 4)], dim)
        assert torch.equal(load_file(tmp_path / f"{dim}")["t"], expected)
    with pytest.raises(InputError, match="does not consist of 4 slices"):
        shards.sliced(stored, 0, 4, (0,))


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), (7, 7), ("1.5 MiB", 3 << 19), ("20kb", 20_000)])
def test_sizes_are_read_as_a_person_writes_them(text: str | int, size: int) -> None:
    assert shards.parse_size(text) == size


def test_memory_stays_under_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "streaming_memory.py"
    spec = importlib.util.spec_from_file_location("streaming_memory", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "streaming_memory", benchmark)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "LAYERS", 8)
    monkeypatch.setattr(benchmark, "DROPPED", [1, 2, 5])
    result = benchmark.measure(tmp_path, 0.1, "50MB")
    assert result["wrong"] == []
    assert result["peak"] <= result["bound"]
    assert result["source_bytes"] > 0.09e9
