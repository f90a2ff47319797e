"""A stage of training that was cut goes on from where it was saved, and ends with the weights it would have had."""

import itertools
import resource
import shutil

import helpers_run as h
import pytest
import tiny
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from trimllm import files
from trimllm.baselines import METHODS, Cell, cell, plain
from trimllm.baselines.job import Job
from trimllm.checkpoints.loading import DEMO, load_tokenizer
from trimllm.config import CompareConfig, TrainSettings
from trimllm.console import Console
from trimllm.errors import InputError
from trimllm.run import checks, placing, progressive, rundir
from trimllm.run.recovery import Recovery
from trimllm.startup import Terminated
from trimllm.training import optimizer_state, train, underway
from trimllm.training.packing import Example
from trimllm.training.step import Stepper
from trimllm.training.underway import Progress, Training, Underway

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Stages are saved after every step."""
    monkeypatch.setattr(Underway, "due", lambda self: self.writes and self.minutes > 0)


@pytest.fixture
def steps(monkeypatch):
    """Counts the optimizer steps that are computed."""
    done, step = [], Stepper.gradients
    monkeypatch.setattr(Stepper, "gradients", lambda *a, **k: done.append(1) or step(*a, **k))
    return done


@pytest.fixture(scope="module")
def dropping_out(tmp_path_factory):
    """A model whose training is random within, too."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": h.DEPTH, "n_head": 4, "n_positions": 128, "vocab_size": len(load_tokenizer(DEMO))}
    config = GPT2Config(**sizes, resid_pdrop=0.3, embd_pdrop=0.3, bos_token_id=0, eos_token_id=0)
    return h.save_model(GPT2LMHeadModel(config), tmp_path_factory.mktemp("dropping-out"))


RECOVER = {"schedule": "recover", "joint_tolerance": 100.0, "tie_tolerance": 100.0, "max_joint": 2, "depth": 2}
CASES = {
    "warm-up": (3, {}),
    "a stage after a drop": (7, {}),
    "a stage with what AdamW knew before": (11, {}),
    "the last stage of the default": (10, {"schedule": "late"}),
    "all of the blocks train": (11, {"sparse_update": "off", "optimizer_state": "fresh"}),
    "with a teacher": (11, {"distill": 0.5}),
    "activations computed again": (11, {"gradient_checkpointing": True, "micro_batch_size": 60}),
    "weights in bfloat16": (11, {"dtype": "bfloat16"}),
    "while the loss recovers": (8, {**RECOVER, "recover_tolerance": 0.0}),
    "dropout": (11, {}),
}
"""At which step the run is killed, which has four of them in each of its three stages, and the settings."""


@pytest.fixture(scope="module")
def uninterrupted(base, task, dropping_out, tmp_path_factory):
    """The folder of a run that nobody interrupted, and its steps: one for all cases of the same settings."""
    runs = {}

    def found(name, changes):
        key = (name == "dropout", *sorted(changes.items()))
        if key not in runs:
            steps, output = [], tmp_path_factory.mktemp("straight") / "run"
            with pytest.MonkeyPatch.context() as patch:
                step = Stepper.gradients
                patch.setattr(Stepper, "gradients", lambda *a, **k: steps.append(1) or step(*a, **k))
                h.run(dropping_out if name == "dropout" else base, task, output, **changes)
            runs[key] = output, len(steps)
        return runs[key]

    return found


@pytest.mark.parametrize("name", CASES)
def test_a_stage_goes_on_and_ends_with_bit_equal_weights(
    base, task, dropping_out, tmp_path, steps, uninterrupted, name
):
    call, changes = CASES[name][0], {"schedule": "epoch", **CASES[name][1]}
    model = dropping_out if name == "dropout" else base
    straight, whole = uninterrupted(name, changes)
    cut = tmp_path / "cut"
    steps.clear()
    h.killed_run((Stepper, "gradients", call), model, task, cut, **changes)
    assert (cut / "stage.pt").exists()
    h.run(model, task, cut, resume=True, **changes)
    assert len(steps) == whole, "no step was computed twice"
    assert h.weights_hash(cut / "model") == h.weights_hash(straight / "model")
    for one, other in zip(h.journal(cut, "stage"), h.journal(straight, "stage"), strict=True):
        assert one["train"] | {"seconds": 0} == other["train"] | {"seconds": 0}
        assert one["calibration"] == other["calibration"]
    assert not list(cut.glob("*stage.pt*"))


def test_dropout_is_another_in_every_step(dropping_out):
    model, masks = GPT2LMHeadModel.from_pretrained(dropping_out), []
    model.transformer.drop.register_forward_hook(lambda _module, _args, out: masks.append(out == 0))
    settings = TrainSettings(lr=1e-9)
    train.train_stage(model, list(model.parameters()), rows(3), settings, Accelerator(cpu=True))
    assert not torch.equal(masks[-1], masks[-2])


def test_a_stage_that_is_cut_while_it_is_saved_goes_on_from_the_save_before(base, task, tmp_path, steps, monkeypatch):
    """A kill leaves a part of the new file beside the old one."""
    output, save, calls = tmp_path / "run", torch.save, itertools.count(1)

    def dying(record, file):
        save(record, file)
        if next(calls) == 3:
            shutil.copy(file.name, output / ".stage.pt.12345.tmp")
            raise h.Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dying)
        with pytest.raises(h.Killed):
            h.run(base, task, output)
    assert len(steps) == 3
    h.run(base, task, output, resume=True)
    whole = sum(stage["train"]["steps"] for stage in h.journal(output, "stage"))
    assert len(steps) == whole + 1, "the third step alone was computed again"
    assert not list(output.glob("*stage.pt*"))


def test_with_a_remedy_the_stage_begins_anew(base, task, tmp_path, steps, capsys):
    """Where a loss diverged, the weights of its last steps are no place to go on from."""
    output = tmp_path / "run"
    h.killed_run((Stepper, "gradients", 3), base, task, output)
    assert len(steps) == 2
    progressive.trim(console=Console(), **h.settings(base, task, output, resume=True, lr=5e-4))
    assert "  with another --lr the stage begins anew (2 of 4 steps were done)\n" in capsys.readouterr().err
    whole = sum(stage["train"]["steps"] for stage in h.journal(output, "stage"))
    assert len(steps) == 2 + whole


def test_a_finished_stage_is_not_kept(base, task, tmp_path):
    output = tmp_path / "run"
    h.killed_run((progressive.Run, "_drop", 1), base, task, output)
    assert h.journal(output)[-1]["event"] == "stage"
    assert not (output / "stage.pt").exists()


@pytest.mark.parametrize("damage", ["torn", "nothing", "another", "a bit", "other weights"])
def test_a_file_that_is_not_of_the_stage_is_not_gone_on_with(base, task, tmp_path, steps, capsys, damage):
    output = tmp_path / "run"
    h.killed_run((Stepper, "gradients", 3), base, task, output)
    file = output / "stage.pt"
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "nothing":
        file.write_bytes(b"")
    elif damage == "a bit":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "another":
        torch.save({"epoch": 3}, file)
    else:
        record = torch.load(file, weights_only=True)
        name = next(iter(record["weights"]))
        record["weights"][name] = record["weights"][name][:1]
        torch.save(record, file)
    done = len(steps)
    capsys.readouterr()
    progressive.trim(console=Console(), **h.settings(base, task, output, resume=True))
    damaged = f"  {file} cannot be read (it is damaged): the stage begins anew\n"
    assert (damaged in capsys.readouterr().err) == (damage != "other weights")
    whole = sum(stage["train"]["steps"] for stage in h.journal(output, "stage"))
    assert len(steps) == done + whole
    assert not file.exists()


def test_no_stage_is_saved_where_it_is_not_wanted(base, task, tmp_path):
    h.killed_run((Stepper, "gradients", 3), base, task, tmp_path / "run", checkpoint_minutes=0)
    assert not (tmp_path / "run" / "stage.pt").exists()


def short_of(monkeypatch, free):
    """The disk has so many bytes left, as far as saving a stage sees."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(underway.shutil, "disk_usage", lambda _: usage._replace(free=free[0]))


@pytest.mark.parametrize("full", ["known", "met"])
def test_a_full_disk_does_not_end_a_stage_that_could_only_not_be_saved(base, task, tmp_path, capsys, monkeypatch, full):
    output = tmp_path / "run"
    if full == "known":
        monkeypatch.setattr(checks, "check_space", lambda *_: None)
        short_of(monkeypatch, [100_000])
    else:
        save, allowed = torch.save, resource.getrlimit(resource.RLIMIT_FSIZE)

        def met(record, file):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, allowed[1]))
            try:
                save(record, file)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, allowed)

        monkeypatch.setattr(torch, "save", met)
    with monkeypatch.context() as patch:
        patch.setattr(progressive.Run, "_checkpoint", lambda *_: (_ for _ in ()).throw(h.Killed))
        with pytest.raises(h.Killed):
            progressive.trim(console=Console(), **h.settings(base, task, output))
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "cannot be saved" in line]
    assert line.endswith("if it is cut, it begins anew")
    assert ("MiB free)" if full == "known" else "File too large: choose another --output)") in line
    assert not list(output.glob("*stage.pt*"))


def test_where_the_disk_fills_later_what_was_saved_stays_and_room_is_used_again(tmp_path, monkeypatch):
    said, free = [], [10**9]
    short_of(monkeypatch, free)
    monkeypatch.setattr(torch, "save", lambda *_: None)
    model = tiny.build("llama")
    parameters, optimizer = list(model.parameters()), torch.optim.AdamW(model.parameters())
    saved = Underway(tmp_path / "stage.pt", 1.0, say=said.append, reserve=10**8)
    for step, room in ((3, 10**9), (5, 10**7), (7, 10**7), (9, 10**9)):
        free[0] = room
        saved.write(Training(model, parameters, optimizer, 20), Progress(steps=step))
        assert saved.step == (3 if room == 10**7 else step)
    first, line = said
    assert first.startswith("  saved within the stage, after step 3 of 20 (")
    assert line.endswith("if it is cut, it goes on after step 3")


def test_a_run_that_goes_on_counts_the_saved_stage_as_room(base, task, tmp_path, monkeypatch):
    output = tmp_path / "run"
    h.killed_run((Stepper, "gradients", 3), base, task, output)
    stage = output / "stage.pt"
    shutil.copy(stage, output / ".stage.pt.77.tmp")
    usage, needed = shutil.disk_usage(tmp_path), 10**6
    monkeypatch.setattr(rundir.shutil, "disk_usage", lambda _: usage._replace(free=needed - 2 * stage.stat().st_size))
    checks.check_space(output, needed)
    with pytest.raises(InputError, match="free some space"):
        checks.check_space(output, needed + 1)


def test_moments_are_not_held_twice_when_a_stage_goes_on(base, task, tmp_path, monkeypatch):
    output, restored, restore = tmp_path / "run", [], optimizer_state.restore
    h.killed_run((Stepper, "gradients", 11), base, task, output, schedule="epoch")
    assert (output / "checkpoints" / f"depth-{h.DEPTH - 1}" / optimizer_state.FOLDER).exists()
    monkeypatch.setattr(optimizer_state, "restore", lambda *a: restored.append(len(a[1])) or restore(*a))
    h.run(base, task, output, resume=True, schedule="epoch")
    assert len(restored) == 1


class BrokenOff:
    """A file whose writing is broken off by a signal."""

    def __init__(self, file, signal):
        self.file, self.signal, self.flush = file, signal, file.flush

    def write(self, data):
        if self.file.tell() > 50_000:
            raise self.signal
        return self.file.write(data)


@pytest.mark.parametrize("signal", [KeyboardInterrupt, Terminated])
@pytest.mark.parametrize("where", ["in a step", "while it is saved"])
def test_a_stage_that_is_ended_from_outside_is_saved_first(base, task, tmp_path, steps, monkeypatch, signal, where):
    output, save, calls = tmp_path / "run", torch.save, itertools.count(1)

    def ended(record, file):
        if next(calls) > 1:
            return save(record, file)
        return save(record, BrokenOff(file, signal))

    with monkeypatch.context() as patch:
        if where == "while it is saved":
            patch.setattr(torch, "save", ended)
        else:
            patch.setattr(Underway, "due", lambda self: False)
            step = Stepper.gradients
            patch.setattr(Stepper, "gradients", lambda *a, **k: raising(signal) if len(steps) == 2 else step(*a, **k))
        with pytest.raises(signal):
            h.run(base, task, output)
    done = len(steps)
    assert torch.load(output / "stage.pt", weights_only=True)["progress"]["steps"] == done > 0
    h.run(base, task, output, resume=True)
    assert len(steps) == sum(stage["train"]["steps"] for stage in h.journal(output, "stage"))


def test_a_look_at_the_loss_that_was_broken_off_is_taken_again(base, task, tmp_path, monkeypatch):
    changes = {**RECOVER, "recover_tolerance": 0.0}
    h.run(base, task, tmp_path / "straight", **changes)
    look, calls = Recovery.__call__, itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "__call__", lambda self: raising(Terminated) if next(calls) == 2 else look(self))
        with pytest.raises(Terminated):
            h.run(base, task, tmp_path / "cut", **changes)
    h.run(base, task, tmp_path / "cut", resume=True, **changes)
    one, other = (h.journal(tmp_path / name, "stage")[1]["train"] for name in ("straight", "cut"))
    assert one["recovery"] == other["recovery"]
    assert h.weights_hash(tmp_path / "cut" / "model") == h.weights_hash(tmp_path / "straight" / "model")


def test_weights_in_the_middle_of_a_step_are_not_saved(base, task, tmp_path, monkeypatch):
    monkeypatch.setattr(Underway, "due", lambda self: False)
    calls, clear = itertools.count(1), torch.optim.AdamW.zero_grad
    monkeypatch.setattr(
        torch.optim.AdamW, "zero_grad", lambda *a, **k: raising(Terminated) if next(calls) == 3 else clear(*a, **k)
    )
    with pytest.raises(Terminated):
        h.run(base, task, tmp_path / "run")
    assert not (tmp_path / "run" / "stage.pt").exists()


def raising(error):
    raise error


def rows(count, length=20):
    return [[Example(list(range(1, length)), 5)] for _ in range(count)]


def trained(plan, file, *, watch=None, moments=None, **more):
    model = tiny.build("llama")
    saved = Underway(file, 1.0, number=1, **more)
    parameters, settings, cpu = list(model.parameters()), TrainSettings(lr=1e-3), Accelerator(cpu=True)
    return train.train_stage(model, parameters, plan, settings, cpu, watch=watch, moments=moments, underway=saved)


def test_what_a_watch_has_seen_is_saved_with_the_stage(tmp_path):
    file, seen = tmp_path / "stage.pt", iter([3.0, 2.0, 1.0])
    watch = Recovery(lambda: next(seen), limit=0.0, cycle=3)
    trained(rows(9), file, watch=watch)
    assert watch.losses == [3.0, 2.0, 1.0]
    assert torch.load(file, weights_only=True)["progress"]["watched"] == [3.0, 2.0]
    again = Recovery(lambda: 0.5, limit=0.0, cycle=3)
    report = trained(rows(9), file, watch=again)
    assert (again.losses, report.steps) == ([3.0, 2.0, 0.5], 9)


def test_a_stage_that_goes_on_holds_nothing_of_what_the_optimizer_knew_at_its_beginning(tmp_path, monkeypatch):
    """It would take twice the memory of what trains, to the end of the stage."""
    trained(rows(4), tmp_path / "stage.pt")
    moments, held, step = {torch.zeros(1): {}}, [], Stepper.gradients
    monkeypatch.setattr(Stepper, "gradients", lambda *a: held.append(len(moments)) or step(*a))
    trained(rows(4), tmp_path / "stage.pt", moments=moments)
    assert held == [0], "it went on after the third of four steps"


def test_another_process_does_not_write(tmp_path):
    trained(rows(4), tmp_path / "stage.pt", writes=False)
    assert not list(tmp_path.iterdir())


def test_time_between_saves(monkeypatch, tmp_path):
    monkeypatch.undo()
    now = [0.0]
    monkeypatch.setattr(underway.time, "monotonic", lambda: now[0])
    saved = Underway(tmp_path / "stage.pt", 2.0)
    now[0] = 119.0
    assert not saved.due()
    now[0] = 121.0
    assert saved.due()
    model = tiny.build("llama")
    optimizer = torch.optim.AdamW(model.parameters())

    def slow(*_):
        now[0] += 60.0

    monkeypatch.setattr(torch, "save", slow)
    saved.write(Training(model, list(model.parameters()), optimizer, 9), Progress())
    now[0] += 1190.0
    assert not saved.due(), "a save takes a minute: one in twenty"
    now[0] += 20.0
    assert saved.due()


def test_weights_that_share_their_storage_with_others_are_saved_alone(tmp_path):
    """Loaders make weights from slices of one large piece of memory."""
    model = tiny.build("llama")
    parameters = list(model.model.norm.parameters())
    large = torch.zeros(1_000_000)
    large[: parameters[0].numel()] = parameters[0].data
    parameters[0].data = large[: parameters[0].numel()]
    saved = Underway(tmp_path / "stage.pt", 1.0)
    saved.write(Training(model, parameters, torch.optim.AdamW(parameters), 9), Progress(steps=1))
    assert saved.path.stat().st_size < 10_000


@pytest.mark.parametrize("name", ["full", "full-long"])
def test_a_fully_fine_tuned_row_of_a_comparison_goes_on(base, task, tmp_path, steps, monkeypatch, name):
    command = CompareConfig(
        model=str(base), task=str(task), output=str(tmp_path), lr=1e-3, batch_size=128, calibration_size=6, device="cpu"
    )

    def job(root):
        made = Job(command, Cell(METHODS[name], 0.5), root)
        made.folder.mkdir(parents=True, exist_ok=True)
        return made

    monkeypatch.setattr(Job, "full", base)
    straight, cut = job(tmp_path / "straight"), job(tmp_path / "cut")
    plain.run(straight)
    whole = len(steps)
    with monkeypatch.context() as patch:
        h.kill_at(patch, Stepper, "gradients", 4)
        with pytest.raises(h.Killed):
            plain.run(cut)
    (cut.folder / ".stage.pt.77.tmp").write_text("left by a kill")
    product = plain.run(job(tmp_path / "cut"))
    assert len(steps) == 2 * whole
    assert h.weights_hash(product.checkpoint) == h.weights_hash(straight.folder / "model")
    assert [path.name for path in cut.folder.glob("*stage.pt*")] == ["stage.pt"], "the row is not finished"
    steps.clear()
    plain.run(job(tmp_path / "cut"))
    assert len(steps) == 1, "cut while it was evaluated"


@pytest.mark.parametrize(("status", "left"), [("done", False), ("not run", True)])
def test_a_finished_row_has_no_use_for_its_stage(base, task, tmp_path, monkeypatch, status, left):
    command = CompareConfig(model=str(base), task=str(task), output=str(tmp_path))
    files.write_atomic(tmp_path / "config.yaml", placing.to_store(command, tmp_path))
    stage = Cell(METHODS["full"], None).file(tmp_path).with_name("stage.pt")
    stage.parent.mkdir(parents=True)
    stage.write_text("saved")
    monkeypatch.setattr(cell, "measure", lambda *_: {"status": status})
    assert cell.main([str(tmp_path), "full"]) == 0
    assert stage.exists() == left
