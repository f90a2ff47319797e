"""Benchmarks end as the command does: what a user gets wrong is one line and exit code 2."""

from __future__ import annotations

import importlib
import json
import lzma
import math
import os
import random
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import helpers_run as h
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trimllm import commands
from trimllm.config import DemoConfig, EvalConfig, TrimConfig
from trimllm.config.shared import option_of
from trimllm.demo import steps
from trimllm.errors import InputError, TrimError
from trimllm.run import rundir, targets

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))
WITHOUT_TRIMLLM = {"check_engine.py"}
"""Runs in the environment of an engine."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_benchmark_is_run_by_the_shared_function(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert script.name in WITHOUT_TRIMLLM or text.endswith("    run(main)\n")
    assert script.name not in WITHOUT_TRIMLLM or "trimllm" not in text.replace("trimllm/", "").split('"""', 2)[2]


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "law-0" / "published").mkdir(parents=True)
    (tmp_path / "law-0" / "published" / "foreign").touch()
    words = ["--seeds", "0", "--domains", "law", "--full-epochs", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(FOLDER / "schedule.py"), *words])
    schedule = module("schedule")
    with pytest.raises(SystemExit) as ended:
        schedule.run(schedule.main)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("schedule.py: --output ")


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Path:
    """Files such as the pre-training takes, of a few hundred words."""
    card, folder, rng = module("base", "_card"), tmp_path_factory.mktemp("data"), random.Random(0)
    for name in (*module("base", "_rows").SOURCES, *card.HELD_OUT.values(), card.WIKITEXT):
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


def words_of(data: Path, output: Path, **changes: Any) -> list[str]:
    """Arguments of a pre-training of a few steps."""
    quick = {"blocks": 1, "hidden": 128, "batch": 2, "rows": 1, "device": "cpu", "data": data, "output": output}
    return [word for name, value in (quick | changes).items() for word in option_of(name, value).split()]


def pretrain(data: Path, output: Path, **changes: Any) -> Any:
    """The state after a pre-training of a few steps."""
    words = words_of(data, output, **changes)
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
        given, was = (option_of(name, one) for one in (value, half["settings"][name]))
        line = f"{given}: .*half/state.pt was trained with {was}: give that, or another --output"
        with pytest.raises(InputError, match=f"^{line}$"):
            pretrain(data, tmp_path / "half", **{"steps": 3, name: value})
    with pytest.raises(InputError, match=r"--steps 2: the base in .*half has 2 already"):
        pretrain(data, tmp_path / "half", steps=2)
    assert (tmp_path / "half" / "state.pt").read_bytes() == before
    resumed = pretrain(data, tmp_path / "half", steps=3)
    assert resumed["settings"] == whole["settings"]
    assert all(torch.equal(tensor, resumed["model"][name]) for name, tensor in whole["model"].items())
    assert not any(torch.equal(tensor, half["model"][name]) for name, tensor in whole["model"].items())


def test_two_processes_pre_train_as_one(data: Path, tmp_path: Path) -> None:
    alone = pretrain(data, tmp_path / "alone", steps=2, bf16=False)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [str(FOLDER / "base" / "pretrain.py")]
    words = words_of(data, tmp_path / "two", steps=2, bf16=False)
    done = h.command(*words, launcher=launcher, program=program)
    assert done.stdout.count("step 2 loss ") == 1, done.stderr
    both = torch.load(tmp_path / "two" / "state.pt", weights_only=True)
    assert both["log"][-1]["loss"] == pytest.approx(alone["log"][-1]["loss"], abs=1e-5)
    for name, tensor in alone["model"].items():
        assert torch.allclose(tensor, both["model"][name], atol=1e-5), name
    assert "2 CPU core(s) in float32" in (tmp_path / "two" / "README.md").read_text()
    odd = h.command(*words_of(data, tmp_path / "odd", steps=1, batch=3), launcher=launcher, program=program)
    assert "--batch 3: 2 processes cannot take as many rows each" in odd.stderr
    assert not (tmp_path / "odd").exists()


def test_a_finished_base_is_trained_on_with_rows_that_it_has_not_seen(data: Path, tmp_path: Path) -> None:
    before = pretrain(data, tmp_path / "base", steps=2, seed=1)
    on = pretrain(data, tmp_path / "on", steps=1, seed=1, weights=tmp_path / "base", lr=0.0, muon_lr=0.0)
    rounded = {name: tensor.bfloat16().float() for name, tensor in before["model"].items()}
    assert all(torch.equal(tensor, on["model"][name]) for name, tensor in rounded.items()), "as it was saved"
    reads, card = module("base", "_rows"), module("base", "_card")
    tokenizer = reads.PreTrainedTokenizerFast.from_pretrained(tmp_path / "on")
    rows = reads.source_rows(tokenizer, Namespace(output=tmp_path / "on"))
    plan = reads.order([len(each) for each in rows], 6, 1)
    model = card.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    seen = [card.mean_loss(model, rows[source][row][None]) for source, row in plan]
    assert on["log"][-1]["loss"] == pytest.approx(sum(seen[4:]) / 2, abs=1e-3), "the third step's rows"
    written = (tmp_path / "on" / "README.md").read_text()
    assert (
        "Training: 0.0 M tokens until a learning rate of 0, then, with fresh optimizers,\n  seed 1, 1 step" in written
    )
    assert pretrain(data, tmp_path / "further", steps=1, seed=1, weights=tmp_path / "on")["settings"]["weights"]
    assert json.loads((tmp_path / "further" / "pretraining.json").read_text())["seen"] == 6
    for weights, seed, line in (
        (tmp_path, 1, "^--weights .*: there is no .*: name the --output of a finished pre-training"),
        (tmp_path / "base", 1, r"^--blocks 2: the base in .*base has --blocks 1: give that$"),
        (tmp_path / "base", 0, r"^--seed 0: the base in .*base has --seed 1: give that$"),
    ):
        with pytest.raises(InputError, match=line):
            pretrain(data, tmp_path / "other", steps=1, blocks=2, weights=weights, seed=seed)
        assert not (tmp_path / "other").exists(), "before rows are made"


def test_pre_training_goes_on_at_the_learning_rate_where_it_was(data: Path, tmp_path: Path) -> None:
    pretrain(data, tmp_path, steps=3, warmup=0, decay=1.0)
    for changes in ({"steps": 6}, {"steps": 4, "decay": 0.5}, {"steps": 4, "warmup": 20}, {"steps": 2}):
        with pytest.raises(InputError, match=r"was at 33\.3% of the peak learning rate, by these it is at "):
            pretrain(data, tmp_path, **({"warmup": 0, "decay": 1.0} | changes))
    on_the_plateau = tmp_path / "plateau"
    pretrain(data, on_the_plateau, steps=2, warmup=0, decay=0.1)
    assert pretrain(data, on_the_plateau, steps=4, warmup=0, decay=0.5)["step"] == 4


def test_rows_of_a_killed_start_are_made_again_and_only_those_of_the_same_files_and_seed_used(
    data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    save = np.save

    def torn(file: Any, rows: Any) -> None:
        save(file, rows[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        pretrain(data, tmp_path / "base", steps=1)
    monkeypatch.setattr(np, "save", save)
    other = tmp_path / "data"
    shutil.copytree(data, other)
    (other / "finance/banking77/train.jsonl").write_text(json.dumps({"text": "of the sea " * 400}) + "\n")
    for folder, seed, which in ((other, 0, "finance/banking77/train.jsonl"), (data, 1, "seed")):
        with pytest.raises(InputError, match=f"the rows in .*base are of another {which}: "):
            pretrain(folder, tmp_path / "base", steps=1, seed=seed)
    pretrain(data, tmp_path / "base", steps=1)
    pretrain(data, tmp_path / "whole", steps=1)
    for number in range(len(module("base", "_rows").SOURCES)):
        made, again = ((tmp_path / name / f"rows-{number}.npy").read_bytes() for name in ("whole", "base"))
        assert made == again


def test_a_card_of_what_is_no_finished_base_is_refused_and_nothing_made(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--card: there is no .*typo/pretraining.json: name the --output of a "):
        pretrain(data, tmp_path / "typo", card=True)
    assert not (tmp_path / "typo").exists()


def test_ends_of_documents_count_as_no_characters(data: Path, tmp_path: Path) -> None:
    reads, card = module("base", "_rows"), module("base", "_card")
    pretrain(data, tmp_path, steps=1)
    tokenizer = reads.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    asked = Namespace(output=tmp_path, data=data, device="cpu", rows=100)
    name, loss, _, bits, _ = card.perplexities(tokenizer, asked)[0]
    rows = reads.token_rows(tokenizer, card.load_text(data / card.HELD_OUT[name]))
    texts = [tokenizer.decode(row) for row in rows]
    assert any(steps.EOS in text for text in texts)
    characters = sum(len(text.replace(steps.EOS, "")) for text in texts)
    assert float(bits) == pytest.approx(float(loss) * rows.size / characters / math.log(2), abs=0.002)


def test_a_device_that_finds_or_chooses_otherwise_is_noticed() -> None:
    device = module("device")
    stages = [{"loss": 2.0, "seconds": 3.0}, {"loss": None}, {"loss": 0.5}]
    one = {"layers": [0, 2], "history": stages, "scan": [{"unit": "block 0", "norm": 100.0}]}
    assert device.difference(one, json.loads(json.dumps(one))) == (0.0, 3, "")
    assert device.difference(one, one | {"seconds": 9.0, "layers": [0, 3]}) == (0.0, 3, "layers")
    off = [{"loss": 2.0}, {"loss": None}, {"loss": 0.7}]
    assert device.difference(one, one | {"history": off})[0] == pytest.approx(0.1), "of the largest loss"
    assert device.difference(one, one | {"history": stages[:2]})[0] == math.inf
    assert device.difference(one, one | {"history": [{"loss": math.nan}, *stages[1:]]})[0] == math.inf


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


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
def test_the_studys_default_spreads_its_epochs_as_the_default_does(keep: float) -> None:
    study, stages_ahead = module("study"), targets.stages_ahead
    given = {**study.PARTS["law"].settings, "output": "-", "keep": keep}
    arm = study.ARMS["late, carried, probability, filled"].settings(given, round(16 * (1 - keep)))
    by_default = TrimConfig(model="m", task="t", output="o", keep=keep, epochs_per_drop=given["epochs_per_drop"])
    chosen = ("optimizer_state", "strategy", "sparse_update")
    assert [getattr(by_default, name) for name in chosen] == [arm[name] for name in chosen]
    ours, theirs = stages_ahead(TrimConfig(**arm), 16), stages_ahead(by_default, 16)
    assert [depth for depth, _ in ours] == [depth for depth, _ in theirs]
    assert [epochs for _, epochs in ours] == pytest.approx([epochs for _, epochs in theirs])


def test_a_study_takes_its_depths_from_runs_that_went_further(tmp_path: Path, monkeypatch: Any) -> None:
    study, made, trained = module("study"), [], {}

    def trim(asked: Any, console: Any) -> None:
        made.append((Path(asked.output).relative_to(tmp_path).as_posix(), asked.depth))
        trained[made[-1][0]] = asked.warmup_epochs, asked.epochs_per_drop, asked.final_epochs
        Path(asked.output).mkdir(parents=True)
        rundir.claim(asked)
        stages = [
            {
                "event": "stage",
                "depth": depth,
                "test": {"value": depth},
                "layout": [{"attention": i, "mlp": i} for i in range(depth)],
                "train": {"tokens": 100, "seconds": 2.0},
                "dropped": [{"seconds": 0.5}] * (depth < 16),
            }
            for depth in range(16, asked.depth - 1, -1)
        ]
        Path(asked.output, "result.json").write_text(json.dumps({"history": stages}))

    monkeypatch.setattr(study, "trim", trim)

    def tests(arm: str, keep: float) -> dict[float, dict[str, Any]]:
        return study.accuracies(
            "law", 0, arm, Namespace(keep=[keep], output=tmp_path, threads=None, mixed_precision="auto")
        )

    def accuracies(arm: str, keep: float) -> dict[float, int]:
        return {share: test["value"] for share, test in tests(arm, keep).items()}

    assert accuracies("one-shot", 0.25) == {1: 16, 0.25: 4}
    assert accuracies("pairs", 0.25) == {1: 16, 0.25: 4}
    before = [("law-0/full", 15), ("law-0/one-shot/4", 4), ("law-0/pairs", 4)]
    assert made == before
    assert accuracies("pairs", 0.5) == {1: 16, 0.5: 8}
    assert made == before, "it has been at half the depth on its way"
    assert accuracies("one-shot", 0.5) == {1: 16, 0.5: 8}
    assert made == [*before, ("law-0/one-shot/8", 8)], "a cut at once is a run of its own"
    assert accuracies("one-shot", 0.1) == {1: 16, 0.1: 2}
    assert made[-1] == ("law-0/one-shot/2", 2)
    test = tests("one-shot", 0.25)[0.25]
    costs = [test.pop(name) for name in ("blocks", "tokens", "train_seconds", "scan_seconds")]
    assert costs == [[0, 1, 2, 3], 1400, 28.0, 6.0], "of full fine-tuning and all thirteen stages, twelve after a drop"
    assert accuracies("full, as long", 0.25) == {1: 16, 0.25: 16}
    assert made[-1] == ("law-0/full-as-long/4", 15), "the least that a run drops, after all of the training"
    assert trained["law-0/full-as-long/4"] == (12.0, 0.0, 0.0), "as many epochs as the others after twelve drops"


def test_a_summary_of_the_study_counts_runs_of_all_files_and_draws_what_has_errors(tmp_path: Path) -> None:
    summary = module("study_summary")
    kept = [
        measured("law", 0, "late, carried", full=80, half=78),
        measured("law", 1, "late, carried", full=90, half=93),
    ]
    kept += [measured("finance", 0, "late, carried", full=50, half=46), measured("cuad", 0, "one-shot", full=9, half=9)]
    kept += [measured("law", 0, "full, as long", full=80, half=82)]
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"raw": kept}))
    found = summary.load([path, path], ["late, carried", "one-shot", "full, as long"])
    assert not found["one-shot"], "of another world"
    by = found["late, carried"][0.5]
    assert [run.points for run in by] == 2 * [-2, 3, -4]
    line = summary.row("late, carried", 0.5, by)
    assert line[:4] == ["late, carried", "50%", "6", "-1.0"]
    assert line[5:8] == ["2.2", "-4.0", "2 of 6"], "the mean of law is +0.5, that of finance -4"
    single = {"full, as long": {0.5: found["full, as long"][0.5][:1]}}
    summary.draw({"late, carried": found["late, carried"], **single}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0


def finished(output: str, asked: Any) -> None:
    """A run that ended at once."""
    rundir.claim(asked)
    Path(output, "result.json").write_text(json.dumps({"history": []}))


def test_finished_runs_of_other_settings_are_not_taken_for_those_of_a_schedule(
    tmp_path: Path, monkeypatch: Any
) -> None:
    schedule = module("schedule")
    monkeypatch.setattr(module("study"), "trim", lambda asked, console: finished(asked.output, asked))
    for threads in (1, 2):
        schedule.result(DemoConfig(domain="law", threads=threads), tmp_path / "run", final_epochs=4.0)
    with pytest.raises(InputError, match=r"^--final-epochs 3\.5: the run in .*run has 4\.0: "):
        schedule.result(DemoConfig(domain="law"), tmp_path / "run", final_epochs=3.5)


def test_answers_beyond_are_cut_as_in_training_and_of_their_own_data(tmp_path: Path, monkeypatch: Any) -> None:
    beyond, made = module("beyond"), []

    def evaluate(_: str, asked: EvalConfig) -> None:
        made.append(asked.task)
        Path(str(asked.output)).write_text(json.dumps({"value": len(made)}))

    monkeypatch.setattr(commands, "carry_out", evaluate)
    one = beyond.Trained("medquad_gen", 0, "full", 16, tmp_path / "model", {})

    def measured(**changes: Any) -> int:
        options = Namespace(**{"data": tmp_path / "data", "answers": 100} | changes)
        (asked,) = beyond.questions("medquad_gen", options).values()
        assert asked["truncate"] is True
        return int(beyond.measured(one, "medquad_gen", asked, None)["value"])

    assert [measured(), measured(data=tmp_path / "other"), measured(answers=50), measured()] == [1, 2, 3, 1]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: Any) -> Path:
    """Where records are kept, with one of every script."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("scan", "scan_growth", "memory", "schedule", "racing"):
        (folder / f"{name}.json").write_text("earlier")
    monkeypatch.setattr(module("_sides"), "RESULTS", folder)
    return folder


def last_line(text: str) -> dict[str, Any]:
    """The record of a call, as strict JSON."""

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    found: dict[str, Any] = json.loads(text.splitlines()[-1], parse_constant=refuse)
    return found


def test_a_call_with_other_options_leaves_the_kept_result(results: Path, monkeypatch: Any, capsys: Any) -> None:
    scan = module("scan")
    monkeypatch.setattr(scan, "growth", lambda *_: [])
    part = {"seconds": dict.fromkeys(("ours", "exhaustive", "harness"), 1.0), "layer-tokens over the least possible": 1}
    part |= {name: {"ratio": 1.0, "ratio_min": 1.0, "ratio_max": 1.0} for name in ("exhaustive", "harness")}
    monkeypatch.setattr(scan, "compare", lambda *_: part | {"raw": {"ours": [1.0], "exhaustive": [1.0]}})
    for words in (["--kinds", "short"], ["--repeats", "1"], ["--growth", "--hidden", "64"]):
        monkeypatch.setattr(sys, "argv", ["scan.py", *words])
        scan.main()
        said = capsys.readouterr().out.splitlines()
        assert f"stays as it is: it is of another {words[-2]}" in said[-2]
        assert last_line(said[-1])["name"].startswith("scan")
    assert {path.read_text() for path in results.iterdir()} == {"earlier"}
    for words in ([], ["--growth"]):
        monkeypatch.setattr(sys, "argv", ["scan.py", *words])
        scan.main()
    assert [json.loads((results / f"{name}.json").read_text())["name"] for name in ("scan", "scan_growth")] == [
        "scan",
        "scan_growth",
    ]


def test_kept_results_of_a_stage_are_of_contract_clauses() -> None:
    stages = module("_stages")
    parser = stages.parser("")
    kept = {
        words: stages.changed(parser, parser.parse_args(words.split()), rows=24)
        for words in (
            "--rows 24 --data a/cuad_clause_type",
            "--data a/cuad_clause_type",
            "--rows 24",
            "--rows 24 --data a/medquad_qtype",
        )
    }
    assert list(kept.values()) == [[], ["--rows"], ["--data"], ["--data"]]


def test_a_kill_leaves_the_record_that_was_there(results: Path, monkeypatch: Any) -> None:
    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", kill)
    with pytest.raises(KeyboardInterrupt):
        module("_sides").finish("memory", [1.0], [2.0], "bytes", changed=[])
    assert (results / "memory.json").read_text() == "earlier"


def test_the_record_of_one_pair_of_schedules_is_json_and_not_kept(
    results: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    schedule = module("schedule")

    def compare(command: DemoConfig, *_: Any) -> dict[str, Any]:
        side = {"tokens": 3, "full_fine_tunes": 3.0, "accuracy": 90.0, "stderr": 1.0, "drops": [], "minutes": 1.0}
        full = {"epochs": 3, "tokens": 1, "accuracy": 91.0, "stderr": 1.0}
        pair = {"domain": command.domain, "seed": command.seed, "published": side, "recover": side}
        return pair | {"error": 1.0, "of_equal_accuracy": None, "fully_fine_tuned": [full]}

    monkeypatch.setattr(schedule, "compare", compare)
    monkeypatch.setattr(sys, "argv", ["schedule.py", "--output", str(tmp_path)])
    assert schedule.main() == 0
    record = last_line(capsys.readouterr().out)
    assert (record["pairs"], record["standard_error_over_pairs"]) == (1, None)
    assert (results / "schedule.json").read_text() == "earlier"
    every = ["--domains", "medicine", "law", "finance", "--seeds", "0", "1", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["schedule.py", *every])
    assert schedule.main() == 0
    assert json.loads((results / "schedule.json").read_text())["pairs"] == 9


def test_what_the_harness_does_once_is_not_timed(monkeypatch: Any) -> None:
    scan, calls, clock = module("scan"), [], time.perf_counter

    def scores(*_: Any) -> None:
        calls.append(1)  # the first one takes an hour

    monkeypatch.setattr(scan, "harness_scores", scores)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * bool(calls))
    found = scan.compare("short", 2, 64, 2, 2)
    assert (len(calls), max(found["raw"]["harness"]) < 3600) == (3, True)


def test_recorded_scans_are_of_their_own_weights_and_questions(results: Path, tmp_path: Path, monkeypatch: Any) -> None:
    racing = module("racing")
    rows, records = tmp_path / "rows", tmp_path / "recorded"
    for name, turn in (("rows", 0), ("others", 1)):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            asked = [
                {"question": f"{split} {i}?", "choices": ["sea", "law"], "answer": (i + turn) % 2} for i in range(8)
            ]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    runs = [tmp_path / part / "trimllm" for part in ("medicine-0", "law-0")]
    for run in runs:
        h.save_base(run / "checkpoints" / "depth-3", depth=3)
    weights = runs[1] / "checkpoints" / "depth-3" / "model.safetensors"
    changed = load_file(weights)
    changed["model.norm.weight"] *= -1
    save_file(changed, weights, metadata={"format": "pt"})

    def raced(task: Path) -> int:
        words = [*map(str, runs), "--task", str(task), "--keep", str(records), "--size", "2", "--scans", "2"]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["racing.py", *words])
            racing.main()
        return len(list(records.iterdir()))

    save = np.savez_compressed

    def torn(file: Any, **arrays: Any) -> None:
        save(file, norm=arrays["norm"])
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", torn)
    with pytest.raises(KeyboardInterrupt):
        raced(rows)
    monkeypatch.setattr(np, "savez_compressed", save)
    assert (raced(rows), raced(tmp_path / "others")) == (2, 4)
    monkeypatch.setattr(racing.scan, "scan", lambda *_, **__: pytest.fail("scanned again"))
    runs[0].rename(tmp_path / "elsewhere")
    runs[0] = tmp_path / "elsewhere"
    assert raced(rows) == 4
    assert (results / "racing.json").read_text() == "earlier"
