"""Benchmarks end as the command does: what a user gets wrong is one line and exit code 2."""

from __future__ import annotations

import importlib
import json
import lzma
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from trimllm.errors import InputError, TrimError
from trimllm.run import rundir

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))
WITHOUT_TRIMLLM = {"check_engine.py"}
"""Runs in the environment of an engine."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_benchmark_is_run_by_the_shared_function(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert script.name in WITHOUT_TRIMLLM or text.endswith("    run(main)\n")
    assert script.name not in WITHOUT_TRIMLLM or "trimllm" not in text.replace("trimllm/", "").split('"""', 2)[2]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "law-0" / "published").mkdir(parents=True)
    (tmp_path / "law-0" / "published" / "foreign").touch()
    words = ["--seeds", "0", "--domains", "law", "--full-epochs", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, FOLDER / "schedule.py", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("schedule.py: --output ")


# ---- the pre-training of the lab base


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Path:
    """Files such as the pre-training takes, of a few hundred words."""
    script, folder, rng = module("base", "pretrain"), tmp_path_factory.mktemp("data"), random.Random(0)
    for name in (*script.SOURCES, *script.HELD_OUT.values(), script.WIKITEXT):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [" ".join(rng.choices(["law", "and", "order", "of", "the", "sea"], k=400)) for _ in range(4)]
        lines = texts if path.suffix == ".txt" else [json.dumps({"text": text}) for text in texts]
        with lzma.open(path, "wt") if path.suffix == ".xz" else path.open("w") as stream:
            stream.write("\n".join(lines) + "\n")
    return folder


def module(*parts: str) -> Any:
    """A benchmark's module."""
    folder = str(FOLDER.joinpath(*parts[:-1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return importlib.import_module(parts[-1])


def pretrain(data: Path, output: Path, **changes: Any) -> Any:
    """The state after a pre-training of a few steps."""
    quick = {"blocks": 1, "hidden": 128, "batch": 2, "rows": 1, "device": "cpu", "data": data, "output": output}
    script = module("base", "pretrain")
    words = [word for name, value in (quick | changes).items() for word in script.option(name, value).split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain.py", *words])
        module("base", "pretrain").main()
    return torch.load(output / "state.pt", weights_only=True)


def test_pre_training_goes_on_as_if_it_had_not_ended_and_only_with_its_own_settings(data: Path, tmp_path: Path) -> None:
    whole = pretrain(data, tmp_path / "whole", steps=3)
    half = pretrain(data, tmp_path / "half", steps=2)
    assert half["step"] == 2
    other = {"batch": 3, "lr": 1e-3, "muon_lr": 1e-3, "seed": 1, "blocks": 2, "hidden": 256}
    other["bf16"] = not half["settings"]["bf16"]
    before = (tmp_path / "half" / "state.pt").read_bytes()
    for name, value in other.items():
        given, was = (module("base", "pretrain").option(name, one) for one in (value, half["settings"][name]))
        line = f"{given}: .*half/state.pt was trained with {was}: give that, or another --output"
        with pytest.raises(InputError, match=f"^{line}$"):
            pretrain(data, tmp_path / "half", **{"steps": 3, name: value})
    with pytest.raises(InputError, match=r"--steps 2: the base in .*half has 2 already"):
        pretrain(data, tmp_path / "half", steps=2)
    assert (tmp_path / "half" / "state.pt").read_bytes() == before
    torch.save({name: value for name, value in half.items() if name != "settings"}, tmp_path / "half" / "state.pt")
    resumed = pretrain(data, tmp_path / "half", steps=3)  # a state of an earlier version, which kept no settings
    assert resumed["settings"] == whole["settings"]
    assert all(torch.equal(tensor, resumed["model"][name]) for name, tensor in whole["model"].items())
    assert not any(torch.equal(tensor, half["model"][name]) for name, tensor in whole["model"].items())


def test_exit_codes_are_those_of_the_command_and_of_own_processes(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    run = importlib.import_module("_sides").run

    def ended(error: Exception | int | None) -> Any:
        def main() -> int | None:
            if isinstance(error, Exception):
                raise error
            return error

        with pytest.raises(SystemExit) as caught:
            run(main)
        return caught.value.code or 0, capsys.readouterr().err.count("\n")

    assert [ended(code) for code in (None, 0, 3)] == [(0, 0), (0, 0), (3, 0)]
    assert ended(InputError("wrong")) == (2, 1)
    assert ended(TrimError("failed")) == (1, 1)
    assert ended(subprocess.CalledProcessError(2, "child")) == (2, 0)
    assert ended(subprocess.CalledProcessError(-9, "child")) == (1, 0)
    with pytest.raises(KeyError):
        run(lambda: {}["a bug"])


# ---- the study


def measured(part: str, seed: int, arm: str, **values: float) -> dict[str, Any]:
    named = {"full": "1", "half": "0.5", "quarter": "0.25"}
    return {"part": part, "seed": seed, "arm": arm, "accuracy": {named[k]: {"value": v} for k, v in values.items()}}


def test_study_differences_are_paired_by_part_and_seed_and_keep_what_was_measured_before(tmp_path: Path) -> None:
    study = module("study")
    path = tmp_path / "study.json"
    first = [measured("law", 0, "late", full=90, half=88), measured("law", 1, "late", full=80, half=84)]
    path.write_text(json.dumps({"raw": study.merged(path, first)}))
    new = [measured("law", 0, "one-shot", full=90, half=86), measured("law", 0, "late", full=90, quarter=70)]
    raw = study.merged(path, new)
    assert [(one["seed"], one["arm"], len(one["accuracy"])) for one in raw] == [
        (0, "late", 3),
        (0, "one-shot", 2),
        (1, "late", 2),
    ]
    over_full = study.means(raw)
    assert over_full["late"]["0.5"] == pytest.approx([1, 3, 2])  # -2 and +4
    assert over_full["late"]["0.25"] == (-20, None, 1)
    assert {arm: by["0.5"][::2] for arm, by in study.means(raw, "one-shot").items()} == {"late": (2, 1)}
    assert "+1.0 +- 3.0 (2)" in study.report(over_full)


def test_a_study_takes_its_depths_from_runs_that_went_further(tmp_path: Path, monkeypatch: Any) -> None:
    study, made = module("study"), []

    def trim(asked: Any, console: Any) -> None:
        made.append((Path(asked.output).relative_to(tmp_path).as_posix(), asked.depth))
        Path(asked.output).mkdir(parents=True)
        rundir.claim(asked)
        stages = [
            {"event": "stage", "depth": depth, "test": {"value": depth}} for depth in range(16, asked.depth - 1, -1)
        ]
        Path(asked.output, "result.json").write_text(json.dumps({"history": stages}))

    monkeypatch.setattr(study, "trim", trim)

    def accuracies(arm: str, keep: float) -> dict[float, int]:
        options = Namespace(keep=[keep], output=tmp_path, threads=None)
        return {share: test["value"] for share, test in study.accuracies("law", 0, arm, options).items()}

    assert accuracies("one-shot", 0.25) == {1: 16, 0.25: 4}
    assert accuracies("pairs", 0.25) == {1: 16, 0.25: 4}
    before = [("law-0/trimllm", 4), ("law-0/one-shot/4", 4), ("law-0/pairs", 4)]
    assert made == before
    assert accuracies("trimllm", 0.5) == accuracies("pairs", 0.5) == {1: 16, 0.5: 8}
    assert made == before, "both have been at half the depth on their way"
    assert accuracies("one-shot", 0.5) == {1: 16, 0.5: 8}
    assert made == [*before, ("law-0/one-shot/8", 8)], "a cut at once is a run of its own"
    assert accuracies("one-shot", 0.1) == {1: 16, 0.1: 2}
    assert made[-1] == ("law-0/one-shot/2", 2), "full fine-tuning is in a reference that ended above, too"
