"""Two processes do what one does, and fail with one line."""

import json
from pathlib import Path

import helpers_run as h
import pytest
import yaml
from safetensors.torch import load_file
from torch import distributed

from trimllm import cli, parallel
from trimllm.errors import TrimError
from trimllm.run import rundir

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

RUNNING = """
import json
import sys

import pytest

sys.path.insert(0, sys.argv[2])
import helpers_run
from trimllm import cli
from trimllm.errors import TrimError
from trimllm.training import train, underway
from trimllm.training.step import Stepper

helpers_run.fast(pytest.MonkeyPatch())
*runs, cut, failing = json.loads(sys.argv[1])
for words in runs:
    assert cli.main(words) == 0

underway.Underway.due = lambda self: self.writes
step, done = Stepper.gradients, []
Stepper.gradients = lambda *a, **k: done.append(1) or step(*a, **k)
with pytest.MonkeyPatch.context() as patch, pytest.raises(helpers_run.Killed):
    helpers_run.kill_at(patch, Stepper, "gradients", 7)
    cli.main(cut)
assert cli.main([*cut, "--resume"]) == 0
assert len(done) == 12, done


def fail(*_, **__):
    raise TrimError("this process cannot go on")


train_stage = train.train_stage
train.train_stage = lambda *a, **k: fail() if a[4].process_index == 1 else train_stage(*a, **k)
sys.exit(cli.main(failing))
"""
"""Runs that end well; one that is cut within its second stage, and goes on; one whose second process fails."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return h.save_base(tmp_path_factory.mktemp("base"), depth=4)


RECOVER = {"schedule": "recover", "depth": 1, "max_joint": 2, "joint_tolerance": 100.0, "tie_tolerance": 100.0}


RUNS = {"epoch": {"depth": 2, "schedule": "epoch"}, "recover": RECOVER}


@pytest.fixture(scope="module")
def pair(base, task, tmp_path_factory):
    """The folder of runs that the same two processes made, one after the other; and how these processes ended."""
    folder = tmp_path_factory.mktemp("pair")
    script = folder / "runs.py"
    script.write_text(RUNNING)
    runs = RUNS | {"cut": RUNS["epoch"], "failing": {"depth": 3}}
    words = [["trim", *h.arguments(h.settings(base, task, folder / name, **runs[name]))] for name in runs]
    done = h.command(json.dumps(words), str(Path(__file__).parent), launcher=TWO, program=[str(script)])
    assert done.stdout.count("trimmed checkpoint:") == len(RUNS) + 1, done.stderr
    assert sum(line.startswith("saved ") for line in done.stderr.splitlines()) == len(RUNS) + 1
    return folder, done


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_drop_the_same_layers_and_measure_the_same_accuracies(
    base, task, pair, tmp_path, monkeypatch, name
):
    one, two, changes = tmp_path / "one", pair[0] / name, RUNS[name]
    h.fast(monkeypatch)
    h.run(base, task, one, **changes)
    assert h.drops(two) == h.drops(one)
    steps = [[stage["train"]["steps"] for stage in h.journal(run, "stage")] for run in (one, two)]
    assert steps[0] == steps[1]
    if changes is RECOVER:
        assert [len(units) for units in h.drops(two)] == [2, 1]
    for a, b in zip(h.result(one)["history"], h.result(two)["history"], strict=True):
        assert a["calibration"]["value"] == b["calibration"]["value"]
        assert a["calibration"]["loss"] == pytest.approx(b["calibration"]["loss"], abs=1e-4)
    assert h.result(one)["test"]["value"] == h.result(two)["test"]["value"]
    alone, together = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    assert alone.keys() == together.keys()
    assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-4


def test_two_processes_go_on_within_a_stage_to_bit_equal_weights(pair):
    straight, cut = (pair[0] / name for name in ("epoch", "cut"))
    assert h.weights_hash(cut / "model") == h.weights_hash(straight / "model")
    assert "  going on after step 2 of 4\n" in pair[1].stderr
    assert not list(cut.glob("*stage.pt*"))


def test_failure_of_one_process_ends_both_with_one_line(pair):
    _, done = pair
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("trimllm: ")] == [
        "trimllm: this process cannot go on"
    ]
    assert "src/trimllm" not in done.stderr, "the process that lost its peer prints no traceback"


ALONE = {
    "scan": "--model m --task t --output o",
    "drop": "--model m --layers 1 --output o",
    "eval": "--model m --task t",
    "bench": "m",
    "compare": "--model m --task t --output o",
    "export": "m --to gguf",
    "push": "d u/n",
    "tasks": "",
    "demo": "",
}
"""Commands that are work for one process, and what each needs to be parsed."""


def test_a_process_that_does_not_see_the_output_says_so_before_any_work(base, task, tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "SHARED_WITHIN", 0.0)
    monkeypatch.setattr(rundir, "claim", lambda config: [])  # the first process has another disk
    with pytest.raises(TrimError, match=r"process 0 on .* does not see what the first process wrote there"):
        h.run(base, task, tmp_path / "run", depth=3)


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "trim"])
def test_commands_that_cannot_share_their_work_are_refused(monkeypatch, capsys, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main([name, *ALONE[name].split()]) == 2
        out, err = capsys.readouterr()
        said = f"trimllm: {name} is work for one process, and 2 were started: call it without torchrun"
        assert (out, err.startswith(said), err.count("\n")) == ("", rank == 0, 1 - rank), err


def test_only_the_first_process_that_fails_reports_it(monkeypatch):
    assert parallel.first_to_fail()
    monkeypatch.setenv("RANK", "1")
    assert not parallel.first_to_fail()
    assert not parallel.another_failed()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert not parallel.another_failed()
        assert [parallel.first_to_fail() for _ in range(3)] == [True, False, False]
        assert parallel.another_failed()
    finally:
        distributed.destroy_process_group()


def test_ready_accelerate_config_is_for_several_gpus_in_bf16():
    from accelerate.commands.config.config_args import load_config_from_file

    path = Path(__file__).parents[1] / "configs" / "multi_gpu.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == "MULTI_GPU"
    assert (config.mixed_precision, config.num_processes, config.use_cpu) == ("bf16", 2, False)
    assert "accelerate launch --config_file configs/multi_gpu.yaml" in path.read_text().splitlines()[0]
    assert yaml.safe_load(path.read_text())["num_machines"] == 1
