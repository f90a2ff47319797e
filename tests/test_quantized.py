"""A quantized hand-over is smaller, is what was quantized, and is read by stock transformers and by `eval`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers_run as h
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trimllm import cli
from trimllm.bench import benching
from trimllm.blocks.surgery import drop_layers
from trimllm.checkpoints import export
from trimllm.checkpoints.loading import load_model
from trimllm.config import ExportConfig
from trimllm.config.plain_settings import make
from trimllm.errors import InputError, TrimError
from trimllm.handover import quantized

IDS = torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(3))


def base(folder: Path, **changes: Any) -> Path:
    """A checkpoint whose linear layers weigh more than its embedding; sizes suit the 4-bit kernel."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": 1536,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**values | changes))
    return h.save_model(model.to(torch.bfloat16).eval(), folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("source") / "cut")


@pytest.fixture(scope="module", params=["int8", "int4"])
def done(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(format, the directory that the command wrote)."""
    target = tmp_path_factory.mktemp("out") / request.param
    assert cli.main(["export", str(source), "--to", request.param, "--output", str(target)]) == 0
    return request.param, target


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(input_ids=IDS).logits.float()


def test_stock_transformers_reads_a_smaller_checkpoint_of_nearly_the_same_model(
    done: tuple[str, Path], source: Path
) -> None:
    to, target = done
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # 640 thousand weights in matrices and 197 thousand in the embedding, which stays in 16 bits
    assert size(target) < size(source) * {"int8": 0.66, "int4": 0.50}[to]
    whole = sum(parameter.numel() for parameter in load_model(source).parameters())
    assert benching.parameters(load_model(target)) == whole
    before, after = logits(source), logits(target)
    assert torch.isfinite(after).all()
    error = float((before - after).std() / before.std())
    assert 0 < error < {"int8": 0.05, "int4": 0.35}[to]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, load_file(source / "model.safetensors")["model.embed_tokens.weight"])
    out = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 24)


def test_weights_are_those_of_the_matrices_rounded(done: tuple[str, Path], source: Path) -> None:
    """int8 by its definition: each row divided by its largest magnitude, times 127."""
    to, target = done
    name = "model.layers.2.mlp.down_proj.weight"
    was, stored = load_file(source / "model.safetensors")[name].float(), load_file(target / "model.safetensors")
    if to == "int8":
        scale = was.abs().amax(dim=1, keepdim=True)
        assert (stored[name].float() - was / scale * 127).abs().max() <= 0.51
        assert torch.allclose(stored[name.replace("weight", "SCB")], scale[:, 0], rtol=1e-2)
    else:
        assert stored[name].dtype == torch.uint8
        assert stored[name].numel() == was.numel() // 2
        assert torch.allclose(stored[name + ".absmax"], was.reshape(-1, 64).abs().amax(dim=1), rtol=1e-2)


def test_eval_of_the_quantized_model_reports_what_export_reported(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, out = h.save_task(tmp_path / "task"), tmp_path / "int8"
    assert cli.main(["export", str(source), "--to", "int8", "--task", str(task), "--output", str(out)]) == 0
    line = capsys.readouterr().out
    record = tmp_path / "eval.json"
    assert cli.main(["eval", "--model", str(out), "--task", str(task), "--output", str(record)]) == 0
    value = json.loads(record.read_text())["value"]
    assert f"acc {value:.1f} +- " in line
    assert f"{size(out) / 1e6:.2f} MB instead of {size(source) / 1e6:.2f}" in line
    card = ModelCard.load(out / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(value, abs=1e-3)
    assert {"int8", "bitsandbytes"} <= set(card.data.tags)


def test_rows_that_the_run_was_trained_on_are_said(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(quantized.used_rows, "warnings", lambda model, *_, at: [f"seen by {model}, {at.name}"])
    asked = {"source": str(source), "to": "int8", "task": str(h.save_task(tmp_path / "task"))}
    said = quantized.write(source, tmp_path / "out", make(ExportConfig, asked))
    assert f"; warning: seen by {source}, {source.name}" in said


def test_files_of_the_source_travel_and_its_plan_stays(source: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    assert cli.main(["drop", "--model", str(source), "--layers", "1", "--output", str(cut)]) == 0
    (cut / "LICENSE").write_text("Apache License")
    (cut / "optimizer.pt").write_text("")
    assert cli.main(["export", str(cut), "--to", "int8", "--output", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "plan.json", "tokenizer.json", "README.md", "generation_config.json"} <= names
    assert "optimizer.pt" not in names
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["layers"] == [0, 2, 3]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "cut to 3 of 4 layers" in text
    assert "## Quantized" in text


def test_matrices_of_odd_sizes_stay_in_16_bits_so_that_every_cpu_can_run_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = base(tmp_path / "odd", intermediate_size=208, num_hidden_layers=2)
    assert cli.main(["export", str(odd), "--to", "int4", "--output", str(tmp_path / "out")]) == 0
    assert "mlp.down_proj and mlp.gate_proj and mlp.up_proj in 16 bits" in capsys.readouterr().out
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.1.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.self_attn.q_proj.weight"].dtype == torch.uint8
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_another_checkpoint_than_the_model_in_memory_is_found(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = make(ExportConfig, {"source": str(source), "to": "int8"})
    quantized.write(source, out, command)
    model = load_model(out)
    assert quantized.compare(out, model) == 0
    stored = load_file(out / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    save_file(stored | {key: stored[key].roll(1, 0)}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrimError, match="logits differ"):
        quantized.compare(out, model)
    save_file({k: v for k, v in stored.items() if k != key}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrimError, match=r"cannot be loaded again|missing keys"):
        quantized.compare(out, model)


def test_the_checkpoint_is_loaded_again_and_compared_on_the_device_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a model on a GPU; here the device is one that any machine has, and that computes nothing."""
    asked, given = list[torch.device](), list[torch.device]()

    class Elsewhere:
        device = torch.device("meta")

        def eval(self) -> Any:
            return self

        def get_input_embeddings(self) -> nn.Module:
            return nn.Embedding(8, 2)

        def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> Any:
            given.append(input_ids.device)
            return SimpleNamespace(logits=torch.arange(32.0))

    def load(folder: Path, *, device_map: dict[str, torch.device], **_: Any) -> Any:
        asked.append(device_map[""])
        return Elsewhere(), dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())

    monkeypatch.setattr(quantized, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=load))
    assert quantized.compare(tmp_path, Elsewhere()) == 0
    assert {device.type for device in (*asked, *given)} == {"meta"}


def test_rows_longer_than_the_context_are_met_before_the_work_and_cut_where_asked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = h.save_task(tmp_path / "task")
    rows = [json.loads(line) for line in (task / "test.jsonl").read_text().splitlines()]
    long = [row | {"question": f"{row['question']} " * 20} for row in rows]
    (task / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    words = ["export", str(source), "--to", "int8", "--task", str(task), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(quantized.loading, "load_model", lambda *_, **__: pytest.fail("quantized"))
        assert "8 of 8 rows do not fit the context of 128 tokens" in h.line(capsys, *words)
    assert not (tmp_path / "out").exists()
    assert cli.main([*words, "--truncate"]) == 0
    assert "; --truncate, 8 reported rows: prompts cut from the left: 8, " in capsys.readouterr().out
    said = h.line(capsys, "export", str(source), "--to", "int8", "--truncate")
    assert "--truncate is for the rows of --task: leave it out, or add --task" in said


def test_what_cannot_be_quantized_is_one_line_and_leaves_nothing(
    done: tuple[str, Path], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def refusal(folder: Path, kind: type[TrimError] = InputError, to: str = "int8", **more: Any) -> str:
        with pytest.raises(kind) as caught:
            quantized.write(folder, out, make(ExportConfig, {"source": str(folder), "to": to, **more}))
        assert "\n" not in str(caught.value)
        assert not any(path.name.endswith("out") or "out." in path.name for path in tmp_path.iterdir())
        return str(caught.value)

    assert "is quantized already" in refusal(done[1])
    assert "unknown task" in refusal(source, task="demo_lwa")
    wide = base(tmp_path / "wide", vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    assert "nothing to quantize" in refusal(wide, to="int4")
    with monkeypatch.context() as patch:
        patch.setattr(quantized, "_bytes", lambda folder: 10**7)
        assert "would take 10.00 MB, not less than now" in refusal(source, TrimError)
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    assert "pip install 'trimllm[quantize]'" in refusal(source)
    monkeypatch.setattr(quantized, "find_spec", importlib.util.find_spec)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        quantized.write(source, out, make(ExportConfig, {"source": str(source), "to": "int8"}))


def test_trim_and_drop_of_a_quantized_model_are_refused_with_the_remedy(
    done: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = done
    task = h.save_task(tmp_path / "task")
    words = h.arguments(h.settings(folder, task, tmp_path / "run", depth=2))
    assert cli.main(["trim", *words]) == 2
    assert "trim the unquantized model" in capsys.readouterr().err
    assert cli.main(["drop", "--model", str(folder), "--layers", "1", "--output", str(tmp_path / "cut")]) == 2
    assert "add --streaming" in capsys.readouterr().err
    with pytest.raises(InputError, match="--streaming"):
        export.save_trimmed(drop_layers(load_model(folder), [1]), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    assert not (tmp_path / "run").exists()


def test_cut_on_disk_after_quantizing_is_quantizing_after_the_cut(
    done: tuple[str, Path], source: Path, tmp_path: Path
) -> None:
    to, folder = done
    one, other, both = tmp_path / "one", tmp_path / "other", tmp_path / "both"
    assert cli.main(["drop", "--model", str(folder), "--layers", "1", "--streaming", "--output", str(one)]) == 0
    assert cli.main(["drop", "--model", str(source), "--layers", "1", "--output", str(other)]) == 0
    assert cli.main(["export", str(other), "--to", to, "--output", str(both)]) == 0
    assert torch.equal(logits(one), logits(both))


def test_a_model_with_its_own_code_is_refused_or_used_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = h.with_own_code(base(tmp_path / "own"), monkeypatch, tmp_path)
    words = ("export", str(own), "--to", "int8", "--output", str(tmp_path / "out"))
    assert "it brings its own code; if you trust it, give --trust-remote-code" in h.line(capsys, *words)
    assert cli.main([*words, "--trust-remote-code"]) == 0
    plain, made = (load_model(folder, trust_remote_code=True) for folder in (own, tmp_path / "out"))
    assert type(made).__name__ == "OwnForCausalLM"
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert benching.parameters(made, trust_remote_code=True) == benching.parameters(plain) == count


def test_share_counts_tied_weights_once(done: tuple[str, Path], source: Path) -> None:
    model = load_model(source)
    linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    assert quantized._share(load_model(done[1])) == pytest.approx(linear / sum(p.numel() for p in model.parameters()))
