"""Rows that a model was made with, and the warnings where it is asked them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import helpers_run as h
import pytest

from trimllm import cli
from trimllm.config import ExportConfig
from trimllm.console import Console
from trimllm.errors import InputError
from trimllm.handover import quantized
from trimllm.run import placing, used_rows
from trimllm.run.progressive import trim
from trimllm.tasks import load_task, world

SEED = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> tuple[Path, Path]:
    """40 rows in one file, and a run on them that drew the reported ones by SEED."""
    folder = tmp_path_factory.mktemp("made")
    write(folder / "rows.jsonl", world.questions("law", "train")[:40])
    base = h.save_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        h.fast(patch)
        more: dict[str, Any] = {"seed": SEED, "warmup_epochs": 1, "epochs_per_drop": 0, "keep_checkpoints": True}
        h.run(base, folder / "rows.jsonl", folder / "run", **more)
    return folder / "rows.jsonl", folder / "run"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def warned(capsys: Any, *words: Any) -> list[str]:
    """The warnings of a command that succeeds."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 0
    lines = map(str.strip, capsys.readouterr().err.splitlines())
    return [line for line in lines if "was made with" in line or "by which" in line]


def seen(rows: Path, seed: int) -> tuple[int, int]:
    """How many reported and calibration rows of `seed` the run trained on, or chose layers by: counted by text."""
    ours, theirs = load_task(rows, seed=SEED, calibration_size=6), load_task(rows, seed=seed)
    trained, decided = ({item.prompt for item in items} for items in (ours.train, ours.calibration))
    return (
        sum(item.prompt in trained | decided for item in theirs.test),
        sum(item.prompt in trained for item in theirs.calibration),
    )


def test_eval_names_how_many_reported_rows_made_the_model(made, tmp_path, capsys):
    rows, run = made
    count, _ = seen(rows, 0)
    assert 0 < count < 8
    for model in (run / "model", run / "checkpoints" / "depth-4"):
        told = (
            f"warning: {model} was made with {count} of 8 reported rows (trained on, or chosen by), and is kind to them"
        )
        assert warned(capsys, "eval", "--model", model, "--task", rows) == [f"{told}: give --seed {SEED}, as there"]
        assert warned(capsys, "eval", "--model", model, "--task", rows, "--seed", SEED) == []
    base = run.parent / "base"
    assert warned(capsys, "eval", "--model", base, "--task", rows) == []
    against = warned(capsys, "eval", "--model", base, "--task", rows, "--against", run / "model")
    assert len(against) == 1
    elsewhere = h.save_task(tmp_path / "other")
    assert warned(capsys, "eval", "--model", run / "model", "--task", elsewhere) == [], "rows of their own"


def test_rows_are_known_by_what_they_say(made, tmp_path, capsys):
    """Not by the file's name, their order, their number, or the signs of their spelling."""
    rows, run = made
    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    grown = write(tmp_path / "grown.jsonl", world.questions("law", "train")[40:60] + read[::-1])
    assert warned(capsys, "eval", "--model", run / "model", "--task", grown)
    spelled = write(tmp_path / "spelled.jsonl", [row | {"question": f" {row['question'].upper()}"} for row in read])
    assert warned(capsys, "eval", "--model", run / "model", "--task", spelled)
    (folder := tmp_path / "folder").mkdir()
    ours = load_task(rows, seed=SEED, calibration_size=6)
    for name, items in (("train", ours.test), ("test", ours.train)):
        write(folder / f"{name}.jsonl", [read[int(item.place.rpartition(":")[2]) - 1] for item in items])
    told = warned(capsys, "eval", "--model", run / "model", "--task", folder, "--seed", SEED)
    assert [
        line.endswith("26 of 26 reported rows (trained on, or chosen by), and is kind to them") for line in told
    ] == [1]


def test_a_run_goes_on_from_what_made_its_base(made, tmp_path, capsys, monkeypatch):
    rows, run = made
    h.fast(monkeypatch)
    reported, calibration = seen(rows, 0)
    scanned = warned(capsys, "scan", "--model", run / "model", "--task", rows, "--output", tmp_path / "scan")
    assert len(scanned) == 1, "a scan asks no reported rows"
    assert f"was trained on {calibration} of " in scanned[0]
    assert scanned[0].endswith(f"calibration rows, by which layers are to be chosen: give --seed {SEED}, as there")
    second = tmp_path / "second"
    asked = h.settings(run / "model", rows, second, warmup_epochs=0, epochs_per_drop=0, depth=2)
    trim(console=Console(), **asked)
    told = capsys.readouterr().err
    assert f"was made with {reported} of 8 reported rows" in told
    assert f"was trained on {seen_of(rows, 0)} of 6 calibration rows" in told
    first, both = used_rows.of(run / "model"), used_rows.of(second / "model")
    assert (both.trained, both.seed) == (first.trained, None), "trained on nothing; no seed has all of it unseen"
    warned_of = h.result(second)["warnings"]
    assert [line for line in warned_of if line.startswith(f"{run / 'model'} was")] == warned_of[:2], "it keeps them"
    assert both.decided > first.decided
    assert len(first.trained) == 26
    assert len(first.decided) == 6


def seen_of(rows: Path, seed: int) -> int:
    """Of six calibration rows of `seed`, those that the run trained on."""
    trained = {item.prompt for item in load_task(rows, seed=SEED, calibration_size=6).train}
    return sum(item.prompt in trained for item in load_task(rows, seed=seed, calibration_size=6).calibration)


def test_a_comparison_keeps_what_its_rows_are_made_with(made, tmp_path, capsys, monkeypatch):
    rows, run = made
    h.in_process(monkeypatch)
    words = ["compare", "--model", run / "model", "--task", rows, "--output", tmp_path / "made"]
    words += ["--sequence", 8, "--new-tokens", 2, "--repeats", 1, "--calibration-size", 6, "--methods", "base"]
    told = warned(capsys, *words)
    assert [line.partition(" was ")[2].partition(" of ")[0] for line in told] == [
        f"made with {seen(rows, 0)[0]}",
        f"trained on {seen_of(rows, 0)}",
    ]
    before, after = used_rows.of(run), used_rows.of(tmp_path / "made" / "cells" / "base")
    assert used_rows.of(tmp_path / "made") == after
    assert (after.trained, len(after.decided)) == (before.trained, len(before.decided | after.decided))


def test_a_folder_that_is_no_run_made_nothing(made, tmp_path, monkeypatch):
    _, run = made
    assert used_rows.of(run.parent / "base") == used_rows.of("some/hub-id") == used_rows.Used()
    monkeypatch.chdir(run)
    assert used_rows.of("model").seed == SEED, "by where it lies, and not by how it is called"
    (tmp_path / "config.yaml").write_text("- no\n- run\n")
    assert placing.run_of(h.save_base(tmp_path / "base")) == {}, "whatever lies beside it"
    (tmp_path / "journal.jsonl").touch()
    assert placing.run_of(tmp_path / "base") == {}


def test_a_quantized_model_is_asked_what_its_run_did_not_train_on(made):
    rows, run = made
    asked = ExportConfig(source=str(run), to="int8", task=str(rows))
    assert quantized._evaluation(asked, run / "model").seed == SEED
    (run / used_rows.FILE).rename(run / "away.json")
    try:
        assert quantized._evaluation(asked, run / "model").seed == SEED, "by its settings"
    finally:
        (run / "away.json").rename(run / used_rows.FILE)


def test_a_folder_called_demo_is_not_the_embedded_model(made, tmp_path, monkeypatch):
    _, run = made
    (tmp_path / "demo").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    assert used_rows.of("./demo").seed == SEED
    assert used_rows.of("demo") == used_rows.Used()
    assert placing.run_of("demo") == {}


def test_links_into_a_run_and_out_of_one_are_followed(made, tmp_path):
    _, run = made
    (tmp_path / "link").symlink_to(run / "model")
    assert used_rows.of(tmp_path / "link") == used_rows.of(run)
    copied = Path(copytree(run, tmp_path / "run"))
    (copied / "model").rename(tmp_path / "moved")
    (copied / "model").symlink_to(tmp_path / "moved")
    assert used_rows.of(copied / "model") == used_rows.of(run)


def test_no_seed_is_named_where_several_made_a_model(made, tmp_path):
    rows, run = made
    base, seeds = str(run / "model"), (0, 5, 5)
    for number, seed in enumerate(seeds):
        folder = tmp_path / str(number)
        (folder / "model").mkdir(parents=True)
        used_rows.keep(folder, load_task(rows, seed=seed, calibration_size=6), base, seed, trains=False)
        assert used_rows.of(folder).seed is None
        base = str(folder / "model")


def test_a_seed_that_did_not_make_all_of_it_is_not_written_over(made, tmp_path):
    rows, _ = made
    for seed, kept in ((1, 1), (0, None), (0, None)):
        used_rows.keep(tmp_path, load_task(rows, seed=seed, calibration_size=6), "some/hub-id", seed)
        assert used_rows.of(tmp_path).seed == kept


def test_a_seed_is_named_where_it_helps(made):
    rows, run = made
    drawn = load_task(rows, calibration_size=6)
    assert f"--seed {SEED}" in used_rows.warnings(run, drawn, 0)[0]
    given = replace(drawn, drawn=False, calibration=())
    assert "--seed" not in used_rows.warnings(run, given, 0)[0]


def test_a_resume_notes_the_rows_of_a_run_of_an_earlier_version_and_a_refused_one_none(made, tmp_path, monkeypatch):
    rows, run = made
    h.fast(monkeypatch)
    copied = Path(copytree(run, tmp_path / "run"))
    whole = (copied / used_rows.FILE).read_text()
    (copied / used_rows.FILE).unlink()
    more = {"seed": SEED, "warmup_epochs": 1, "epochs_per_drop": 0, "keep_checkpoints": True, "resume": True}
    with pytest.raises(InputError, match="its weights are not those"):
        h.run(h.save_base(tmp_path / "other", 6), rows, copied, **more)
    assert not (copied / used_rows.FILE).exists()
    h.run(run.parent / "base", rows, copied, **more)
    assert (copied / used_rows.FILE).read_text() == whole
