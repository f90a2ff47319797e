"""A run that was interrupted anywhere gives what it would have given."""

import json
import os
import shutil
import weakref

import helpers_run as h
import pytest
import safetensors.torch
import torch
import yaml
from transformers import PreTrainedModel

from trimllm import cli, files
from trimllm.checkpoints import folders, verification
from trimllm.config import DemoConfig, TrimConfig
from trimllm.console import Console
from trimllm.demo.demo import demo
from trimllm.errors import InputError, TrimError
from trimllm.evaluation import batches
from trimllm.importance import deletion
from trimllm.run import account, deciding, placing, progressive, recording, rundir
from trimllm.run.progressive import trim
from trimllm.training import optimizer_state, train
from trimllm.training.step import Stepper

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(scope="module")
def album(base, task, tmp_path_factory):
    """A run that nobody interrupted, `straight`, and its folder at every one of the `POINTS`."""
    return h.photographed_run(POINTS, tmp_path_factory.mktemp("album"), base, task)


@pytest.fixture(scope="module")
def straight(album):
    return album / "straight"


def assert_same(output, straight):
    assert h.drops(output) == h.drops(straight)
    assert h.weights_hash(output / "model") == h.weights_hash(straight / "model")
    one, other = h.result(output), h.result(straight)
    assert one["test"] == other["test"]
    assert [row["calibration"] for row in one["history"]] == [row["calibration"] for row in other["history"]]
    assert [event["event"] for event in h.journal(output)] == [event["event"] for event in h.journal(straight)]
    left = {str(path.relative_to(output)) for path in output.rglob("*")}
    assert left == {str(path.relative_to(straight)) for path in straight.rglob("*")}, (
        "nothing of the killed run is left"
    )


POINTS = {
    "before the journal begins": (progressive.Run, "_start", 1, False),
    "before the base is journaled": (recording.Recorder, "record", 1, False),
    "in the warm-up": (Stepper, "gradients", 2, False),
    "between the first checkpoint and its journal line": (progressive.Run, "_checkpoint", 1, True),
    "while the fine-tuned model is measured": (recording, "size", 2, False),
    "between warm-up and scan": (progressive.Run, "_drop", 1, False),
    "in the first scan": (deletion, "measure", 2, False),
    "between scan and choice": (deciding.Decider, "_choose", 1, False),
    "after the drop, before its journal line": (deciding.Decider, "table", 1, False),
    "between drop and training": (progressive.Run, "_drop", 1, True),
    "in the middle of a stage": (Stepper, "gradients", 7, False),
    "while a checkpoint is written": (PreTrainedModel, "save_pretrained", 2, True),
    "between a checkpoint and its journal line": (progressive.Run, "_checkpoint", 2, True),
    "while a depth is measured": (recording.Recorder, "record", 3, False),
    "between the journal line and cleaning up": (progressive.Run, "_clean", 2, False),
    "while an old checkpoint is deleted": (shutil, "rmtree", 4, False),
    "in the second scan": (deletion, "measure", 4, False),
    "before the export": (progressive.Run, "_finish", 1, False),
    "in the export": (verification, "verify", 1, False),
    "between the export and result.json": (progressive.Run, "_load", 1, False),
    "between result.json and the last journal line": (files, "write_json", 8, True),
}


@pytest.mark.parametrize("point", POINTS)
def test_run_killed_there_ends_with_the_same_drops_and_bit_equal_weights(base, task, straight, album, point):
    h.run(base, task, album / point, resume=True)
    assert_same(album / point, straight)


def test_run_killed_again_and_again_still_ends_the_same(base, task, tmp_path, straight, monkeypatch):
    output, resume = tmp_path / "run", False
    for owner, name, call, after in list(POINTS.values())[2::4]:
        with monkeypatch.context() as patch:
            h.kill_at(patch, owner, name, call, after=after)
            try:
                h.run(base, task, output, resume=resume)
            except h.Killed:
                resume = True
    h.run(base, task, output, resume=True)
    assert_same(output, straight)


@pytest.mark.parametrize("call", [2, 3, 4])
def test_a_stage_is_not_trained_again_that_was_only_not_measured(base, task, tmp_path, straight, monkeypatch, call):
    """Of the warm-up, of a depth on the way, of the last one."""
    output, trained, train_stage = tmp_path / "run", [], train.train_stage
    h.killed_run((recording.Recorder, "record", call), base, task, output)
    monkeypatch.setattr(train, "train_stage", lambda *a, **k: trained.append(1) or train_stage(*a, **k))
    h.run(base, task, output, resume=True)
    assert len(trained) == 4 - call
    assert_same(output, straight)


@pytest.mark.parametrize("keep", [True, False])
def test_a_floor_that_was_raised_after_a_stage_was_trained_and_not_measured(base, task, tmp_path, monkeypatch, keep):
    """The depth before it, and the one before that, may be the result."""
    output, settings = tmp_path / "run", {"depth": 2, "min_accuracy": 0, "keep_checkpoints": keep}
    h.killed_run((recording.Recorder, "record", 5), base, task, output, **settings)
    assert [event["event"] for event in h.journal(output)][-2:] == ["drop", "trained"]
    h.floor_ends(monkeypatch, 3)
    model, _ = h.run(base, task, output, resume=True, **settings)
    assert model.config.num_hidden_layers == h.DEPTH - 1
    assert h.result(output)["depth"] == h.DEPTH - 1
    kept = {path.name for path in (output / "checkpoints").iterdir()}
    assert "depth-2" not in kept, "what nobody measured is no depth to export"
    assert not list(output.rglob(optimizer_state.FOLDER))


def test_a_share_is_no_floor_to_go_on_with(base, task, tmp_path):
    output = tmp_path / "run"
    h.killed_run((progressive.Run, "_drop", 1), base, task, output, min_accuracy=10, depth=4)
    with pytest.raises(InputError, match=r"^--min-accuracy 0\.8 is in percent"):
        h.run(base, task, output, min_accuracy=0.8, depth=4, resume=True)


def test_a_run_that_goes_on_does_not_hold_the_base_beside_its_checkpoint(base, task, tmp_path, monkeypatch):
    output, bases, held = tmp_path / "run", [], []
    h.killed_run((progressive.Run, "_drop", 1), base, task, output)
    load, again = progressive.load, progressive.loading.load_model
    monkeypatch.setattr(progressive, "load", lambda *a, **k: bases.append(load(*a, **k)) or bases[-1])

    def loading(folder, **named):
        held.extend(one.model.device.type for one in bases)
        return again(folder, **named)

    monkeypatch.setattr(progressive.loading, "load_model", loading)
    h.run(base, task, output, resume=True)
    assert set(held) == {"meta"}


def test_a_run_goes_on_in_the_dtype_that_it_noted(base, task, tmp_path):
    output = tmp_path / "run"
    h.killed_run((progressive.Run, "_drop", 1), base, task, output)
    start, *others = h.journal(output)
    lines = [start | {"save_dtype": "bfloat16"}, *others]
    (output / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))
    h.run(base, task, output, resume=True)
    assert {value.dtype for value in safetensors.torch.load_file(output / "model" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def count_parts(monkeypatch):
    measured, part = [], deletion.measure
    monkeypatch.setattr(deletion, "measure", lambda *a, **k: measured.append(1) or part(*a, **k))
    return measured


def scanned(*arguments, resume=False, **changes):
    """A run as far as the first scan's table and the drop by it."""
    h.killed_run((progressive.Run, "_stage", 1 if resume else 2), *arguments, **changes, resume=resume)


def test_finished_batches_of_a_scan_are_not_computed_again(base, task, tmp_path, straight, monkeypatch):
    output = tmp_path / "run"
    h.killed_run((deletion, "measure", 2), base, task, output, depth=4)
    path = output / "scans" / "scan-000.jsonl"
    (line,) = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert line["seconds"] > 0
    path.write_text(json.dumps(line | {"seconds": 1000.0}) + "\n")
    measured = count_parts(monkeypatch)
    scanned(base, task, output, depth=4, resume=True)
    assert 1000 < h.journal(output, "drop")[0]["seconds"] < 1100, "what the killed scan took counts"
    batches = len(measured) + 1
    scanned(base, task, tmp_path / "other", depth=4)
    assert len(measured) - (batches - 1) == batches


def test_scan_in_batches_of_another_size_is_not_continued(base, task, tmp_path):
    output = tmp_path / "run"
    h.killed_run((deletion, "measure", 2), base, task, output, depth=4)
    scanned(base, task, output, depth=4, resume=True, eval_batch_size=40)
    scanned(base, task, tmp_path / "straight", depth=4, eval_batch_size=40)
    tables = [json.loads((run / "scans" / "scan-000.json").read_text()) for run in (output, tmp_path / "straight")]
    for one, other in zip(tables[0]["units"], tables[1]["units"], strict=True):
        assert one["value"] == other["value"]
        assert one["norm"] == pytest.approx(other["norm"], rel=1e-5)


def test_scan_that_another_kind_of_device_began_is_not_continued(base, task, tmp_path, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(batches, "ENOUGH", {"cpu": 40})  # where this machine puts rows of other lengths together
        h.kill_at(patch, deletion, "measure", 2)
        with pytest.raises(h.Killed):
            h.run(base, task, output, depth=4)
    assert (output / "scans" / "scan-000.jsonl").exists()
    scanned(base, task, output, depth=4, resume=True)
    scanned(base, task, tmp_path / "straight", depth=4)
    tables = [json.loads((run / "scans" / "scan-000.json").read_text()) for run in (output, tmp_path / "straight")]
    assert [table | {"seconds": 0} for table in tables[:1]] == [table | {"seconds": 0} for table in tables[1:]]


def test_race_that_another_kind_of_device_began_is_not_continued(base, tmp_path, monkeypatch):
    task, straight = h.save_task(tmp_path / "task", train=80), tmp_path / "straight"
    race = {"depth": 4, "scan": "racing", "strategy": "scan+norm", "calibration_size": 40, "eval_batch_size": 400}
    scanned(base, task, straight, **race)
    for call in (2, 4, 6):
        output = tmp_path / f"run-{call}"
        with monkeypatch.context() as patch:
            patch.setattr(batches, "ENOUGH", {})
            h.kill_at(patch, deletion, "measure", call)
            with pytest.raises(h.Killed):
                h.run(base, task, output, **race)
        scanned(base, task, output, **race, resume=True)
        tables = [json.loads((run / "scans" / "scan-000.json").read_text()) for run in (output, straight)]
        assert tables[0]["units"] == tables[1]["units"]


@pytest.mark.parametrize("other", [{"metric": "acc"}, {"mixed": True}], ids=["all choices", "mixed precision"])
def test_scan_that_was_begun_in_another_way_is_not_continued(base, task, tmp_path, monkeypatch, other):
    """With right choices alone where all were asked, or in another precision, as on another device."""
    output = tmp_path / "run"
    h.killed_run((deletion, "measure", 2), base, task, output, depth=4, strategy="loss")
    path = output / "scans" / "scan-000.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines
    assert all(line[name] != value for line in lines for name, value in other.items())
    path.write_text("".join(json.dumps(line | other) + "\n" for line in lines))
    measured = count_parts(monkeypatch)
    scanned(base, task, output, depth=4, strategy="loss", resume=True)
    resumed = len(measured)
    scanned(base, task, tmp_path / "straight", depth=4, strategy="loss")
    assert len(measured) == 2 * resumed


def test_line_torn_by_a_kill_is_cut_off(base, task, tmp_path, straight):
    output = tmp_path / "run"
    h.killed_run((deciding.Decider, "_choose", 1), base, task, output)
    for name in ("journal.jsonl", "scans/scan-000.jsonl"):
        whole = (output / name).read_bytes()
        (output / name).write_bytes(whole + whole.splitlines()[-1][:25])
    h.run(base, task, output, resume=True)
    assert_same(output, straight)


def test_finished_run_is_returned_without_computing(base, task, straight, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*.safetensors")}
    monkeypatch.setattr(progressive.Run, "_loop", None)
    model, history = h.run(base, task, straight, resume=True)
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*.safetensors")} == before
    assert model.config.num_hidden_layers == 3
    assert [row["depth"] for row in history] == [5, 5, 4, 3, 3]


def test_python_resume_needs_the_output_only(straight):
    model, _ = progressive.trim(output=str(straight), resume=True)
    assert model.config.num_hidden_layers == 3


def test_other_settings_are_refused_and_harmless_ones_are_not(base, task, straight):
    with pytest.raises(InputError, match=r"--depth 2: the run in .* has 3"):
        h.run(base, task, straight, resume=True, depth=2)
    h.run(base, task, straight, resume=True, threads=1, micro_batch_size=64)
    assert yaml.safe_load((straight / "config.yaml").read_text())["depth"] == 3


def test_directory_of_another_run_or_with_other_files_is_refused(base, task, straight, tmp_path):
    with pytest.raises(InputError, match="already holds a run: add --resume"):
        h.run(base, task, straight)
    (tmp_path / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"already holds thesis\.tex: choose another"):
            h.run(base, task, tmp_path, resume=resume)
    with pytest.raises(InputError, match="it is a file"):
        h.run(base, task, tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("resume", [True, False])
def test_run_that_another_process_works_on_is_refused_before_anything_is_loaded(
    base, task, straight, monkeypatch, resume
):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    with folders.held(straight), monkeypatch.context() as patch:
        patch.setattr(progressive, "load", lambda *_, **__: pytest.fail("loaded"))
        with pytest.raises(InputError, match="something is at work there already"):
            h.run(base, task, straight, resume=resume)
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_demo_that_goes_on_in_another_process_is_left_alone(tmp_path):
    journal = tmp_path / "law" / "trimmed" / "journal.jsonl"
    files.append_line(journal, {"event": "start"})
    with folders.held(tmp_path / "law"), pytest.raises(InputError, match="something is at work there already"):
        demo(DemoConfig(domain="law", output=str(tmp_path)))
    assert journal.exists()


def test_run_that_cannot_begin_leaves_no_directory(base, tmp_path):
    with pytest.raises(InputError, match="nothing"):
        h.run(base, tmp_path / "nothing", tmp_path / "a" / "run")
    assert not list(tmp_path.iterdir())


def test_changed_base_weights_are_refused(task, tmp_path, monkeypatch):
    mine, output = h.save_base(tmp_path / "base"), tmp_path / "run"
    h.kill_at(monkeypatch, progressive.Run, "_drop", 1)
    with pytest.raises(h.Killed):
        h.run(mine, task, output)
    file = mine / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=r"its weights are not those that the run in .* began with"):
        h.run(mine, task, output, resume=True)


def interrupted(*arguments, **changes):
    """A run that is killed at its first drop."""
    h.killed_run((progressive.Run, "_drop", 1), *arguments, **changes)


def test_changed_rows_are_refused(base, tmp_path):
    rows, text, output = h.save_task(tmp_path / "rows"), tmp_path / "text.txt", tmp_path / "run"
    text.write_text("the cat sat on the mat. " * 40)
    interrupted(base, rows, output, text=str(text))
    journaled, settings = h.journal(output), (output / "config.yaml").read_bytes()
    for changed in (rows / "train.jsonl", rows / "test.jsonl", text):
        was = changed.read_text()
        lines = was.splitlines(keepends=True)
        changed.write_text("a dog. " + was if changed == text else "".join([lines[1], lines[0], *lines[2:]]))
        option = f"--text {text}" if changed == text else f"--task {rows}"
        with pytest.raises(InputError) as error:
            h.run(base, rows, output, text=str(text), resume=True)
        assert str(error.value) == (
            f"{option}: its rows are not those that the run in {output} began with: give those, or another --output"
        )
        changed.write_text(was)
    others = {
        "--task demo_law": {"task": "demo_law"},
        "--text demo_law": {"text": "demo_law"},
        "no --text": {"text": None},
    }
    for named, changes in others.items():
        other = {"task": str(rows), "text": str(text), **changes}
        with pytest.raises(InputError, match=f"^{named}: its rows are not those"):
            trim(console=Console(quiet=True), **h.settings(base, rows, output, resume=True) | other)
    assert h.journal(output) == journaled
    assert (output / "config.yaml").read_bytes() == settings
    h.run(base, rows, output, text=str(text), resume=True)


def test_a_run_goes_on_from_another_folder_and_with_data_that_moved(base, task, tmp_path, straight, monkeypatch):
    begun = tmp_path / "begun"
    shutil.copytree(base, begun / "base")
    shutil.copytree(task, begun / "rows")
    monkeypatch.chdir(begun)
    settings = {**h.settings(base, task, begun), "model": "base", "task": "rows", "output": "run"}
    with monkeypatch.context() as patch:
        h.kill_at(patch, progressive.Run, "_drop", 1)
        with pytest.raises(h.Killed):
            cli.main(["trim", *h.arguments(settings)])
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        h.kill_at(patch, progressive.Run, "_drop", 2)
        with pytest.raises(h.Killed):
            cli.main(["trim", "--output", "begun/run", "--resume"])
    (begun / "rows").rename(tmp_path / "elsewhere")
    (begun / "base").rename(tmp_path / "model")
    words = ["trim", "--output", "begun/run", "--resume", "--model", "model", "--task", "elsewhere"]
    assert cli.main(words) == 0
    assert h.drops(begun / "run") == h.drops(straight)
    assert h.weights_hash(begun / "run" / "model") == h.weights_hash(straight / "model")


def test_paths_are_of_the_folder_where_a_run_began(tmp_path, monkeypatch):
    """A folder named like a task that comes with us, or like the run itself, is not meant."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one / "base", one / "rows", one / "demo_law", other / "base"):
        folder.mkdir(parents=True)
    (one / "a.jsonl").write_text("")
    monkeypatch.chdir(one)
    files = {"train": "a.jsonl", "test": "hub/id"}
    config = TrimConfig(model="base", task="demo_law", text="rows", task_files=files, output="hub/id")
    rundir.claim(config)
    paths = ("model", "task", "text", "task_files")
    stored = [placing.stored_settings("hub/id")[name] for name in paths]
    assert stored == ["base", "demo_law", "rows", files]
    before = (one / "hub" / "id" / "config.yaml").read_bytes()
    monkeypatch.chdir(other)
    moved = placing.stored_settings(one / "hub" / "id")
    assert [moved[name] for name in paths] == [
        f"{one}/base",
        "demo_law",
        f"{one}/rows",
        {"train": f"{one}/a.jsonl", "test": "hub/id"},
    ]
    again = TrimConfig(**moved | {"output": str(one / "hub" / "id"), "resume": True})
    rundir.claim(again)
    assert (one / "hub" / "id" / "config.yaml").read_bytes().replace(str(one / "hub").encode(), b"hub") == before
    rundir.claim(again.model_copy(update={"model": "base"}))
    monkeypatch.chdir(tmp_path)
    assert placing.stored_settings(one / "hub" / "id")["model"] == f"{other}/base"


def test_a_finished_run_keeps_its_settings(straight, capsys):
    before = (straight / "config.yaml").read_bytes()
    for option, value in (("--lr", "0.0001"), ("--max-grad-norm", "0.5"), ("--task", "demo_medicine")):
        line = h.line(capsys, "trim", "--output", str(straight), "--resume", option, value)
        assert line.startswith(f"trimllm: {option} {value}: ")
    assert cli.main(["trim", "--output", str(straight), "--resume", "--threads", "1"]) == 0
    assert (straight / "config.yaml").read_bytes() == before


def test_loss_that_is_not_a_number_names_the_step_and_a_smaller_rate_goes_on(
    base, task, tmp_path, straight, monkeypatch, capsys
):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        step, calls = Stepper.gradients, []

        def diverging(*arguments):
            calls.append(1)
            return step(*arguments) if len(calls) < 7 else float("nan")

        patch.setattr(Stepper, "gradients", diverging)
        words = h.arguments(h.settings(base, task, output))
        assert cli.main(["trim", *words]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("trimllm: the loss became nan at step ")
    assert "lower --lr" in error
    assert (output / "checkpoints" / "depth-5" / "model.safetensors").exists()
    journaled = h.journal(output)
    assert cli.main(["trim", "--output", str(output), "--resume", "--lr", "1e-4"]) == 0
    assert h.journal(output)[: len(journaled)] == journaled
    told = "stages were trained at --lr 0.001, then 0.0001: the settings hold the last one"
    assert told in h.result(output)["warnings"]
    assert f"warning: {told}\n" in capsys.readouterr().err
    assert not any("stages were trained" in one for one in h.result(straight)["warnings"])
    assert h.result(output)["settings"]["lr"] == 1e-4
    assert h.drops(output)[0] == h.drops(straight)[0]


def full_disk():
    raise OSError(28, os.strerror(28))


def safetensors_full_disk():
    raise safetensors.SafetensorError(
        'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
    )


@pytest.mark.parametrize("failure", [full_disk, safetensors_full_disk])
@pytest.mark.parametrize("saves", [2, 4], ids=["checkpoint", "export"])
def test_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(
    base, task, tmp_path, straight, monkeypatch, failure, saves
):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        save, calls = PreTrainedModel.save_pretrained, []

        def saving(self, folder, **more):
            calls.append(1)
            save(self, folder, **more)
            if len(calls) == saves:
                failure()

        patch.setattr(PreTrainedModel, "save_pretrained", saving)
        with pytest.raises(TrimError, match="the disk is full") as error:
            h.run(base, task, output)
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)
    h.run(base, task, output, resume=True)
    assert_same(output, straight)


def test_full_disk_while_journaling_loses_only_that_event(base, task, tmp_path, straight, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: full_disk() if (output / "checkpoints" / "depth-4").exists() else None)
        with pytest.raises(TrimError, match="the disk is full"):
            h.run(base, task, output)
    h.run(base, task, output, resume=True)
    assert h.weights_hash(output / "model") == h.weights_hash(straight / "model")


def test_resumed_weights_are_float32_even_if_the_base_is_not(task, tmp_path):
    mine, output = h.save_base(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "run"
    h.killed_run((progressive.Run, "_drop", 2), mine, task, output)
    h.run(mine, task, output, resume=True)
    h.run(mine, task, tmp_path / "straight")
    assert h.weights_hash(output / "model") == h.weights_hash(tmp_path / "straight" / "model")


def test_row_of_the_saved_model_is_measured_anew_when_the_run_went_on_after_it(base, task, tmp_path):
    output = tmp_path / "run"
    h.killed_run((account, "result", 1), base, task, output)
    events = [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "saved"
    stale = events[-1] | {"depth": 4, "test": None}
    lines = [json.dumps(event) for event in [*events[:-2], stale, events[-2]]]
    (output / "journal.jsonl").write_text("\n".join(lines) + "\n")
    _, history = h.run(base, task, output, resume=True)
    assert [row["depth"] for row in history if row["event"] == "saved"] == [3]
    assert h.result(output)["test"] == history[-1]["test"] == events[-1]["test"]


def test_saved_model_that_a_lowered_floor_replaces_is_measured(base, task, tmp_path, monkeypatch):
    output, floor = tmp_path / "run", {"depth": 4, "min_accuracy": 0}
    with monkeypatch.context() as patch:
        h.floor_ends(patch, 2)
        h.kill_at(patch, account, "result", 1)
        with pytest.raises(h.Killed):
            h.run(base, task, output, **floor)
    assert [row["depth"] for row in h.journal(output, "saved")] == [5]
    model, history = h.run(base, task, output, resume=True, **floor)
    assert model.config.num_hidden_layers == 4
    assert history[-1]["depth"] == len(h.result(output)["blocks"]) == 4
    assert history[-1]["event"] == "saved"


def test_run_that_goes_on_lets_go_of_the_base(base, task, tmp_path, monkeypatch):
    output = tmp_path / "run"
    h.killed_run((progressive.Run, "_drop", 1), base, task, output, depth=4)
    load, stage, bases, there = progressive.load, train.train_stage, [], []

    def loading(*arguments, **more):
        loaded = load(*arguments, **more)
        bases.append(weakref.ref(loaded.model))
        return loaded

    def training(*arguments, **more):
        there.append(bases[0]() is not None)
        return stage(*arguments, **more)

    monkeypatch.setattr(progressive, "load", loading)
    monkeypatch.setattr(train, "train_stage", training)
    h.run(base, task, output, depth=4, resume=True)
    assert there == [False]
