"""--schedule recover: what goes at once is tried at once, and a stage ends when the calibration loss is back."""

from __future__ import annotations

import itertools
import json
import re

import helpers_run as h
import numpy as np
import pytest
import tiny
from transformers import AutoModelForCausalLM

from trimllm import files
from trimllm.blocks import surgery
from trimllm.blocks.layout import Unit, halves, load_layout, remove, remove_all, units, whole
from trimllm.checkpoints.loading import DEMO, load_tokenizer
from trimllm.config import TrimConfig
from trimllm.errors import InputError
from trimllm.evaluation.evaluate import Scorer
from trimllm.evaluation.inputs import scorer, task_data
from trimllm.evaluation.judging import Evaluation
from trimllm.importance import joint
from trimllm.importance.joint import Joint
from trimllm.parallel import ALONE
from trimllm.run import account, opening, progressive, recovery
from trimllm.run.recovery import Recovery
from trimllm.run.set_search import SetSearch
from trimllm.run.targets import drops_end_sooner, least_depth, stage_epochs, stages_ahead
from trimllm.training import train, training_rows
from trimllm.training.packing import Example
from trimllm.training.step import Stepper

pytestmark = pytest.mark.usefixtures("fast")

EASY = {"schedule": "recover", "joint_tolerance": 100.0, "tie_tolerance": 100.0}
"""Anything may go together."""
ONE_BY_ONE = {"schedule": "recover", "max_joint": 1}


RECOVER = {**EASY, "max_joint": 2, "depth": 2, "epochs_per_drop": 0.5, "recover_tolerance": 0.0}


POINTS = {
    "between joint decision and cut": (joint, "grow", 1, True),
    "in the first cycle of a stage": (Stepper, "gradients", 8, False),
    "in a look at the loss": (Recovery, "__call__", 1, True),
    "in a later cycle": (Recovery, "__call__", 2, False),
    "between the second joint decision and its cut": (joint, "grow", 2, True),
}


@pytest.fixture(scope="module")
def album(base, task, tmp_path_factory):
    """A run that nobody interrupted, `straight`, and its folder at every one of the `POINTS`."""
    return h.photographed_run(POINTS, tmp_path_factory.mktemp("album"), base, task, **RECOVER)


@pytest.fixture(scope="module")
def straight(album):
    return album / "straight"


def looks(monkeypatch, losses):
    """Scripted calibration losses for the looks within stages (the model is in training mode there); the rest is real.

    Returns how many looks there were at each depth.
    """
    measure, script, seen = Scorer.evaluate, itertools.chain(losses, itertools.repeat(99.0)), {}

    def evaluate(self, model, *arguments, **more):
        training = model.training
        found = measure(self, model, *arguments, **more)
        if training:
            depth = model.config.num_hidden_layers
            seen[depth] = seen.get(depth, 0) + 1
            object.__setattr__(found, "loss", next(script))
        return found

    monkeypatch.setattr(Scorer, "evaluate", evaluate)
    return seen


def test_stage_ends_at_the_first_look_that_finds_the_loss_back(base, task, tmp_path, monkeypatch):
    seen = looks(monkeypatch, [99.0, 99.0, 0.0])
    h.run(base, task, tmp_path / "run", **ONE_BY_ONE, depth=3, epochs_per_drop=3)
    warm, first, last = h.journal(tmp_path / "run", "stage")
    found = first["train"]["recovery"]
    assert (found["losses"], found["recovered"], seen) == ([99.0, 99.0, 0.0], True, {4: 3})
    assert first["train"]["steps"] == 3 * found["cycle"] < last["train"]["steps"]
    assert found["limit"] == warm["calibration"]["loss"] + 0.5
    assert "recovery" not in warm["train"], "the warm-up is not cut short"
    assert "recovery" not in last["train"], "nor the last stage"


def test_stage_that_does_not_recover_ends_at_its_budget_and_says_so(base, task, tmp_path, monkeypatch, capsys):
    looks(monkeypatch, [])
    settings = h.settings(base, task, tmp_path / "run", **EASY, max_joint=2, depth=2, epochs_per_drop=1.5)
    progressive.trim(**settings)
    warm, first, _ = h.journal(tmp_path / "run", "stage")
    assert [len(drop["units"]) for drop in h.journal(tmp_path / "run", "drop")] == [2, 1]
    assert first["train"]["steps"] == pytest.approx(3 * warm["train"]["steps"], abs=2), "1.5 epochs for each of two"
    assert not first["train"]["recovery"]["recovered"]
    assert "is not back in the budget: 99.000" in capsys.readouterr().err


def test_looks_ask_right_answers_only(tokenizer, questions):
    model = tiny.build("llama", 3)
    scorer = Scorer(model, tokenizer, questions)
    asked = []
    model.register_forward_pre_hook(lambda _m, _a, given: asked.append(given["input_ids"].numel()), with_kwargs=True)
    watch = recovery.follow(model, scorer, ALONE, [], 1.0, 0.0)
    assert not watch()
    right = sum(asked)
    assert watch.losses == [pytest.approx(scorer.evaluate(model, "acc").loss, abs=1e-5)]
    assert right < sum(asked) - right


def test_loss_is_looked_at_where_the_learning_rate_is_down(base, task, tmp_path, monkeypatch):
    rates, look, step, adam = [], Recovery.__call__, Stepper.gradients, train.torch.optim.AdamW
    optimizers = []
    monkeypatch.setattr(train.torch.optim, "AdamW", lambda *a, **k: optimizers.append(adam(*a, **k)) or optimizers[-1])
    monkeypatch.setattr(Stepper, "gradients", lambda *a: rates.append(optimizers[-1].param_groups[0]["lr"]) or step(*a))
    monkeypatch.setattr(Recovery, "__call__", lambda self: rates.append("look") or look(self))
    looks(monkeypatch, [])
    h.run(base, task, tmp_path / "run", **ONE_BY_ONE, depth=3, warmup_epochs=0, epochs_per_drop=1, batch_size=60)
    cycle = h.journal(tmp_path / "run", "stage")[1]["train"]["recovery"]["cycle"]
    end = rates.index("look")
    assert end >= 3
    assert abs(end - cycle) <= 1
    assert rates.count("look") >= 2
    assert rates[:end] == sorted(rates[:end], reverse=True)
    assert rates[end - 1] <= 1e-3 / end < rates[0] == rates[end + 1] == 1e-3
    assert rates[-1] == "look" or rates[-1] <= 1e-3 / end, "no stage ends at a high rate"


def test_cycles_cover_every_step_once():
    places = [train._in_cycle(step, 25, 10) for step in range(25)]
    assert places == [(i, 12) for i in range(12)] + [(i, 13) for i in range(13)]
    assert [train._in_cycle(step, 4, None) for step in range(4)] == [(i, 4) for i in range(4)]


def test_looks_cost_at_most_their_share():
    assert recovery.cycle(90, 3.0, 90_000, 30) == 10, "three an epoch"
    steps, tokens, calibration = 90, 90_000, 60_000
    cycle = recovery.cycle(steps, 3.0, tokens, calibration)
    assert calibration / 3 / (cycle * tokens / steps) == pytest.approx(recovery.SHARE, rel=0.05)
    assert recovery.cycle(0, 0.0, 0, 30) == 1


def test_loss_to_come_back_to_is_that_before_the_first_drop():
    stages = [{"calibration": {"loss": loss}} for loss in (0.7, 0.5, 0.9)]
    assert recovery.limit(stages, 0.1) == pytest.approx(0.8)


def test_two_units_that_are_harmless_alone_and_harmful_together_do_not_go_together():
    harmful = {frozenset({1, 2})}
    trials = []

    def attempt(chosen):
        trials.append(chosen)
        bad = any(pair <= set(chosen) for pair in harmful)
        return Joint(chosen, 50.0 if bad else 80.0, 2.0 if bad else 0.5)

    def following(chosen, refused):
        return next((i for i in (1, 2, 3, 4) if i not in chosen and i not in refused), None)

    intact = Evaluation("acc", 80.0, 0.0, 6, 0.5, correct=(True,))
    chosen, tried = joint.grow(1, following, attempt, lambda found: joint.harmless(found, intact, 0.1, 0.0), 3)
    assert chosen == (1, 3, 4)
    assert [found.units for found in tried] == trials == [(1, 2), (1, 3), (1, 3, 4)]


@pytest.mark.parametrize(
    ("value", "loss", "passes"),
    [(80, 0.6, True), (80, 0.61, False), (77, 0.5, True), (76.9, 0.5, False), (99, 0.0, True)],
)
@pytest.mark.parametrize(("stderr", "points"), [(3.0, 1.0), (1.0, 3.0)])
def test_harmless_is_loss_and_accuracy(value, loss, passes, stderr, points):
    intact = Evaluation("acc", 80.0, stderr, 6, 0.5, correct=(True,))
    assert joint.harmless(Joint((1, 2), value, loss), intact, 0.1, points) is passes
    text = Evaluation("likelihood", 60.0, 1.0, 6, 0.5)
    assert joint.harmless(Joint((1, 2), 0.0, 0.6), text, 0.1, 0.0), "without choices the loss decides"


@pytest.mark.parametrize("most", [2, 4])
def test_blocks_that_only_harm_together_go_one_by_one_and_few_sets_are_tried(base, task, tmp_path, monkeypatch, most):
    together, measure, inside = SetSearch.grow, Scorer.evaluate, []

    def evaluate(self, model, *arguments, **more):
        found = measure(self, model, *arguments, **more)
        if inside:
            object.__setattr__(found, "loss", 1e4)
        return found

    def watched(self, *arguments):
        inside.append(True)
        chosen = together(self, *arguments)
        inside.clear()
        return chosen

    monkeypatch.setattr(Scorer, "evaluate", evaluate)
    monkeypatch.setattr(SetSearch, "grow", watched)
    h.run(base, task, tmp_path / "run", **EASY, depth=3, max_joint=most)
    drops = h.journal(tmp_path / "run", "drop")
    assert [len(drop["units"]) for drop in drops] == [1, 1]
    scan = json.loads((tmp_path / "run" / "scans" / "scan-000.json").read_text())
    assert [found["loss"] for found in scan["joint"]] == [1e4] * most, "of four other blocks"


@pytest.mark.parametrize("unit", ["block", "pair"])
def test_journaled_joint_trial_is_what_a_really_cut_model_gives(base, task, tmp_path, unit):
    output = tmp_path / "run"
    h.run(base, task, output, **EASY, depth=2, unit=unit, keep_checkpoints=True, max_joint=3, epochs_per_drop=0.2)
    drop = h.journal(output, "drop")[0]
    assert len(drop["units"]) == len(drop["joint"]["units"]) == 3
    assert drop["reached"] == "depth 2"
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoints" / "depth-5")
    surgery.apply_layout(model, load_layout(drop["cut"]))
    config = TrimConfig(**h.settings(base, task, output))
    tokenizer = load_tokenizer(DEMO)
    data = task_data(config, tokenizer)
    found = scorer(config, model, tokenizer, data.calibration).evaluate(model, data.metric)
    assert drop["joint"]["value"] == found.value
    assert drop["joint"]["loss"] == pytest.approx(found.loss, abs=1e-4)


@pytest.mark.parametrize(
    ("target", "depth"),
    [
        ({"max_params": 87_904 - 2 * 7_000}, 3),
        ({"target_speedup": 1.6}, 3),
        ({"max_params": 57_000, "min_depth": 3}, 3),
    ],
    ids=str,
)
def test_no_set_goes_beyond_the_target(base, task, tmp_path, target, depth):
    h.run(base, task, tmp_path / "run", **EASY, max_joint=5, warmup_epochs=0, epochs_per_drop=0, **target)
    assert h.result(tmp_path / "run")["depth"] == depth
    (drop,) = h.journal(tmp_path / "run", "drop")
    assert len(drop["units"]) == h.DEPTH - depth


def test_what_is_harmful_alone_is_not_tried_with_others(base, task, tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "harmless", lambda found, *_: found.units == (0,))
    h.run(base, task, tmp_path / "run", **EASY, depth=3, warmup_epochs=0, epochs_per_drop=0)
    assert all(drop["joint"] is None for drop in h.journal(tmp_path / "run", "drop"))
    scans = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "scans").glob("*.json"))]
    tried = [found["units"] for scan in scans for found in scan["joint"]]
    assert tried
    assert all(units[-1] == 0 for units in tried)


def test_only_what_has_a_score_goes_with_others(base, task, tmp_path):
    """By angular distance, of five blocks to two: runs of three begin with the first three, of which two must stay."""
    quick = {"depth": 2, "protect": (0, 1), "warmup_epochs": 0, "epochs_per_drop": 0}
    h.run(base, task, tmp_path / "run", **EASY, strategy="angular", **quick)
    first, *others = h.journal(tmp_path / "run", "drop")
    assert first["units"] == ["block 2"]
    assert all(np.isfinite(drop["importance"]).all() for drop in (first, *others))


@pytest.mark.parametrize("kind", ["block", "pair"])
def test_units_that_go_at_once_leave_what_they_leave_one_by_one(kind):
    every = units(kind, whole(6))
    for one, other in itertools.combinations(every, 2):
        if halves(one) & halves(other):
            with pytest.raises(InputError, match="a part in common"):
                remove_all(whole(6), [one, other])
            continue
        first, then = sorted((one, other), key=lambda unit: -min(unit.blocks))
        assert remove_all(whole(6), [one, other]) == remove(remove(whole(6), first), then)
    assert remove_all(whole(6), [Unit("block", 1, 2), Unit("block", 4, 2)]) == (whole(6)[0], whole(6)[3])
    with pytest.raises(InputError, match="cannot drop all 2 layers"):
        remove_all(whole(2), [Unit("block", 0), Unit("block", 1)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "recover", "one_shot": True}, "--one-shot is not for --schedule recover"),
        ({"schedule": "recover", "drops_per_stage": 2}, "--drops-per-stage 2 is not for --schedule recover"),
        ({"max_joint": 2}, "--max-joint 2 is for --schedule recover"),
        ({"joint_tolerance": 0.1}, "--joint-tolerance 0.1 is for --schedule recover"),
        ({"recover_tolerance": 0.1}, "--recover-tolerance 0.1 is for --schedule recover"),
        ({"schedule": "recover", "max_joint": 1, "joint_tolerance": 0.1}, "with --max-joint 1 none is tried: leave it"),
        ({"schedule": "recover", "max_joint": 1, "tie_tolerance": 1.0}, "--tie-tolerance 1"),
        ({"schedule": "recover", "epochs_per_drop": 0, "recover_tolerance": 0.1}, "with --epochs-per-drop 0 none does"),
        ({"schedule": "late", "max_drop": 2.0}, "--max-drop judges depths when they are trained"),
        ({"distill": 0.5, "epochs_per_drop": 0}, "--distill 0.5 is about the training after drops"),
    ],
    ids=str,
)
def test_options_without_an_effect_are_refused(base, task, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        h.run(base, task, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_epochs_of_a_stage():
    def epochs(units, stage=1, *, last, **settings):
        return stage_epochs(TrimConfig(model="m", task="t", output="o", **settings), units, stage, last=last)

    assert epochs(3, last=False, schedule="epoch") == 1
    assert epochs(3, last=True, schedule="epoch", final_epochs=4) == 5
    assert epochs(3, last=True, one_shot=True, depth=1) == 3
    assert epochs(3, last=False, schedule="recover", epochs_per_drop=2) == 6
    assert epochs(3, last=True, schedule="recover", epochs_per_drop=2) == 2
    assert epochs(3, last=True, schedule="recover", epochs_per_drop=2, final_epochs=4) == 4


def test_late_training_is_as_much_in_all_and_most_of_it_comes_last():
    def every(stages, units, **settings):
        config = TrimConfig(model="m", task="t", output="o", epochs_per_drop=1.5, final_epochs=2, **settings)
        return [stage_epochs(config, units, n, last=n == stages) for n in range(1, stages + 1)]

    late, published, at_once = every(5, 2), every(5, 2, schedule="epoch"), every(1, 5, one_shot=True, depth=1)
    assert [sum(late), sum(published), sum(at_once)] == pytest.approx([5 * 1.5 + 2] * 3)
    assert late[:-1] == pytest.approx([each / 3 for each in published[:-1]])


@pytest.mark.parametrize(
    ("settings", "found"),
    [({}, "late"), ({"keep": 0.25}, "late"), ({"max_drop": 2.0}, "epoch"), ({"keep": 0.5, "min_accuracy": 5}, "epoch")],
    ids=str,
)
def test_training_waits_for_the_last_drop_unless_a_floor_may_come_first(settings, found):
    assert TrimConfig(model="m", task="t", output="o", **settings).schedule == found
    assert TrimConfig(model="m", task="t", output="o", **settings, schedule="epoch").schedule == "epoch"


def test_least_depth_for_a_speed_is_where_blocks_alone_would_give_it():
    config = TrimConfig(model="m", task="t", output="o", target_speedup=1.6)
    assert (least_depth(config, 16), least_depth(config, 5)) == (10, 3)


def test_tokens_are_counted_against_one_full_fine_tune(straight):
    stages = [stage["train"]["tokens"] for stage in h.journal(straight, "stage")]
    found = h.result(straight)["tokens"]
    assert found == {"stages": stages, "total": sum(stages), "full_fine_tunes": sum(stages) / stages[0]}
    rows = [{"train": {"tokens": 0}}, {"train": {"tokens": 7}}]
    assert account.tokens(rows) == {"stages": [0, 7], "total": 7, "full_fine_tunes": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 2, "epochs_per_drop": 2.0},
        {"depth": 2, "drops_per_stage": 2, "text": "demo_law", "text_ratio": 8.0},
        {"depth": 2, "one_shot": True, "final_epochs": 0.5},
        {"depth": 3, "schedule": "epoch", "final_epochs": 1.0, "warmup_epochs": 0},
    ],
    ids=str,
)
def test_training_is_foretold(base, task, tmp_path, monkeypatch, capsys, changes):
    steps, epochs = training_rows.steps, []
    monkeypatch.setattr(training_rows, "steps", lambda *given: (epochs.append(given[3]), steps(*given))[1])
    config = TrimConfig(**h.settings(base, task, tmp_path / "run", **changes))
    progressive.trim(config)
    stages = h.journal(tmp_path / "run", "stage")
    found = [(stage["depth"], given) for stage, given in zip(stages, epochs, strict=True)]
    assert found == [(h.DEPTH, config.warmup_epochs), *stages_ahead(config, h.DEPTH)]
    lines = capsys.readouterr().err
    (total,) = re.findall(r"training: .* tokens an epoch, ([\d,]+) in all\n", lines)
    assert int(total.replace(",", "")) == pytest.approx(h.result(tmp_path / "run")["tokens"]["total"], rel=0.05)
    assert ("training after drops: about" in lines) == (config.warmup_epochs > 0)
    assert f" parameters; {stages[-1]['depth']} layers are to stay\n" in lines


def test_layers_that_are_to_stay_may_be_more_where_a_floor_or_a_size_ends_the_drops():
    asked = [{}, {"schedule": "recover"}, {"keep": 0.5, "max_drop": 2}, {"keep": 0.5, "max_params": 9}]
    found = [drops_end_sooner(TrimConfig(model="m", task="t", output="o", **settings)) for settings in asked]
    assert found == [False, False, True, True]


def test_of_training_that_may_end_sooner_the_most_is_foretold():
    def line(**settings):
        config = TrimConfig(model="m", task="t", output="o", **settings)
        return opening.training_ahead(config, stages_ahead(config, 12), 1000)

    assert line() == "training: 1 epoch of all layers, 6 epochs after drops; 1,000 tokens an epoch, 7,000 in all"
    most = "training: 1 epoch of all layers, at most 6 epochs after drops; 1,000 tokens an epoch, at most 7,000 in all"
    assert line(keep=0.5, max_drop=2) == line(schedule="recover") == line(keep=0.5, max_params=9) == most
    assert line(max_drop=2) == "training: 1 epoch of all layers, 1 epoch after every drop; 1,000 tokens an epoch"
    unknown = {
        "0.333 epochs after every drop, 0.667 epochs for each after the last": {},
        "0.333 epochs after every 2 drops, 0.667 epochs for each after the last, 3 epochs after the last one": {
            "drops_per_stage": 2,
            "final_epochs": 3,
        },
        "2 epochs after every drop": {"schedule": "epoch", "epochs_per_drop": 2},
        "at most 1 epoch after every dropped unit": {"schedule": "recover"},
    }
    for told, settings in unknown.items():
        asked = {"max_params": 9, "warmup_epochs": 0, **settings}
        assert line(**asked) == f"training: {told}; 1,000 tokens an epoch"
    assert line(warmup_epochs=0) == "training: 6 epochs after drops; 1,000 tokens an epoch, 6,000 in all"
    config = TrimConfig(model="m", task="t", output="o", schedule="epoch")
    assert stages_ahead(config, 12, length=3) == [(9, 1), (6, 1)]


def test_text_that_comes_again_and_again_is_counted():
    config = TrimConfig(model="m", task="t", output="o", text="notes.txt", text_ratio=2)
    task, text = [Example(tuple(range(10)), 1)] * 5, [Example(tuple(range(20)), 1)]
    assert opening.text_line(config, text, task, stages_ahead(config, 12)) == (
        "notes.txt: 20 tokens of domain text, each about 35 times"  # twice 50 tokens in each of 7 epochs
    )
    assert (
        opening.text_line(config, text * 30, task, stages_ahead(config, 12)) == "notes.txt: 600 tokens of domain text"
    )
    for settings, often in (
        ({"max_params": 9}, "about 5 times an epoch"),
        ({"max_drop": 2, "keep": 0.5}, "at most 35 times"),
    ):
        config = TrimConfig(model="m", task="t", output="o", text="notes.txt", text_ratio=2, **settings)
        assert opening.text_line(config, text, task, stages_ahead(config, 12)).endswith(f", each {often}")


def test_time_ahead_is_less_for_fewer_blocks():
    warm = {"depth": 12, "train": {"tokens": 2000, "seconds": 120.0}}

    def ahead(stages, warm=warm, **changes):
        return opening.time_ahead(TrimConfig(model="m", task="t", output="o", **changes), stages, 1000, warm)

    told = "about 1 min 45 s, and the scans"  # (9 + 2 * 6) / 12 minutes
    assert ahead([(9, 1.0), (6, 2.0)]) == f"training after drops: {told}"
    for sooner in ({"schedule": "recover"}, {"keep": 0.5, "max_drop": 2.0}):
        assert ahead([(9, 1.0), (6, 2.0)], **sooner) == f"training after drops: at most {told}"
    assert ahead([(9, 1.0)], distill=0.5) is None, "the teacher takes time, too"
    assert ahead([]) is None
    assert ahead([(9, 0.0), (6, 0.0)]) is None
    assert ahead([(9, 1.0)], warm={"depth": 12, "train": {"tokens": 0, "seconds": 0.0}}) is None


def test_line_of_a_joint_drop_names_both_accuracies(base, task, tmp_path, capsys):
    progressive.trim(**h.settings(base, task, tmp_path / "run", **EASY, depth=3, warmup_epochs=0, epochs_per_drop=0))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  drop ")]
    together, intact = (h.journal(tmp_path / "run", event)[0] for event in ("drop", "stage"))
    assert f"2 at once (joint {together['joint']['value']:.1f}, intact {intact['calibration']['value']:.1f}" in line


@pytest.mark.parametrize("point", POINTS)
def test_run_killed_there_ends_with_the_same_drops_and_bit_equal_weights(base, task, straight, album, point):
    output = album / point
    h.run(base, task, output, **RECOVER, resume=True)
    assert h.drops(output) == h.drops(straight)
    assert [drop["joint"] for drop in h.journal(output, "drop")] == [
        drop["joint"] for drop in h.journal(straight, "drop")
    ]
    recoveries = [[stage["train"].get("recovery") for stage in h.journal(run, "stage")] for run in (output, straight)]
    assert recoveries[0] == recoveries[1]
    assert any(recoveries[1])
    assert h.weights_hash(output / "model") == h.weights_hash(straight / "model")


def test_sets_that_were_tried_are_not_tried_again(base, task, tmp_path, monkeypatch):
    output = tmp_path / "run"
    more = {**EASY, "depth": 2, "max_joint": 3, "warmup_epochs": 0, "epochs_per_drop": 0}
    h.killed_run((joint, "grow", 1, True), base, task, output, **more)
    kept = files.read_lines(output / "scans" / "scan-000.jsonl")
    assert [line["joint"]["units"] for line in kept if "joint" in line] == [
        found["units"] for found in kept_sets(base, task, tmp_path / "other", more)
    ]
    measured, evaluate = [], Scorer.evaluate
    monkeypatch.setattr(Scorer, "evaluate", lambda *a, **k: measured.append(1) or evaluate(*a, **k))
    h.run(base, task, output, **more, resume=True)
    assert len(measured) == 3, "the last stage's calibration and the saved model's two splits: no joint trial"


def kept_sets(base, task, output, settings):
    h.run(base, task, output, **settings)
    return json.loads((output / "scans" / "scan-000.json").read_text())["joint"]
