"""A tiny model, a tiny task and settings for whole runs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, dynamic_module_utils

from trimllm import cli, compare
from trimllm.baselines import cell, elsewhere
from trimllm.bench import timing
from trimllm.checkpoints import verification
from trimllm.checkpoints.loading import DEMO, load_tokenizer
from trimllm.config import TrimConfig, without_idle
from trimllm.console import Console
from trimllm.evaluation import fluency
from trimllm.run import progressive, recording, targets
from trimllm.run.progressive import trim
from trimllm.tasks import world

DEPTH = 5


def save_model(model: Any, folder: Path) -> Path:
    """The model with the embedded model's tokenizer."""
    model.save_pretrained(folder)
    load_tokenizer(DEMO).save_pretrained(folder)
    return folder


def save_base(folder: Path, depth: int = DEPTH, dtype: torch.dtype = torch.float32, context: int = 128) -> Path:
    """A random Llama whose blocks all differ and all matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(load_tokenizer(DEMO)),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return save_model(model.to(dtype), folder)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_code"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(folder: Path, monkeypatch: Any, cache: Path) -> Path:
    """The checkpoint of a Llama, changed to one that brings its code; `cache` is where transformers copies that."""
    (folder / "own.py").write_text(OWN_CODE, encoding="utf-8")
    named = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    changed = {"model_type": "own_code", "architectures": ["OwnForCausalLM"], "auto_map": named}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changed), encoding="utf-8")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache / "modules"))
    monkeypatch.syspath_prepend(str(cache / "modules"))
    return folder


def save_task(folder: Path, train: int = 24, test: int = 8) -> Path:
    """Four-way questions with a train and a test file."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        rows = world.questions("law", split)[:count]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def settings(model: Path, task: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of seconds that stops at depth 3."""
    quick = {
        "model": str(model),
        "task": str(task),
        "output": str(output),
        "calibration_size": 6,
        "lr": 1e-3,
        "batch_size": 128,
        "eval_batch_size": 96,
        "report_depths": False,
        "device": "cpu",
    }
    target = {"max_params", "max_memory", "target_speedup", "min_accuracy", "max_drop", "keep", "depth"}
    asked = quick | ({} if target & set(changes) else {"depth": 3}) | changes
    return without_idle(TrimConfig, asked) | changes


def run(model: Path, task: Path, output: Path, **changes: Any) -> tuple[Any, list[dict[str, Any]]]:
    """One quiet run."""
    return trim(console=Console(quiet=True), **settings(model, task, output, **changes))


def fast(monkeypatch: Any) -> None:
    """Decode speeds as if every block took a millisecond, few words written freely, saved models verified over one step
    of decoding, no waiting for the disk."""

    def speeds(models: dict[str, Any], *, repeats: int = 5, **_: Any) -> dict[str, list[float]]:
        return {name: [1000.0 / model.config.num_hidden_layers] * repeats for name, model in models.items()}

    def final_speedup(recorder: Any, saved: Any) -> dict[str, float]:
        """Without the base, which is loaded for it."""
        ratio = recorder.journal.of("base")[0]["depth"] / saved.config.num_hidden_layers
        return {"median": ratio, "min": ratio, "max": ratio}

    monkeypatch.setattr(timing, "decode_speed", speeds)
    monkeypatch.setattr(recording.Recorder, "final_speedup", final_speedup)
    monkeypatch.setattr(verification, "STEPS", 1)
    monkeypatch.setattr(fluency, "TOKENS", 3)
    monkeypatch.setattr(os, "fsync", lambda _: None)


SPEED = {
    "ratio": {"median": 1.0, "min": 0.9, "max": 1.1},
    "prefill_ratio": {"median": 1.0, "min": 0.9, "max": 1.1},
    "dtype": "float32",
    "slowdown": 1.0,
    "prefill_tokens_per_second": 1.0,
    "decode_tokens_per_second": 1.0,
    "peak_bytes": None,
}
"""Of a row of a comparison that was not timed."""


def in_process(monkeypatch: Any, picture: bool = False, apart: str = "") -> None:
    """Rows of comparisons are made in this process: no child starts, nothing is timed, but for the row of the method
    `apart`."""

    def child(command: list[str], *_: Any) -> int:
        assert command[1:3] == ["-m", "trimllm.baselines.cell"]
        return subprocess.run(command).returncode if command[4] == apart else cell.main(command[3:])

    monkeypatch.setattr(elsewhere, "ended", child)
    monkeypatch.setattr(cell, "speed", lambda *_: SPEED)
    fast(monkeypatch)
    if not picture:
        monkeypatch.setattr(compare, "compare_plot", lambda *_: None)


def arguments(values: dict[str, Any]) -> list[str]:
    """Settings as command-line options."""
    out = []
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            out.append(option if value else "--no-" + option[2:])
        else:
            out += [option, str(value)]
    return out


def command(
    *words: str, launcher: list[str] | None = None, program: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m trimllm ...` in a process of its own, or another program in its place."""
    line = [sys.executable, *(launcher or []), *(program or ["-m", "trimllm"]), *words]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


def line(capsys: Any, *words: str) -> str:
    """The only line that a command prints which the user got wrong."""
    capsys.readouterr()
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


def journal(output: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The events of a run."""
    lines = [json.loads(line) for line in (output / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if event is None or line["event"] == event]


def result(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text(encoding="utf-8"))


def drops(output: Path) -> list[list[str]]:
    return [drop["units"] for drop in journal(output, "drop")]


def weights_hash(folder: Path) -> str:
    """SHA-256 of the safetensors files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).hexdigest()


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it. (A real SIGKILL: benchmarks/kill_resume.py.)"""


def floor_ends(monkeypatch: Any, stages: int) -> None:
    """The stage of this number (1-based) is the first that falls below the floor."""
    monkeypatch.setattr(progressive.Run, "_above_floor", lambda run: len(run.journal.of("stage")) < stages)
    good = targets.last_good
    monkeypatch.setattr(targets, "last_good", lambda config, all_, kept: good(config, all_[: stages - 1], kept))


def kill_at(monkeypatch: Any, owner: Any, name: str, call: int, *, after: bool = False) -> None:
    """Die at call number `call` (1-based) of `owner.name`, before or after it does its work."""
    work, calls = getattr(owner, name), [0]

    def dying(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            raise Killed
        value = work(*arguments, **more)
        if calls[0] == call:
            raise Killed
        return value

    monkeypatch.setattr(owner, name, dying)


def photographed_run(
    points: dict[str, Any], album: Path, model: Path, task: Path, prepare: Callable[[Any], None] = fast, **changes: Any
) -> Path:
    """A run to its end, in `straight` of the folder `album`, which is returned. At every one of the points (owner,
    name, call, whether after its work) the run's folder is copied to `album/POINT` as it is, which is what SIGKILL
    would have left there. `prepare` is called with the monkeypatch before."""
    output, calls = album / "straight", Counter[tuple[Any, str]]()

    def photograph(*moment: Any) -> None:
        for point in (point for point, each in points.items() if each == moment):
            copytree(output, album / point) if output.exists() else (album / point).mkdir()

    def photographed(owner: Any, name: str) -> Any:
        work = getattr(owner, name)

        def working(*arguments: Any, **more: Any) -> Any:
            calls[owner, name] += 1
            number = calls[owner, name]
            photograph(owner, name, number, False)
            value = work(*arguments, **more)
            photograph(owner, name, number, True)
            return value

        return working

    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        for owner, name in {point[:2] for point in points.values()}:
            patch.setattr(owner, name, photographed(owner, name))
        run(model, task, output, **changes)
    assert [point for point in points if not (album / point).exists()] == []
    return album


def killed_run(point: Any, model: Path, task: Path, output: Path, **changes: Any) -> None:
    """A run that dies at `point`: (owner, name, call) and whether after its work, see `kill_at`."""
    owner, name, call, *after = point
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, name, call, after=any(after))
        with pytest.raises(Killed):
            run(model, task, output, **changes)
