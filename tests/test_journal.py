"""What a run remembers survives a kill."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import helpers_run as h
import pytest
import yaml

import trimllm
from trimllm import cli, files
from trimllm.blocks.layout import Block, dump_layout, load_layout, whole_layers
from trimllm.checkpoints import loading
from trimllm.config import CompareConfig, TrimConfig
from trimllm.errors import InputError, TrimError
from trimllm.run import checks, journal, placing, rundir


def test_events_come_back_in_order_with_their_values(tmp_path):
    path = tmp_path / "new" / "journal.jsonl"
    log = journal.Journal(path, [])
    log.add("start", depth=3)
    log.add("stage", loss=0.1, name="ä\n")
    log.add("stage", loss=None)
    assert files.read_lines(path) == log.events
    assert [event["loss"] for event in log.of("stage")] == [0.1, None]
    assert log.last("stage")["loss"] is None
    assert log.last("done") is None


def test_process_that_does_not_write_remembers_the_same(tmp_path):
    log = journal.Journal(tmp_path / "journal.jsonl", [], writes=False)
    log.add("start", depth=3)
    assert log.events == [{"event": "start", "depth": 3}]
    assert not log.path.exists()


@pytest.mark.parametrize("cut", range(1, 18))
def test_line_torn_anywhere_is_cut_off_and_the_journal_goes_on(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    files.append_line(path, {"event": "a"})
    files.append_line(path, {"event": "b", "x": 1})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert files.read_lines(path) == [{"event": "a"}]
    files.append_line(path, {"event": "b", "x": 1})
    assert path.read_bytes() == whole


def test_a_journal_that_may_still_be_written_is_only_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    torn = '{"event": "a"}\n{"event": "b"'
    path.write_text(torn)
    assert files.read_lines(path, mend=False) == [{"event": "a"}]
    assert path.read_text() == torn


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "a"}\n{"ev\n{"event": "b"}\n')
    with pytest.raises(TrimError, match="is damaged"):
        files.read_lines(path)
    path.write_bytes(b'{"event": "a"}\n\0\xff\0\n{"event": "b"}\n')  # a loss of power
    with pytest.raises(TrimError, match="is damaged"):
        files.read_lines(path)


def test_two_processes_may_write_one_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    real = os.fsync

    def other_process_writes_meanwhile(descriptor):
        monkeypatch.setattr(files.os, "fsync", real)
        monkeypatch.setattr(files.os, "getpid", lambda: 1)
        files.write_json(path, {"by": "another"})
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", other_process_writes_meanwhile)
    files.write_json(path, {"by": "me"})
    assert files.read_json(path) == {"by": "me"}
    assert [left.name for left in tmp_path.iterdir()] == ["result.json"]


def test_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    files.write_json(path, {"depth": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TrimError, match=r"^cannot write to .*plan\.json: the disk is full: .*--resume"):
            files.write_json(path, {"depth": 2})
    assert json.loads(path.read_text()) == {"depth": 1}
    files.write_json(path, {"depth": 3})
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_json_that_others_can_read_has_no_nan(tmp_path):
    path = tmp_path / "scan.json"
    files.write_json(path, {"rows": [{"importance": float("inf")}, (float("nan"), 1.5, True, None, "x")]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "rows": [{"importance": None}, [None, 1.5, True, None, "x"]]
    }


def config(tmp_path, **values):
    return TrimConfig(**({"model": "m", "task": "t", "output": str(tmp_path / "run")} | values))


def test_stored_settings_make_the_same_config(tmp_path):
    mine = config(tmp_path, lr=3e-5, protect=(0, -1), task_files={"train": "a: b.jsonl"}, min_accuracy=60)
    assert rundir.claim(mine) == []
    assert TrimConfig(**placing.stored_settings(mine.output)) == mine
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lr"] == 3e-5


def is_place(annotation, metadata=()):
    found = (*metadata, *getattr(annotation, "__metadata__", ()))
    return any(getattr(one, "func", None) is os.path.expanduser for one in found) or any(
        is_place(part) for part in get_args(annotation)
    )


def test_every_place_a_run_can_be_given_is_found_from_another_folder():
    places = {
        name
        for kind in (TrimConfig, CompareConfig)
        for name, field in kind.model_fields.items()
        if is_place(field.annotation, field.metadata)
    }
    assert {*places, "model"} - {"output"} == set(placing.PATHS)


def test_what_python_gives_in_place_of_a_name_is_not_repeated_at_length(tmp_path):
    with pytest.raises(InputError) as found:
        trimllm.trim(model="m", task=["row"] * 1000, output=str(tmp_path / "run"))
    assert "--task ['row', " in str(found.value)
    assert len(str(found.value)) < 300


def test_going_on_from_python_with_a_run_that_is_not_there_says_so(tmp_path):
    with pytest.raises(InputError, match=r"resume: there is no run in .*run: check output, or give model and task"):
        trimllm.trim(output=str(tmp_path / "run"), resume=True)


def test_everything_public_is_there_and_known_to_type_checkers():
    source = Path(trimllm.__file__).with_suffix(".pyi").read_text()
    for name in trimllm.__all__:
        assert getattr(trimllm, name).__name__ == name
        assert f"import {name} as {name}" in source
    assert trimllm.__version__
    assert Path(trimllm.__file__).with_name("py.typed").exists()
    with pytest.raises(AttributeError):
        _ = trimllm.nonsense


def test_settings_are_found_again_without_heavy_libraries(tmp_path):
    """A method's process sets variables that these read when they are imported."""
    mine = config(tmp_path)
    rundir.claim(mine)
    heavy = "[m for m in ('tqdm', 'torch', 'transformers') if m in sys.modules]"
    words = ["trim", "--resume", "--output", mine.output]
    code = f"import sys, trimllm.baselines.cell; from trimllm import cli; cli.parse({words!r}); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_folders_of_depths_are_depths(tmp_path):
    run = rundir.RunDir(tmp_path)
    for name in ("depth-4", "depth-12", "depth-10.bak", "depth-", "depth-x"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.kept_depths() == [12, 4]


def test_a_floor_added_later_leaves_the_target_of_the_run(tmp_path):
    rundir.claim(config(tmp_path, schedule="epoch"))
    again = TrimConfig(**(placing.stored_settings(tmp_path / "run") | {"resume": True, "min_accuracy": 60}))
    assert again.keep == 0.5
    rundir.check(again)


def test_run_that_died_before_its_first_event_can_be_resumed(tmp_path):
    mine = config(tmp_path)
    rundir.claim(mine)
    rundir.RunDir(mine.output).config.with_name(".config.yaml.tmp").write_text("mod")
    again = mine.model_copy(update={"resume": True})
    rundir.check(again)
    assert rundir.claim(again) == []
    rundir.RunDir(mine.output).config.unlink()
    rundir.check(mine)


def test_half_written_leftovers_of_a_kill_are_removed(tmp_path):
    mine = config(tmp_path)
    rundir.claim(mine)
    run = rundir.RunDir(mine.output)
    for left in (run.root / ".model.x1y2", run.checkpoints / ".depth-4.tmp", run.checkpoints / "depth-5"):
        left.mkdir(parents=True)
    rundir.claim(mine.model_copy(update={"resume": True}))
    assert [path.name for path in run.checkpoints.iterdir()] == ["depth-5"]
    assert not (run.root / ".model.x1y2").exists()
    assert run.kept_depths() == [5]


def test_too_little_space_is_said_before_the_run(tmp_path):
    with pytest.raises(InputError, match=r"iB free, about .* [GM]iB needed"):
        checks.check_space(tmp_path / "a" / "b", 2**62)
    checks.check_space(tmp_path / "a" / "b", 1)


def test_weights_that_stand_there_need_no_more_space(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.safetensors").write_bytes(b"x" * 900)
    (tmp_path / "model-depth-3").mkdir()
    (tmp_path / "model-depth-3" / "model.safetensors").write_bytes(b"x" * 2000)  # an export, which saves nothing
    checks.check_space(tmp_path, 1000)
    with pytest.raises(InputError, match="MiB free"):
        checks.check_space(tmp_path, 1001)


@pytest.mark.usefixtures("fast")
def test_space_for_every_depth_that_may_be_kept_is_only_pointed_out(tmp_path, monkeypatch, capsys):
    base, task = h.save_base(tmp_path / "base"), h.save_task(tmp_path / "task")
    weights = sum(parameter.nbytes for parameter in loading.load_model(base).parameters())
    run = {"keep_checkpoints": True, "min_accuracy": 0, "min_depth": 3, "warmup_epochs": 0, "epochs_per_drop": 0}
    two = {"drops_per_stage": 2}  # depths 3 and 5 of 5, and the result; else 4, too
    cases = [(3.39, {}, True), (3.41, {}, False), (3.001, two, False)]
    for number, (free, more, told) in enumerate(cases):
        monkeypatch.setattr(rundir.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=int(free * weights)))
        assert cli.main(["trim", *h.arguments(h.settings(base, task, tmp_path / f"run-{number}", **run, **more))]) == 0
        assert ("warning: --keep-checkpoints needs up to " in capsys.readouterr().err) == told


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("changes", "copies"), [({"depth": 1}, 4), ({"depth": 4}, 3), ({"max_params": 57_000}, 3)], ids=str
)
def test_space_is_asked_for_every_depth_that_is_kept_and_not_of_a_finished_run(tmp_path, monkeypatch, changes, copies):
    base, task, asked = h.save_base(tmp_path / "base"), h.save_task(tmp_path / "task"), []
    monkeypatch.setattr(checks, "check_space", lambda _, needed: asked.append(needed))
    run = {"keep_checkpoints": True, "warmup_epochs": 0, "epochs_per_drop": 0, **changes}
    h.run(base, task, tmp_path / "run", **run)
    weights = sum(parameter.nbytes for parameter in loading.load_model(base).parameters())
    assert asked == [copies * weights]
    h.run(base, task, tmp_path / "run", **run, resume=True)
    assert len(asked) == 1


def test_layers_of_a_layout():
    assert whole_layers((Block(0, 0), Block(3, 3))) == [0, 3]
    assert whole_layers((Block(0, 1), Block(3, 3))) is None
    layout = (Block(0, 1), Block(3, 3))
    assert load_layout(dump_layout(layout)) == layout
