"""A trimmed checkpoint as an ONNX or OpenVINO graph: the same logits and greedy text, in a loop of plain numpy."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from conftest import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.exporters import ExportedModel, OnnxExporter

import trimllm
from trimllm import commands
from trimllm.blocks.layout import Unit, remove, whole
from trimllm.checkpoints import models
from trimllm.config import ExportConfig
from trimllm.errors import InputError, TrimError
from trimllm.handover import graphs

NEW = 8
TOLERANCE = 1e-4
"""Largest difference of logits, float32, absolute. The largest measured is 2.1e-6."""


def cut(model: Any, how: str) -> Any:
    """Drop one layer: a block, or the MLP of the first with the attention of the second."""
    if how == "blocks":
        return trimllm.drop_layers(model, [0])
    depth = model.config.num_hidden_layers
    return trimllm.apply_layout(model, remove(whole(depth), Unit("pair", 0)))


def save(model: Any, folder: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    trimllm.save_trimmed(model, folder, tokenizer=tokenizer, verify=False)
    return folder


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of up to 9 tokens, padded on the left: longer than the windows of 4; other sizes than traced."""
    ids = torch.randint(3, tiny.VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids.masked_fill(mask == 0, 0), mask


def decode(step: graphs.Step) -> tuple[Any, list[list[int]]]:
    """A greedy loop of plain numpy: logits (rows, 9 + NEW - 1, vocab) and the new tokens."""
    ids, mask = (value.numpy() for value in rows())
    positions = (mask.cumsum(1) - 1).clip(0)
    logits, text = [step(ids, mask, positions)], []
    for _ in range(NEW - 1):
        text.append(logits[-1][:, -1].argmax(-1))
        mask = np.concatenate([mask, np.ones((len(mask), 1), mask.dtype)], axis=1)
        positions = positions[:, -1:] + 1
        logits.append(step(text[-1][:, None], mask, positions))
    text.append(logits[-1][:, -1].argmax(-1))
    return np.concatenate(logits, axis=1), np.stack(text, axis=1).tolist()


@torch.no_grad()
def expected(model: Any) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """What `decode` should find, by `generate` and one forward pass without a cache; and where there is no padding."""
    ids, mask = rows()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0)  # no end of text
    whole_rows = model.generate(ids, attention_mask=mask)
    mask = torch.cat([mask, torch.ones(3, NEW - 1, dtype=mask.dtype)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=whole_rows[:, :-1], attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits, mask == 1, whole_rows[:, ids.shape[1] :].tolist()


CASES = [
    ("onnx", "gpt2", "blocks", 2),
    ("onnx", "qwen2-sliding", "pairs", 2),
    ("openvino", "llama", "pairs", 3),
]


@pytest.mark.parametrize(("to", "family", "how", "depth"), CASES)
def test_graph_decodes_as_the_trimmed_model(
    to: str, family: str, how: str, depth: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = cut(tiny.build(family, depth), how)
    if narrow := family != "qwen2-sliding":
        models.cast(model, torch.bfloat16)
    source = save(model, tmp_path / "model")
    commands.carry_out("export", ExportConfig(source=str(source), to=to))
    target = tmp_path / f"model-{to}"
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{target}: {depth - 1} layers in float32")
    assert ("(the checkpoint is bfloat16)" in printed.out) == narrow
    assert printed.out.count("\n") == 1
    assert printed.err == ""

    shutil.rmtree(source)  # the graph has weights of its own
    save(model, source)
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    wanted, told, text = expected(stock)
    found, decoded = decode(graphs.STEPPERS[to](target))
    assert float((torch.from_numpy(found) - wanted)[told].abs().max()) < TOLERANCE
    assert decoded == text
    assert float((expected(tiny.build(family, depth))[0] - wanted).abs().max()) > 0.1

    if to == "onnx":
        assert by_the_runner(target, stock) < TOLERANCE

    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    assert {"export.json", "generation_config.json"} <= {path.name for path in target.iterdir()}
    assert AutoTokenizer.from_pretrained(target).chat_template == "{{ messages[0]['content'] }}"


def by_the_runner(target: Path, model: Any) -> float:
    """The largest difference in the logits of a second step when transformers' own runner runs the saved graph."""
    ids, mask = rows()
    given: dict[str, Any] = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    cache = DynamicCache()
    with torch.no_grad():
        wanted = model(input_ids=ids, **given).logits[:, 5:]
        model(input_ids=ids[:, :5], past_key_values=cache, **{name: value[:, :5] for name, value in given.items()})
    given["position_ids"] = given["position_ids"][:, 5:]
    runner = ExportedModel.from_pretrained(target, device="cpu")
    return float((runner(input_ids=ids[:, 5:], past_key_values=cache, **given).logits - wanted).abs().max())


def by_transformers(model: Any, error: float) -> Any:
    """Stands for a graph: transformers itself, with an error in the logits of the last step."""

    def make(_: Path) -> graphs.Step:
        cache = DynamicCache()

        def step(ids: Any, mask: Any, positions: Any) -> Any:
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            with torch.no_grad():
                out = model(**{name: torch.from_numpy(value) for name, value in given.items()}, past_key_values=cache)
            return out.logits.numpy() + error * (mask.shape[1] == graphs.PREFILL + graphs.STEPS)

        return step

    return make


@pytest.mark.parametrize("error", [0.0, 0.05, float("nan")])
def test_a_graph_that_is_not_the_model_is_not_written(
    error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama", 2)
    source, target = save(model, tmp_path / "model"), tmp_path / "out"
    monkeypatch.setattr(graphs, "_export", lambda *_: None)
    monkeypatch.setitem(graphs.STEPPERS, "onnx", by_transformers(model, error))
    if error == 0:
        assert "differ by" in graphs.write(source, target, ExportConfig(source="run", to="onnx"))
        assert (target / "tokenizer.json").exists()
        return
    with pytest.raises(TrimError, match=r"the onnx graph is not the model: logits differ by (0\.05|nan) "):
        graphs.write(source, target, ExportConfig(source="run", to="onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_export_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no\nsuch operator")

    monkeypatch.setattr(OnnxExporter, "export", fails)
    source = save(tiny.build("llama", 2), tmp_path / "model")
    with pytest.raises(TrimError, match="llama: the OnnxExporter of transformers failed: no such operator"):
        graphs.write(source, tmp_path / "out", ExportConfig(source="run", to="onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_graph_that_does_not_run_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Falcon with ALiBi multiplies in bfloat16, for which ONNX Runtime has no kernel on CPU."""

    def fails(_: Path) -> None:
        raise RuntimeError("Could not find\nan implementation for Mul")

    monkeypatch.setattr(graphs, "_export", lambda *_: None)
    monkeypatch.setitem(graphs.STEPPERS, "onnx", fails)
    source = save(tiny.build("falcon-alibi", 2), tmp_path / "model")
    with pytest.raises(TrimError, match="falcon: onnxruntime cannot run the onnx graph: Could not find an impl"):
        graphs.write(source, tmp_path / "out", ExportConfig(source="run", to="onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def dynamic_rope() -> Any:
    model = tiny.build("llama", 2)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny.build("lfm2", 3), r"lfm2 cannot be exported: it keeps a state beside keys and values"),
        (lambda: tiny.build("qwen3_next", 3), r"qwen3_next cannot be exported: it keeps a state beside"),
        (dynamic_rope, "llama with rope_type dynamic cannot be exported"),
    ],
)
def test_families_that_are_traced_wrongly_are_refused(model: Any, reason: str, tmp_path: Path) -> None:
    source = save(model(), tmp_path / "model")
    with pytest.raises(InputError, match=reason):
        graphs.write(source, tmp_path / "out", ExportConfig(source="run", to="onnx"))


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_what_is_missing_is_named_before_work(to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, nowhere = ExportConfig(source="run", to=to), tmp_path / "nowhere"
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(InputError, match="the directory is not empty"):
        graphs.write(nowhere, tmp_path / "used", command)

    package = graphs.PACKAGES[to][-1]
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
        with pytest.raises(InputError, match=rf"{package} is not installed: pip install 'trimllm\[{to}\]'"):
            graphs.write(nowhere, tmp_path / "out", command)
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "__version__", "5.22.2")
        with pytest.raises(InputError, match=r"5\.22\.2 has no exporter for it: pip install 'transformers>=5.23'"):
            graphs.write(nowhere, tmp_path / "out", command)
    assert not (tmp_path / "out").exists()
