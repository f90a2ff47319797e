"""`trimllm compare`: one comparison from end to end, and what happens to rows that cannot be made."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from helpers_run import SPEED, Killed, in_process, save_base, save_task, with_own_code
from matplotlib.axes import Axes
from matplotlib.text import Text
from transformers import AutoTokenizer

from trimllm import cli, compare, compare_report, memory, startup
from trimllm.baselines import METHODS, Cell, cell, cells, elsewhere, job, plain
from trimllm.bench import benching, tables
from trimllm.checkpoints import arithmetic, folders, models, room
from trimllm.config import CompareConfig, EvalConfig, TrimConfig, plain_settings
from trimllm.console import Console
from trimllm.errors import InputError, TrimError
from trimllm.evaluation import inputs
from trimllm.evaluation.paired import shown
from trimllm.run import used_rows
from trimllm.tasks import load_task

DEPTH = 4
KEEPS = (0.75, 0.5)
HALF = 0.5
DONE = {
    "status": "done",
    "note": "",
    "depth": 4,
    "parameters": 10,
    "disk_bytes": 40,
    "accuracy": {"t": {"metric": "acc", "value": 50.0, "stderr": 1.0, "n": 4, "acc_norm": 51.0}},
    "speed": SPEED,
    "conditions": {"device": "cpu", "threads": 1},
    "tokens": 0,
    "train_seconds": 0.0,
    "compress_seconds": 0.0,
    "seconds": 1.0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: Any) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("world")
    base = save_base(folder / "base", DEPTH)
    (base / "LICENSE").write_text("Apache License")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    return base, save_task(folder / "task")


def settings(world: tuple[Path, Path], output: Path, **changes: Any) -> CompareConfig:
    quick = {
        "model": str(world[0]),
        "task": str(world[1]),
        "output": str(output),
        "calibration_size": 6,
        "lr": 1e-3,
        "batch_size": 256,
        "epochs_per_drop": 0.5,
        "schedule": "epoch",
        "sequence": 16,
        "new_tokens": 2,
        "repeats": 1,
        "device": "cpu",
        "threads": 1,
    }
    return plain_settings.make(CompareConfig, quick | changes)


def go(command: CompareConfig) -> dict[str, dict[str, Any]]:
    rows = compare.compare(command, Console(quiet=True))["rows"]
    return {Cell(METHODS[row["method"]], row["keep"]).name: row for row in rows}


def made_up(monkeypatch: Any, **made: Any) -> list[list[str]]:
    """Children that write a finished row at once, or what `made` says for a method; the list of those that ran."""
    ran = []

    def child(command: list[str], *_: Any) -> int:
        root, name, *keep = command[3:]
        ran.append([name, *keep])
        row = made.get(name, DONE)
        if isinstance(row, int):
            return row
        each = Cell(METHODS[name], float(keep[0]) if keep else None)
        text = json.dumps({"method": name, "keep": each.keep, **row})
        (Path(root) / "cells" / each.name / "row.json").write_text(text)
        return 0

    monkeypatch.setattr(elsewhere, "ended", child)
    monkeypatch.setattr(compare, "compare_plot", lambda *_: None)
    return ran


def accuracy(checkpoint: Path, task: Path) -> dict[str, Any]:
    """The reported split by the checkpoint, without anything of `compare`."""
    settings = EvalConfig(model=str(checkpoint), task=str(task), device="cpu")
    loaded = models.load(settings)
    data = inputs.task_data(settings, loaded.tokenizer)
    return (
        inputs.scorer(settings, loaded.model, loaded.tokenizer, data.test).evaluate(loaded.model, data.metric).summary()
    )


@pytest.fixture(scope="module")
def whole(world: tuple[Path, Path], tmp_path_factory: Any) -> tuple[Path, dict[str, dict[str, Any]], str]:
    """A real comparison: its folder, its rows, what it printed.

    The base's row is made and timed as users have it, by a child process; meanwhile the others in this one, for time's
    sake.
    """
    output = tmp_path_factory.mktemp("whole") / "compare"
    command = settings(world, output, methods=("base", "full", "trim", "shortgpt"), keep=(HALF,))
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, picture=True, apart="base")
        compare.claim(command, output, {})
        with ThreadPoolExecutor(1) as pool:
            child = pool.submit(compare.make_row, command, Cell(METHODS["base"], None), output, 2)
            go(command.model_copy(update={"methods": ("full", "trim", "shortgpt"), "resume": True}))
            child.result()
        with redirect_stdout(StringIO()) as printed:
            go(command.model_copy(update={"resume": True}))
    rows = json.loads((output / "compare.json").read_text())["rows"]
    return output, {row["method"]: row for row in rows}, printed.getvalue()


def test_figures_are_those_of_the_checkpoints(whole: Any, world: tuple[Path, Path]) -> None:
    output, rows, _ = whole
    assert list(rows) == ["base", "full", "trim", "shortgpt"]
    assert all(row["status"] == "done" for row in rows.values())
    for name, row in rows.items():
        checkpoint = output / row["checkpoint"]
        (found,) = row["accuracy"].values()
        assert found == accuracy(checkpoint, world[1])
        assert row["depth"] == (DEPTH if name in ("base", "full") else DEPTH // 2)
        assert row["disk_bytes"] == (checkpoint / "model.safetensors").stat().st_size
        assert row["tokens"] == 0 if name == "base" else row["tokens"] > 0
        assert (checkpoint / "LICENSE").read_text() == "Apache License"
        if name in ("trim", "shortgpt"):
            assert "\nlicense: mit\n" in (checkpoint / "README.md").read_text()
    assert output / rows["base"]["checkpoint"] == world[0]
    assert rows["trim"]["parameters"] == rows["shortgpt"]["parameters"] < rows["base"]["parameters"]


def test_rows_are_held_against_full_fine_tuning_question_by_question(
    whole: Any, world: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output, rows, printed = whole
    full = output / rows["full"]["checkpoint"]
    assert rows["full"]["above_full"] == {}
    for name in ("base", "trim"):
        told = output.parent / f"{name}.json"
        model = str(output / rows[name]["checkpoint"])
        words = ["eval", "--model", model, "--task", str(world[1]), "--against", str(full)]
        assert cli.main([*words, "--device", "cpu", "--output", str(told)]) == 0
        (above,) = rows[name]["above_full"].values()
        assert above == json.loads(told.read_text())["against"]["above"]
        line = next(line for line in printed.splitlines() if line.startswith(rows[name]["title"] + "  "))
        assert f"  {shown(above)}  " in line
    assert "\nabove full: points of task above full fine-tuning, +- standard error over paired answers" in printed


def test_rows_are_not_held_against_what_is_not_there(whole: Any, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(whole[0], output)
    full = Cell(METHODS["full"], None)

    def held() -> list[dict[str, Any]]:
        return compare.against_full(compare.finished(output), output)

    assert [bool(row["above_full"]) for row in held()] == [True, False, True, True]
    (output / "cells" / "trim-0.5" / "answers.json").unlink()  # lost
    assert [bool(row["above_full"]) for row in held()] == [True, False, False, True]
    full.file(output).write_text(json.dumps(full.row(output) | {"status": "failed", "why": "w"}))
    rows = held()
    assert not any(row["above_full"] for row in rows)
    settings = {"methods": ["base"], "keep": [0.5]}
    assert "above full" not in compare_report.report({"rows": rows, "settings": settings})


def test_peers_train_as_long_as_the_progressive_run(whole: Any) -> None:
    output, *_ = whole
    stages = {}
    for name in ("trim-0.5", "shortgpt-0.5"):
        path = next(p for p in output.rglob("journal.jsonl") if name in str(p))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        stages[name] = [line["train"]["steps"] for line in lines if line["event"] == "stage"]
    assert sum(stages["trim-0.5"]) == sum(stages["shortgpt-0.5"]) > 0


def test_what_its_models_were_trained_on_is_known(whole: Any, world: tuple[Path, Path]) -> None:
    output, rows, _ = whole
    data = load_task(world[1], calibration_size=6)
    for name in ("full", "trim", "shortgpt"):
        used = used_rows.of(output / rows[name]["checkpoint"])
        assert (len(used.trained), len(used.decided)) == (len(data.train), len(data.calibration))
        assert used_rows.warnings(output / rows[name]["checkpoint"], data, 0) == []
        asked = replace(data, test=data.train[:2], calibration=data.train[2:5])
        said = used_rows.warnings(output / rows[name]["checkpoint"], asked, 0)
        assert [line.partition(" of ")[0].rpartition(" ")[2] for line in said] == ["2", "3"]


def test_table_shows_the_rows(whole: Any) -> None:
    output, rows, printed = whole
    for row in rows.values():
        (found,) = row["accuracy"].values()
        quality, size = (line for line in printed.splitlines() if line.startswith(row["title"] + "  "))
        assert f" {row['depth']}  {found['value']:.1f} +- {found['stderr']:.1f} " in re.sub(r" {2,}", "  ", quality)
        assert f"{row['parameters'] / 1e6:.2f}" in size
        assert f"{row['speed']['decode_tokens_per_second']:.1f}" in size
    speed = rows["base"]["speed"]
    assert 0 < speed["ratio"]["min"] <= speed["ratio"]["median"] <= speed["ratio"]["max"]
    assert speed["decode_tokens_per_second"] > 0
    assert (speed["sequence"], speed["new_tokens"]) == (16, 2)
    assert (speed["dtype"], speed["slowdown"]) == ("float32", 1)
    for phase, ratio in (("prefill", speed["prefill_ratio"]), ("decode", speed["ratio"])):  # of one round
        beside = speed["base"][f"{phase}_tokens_per_second"]
        assert ratio["median"] == pytest.approx(speed[f"{phase}_tokens_per_second"] / beside)
    assert rows["base"]["source"] == ""
    assert rows["trim"]["source"] == "https://arxiv.org/abs/2412.11242"
    assert (output / "compare.png").stat().st_size > 5000


def test_speeds_that_a_cpu_emulates_are_said_and_taken_in_the_dtype_that_was_asked_for(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    product = job.Product(str(world[0]))
    asked = settings(world, tmp_path / "out", dtype="bfloat16")
    monkeypatch.setattr(arithmetic, "_measured", lambda dtype: 8.0)  # the models' processes measure for themselves
    assert cell.speed(asked, product)["dtype"] == "bfloat16"
    known = [
        {"slowdown": 8.0, "dtype": "bfloat16"},
        {"slowdown": 1.0, "dtype": "bfloat16"},
    ]  # a quantized row's own is 1
    speeds = dict.fromkeys(("read_bytes_per_step", *SPEED), 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(benching, "measure", lambda _: (benching.Lengths(16, 2), known, {}))
        patch.setattr(tables, "record", lambda *_: {"rows": [speeds, speeds]})
        assert cell.speed(asked, product)["slowdown"] == 8, "the base beside it was slow"
    slow = DONE | {"speed": SPEED | {"dtype": "bfloat16", "slowdown": 8.0}, "above_full": {}, "keep": None}
    rows = [slow | {"method": "full", "title": "full"}]
    told = compare_report.report({"rows": rows, "settings": {"methods": ["full"], "keep": [0.5]}})
    assert "\nthis CPU emulates bfloat16: prefill is faster with --dtype float32" in told
    assert "speeds are in" not in told
    own = SPEED | {"dtype": "float16"}
    rows += [slow | {"method": "llm-int8", "title": "LLM.int8()", "speed": own}]
    rows += [rows[0] | {"title": "other", "above_full": {"t": {"difference": 0.0, "stderr": 0.0}}}]
    told = compare_report.report({"rows": rows, "settings": {"methods": ["full"], "keep": [0.5]}})
    assert "\nspeeds are in bfloat16, those of LLM.int8() in float16" in told
    assert "  same scores  " in told


def test_names_in_the_picture_are_all_there_and_do_not_cover_one_another(tmp_path: Path, monkeypatch: Any) -> None:
    drawn, annotate = list[Any](), Axes.annotate

    def drawing(self: Axes, *where: Any, **how: Any) -> Any:
        drawn.append(annotate(self, *where, **how))
        return drawn[-1]

    monkeypatch.setattr(Axes, "annotate", drawing)
    rows = []
    for number, each in enumerate(cells((), (0.5, 0.25))):
        own = {"t": DONE["accuracy"]["t"] | {"value": 40.0 if number == 7 else 97 + (number % 5) / 10}}
        speed = SPEED | {"ratio": {"median": 1.0 + number % 3, "min": 1.0, "max": 3.0}}
        rows.append(DONE | {"method": each.method.name, "title": each.title, "accuracy": own, "speed": speed})
    compare_report.compare_plot({"rows": rows, "settings": {"model": "m", "task": "t"}}, tmp_path / "compare.png")
    figure = drawn[0].figure
    figure.set_dpi(130)  # as it was saved
    boxes = [Text.get_window_extent(text) for text in drawn]  # without the line to the point
    assert {text.get_text() for text in drawn} == {row["title"] for row in rows}
    assert [text.xy[1] for text in drawn] == sorted(text.xy[1] for text in drawn)
    assert [box.y0 for box in boxes] == sorted(box.y0 for box in boxes), "names stand in the order of the points"
    assert not [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.overlaps(b)]
    assert all(box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)


@pytest.mark.parametrize("heights", [[0.0, 0.01, 0.02], [0.98, 0.99, 1.0], [0.1, 0.5, 0.52, 0.9]])
def test_names_beside_the_picture_stay_within_its_height(heights: list[float]) -> None:
    found = compare_report._spread(heights, 0.1)
    assert all(0 <= height <= 1 for height in found)
    assert all(above - below >= 0.1 - 1e-9 for below, above in itertools.pairwise(found))
    assert found[0] == heights[0] or heights[0] > 0.9


def test_table_and_picture_name_the_metric(tmp_path: Path, monkeypatch: Any) -> None:
    labels: list[str] = []
    accuracy = {
        "notes": DONE["accuracy"]["t"] | {"metric": "likelihood", "perplexity": 2117.4},
        "t": DONE["accuracy"]["t"],
    }
    row = DONE | {"method": "base", "keep": None, "title": "no training", "accuracy": accuracy, "above_full": {}}
    found = {"rows": [row], "settings": {"model": "m", "task": "notes", "methods": ["base", "full"], "keep": [0.5]}}
    told = compare_report.report(found)
    assert "\nnotes: likelihood, t: acc, in percent +- standard error" in told
    assert ("perplexity" in told, "acc_norm" in told, "  2117  " in told) == (True, False, True)
    monkeypatch.setattr(Axes, "set_ylabel", lambda _, text: labels.append(text))
    compare_report.compare_plot(found, tmp_path / "compare.png")
    assert labels == ["likelihood on the reported split (%)"]


def test_rows_that_a_resume_would_make_are_named() -> None:
    cells = [("base", None), ("full", None), ("trim", 0.333333)]  # as a child is told 1/3
    rows = [DONE | {"method": name, "keep": keep, "title": name, "above_full": {}} for name, keep in cells]
    settings: dict[str, Any] = {"methods": ["trim", "llm-int8"], "keep": [0.5, 1 / 3]}
    said = "\n--resume without --methods and --keep would also make: trim-0.5, llm-int8"
    assert compare_report.report({"rows": rows, "settings": settings}).endswith(said)
    settings["methods"] = ["base"]
    assert "would also make" not in compare_report.report({"rows": rows, "settings": settings})


def test_modules_in_the_users_folder_are_not_those_of_python(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "inspect.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    command = settings(world, tmp_path / "out")
    compare.claim(command, tmp_path / "out", {})
    compare.make_row(command, Cell(METHODS["gptq"], None), tmp_path / "out", 2)
    assert Cell(METHODS["gptq"], None).row(tmp_path / "out")["status"] == "not run"


def test_an_interrupted_row_says_nothing(world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    def stopped(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except startup.Terminated:
            os.kill(os.getpid(), signal.SIGTERM)  # of its group, and of the comparison: what it saves then is saved
            raise

    compare.claim(settings(world, tmp_path), tmp_path, {})
    monkeypatch.setattr(cell, "measure", stopped)
    assert cell.main([str(tmp_path), "base"]) == 128 + signal.SIGTERM
    assert not Cell(METHODS["base"], None).file(tmp_path).exists()


def test_resume_keeps_finished_rows_and_adds_others(
    whole: Any, world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """In a folder that was moved."""
    output, rows, _ = whole
    moved = shutil.copytree(output, tmp_path / "moved")
    before = {path: path.stat().st_mtime_ns for path in moved.glob("cells/*/row.json")}
    in_process(monkeypatch)
    names = ("base", "full", "trim", "shortgpt", "random")
    found = go(settings(world, moved, methods=names, keep=(HALF,), resume=True))
    assert found["random-0.5"]["status"] == "done"
    assert found["random-0.5"]["depth"] == DEPTH // 2
    assert (moved / found["random-0.5"]["checkpoint"] / "config.json").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {name: found[name]["accuracy"] for name in ("base", "full")} == {
        name: rows[name]["accuracy"] for name in ("base", "full")
    }


def test_depths_of_trim_share_a_run(whole: Any, world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    output, rows, _ = whole
    copy = shutil.copytree(output, tmp_path / "copy")
    for name in ("trim-0.5", "shortgpt-0.5"):
        shutil.rmtree(copy / "cells" / name)
    shutil.rmtree(copy / "runs")
    in_process(monkeypatch)
    found = go(settings(world, copy, methods=("trim",), keep=(0.75, 0.5), resume=True))
    assert [path.name for path in (copy / "runs").iterdir()] == ["trim-0.5"]
    assert {name: found[name]["depth"] for name in ("trim-0.75", "trim-0.5")} == {"trim-0.75": 3, "trim-0.5": 2}
    assert 0 < found["trim-0.75"]["tokens"] < found["trim-0.5"]["tokens"] == rows["trim"]["tokens"]
    assert found["trim-0.5"]["accuracy"] == rows["trim"]["accuracy"]


def test_late_training_is_as_long_as_that_of_peers_and_every_depth_has_a_run(
    whole: Any, world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    in_process(monkeypatch)
    late = settings(
        world, tmp_path / "late", schedule="late", epochs_per_drop=3, methods=("trim", "shortgpt"), keep=KEEPS
    )
    found = go(late)
    assert not (tmp_path / "late" / "runs").exists()
    assert {name: found[name]["depth"] for name in ("trim-0.75", "trim-0.5")} == {"trim-0.75": 3, "trim-0.5": 2}
    for keep in KEEPS:
        assert found[f"trim-{keep}"]["tokens"] == found[f"shortgpt-{keep}"]["tokens"] > 0
    lines = (tmp_path / "late/cells/trim-0.5/run/journal.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    first, last = [event["train"]["tokens"] for event in events if event["event"] == "stage"][1:]
    assert last == 5 * first


def test_a_model_with_its_own_code_is_refused_or_used_as_asked(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    own = (with_own_code(shutil.copytree(world[0], tmp_path / "base"), monkeypatch, tmp_path), world[1])
    in_process(monkeypatch)
    with pytest.raises(InputError, match="it brings its own code; if you trust it, give --trust-remote-code"):
        go(settings(own, tmp_path / "new", methods=("trim",)))
    quick = {"epochs_per_drop": 0, "warmup_epochs": 0, "trust_remote_code": True}
    found = go(settings(own, tmp_path / "out", methods=("trim",), keep=(0.75, HALF), **quick))
    assert {name: row["depth"] for name, row in found.items()} == {"full": 4, "trim-0.75": 3, "trim-0.5": 2}


def test_other_settings_are_refused(world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    ran = made_up(monkeypatch)
    go(settings(world, tmp_path / "out", methods=("base",)))
    with pytest.raises(InputError, match="add --resume") as error:
        go(settings(world, tmp_path / "out", methods=("base",)))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="lr") as error:
        go(settings(world, tmp_path / "out", methods=("base",), resume=True, lr=5e-4))
    assert "\n" not in str(error.value)
    go(settings(world, tmp_path / "out", methods=("base",), resume=True, micro_batch_size=2))
    assert ran == [["base"]]


def test_a_comparison_that_another_process_works_on_is_refused(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    ran = made_up(monkeypatch)
    output = tmp_path / "out"
    with folders.held(output), pytest.raises(InputError, match="something is at work there already"):
        go(settings(world, output, methods=("base",)))
    assert not ran
    assert not output.exists()


@pytest.mark.parametrize("python", [None, "another"])
def test_a_row_that_outlives_its_comparison_holds_the_folder(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, python: str | None
) -> None:
    """A comparison that is killed leaves the child behind that makes a row: nobody may begin the same row meanwhile."""
    output, started = tmp_path / "out", list[subprocess.Popen[bytes]]()

    def orphan(_: list[str], __: Any, lock: int) -> Any:
        started.append(subprocess.Popen(["sleep", "60"], pass_fds=[lock]))
        raise Killed

    monkeypatch.setattr(elsewhere, "ended", orphan)
    monkeypatch.setattr(cell, "missing", lambda _: "a library" if python else "")
    monkeypatch.setattr(elsewhere, "lacking", lambda *_: "")
    command = settings(world, output, methods=("base",), baselines_python=python and sys.executable)
    try:
        with pytest.raises(Killed):
            go(command)
        with pytest.raises(InputError, match="something is at work there already"):
            go(command.model_copy(update={"resume": True}))
    finally:
        started[0].kill()
        started[0].wait()
    with folders.held(output):
        pass


def test_what_truncate_cuts_is_said_once_for_all_rows(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    made_up(monkeypatch)
    command = settings(world, tmp_path / "out", methods=("base", "full"), max_length=16, truncate=True)
    compare.compare(command, Console())
    lines = [line for line in capsys.readouterr().err.splitlines() if "prompts cut from the left" in line]
    assert [re.findall(r"(\w+) rows:", line)[0] for line in lines] == ["reported", "calibration", "training"]


def test_rows_of_one_table_have_the_same_threads_and_device(
    whole: Any, world: tuple[Path, Path], tmp_path: Path
) -> None:
    """Real rows say what they were made with; a call with anything else is refused before it changes the folder."""
    output, rows, _ = whole
    assert {json.dumps(row["conditions"]) for row in rows.values()} == {'{"device": "cpu", "threads": 1}'}
    moved = shutil.copytree(output, tmp_path / "moved")
    again = {"methods": ("base",), "keep": (HALF,), "resume": True}
    with pytest.raises(InputError, match=r"--threads 2: .* were made with 1: give --threads 1, or start") as error:
        go(settings(world, moved, threads=2, **again))
    assert "\n" not in str(error.value)
    path = moved / "cells" / "full" / "row.json"
    path.write_text(path.read_text().replace('"cpu"', '"NVIDIA H100"'))
    with pytest.raises(InputError, match=r"--device cpu is cpu, .* were made on NVIDIA H100: resume there") as error:
        go(settings(world, moved, **again))
    assert "\n" not in str(error.value)
    assert (moved / "config.yaml").read_bytes() == (output / "config.yaml").read_bytes()


def test_a_folder_remembers_the_methods_and_shares_of_all_calls(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    ran = made_up(monkeypatch)
    go(settings(world, tmp_path / "out", methods=("base",), keep=(HALF,)))
    go(settings(world, tmp_path / "out", methods=("top",), keep=(0.75,), resume=True))
    assert ran == [["base"], ["top", "0.75"]]
    command = ("compare", "--resume", "--output", str(tmp_path / "out"))
    stored = cli.parse([*command])
    assert isinstance(stored, CompareConfig)
    assert (stored.methods, stored.keep) == (("base", "top"), (0.75, HALF))
    made = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (made["settings"]["methods"], made["settings"]["keep"]) == (["base", "top"], [0.75, HALF])
    go(stored)
    assert ran[2:] == [["top", "0.5"]]
    go(settings(world, tmp_path / "out", methods=(), keep=(HALF,), resume=True))
    assert cli.parse([*command]).methods == ()  # type: ignore[attr-defined]


def test_a_device_is_left_to_what_is_measured_next(world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """What this process keeps of a GPU's memory, the processes that measure the speed do not have."""
    done, each = list[str](), Cell(METHODS["base"], None)
    for owner, name, result in (
        (plain, "run", job.Product(world[0])),
        (memory, "release", None),
        (cell, "evaluate", {}),
        (cell, "speed", {}),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name, result=result: done.append(name) or result)
    assert cell.measure(settings(world, tmp_path / "out"), each, tmp_path / "out")["status"] == "done"
    assert done == ["run", "release", "evaluate", "release", "speed"]


ONE_RUN = [name for name, method in METHODS.items() if method.module in ("one_shot", "sajjad", "greedy", "trimmed")]


@pytest.mark.parametrize("name", ONE_RUN)
def test_peers_train_everything_and_trimllm_what_its_sparse_update_takes(
    name: str, world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(job.Job, "trim", lambda *_, **changes: asked.append(changes))
    monkeypatch.setattr(job.Job, "full", tmp_path)
    method = METHODS[name]
    command = settings(world, tmp_path, schedule="late")
    importlib.import_module(f"trimllm.baselines.{method.module}").run(job.Job(command, Cell(method, 0.5), tmp_path))
    ours = name in ("trim", "trim-pair", "one-shot")
    assert [changes.get("sparse_update") for changes in asked] == [None if ours else "off"]


def test_embeddings_train_in_every_row(world: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--no-train-embeddings is for frozen blocks, and most methods train all"):
        cli.parse(["compare", "--model", "demo", "--task", "demo_law", "--output", "o", "--no-train-embeddings"])


def test_the_extra_that_is_named_brings_the_library() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for method in METHODS.values():
        listed = re.search(rf"^{method.extra} = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
        assert all(f'"{library}>=' in listed[1] for library in method.needs), method.name


def test_titles_do_not_call_a_model_cut_that_is_not() -> None:
    said = {name: Cell(METHODS[name], None if name == "gptq" else HALF).title for name in METHODS}
    assert said["trim"] == "TrimLLM, blocks, 50% kept"
    assert said["one-shot"] == "one-shot, by the same scan, 50% kept"
    assert said["full-long"] == "full fine-tuning, all blocks, as long as for 50%"
    assert said["layer-drop"] == "progressive layer dropping, all blocks, as long as for 50%"
    assert said["gptq"] == "GPTQ int4"
    assert {name for name, title in said.items() if "as long" in title} == {"full-long", "layer-drop"}


def test_rows_that_failed_are_tried_again(world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    made_up(monkeypatch, full=1)
    assert go(settings(world, tmp_path / "out", methods=("base", "full")))["full"]["status"] == "failed"
    ran = made_up(monkeypatch)
    assert go(settings(world, tmp_path / "out", methods=("base", "full"), resume=True))["full"]["status"] == "done"
    assert ran == [["full"]]


@pytest.mark.parametrize(("epochs", "methods"), [(0, ("base", "full")), (1, ("base",)), (1, ("base", "full"))])
def test_rows_are_trained_on_where_something_trains(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, epochs: int, methods: tuple[str, ...]
) -> None:
    made_up(monkeypatch)
    asked = {"methods": methods, "warmup_epochs": epochs, "epochs_per_drop": 0, "optimizer_state": "fresh"}
    go(settings(world, tmp_path / "out", **asked))
    used = used_rows.of(tmp_path / "out")
    assert (bool(used.trained), bool(used.decided)) == (bool(epochs) and "full" in methods, True)


def test_unknown_method_names_the_nearest(world: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--methods shortgtp: unknown method \(did you mean 'shortgpt'\?\)"):
        go(settings(world, tmp_path / "out", methods=("shortgtp",)))
    assert not (tmp_path / "out").exists()


def test_a_method_brings_what_it_starts_from() -> None:
    assert [each.name for each in cells(("trim-int8",), (0.5, 0.75))] == [
        *("full", "trim-0.75", "trim-0.5", "trim-int8-0.75", "trim-int8-0.5"),
    ]
    assert [each.method.name for each in cells((), (0.5,))] == list(METHODS)


def test_missing_library_is_a_row_and_the_rest_goes_on(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    in_process(monkeypatch)
    monkeypatch.setattr(cell, "find_spec", lambda name: None if name == "llmcompressor" else find_spec(name))
    monkeypatch.setattr(cell, "measure", lambda *_: DONE)
    found = go(settings(world, tmp_path / "out", methods=("gptq", "shortgpt")))
    assert found["gptq"]["status"] == "not run"
    assert re.fullmatch(r"needs llmcompressor: pip install 'trimllm\[baselines\]'.*", found["gptq"]["why"])
    assert found["shortgpt-0.5"]["status"] == "done"
    assert "GPTQ int4: not run: needs llmcompressor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "why"),
    [(-signal.SIGKILL, "signal 9: perhaps memory ran out"), (-signal.SIGTERM, "signal 15"), (1, "exit code 1")],
)
def test_a_child_that_dies_is_a_row(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, code: int, why: str
) -> None:
    ran = made_up(monkeypatch, full=code)
    found = go(settings(world, tmp_path / "out", methods=("full", "top")))
    assert found["full"]["status"] == "failed"
    assert why in found["full"]["why"]
    assert found["top-0.5"]["status"] == "done"
    assert ran == [["full"], ["top", "0.5"]]


def test_without_training_rows_the_base_is_measured_and_the_others_say_so(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    in_process(monkeypatch)
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(world[1] / "test.jsonl", tests)
    found = go(settings((world[0], tests), tmp_path / "out", methods=("base", "trim", "gptq")))
    assert {name: row["status"] for name, row in found.items()} == {
        "base": "done",
        "full": "not run",
        "trim-0.5": "not run",
        "gptq": "not run",
    }
    (why,) = {row["why"] for row in found.values() if "why" in row}
    assert why.startswith("task 'tests' has no training rows: give a train split")
    assert not used_rows.of(tmp_path / "out").trained
    again = go(settings((world[0], tests), tmp_path / "alone", methods=("base",)))
    assert again["base"]["accuracy"] == found["base"]["accuracy"]


def test_a_method_says_that_what_it_starts_from_is_not_there(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    in_process(monkeypatch)
    monkeypatch.setattr(job.Job, "tune", lambda *_, **__: (_ for _ in ()).throw(TrimError("the loss is infinite")))
    found = go(settings(world, tmp_path / "out", methods=("full", "shortgpt")))
    assert found["full"]["why"] == "the loss is infinite"
    assert found["shortgpt-0.5"]["why"] == ("it starts from full fine-tuning, which is not there: the loss is infinite")


def test_a_model_too_large_is_said_before_it_is_loaded_or_trained(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    in_process(monkeypatch)
    size = room.weights(str(world[0]), None)
    assert size is not None
    monkeypatch.setattr(room, "free_bytes", lambda _: size - 1)
    monkeypatch.setattr(models.loading, "load_model", lambda *_, **__: pytest.fail("loaded"))
    found = go(settings(world, tmp_path / "out", methods=("full",)))
    assert found["full"]["status"] == "not run"
    assert "the weights alone take" in found["full"]["why"]
    monkeypatch.undo()
    in_process(monkeypatch)
    monkeypatch.setattr(room, "free_bytes", lambda _: 3 * size - 1)
    monkeypatch.setattr(job.train, "train_stage", lambda *_, **__: pytest.fail("begun"))
    found = go(settings(world, tmp_path / "out", methods=("full",), resume=True))
    assert found["full"]["status"] == "not run"
    assert found["full"]["why"].startswith("training all parameters takes, beside the weights, 0.0 GB for gradients")
    monkeypatch.undo()
    in_process(monkeypatch)
    monkeypatch.setattr(room, "free_bytes", lambda _: 3 * size - 1)
    idle = settings(world, tmp_path / "idle", methods=("full",), warmup_epochs=0, epochs_per_drop=1.0)
    assert go(idle)["full"]["status"] == "done", "nothing trains"
    monkeypatch.undo()
    in_process(monkeypatch)
    monkeypatch.setattr(room, "free_bytes", lambda _: 3 * size)
    assert go(settings(world, tmp_path / "out", methods=("full",), resume=True))["full"]["status"] == "done"


def test_probe_asks_for_all_that_this_package_depends_on() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    names = {
        re.split(r"[><=]", each)[0].replace("-", "_").replace("pyyaml", "yaml")
        for each in re.findall(r'"(.+?)"', listed[1])
    }
    assert set(elsewhere.OURS) == names
    assert all(find_spec(name) for name in names)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_another_python_that_lacks_something(world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """One line says what is missing there; no row's process starts."""
    made_up(monkeypatch)
    monkeypatch.setattr(cell, "find_spec", lambda name: None if name == "llmcompressor" else find_spec(name))
    bare = script(tmp_path / "python", f'exec {sys.executable} -I -S "$@"')
    found = go(settings(world, tmp_path / "out", methods=("gptq",), baselines_python=str(bare)))
    assert found["full"]["status"] == "done"
    assert found["gptq"]["status"] == "not run"
    assert found["gptq"]["why"].startswith(f"--baselines-python {bare} lacks torch, transformers, ")
    assert found["gptq"]["why"].endswith("llmcompressor: pip install 'trimllm[baselines]' there")
    assert "\n" not in found["gptq"]["why"]


def test_another_python_that_does_not_run(world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    made_up(monkeypatch)
    monkeypatch.setattr(cell, "find_spec", lambda name: None if name == "llmcompressor" else find_spec(name))
    broken = script(tmp_path / "broken", "exit 3")
    found = go(settings(world, tmp_path / "out", methods=("awq",), baselines_python=str(broken)))
    assert found["awq"]["why"] == f"--baselines-python {broken} is no Python that runs: exit code 3"
    with pytest.raises(InputError, match="--baselines-python /nowhere/python: no such program"):
        go(settings(world, tmp_path / "new", methods=("awq",), baselines_python="/nowhere/python"))
    assert not (tmp_path / "new").exists()


def test_another_python_runs_this_very_package(tmp_path: Path, monkeypatch: Any) -> None:
    """Also where that environment has a trimllm of its own, and without what is installed beside this one."""
    other = tmp_path / "site" / "trimllm"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.setenv("PYTHONPATH", str(other.parent))
    spy = 'import sys, trimllm; print(trimllm.__file__, sys.argv[1:], file=open(sys.argv[1], "w"))'
    python = script(tmp_path / "python", f"shift 2; exec {sys.executable} -c '{spy}' \"$@\"")
    assert elsewhere.run(str(python), [str(tmp_path / "said"), "gptq"], 2) == 0
    path, _, rest = (tmp_path / "said").read_text().partition(" ")
    assert Path(path).parent.name == "trimllm"
    assert not Path(path).parent.exists()  # the link is gone with its folder
    assert "gptq" in rest
    assert os.environ["PYTHONPATH"] == str(other.parent)


def test_a_row_is_asked_to_end_and_waited_for_where_the_comparison_is_cut(tmp_path: Path) -> None:
    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    saves = f"trap 'sleep 0.2; touch {tmp_path}/saved; exit 143' TERM; while :; do sleep 0.05; done"
    before = signal.signal(signal.SIGALRM, cut)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 5.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            elsewhere.ended(["sh", "-c", saves], os.environ, 2)
        assert (tmp_path / "saved").exists()
        signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
        with pytest.raises(KeyboardInterrupt):  # and killed where it is cut again
            elsewhere.ended(["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"], os.environ, 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_settings_without_effect_on_a_row_are_left_out_all_of_them(world: tuple[Path, Path], tmp_path: Path) -> None:
    """Without training text has no effect, and without text its ratio."""
    asked = settings(world, tmp_path, text=str(world[1]), text_ratio=3.0, epochs_per_drop=0.0, optimizer_state="fresh")
    row = job.Job(asked, Cell(METHODS["trim"], HALF), tmp_path)
    made = row.trim_settings(keep=HALF, warmup_epochs=0.0)
    assert (made.text, made.epochs_per_drop) == (None, 0)


def test_rows_that_changed_are_refused(world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    made_up(monkeypatch)
    mine, output = (world[0], tmp_path / "rows"), tmp_path / "out"
    shutil.copytree(world[1], mine[1])
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    shutil.copytree(world[1], tmp_path / "also")
    more = {"text": str(text), "also": (str(tmp_path / "also"),)}
    go(settings(mine, output, methods=("full",), **more))
    again = settings(mine, output, methods=("full", "random"), keep=(HALF,), resume=True, **more)
    train = mine[1] / "train.jsonl"
    also = tmp_path / "also" / "test.jsonl"
    for file, option in ((train, f"--task {mine[1]}"), (text, f"--text {text}"), (also, "--also also")):
        was = file.read_text()
        file.write_text(was.replace("the", "a"))
        with pytest.raises(InputError) as error:
            go(again)
        assert str(error.value).startswith(f"{option}: its rows are not those that the comparison in {output} began ")
        file.write_text(was)
    assert set(json.loads((output / "data.json").read_text())) == {"--model", "--task", "--text", "--also also"}
    assert set(go(again)) == {"full", "random-0.5"}
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "--output", "out", "--resume"]) == 0
    named = {"task": "rows", "text": "text.txt", "also": ("also",)}
    assert set(go(again.model_copy(update=named))) == {"full", "random-0.5"}


def test_a_base_whose_weights_changed_is_refused(world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    made_up(monkeypatch)
    base, output = shutil.copytree(world[0], tmp_path / "base"), tmp_path / "out"
    again = settings((base, world[1]), output, methods=("base",), keep=(HALF,), resume=True)
    go(again.model_copy(update={"resume": False}))
    weights = base / "model.safetensors"
    was = weights.read_bytes()
    weights.write_bytes(was[:-1] + bytes([was[-1] ^ 1]))
    with pytest.raises(InputError) as error:
        go(again)
    said = f"--model {base}: its weights are not those that the comparison in {output} began with: give those, or "
    assert str(error.value) == said + "another --output"
    weights.write_bytes(was)
    assert set(go(again)) == {"base"}


def test_a_resume_with_fewer_methods_keeps_the_other_rows_in_the_table(tmp_path):
    for name, keep in (("shortgpt-0.25", 0.25), ("base", None), ("shortgpt-0.5", 0.5)):
        folder = tmp_path / "cells" / name
        folder.mkdir(parents=True)
        row = {"method": name.split("-")[0], "keep": keep, "status": "not run", "why": "a test"}
        (folder / "row.json").write_text(json.dumps(row), encoding="utf-8")
    rows = compare.finished(tmp_path)
    assert [(row["method"], row["keep"]) for row in rows] == [("base", None), ("shortgpt", 0.5), ("shortgpt", 0.25)]


def rows_file(folder: Path, *rows: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def question(prompt: str = "What is it?") -> dict[str, Any]:
    return {"question": prompt, "choices": ["this", "that"], "answer": 0}


def wrong(world: tuple[Path, Path], folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """What may be wrong with the settings -> them, and the line that is expected."""
    base, task = world
    folder.mkdir()
    only_tests = folder / "only_tests"
    only_tests.mkdir()
    shutil.copy(task / "test.jsonl", only_tests)
    torn = shutil.copytree(base, folder / "torn")
    (torn / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-10])
    bare = shutil.copytree(base, folder / "bare")
    (bare / "model.safetensors").unlink()
    encoder = shutil.copytree(base, folder / "encoder")
    (encoder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    wider = shutil.copytree(base, folder / "wider")
    tokenizer = AutoTokenizer.from_pretrained(wider)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(wider)
    image = rows_file(folder / "image", *[question(f"{n} <image> words") for n in range(40)])
    same = shutil.copytree(task, folder / "other" / "task")
    long = rows_file(folder / "long", *[question(f"{n} words " * 100) for n in range(40)])
    return {
        "unknown task": ({"task": "demo_lav"}, "unknown task 'demo_lav'.*demo_law"),
        "no such file": ({"task": "nowhere/rows.jsonl"}, "nowhere/rows.jsonl does not exist"),
        "no training rows": ({"task": str(only_tests), "methods": ("trim",)}, "'only_tests' has no training rows: "),
        "long prompts": ({"task": long}, r"\d+ of \d+ rows do not fit the context of 128 tokens"),
        "unknown task of --also": ({"also": ("demo_law", "no_such_task")}, "no_such_task"),
        "broken file in --also": ({"also": (rows_file(folder / "broken", {"colour": "red"}),)}, "colour"),
        "long prompts in --also": ({"also": (long,)}, r"\d+ of \d+ rows do not fit the context of 128 tokens"),
        "two tasks of a name": ({"also": (str(same),)}, f"--also {same}: its name, task, is that of another task"),
        "no such model": ({"model": str(folder / "no")}, "cannot load '.*/no': there is no such folder"),
        "torn weights": ({"model": str(torn)}, "model.safetensors"),
        "no weights": ({"model": str(bare)}, "cannot load model '.*/bare': the folder has no model.safetensors"),
        "no language model": ({"model": str(encoder)}, "cannot use model '.*/encoder': it is not a causal language"),
        "no such text": ({"text": str(folder / "no.txt")}, "no.txt does not exist"),
        "nothing to drop": ({"keep": (HALF, 0.95)}, "--keep 0.95: the model has only 4 layers"),
        "no such device": ({"device": "cuda:99"}, "--device cuda:99: there is no such device here"),
        "unknown attention": ({"attention": "flashy"}, "--attention flashy: "),
        "long rows for the speed": ({"sequence": 100_000}, "--sequence 100000: .* takes at most 128 tokens"),
        "no room for a prompt": (
            {"sequence": None, "new_tokens": 128},
            "--new-tokens 128 leave no prompt in rows of 128 tokens: ask for less$",
        ),
        "a token of no embedding": ({"model": str(wider), "also": (image,)}, "a row holds '<image>', token"),
    }


WRONG = (
    *("unknown task", "no such file", "no training rows", "long prompts", "unknown task of --also"),
    *("broken file in --also", "long prompts in --also", "two tasks of a name", "no such model", "torn weights"),
    *("no weights", "no language model", "no such text", "nothing to drop", "no such device", "unknown attention"),
    *("long rows for the speed", "no room for a prompt", "a token of no embedding"),
)


@pytest.mark.parametrize("what", WRONG)
def test_what_would_end_every_row_is_one_line_before_any_starts(
    what: str, world: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    ran = made_up(monkeypatch)
    cases = wrong(world, tmp_path / "wrong")
    assert tuple(cases) == WRONG
    changes, said = cases[what]
    with pytest.raises(InputError, match=said) as error:
        go(settings(world, tmp_path / "new", **changes))
    assert "\n" not in str(error.value)
    assert ran == []
    assert not (tmp_path / "new").exists()


def test_the_command_ends_with_one_line_and_exit_code_2(tmp_path: Path, capsys: Any) -> None:
    words = [
        "compare",
        "--model",
        "demo",
        "--task",
        "demo_law",
        "--also",
        "demo_lav",
        "--output",
        str(tmp_path / "new"),
    ]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "demo_lav" in err
    assert not (tmp_path / "new").exists()


def test_a_comparison_is_no_run_and_a_run_no_comparison(tmp_path, capsys):
    made = {"cmp": CompareConfig(model="demo", task="demo_law", output=str(tmp_path / "cmp"))}
    made["run"] = TrimConfig(model="demo", task="demo_law", output=str(tmp_path / "run"))
    for name, settings in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(plain_settings.to_yaml(settings))
    (tmp_path / "cmp" / "cells" / "full" / "model").mkdir(parents=True)
    begin = ["--model", "demo", "--task", "demo_law"]
    cmp, run = str(tmp_path / "cmp"), str(tmp_path / "run")
    inside = f"{cmp} holds a comparison, not a run: give a checkpoint in it, such as {cmp}/cells/full/model"
    no_run, no_comparison = "holds a comparison, not a run: choose", "holds a run, not a comparison: choose"
    for words, said in (
        (["trim", "--output", cmp, "--resume"], f"--output {cmp}: the directory {no_run}"),
        (["trim", *begin, "--output", cmp], f"--output {cmp}: the directory {no_run}"),
        (["compare", "--output", run, "--resume"], f"--output {run}: the directory {no_comparison}"),
        (["compare", *begin, "--output", run], f"--output {run}: the directory {no_comparison}"),
        (["export", cmp, "--to", "gguf"], inside),
        (["export", cmp, "--depth", "3"], inside),
        (["push", cmp, "me/x"], inside),
    ):
        assert cli.main(words) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_shares_are_as_the_rows_are_named(world: tuple[Path, Path], tmp_path: Path) -> None:
    asked = settings(world, tmp_path / "out", keep=(0.5, 1 / 3, 0.333333))
    assert asked.keep == (0.5, 0.333333)
    with pytest.raises(InputError, match="must be less than 1, in six digits"):
        settings(world, tmp_path / "out", keep=(0.99999999,))
    names = [cell.name for cell in cells(("one-shot",), asked.keep)]
    assert names == ["full", "one-shot-0.5", "one-shot-0.333333"]


def test_what_a_kill_left_of_the_settings_does_not_fill_a_folder(world: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.123.tmp").write_text("mod")
    compare.claim(settings(world, tmp_path), tmp_path, {})
    assert (tmp_path / "config.yaml").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"the directory already holds notes\.txt: choose another one"):
        compare.claim(settings(world, tmp_path / "other"), tmp_path / "other", {})
