"""AdamW's state goes on over a drop, in memory and through a kill, and is nowhere else."""

from __future__ import annotations

import contextlib
import copy
import json

import helpers_run as h
import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from trimllm import cli
from trimllm.blocks import surgery
from trimllm.blocks.layout import Block, whole
from trimllm.checkpoints import loading
from trimllm.config import TrainSettings, TrimConfig
from trimllm.config.plain_settings import make
from trimllm.errors import InputError
from trimllm.run import checks, progressive, recording
from trimllm.run.rundir import RunDir
from trimllm.training import optimizer_state, sparse, train
from trimllm.training.packing import Example
from trimllm.training.step import Stepper

ROWS = [Example(tuple((7 * n + 3 * i) % 60 + 3 for i in range(3 + 2 * (n % 5))), 1 + n % 2) for n in range(8)]
PLANS = [[ROWS[:4], ROWS[4:], ROWS[2:6]], [ROWS[1:5], ROWS[:2], ROWS, ROWS[3:]]]
SETTINGS = TrainSettings(lr=1e-2, batch_size=200, weight_decay=0.01)


def stage(model, plan, moments, parameters=None):
    parameters = parameters or sparse.freeze(model, whole(model.config.num_hidden_layers), None)
    carried = None if moments is None else {}
    train.train_stage(model, parameters, plan, SETTINGS, Accelerator(cpu=True), moments=moments, carried=carried)
    if moments is not None:
        moments.update(carried)


def apart(one, other):
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def step(model, rows, optimizer, rate):
    """Plain PyTorch, row by row."""
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids[:-1]]), use_cache=False).logits[0, row.start - 1 :]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.start :]), reduction="sum")
        (loss / sum(each.targets for each in rows)).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], SETTINGS.max_grad_norm)
    optimizer.step()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_two_stages_are_one_optimizer_that_nobody_interrupted(family, monkeypatch):
    """AdamW divides by the gradient's size: with a large eps rounding noise does not grow to a step."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: adamw(*a, eps=0.1, **k))
    model = tiny.build(family, 2)
    twin, fresh = copy.deepcopy(model), copy.deepcopy(model)
    moments = {}
    for plan in PLANS:
        stage(model, plan, moments)
        stage(fresh, plan, None)
    optimizer = torch.optim.AdamW(twin.parameters(), weight_decay=SETTINGS.weight_decay)
    for plan in PLANS:
        for number, rows in enumerate(plan):
            step(twin, rows, optimizer, SETTINGS.lr * train.schedule(number, len(plan)))
    assert apart(model, twin) < 1e-6
    assert apart(fresh, twin) > 1e-5
    assert {float(known["step"]) for known in moments.values()} == {7.0}


def test_what_leaves_or_stops_training_is_forgotten_and_what_begins_starts_empty():
    model, moments = tiny.build("llama", 4), {}
    stage(model, PLANS[0], moments, sparse.freeze(model, whole(4), [0, 1, 2], embeddings=False))
    surgery.apply_layout(model, layout := (Block(0, 0), Block(2, 2), Block(3, 3)))
    moments = optimizer_state.present(moments, model)
    assert set(moments) == {p for place in (0, 1) for p in model.model.layers[place].parameters()}, (
        "block 1 took its own"
    )
    stage(model, PLANS[1], moments, sparse.freeze(model, layout, [2, 3], embeddings=False))
    steps = [
        {float(moments[p]["step"]) if p in moments else 0 for p in block.parameters()} for block in model.model.layers
    ]
    assert steps == [{0}, {7.0}, {4.0}]
    stage(model, [], moments)
    assert len(moments) == sum(1 for block in model.model.layers[1:] for _ in block.parameters()), "an empty stage"


def test_halves_of_repacked_blocks_keep_their_own_state():
    model, moments = tiny.build("llama", 3), {}
    stage(model, PLANS[0], moments)
    before = {id(p): known for p, known in moments.items()}
    mlp, attention = (
        list(model.model.layers[i].get_submodule(n).parameters()) for i, n in ((1, "mlp"), (0, "self_attn"))
    )
    surgery.apply_layout(model, (Block(0, 1), Block(2, 2)))
    moments = optimizer_state.present(moments, model)
    first = model.model.layers[0]
    assert [id(p) for p in (*first.mlp.parameters(), *first.self_attn.parameters())] == [
        id(p) for p in (*mlp, *attention)
    ]
    assert all(moments[p] is before[id(p)] for p in (*mlp, *attention))
    assert set(moments) == set(model.parameters())


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma3n_text"])
def test_state_read_back_goes_on_bit_for_bit(family, tmp_path):
    model, moments = tiny.build(family, 6), {}
    stage(model, PLANS[0], moments)
    model.save_pretrained(tmp_path / "depth-6")
    optimizer_state.save(moments, model, tmp_path / "depth-6")
    again = loading.load_model(tmp_path / "depth-6")
    read = optimizer_state.load(again, tmp_path / "depth-6")
    names = [{name for name, p in m.named_parameters() if p in known} for m, known in ((model, moments), (again, read))]
    assert names[0] == names[1] != set()
    for one, known in ((model, moments), (again, read)):
        surgery.drop_layers(one, [0])
        kept = optimizer_state.present(known, one)
        assert (len(kept) < len(list(one.parameters()))) == (family == "gemma3n_text"), "a weight that is cut is new"
        stage(one, PLANS[1], kept)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    fast(monkeypatch)


def fast(monkeypatch):
    """No waiting; and before every stage, no state of a parameter that the model has lost."""
    h.fast(monkeypatch)
    begin = progressive.Run._stage

    def checked(self, state, *rest):
        assert set(state.moments) <= set(state.model.parameters())
        several = state.stages > 1 or state.trained is not None
        assert bool(state.moments) == (self.config.optimizer_state == "carried" and several)
        return begin(self, state, *rest)

    monkeypatch.setattr(progressive.Run, "_stage", checked)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return h.save_base(tmp_path_factory.mktemp("base"), depth=4)


CARRIED = {
    "optimizer_state": "carried",
    "sparse_update": "dynamic",
    "depth": 1,
    "warmup_epochs": 0.5,
    "epochs_per_drop": 0.5,
    "calibration_size": 3,
}


POINTS = {
    "between drop and training": (progressive.Run, "_drop", 1, True),
    "in the middle of a stage": (Stepper, "gradients", 5, False),
    "while the state is written": (optimizer_state, "save", 2, False),
    "between a checkpoint and its journal line": (progressive.Run, "_checkpoint", 2, True),
    "while the first cut is measured": (recording.Recorder, "record", 3, False),
    "while a later one is measured": (recording.Recorder, "record", 4, False),
    "between the journal line and cleaning up": (progressive.Run, "_clean", 3, False),
    "between a drop's line and its scan's leftovers": (progressive.Run, "_drop", 2, True),
}


@pytest.fixture(scope="module")
def album(base, task, tmp_path_factory):
    """A run that nobody interrupted, `straight`, and its folder at every one of the `POINTS`."""
    return h.photographed_run(POINTS, tmp_path_factory.mktemp("album"), base, task, fast, **CARRIED)


@pytest.fixture(scope="module")
def straight(album):
    return album / "straight"


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_ends_bit_equal(base, task, straight, album, point):
    output = album / point
    h.run(base, task, output, **CARRIED, resume=True)
    assert h.drops(output) == h.drops(straight)
    assert h.weights_hash(output / "model") == h.weights_hash(straight / "model")
    left, wanted = ({str(p.relative_to(run)) for p in run.rglob("*")} for run in (output, straight))
    assert left == wanted


def test_the_run_differs_from_one_with_fresh_optimizers(base, task, tmp_path, straight):
    h.run(base, task, tmp_path / "run", **CARRIED | {"optimizer_state": "fresh"})
    assert h.weights_hash(tmp_path / "run" / "model") != h.weights_hash(straight / "model")
    for output in (tmp_path / "run", straight):
        assert not list(output.rglob(optimizer_state.FOLDER)), "a finished run has no use for it"


def test_only_the_last_checkpoint_of_an_unfinished_run_holds_state(base, task, tmp_path):
    output, settings = tmp_path / "run", CARRIED | {"keep_checkpoints": True}
    run = RunDir(output)
    h.killed_run((progressive.Run, "_drop", 1), base, task, output, **settings)
    assert not list(output.rglob(optimizer_state.FOLDER)), "nothing comes from the warm-up"
    h.killed_run((progressive.Run, "_drop", 3), base, task, output, **settings, resume=True)
    assert run.kept_depths() == [4, 3, 2]
    assert [path.parent for path in output.rglob(optimizer_state.FOLDER)] == [run.checkpoint(2)]
    held = load_file(run.checkpoint(2) / optimizer_state.FOLDER / optimizer_state.FILE)
    (last,) = [drop["trains"] for drop in h.journal(output, "drop")[-1:]]
    places = [block["attention"] for block in json.loads((run.plans / "depth-2.json").read_text())["blocks"]]
    trained = {f"model.layers.{place}" for place, source in enumerate(places) if source in last}
    assert {".".join(name.split(".")[:3]) for name in held if ".layers." in name} == trained
    assert {name.rpartition(".")[2] for name in held} == {"step", "exp_avg", "exp_avg_sq"}
    foreseen = optimizer_state.most_bytes(
        make(TrimConfig, h.settings(base, task, output, **settings)), loading.load_model(base)
    )
    moments = sum(value.nbytes for name, value in held.items() if not name.endswith(".step"))
    assert moments == foreseen
    h.killed_run((progressive.Run, "_finish", 1), base, task, output, **settings, resume=True)
    assert not list(tmp_path.rglob(optimizer_state.FOLDER)), "nothing comes after the last stage"
    h.run(base, task, output, **settings, resume=True)
    assert [path.name for path in sorted(run.scans.iterdir())] == [f"scan-{n:03d}.json" for n in range(3)]
    assert cli.main(["export", str(output), "--depth", "2", "--output", str(tmp_path / "product")]) == 0
    assert not list(tmp_path.rglob(optimizer_state.FOLDER))
    for product in (tmp_path / "product", run.model):
        assert [path.name for path in product.rglob("*.safetensors")] == ["model.safetensors"]


def test_a_run_that_a_floor_ends_keeps_no_state_either(base, task, tmp_path, monkeypatch):
    h.floor_ends(monkeypatch, 3)
    output = tmp_path / "run"
    h.run(base, task, output, **CARRIED | {"min_accuracy": 0, "keep_checkpoints": True})
    assert RunDir(output).kept_depths() == [4, 3, 2]
    assert h.result(output)["depth"] == 3
    assert not list(output.rglob(optimizer_state.FOLDER))


def test_state_that_a_kill_left_in_a_finished_run_goes_when_it_is_asked_again(base, task, tmp_path, monkeypatch):
    h.floor_ends(monkeypatch, 3)
    output, settings = tmp_path / "run", CARRIED | {"min_accuracy": 0}
    h.killed_run((RunDir, "forget", 1), base, task, output, **settings)
    assert list(output.rglob(optimizer_state.FOLDER))
    h.run(base, task, output, **settings, resume=True)
    assert not list(output.rglob(optimizer_state.FOLDER))


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, True),
        ({"optimizer_state": "fresh"}, False),
        ({"one_shot": True, "sparse_update": "filled"}, False),
        ({"epochs_per_drop": 0.0, "sparse_update": "filled"}, False),
        ({"depth": 3}, False),
        ({"depth": None, "max_params": 57_000}, True),
    ],
    ids=str,
)
def test_space_is_asked_for_state_that_will_be_written(base, task, tmp_path, monkeypatch, changes, state):
    asked = []

    def full(_output, needed):
        asked.append(needed)
        raise h.Killed

    monkeypatch.setattr(checks, "check_space", full)
    with pytest.raises(h.Killed):
        h.run(base, task, tmp_path / "run", **CARRIED | changes)
    model = loading.load_model(base)
    weights = sum(p.nbytes for p in model.parameters())
    settings = make(TrimConfig, h.settings(base, task, tmp_path / "run", **CARRIED | changes))
    assert asked == [3 * weights + 2 * state * optimizer_state.most_bytes(settings, model)]


def test_state_that_is_gone_is_one_line(base, task, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        h.kill_at(patch, progressive.Run, "_drop", 3)
        with contextlib.suppress(h.Killed):
            h.run(base, task, tmp_path / "run", **CARRIED)
    optimizer_state.delete(RunDir(tmp_path / "run").checkpoint(2))
    with pytest.raises(InputError, match=r"depth-2.*: the state of the optimizer is not there: begin a new run"):
        h.run(base, task, tmp_path / "run", **CARRIED, resume=True)


def test_a_stage_leaves_room_for_what_adamw_knows_where_that_is_kept(base, task, tmp_path, monkeypatch):
    """Not by the warm-up nor by the last stage, whose checkpoints hold none of it."""
    reserves, underway = [], progressive.Underway

    def watched(*arguments, **named):
        reserves.append(named["reserve"])
        return underway(*arguments, **named)

    monkeypatch.setattr(progressive, "Underway", watched)
    h.run(base, task, tmp_path / "run", depth=2, optimizer_state="carried", keep_checkpoints=True)
    sizes = [stage["parameters"] * 4 for stage in h.journal(tmp_path / "run", "stage")]
    kept = [reserve - size for reserve, size in zip(reserves, sizes, strict=True)]
    assert kept[0] == kept[-1] == 0
    assert all(more > 0 for more in kept[1:-1])
    assert len(kept) > 2
