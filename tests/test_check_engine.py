"""The script that checks a checkpoint in vLLM or SGLang, with transformers in the engine's place."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from conftest import TEXT, make_tokenizer

import trimllm

PROMPTS = [TEXT[:20], TEXT[3:12], "no"]
NEW = 6


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "check_engine.py"
    spec = importlib.util.spec_from_file_location("check_engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["check_engine"] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "model"
    trimllm.save_trimmed(tiny.build("llama", 2), folder, tokenizer=make_tokenizer(), verify=False)
    return folder


class ByTransformers:
    """An engine: greedy decoding without a cache, with what is wrong on purpose."""

    def __init__(self, model: Any, *, other_token: int | None = None, error: float = 0.0) -> None:
        self.model, self.other_token, self.error = model, other_token, error

    @torch.no_grad()
    def greedy(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        found = []
        for prompt in prompts:
            ids = list(prompt)
            for place in range(new):
                ids.append(int(self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
                if place == self.other_token and prompt == prompts[0]:
                    ids[-1] = (ids[-1] + 1) % tiny.VOCAB
            found.append(ids[len(prompt) :])
        return found

    @torch.no_grad()
    def logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        rows = []
        for prompt in prompts:
            scores = self.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
            rows.append([float(scores[i, token]) + self.error for i, token in enumerate(prompt[1:])])
        return rows


@pytest.fixture(scope="module")
def expected(script: ModuleType, checkpoint: Path) -> Any:
    return script.expect(str(checkpoint), "float32", PROMPTS, NEW)


def test_the_same_model_is_the_same(script: ModuleType, expected: Any) -> None:
    result = script.compare(ByTransformers(tiny.build("llama", 2)), expected, 1e-3)
    assert result.same
    assert (result.prompts, result.equal, result.ties) == (3, 3, 0)
    assert result.logprob_difference < 1e-5
    assert [len(row.logprobs) for row in expected] == [len(row.prompt) - 1 for row in expected]
    assert all(len(row.text) == len(row.margins) == NEW and min(row.margins) >= 0 for row in expected)


@pytest.mark.parametrize(
    "engine",
    [
        lambda: ByTransformers(tiny.build("llama", 2), other_token=3),
        lambda: ByTransformers(tiny.build("llama", 2), error=0.01),
        lambda: ByTransformers(tiny.build("llama", 2), error=float("nan")),
        lambda: ByTransformers(tiny.build("llama", 2, seed=1)),
    ],
    ids=["a token", "log-probabilities", "nan", "another model"],
)
def test_another_model_is_not(script: ModuleType, expected: Any, engine: Any) -> None:
    assert not script.compare(engine(), expected, 1e-3).same


def test_a_tie_may_go_either_way_only_where_it_is_one(script: ModuleType, expected: Any) -> None:
    engine = ByTransformers(tiny.build("llama", 2), other_token=3)
    margins = list(expected[0].margins)
    margins[3] = 5e-4
    result = script.compare(engine, [replace(expected[0], margins=margins), *expected[1:]], 1e-3)
    assert result.same
    assert (result.equal, result.ties) == (2, 1)
    margins[2:4] = [5e-4, 0.1]
    assert not script.compare(engine, [replace(expected[0], margins=margins), *expected[1:]], 1e-3).same


def test_speed_counts_new_tokens_and_leaves_the_warm_up_out(script: ModuleType) -> None:
    class Slow:
        now, calls = 0.0, 0

        def greedy(self, prompts: list[list[int]], new: int) -> list[list[int]]:
            self.calls += 1
            self.now += 100.0 if self.calls == 1 else 2.0
            return [[0] * new for _ in prompts]

    engine = Slow()
    assert script.speed(engine, [[1], [2], [3]], 8, 2, lambda: engine.now) == [12.0, 12.0]
    assert engine.calls == 3


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_that_is_not_there_is_named(
    script: ModuleType,
    engine: str,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        script.main(["--engine", engine, "--model", str(checkpoint)])
    assert stopped.value.code == 2
    assert f"{engine} is not installed here" in capsys.readouterr().err


def test_the_report_ends_in_json(
    script: ModuleType, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of `main`, in this process, with transformers in the engine's place."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(script, "version", lambda _: "0")
    monkeypatch.setattr(script, "alone", lambda job, *arguments: job(*arguments))
    monkeypatch.setitem(script.ENGINES, "vllm", lambda *_: ByTransformers(tiny.build("llama", 2)))
    settings = ["--new", "4", "--speed-tokens", "2", "--copies", "1", "--repeats", "1"]
    arguments = ["--engine", "vllm", "--model", str(checkpoint), "--reference", str(checkpoint), *settings]
    assert script.main(arguments) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["same"]
    assert record["prompts"] == 8
    assert record["speed_up"] > 0
    monkeypatch.setitem(script.ENGINES, "vllm", lambda *_: ByTransformers(tiny.build("llama", 2, seed=1)))
    assert script.main(arguments) == 1
