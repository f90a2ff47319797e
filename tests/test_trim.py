"""The main loop: where it ends, what it drops and trains, and what it leaves in its directory."""

import json
import math
import re
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import helpers_run as h
import numpy as np
import pytest
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

from trimllm import cli
from trimllm.blocks import decoder
from trimllm.blocks.layout import in_short, whole
from trimllm.checkpoints import models
from trimllm.checkpoints.loading import DEMO, load_tokenizer
from trimllm.config import STRATEGIES, EvalConfig, TrimConfig
from trimllm.console import Console
from trimllm.errors import InputError, TrimError
from trimllm.evaluation import generation, inputs
from trimllm.evaluation.evaluate import Scorer, evaluate
from trimllm.evaluation.paired import difference
from trimllm.importance import scan, scores, weights
from trimllm.importance.rules import Rules
from trimllm.run import account, deciding, progressive, rundir, targets
from trimllm.run.set_search import SetSearch
from trimllm.tasks import Item
from trimllm.training import losses, train

FINAL_SPEEDUP = progressive.Recorder.final_speedup
"""As it is where a test does not make it fast."""
pytestmark = pytest.mark.usefixtures("fast")

PAPERS = {"strategy": "scan+norm"}
"""What the paper compares; ties are of its accuracies."""
NO_TRAINING = {"warmup_epochs": 0, "epochs_per_drop": 0}
HARDLY = {"warmup_epochs": 0, "epochs_per_drop": 0.01}
"""As little training as lets settings of training be given."""


@pytest.fixture(scope="module")
def trained(base, task, tmp_path_factory):
    """One run with everything switched on: its directory, and what trim() returned."""
    with pytest.MonkeyPatch.context() as patch:
        h.fast(patch)
        output = tmp_path_factory.mktemp("trained") / "run"
        return output, *h.run(base, task, output, depth=3, keep_checkpoints=True, report_depths=True, final_epochs=1)


@pytest.fixture
def scripted(monkeypatch):
    """Calibration accuracies per depth, in place of measured ones (the test split stays as it is)."""

    def script(accuracies):
        measure = Scorer.evaluate

        def evaluate(self, model, *arguments, **more):
            found = measure(self, model, *arguments, **more)
            calibration = len(self.items) == 6
            object.__setattr__(found, "value", accuracies[decoder.depth(model)] if calibration else found.value)
            return found

        monkeypatch.setattr(Scorer, "evaluate", evaluate)

    return script


def blocks(model):
    return [{name: p.detach() for name, p in block.named_parameters()} for block in decoder.blocks(model)]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_result_is_a_stock_checkpoint_that_generates_and_equals_the_returned_model(trained):
    output, returned, _ = trained
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    prompt = tokenizer("Question: what is it?\nAnswer:", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False).shape[1] == (
        prompt["input_ids"].shape[1] + 5
    )
    assert model.config.num_hidden_layers == 3
    mine, stock = returned.state_dict(), model.state_dict()
    assert mine.keys() == stock.keys()
    assert all(torch.equal(mine[name], stock[name]) for name in mine)


def test_layers_in_result_are_those_that_remain_and_nothing_else_changed_without_training(base, task, tmp_path):
    model, _ = h.run(base, task, tmp_path / "run", depth=2, **NO_TRAINING)
    original = AutoModelForCausalLM.from_pretrained(base)
    kept = h.result(tmp_path / "run")["layers"]
    assert len(kept) == 2
    for block, layer in zip(blocks(model), kept, strict=True):
        assert same(block, blocks(original)[layer])
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    gone = [drop["units"][0] for drop in h.journal(tmp_path / "run", "drop")]
    assert sorted(kept + [int(unit.removeprefix("block ")) for unit in gone]) == list(range(h.DEPTH))


def test_every_file_of_a_run_agrees_with_the_others(trained, base):
    output, _, history = trained
    result, plan = h.result(output), json.loads((output / "plan.json").read_text())
    assert [row["depth"] for row in history] == [5, 5, 4, 3, 3]
    assert [row["event"] for row in history] == ["base", "stage", "stage", "stage", "saved"]
    assert result["test"] == history[-1]["test"]
    assert all(row["test"]["n"] == 8 and row["calibration"]["n"] == 6 for row in history)
    assert result["history"] == history
    assert (result["depth"], result["base_depth"], result["rows"]["calibration"]) == (3, 5, 6)
    assert result["layers"] == plan["layers"]
    assert len(plan["layers"]) == 3
    assert json.loads((output / "model" / "plan.json").read_text())["layers"] == plan["layers"]
    assert [json.loads((output / "plans" / f"depth-{d}.json").read_text())["depth"] for d in (5, 4, 3)] == [5, 4, 3]
    for number, drop in enumerate(result["drops"]):
        scan = json.loads((output / "scans" / f"scan-{number:03d}.json").read_text())
        assert [scan["units"][i]["unit"] for i in scan["dropped"]] == drop["units"]
        assert len(scan["units"]) == h.DEPTH - number
    assert not list((output / "scans").glob("*.jsonl"))
    stored = yaml.safe_load((output / "config.yaml").read_text())
    assert stored == result["settings"] | {"resume": False}
    assert stored["model"] == str(base)
    assert result["parameters"] == sum(p.numel() for p in trained[1].parameters())
    assert result["decode_speedup"]["median"] == pytest.approx(5 / 3)
    steps = [stage["train"]["steps"] for stage in h.journal(output, "stage")]
    assert steps[2] > steps[1], "final epochs train longer after the last drop"


def numbered(names):
    """Numbers in place of names, in the order in which they come."""
    places = {name: f"{i}" for i, name in enumerate(dict.fromkeys(name for name in names if name is not None), 1)}
    return [places.get(name) for name in names]


def test_the_result_is_held_against_all_layers_before_the_drops(trained, task):
    output, model, history = trained
    result = h.result(output)
    kept = {path.stem: json.loads(path.read_text()) for path in (output / "answers").iterdir()}
    assert kept.keys() == {"base", "depth-5", "depth-4", "depth-3", "saved"}
    command = EvalConfig(model=str(output / "model"), task=str(task), device="cpu")
    items = inputs.task_data(command, load_tokenizer(output / "model")).test
    answered = evaluate(model, load_tokenizer(output / "model"), items, "acc").per_item
    assert kept["saved"]["values"] == list(answered)
    assert kept["saved"]["groups"] == numbered([item.group for item in items]), "no names"
    apart, error = difference(answered, kept["depth-5"]["values"], kept["saved"]["groups"])
    assert result["above_full"] == {"difference": apart, "stderr": error}
    assert apart == pytest.approx(history[-1]["test"]["value"] - history[1]["test"]["value"])
    told = f"{apart:+.1f} +- {error:.1f} points against all 5 layers, as they were before the drops"
    assert told in (output / "model" / "README.md").read_text()


def test_without_a_warm_up_all_layers_are_those_of_the_base(base, task, tmp_path, capsys):
    progressive.trim(**h.settings(base, task, tmp_path / "run", depth=4, **NO_TRAINING))
    history, above = h.result(tmp_path / "run")["history"], h.result(tmp_path / "run")["above_full"]
    assert above["difference"] == pytest.approx(history[-1]["test"]["value"] - history[0]["test"]["value"])
    told = f"  {above['difference']:+.1f} +- {above['stderr']:.1f} points against all 5 layers"
    assert told in capsys.readouterr().err


def test_a_result_is_not_held_against_what_was_not_asked(base, task, tmp_path):
    h.run(base, task, tmp_path / "run", depth=4)
    assert h.result(tmp_path / "run")["above_full"] is None


def test_answers_that_a_killed_run_left_of_another_model_are_not_used(base, task, tmp_path):
    output, settings = tmp_path / "run", {"depth": 4, "report_depths": True}
    h.killed_run((progressive.account, "result", 1), base, task, output, **settings)
    path = output / "answers" / "saved.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"values": [12.34] * 8}))
    h.run(base, task, output, **settings, resume=True)
    assert h.result(output)["above_full"] is None


def test_model_card_names_base_layers_and_accuracy(trained):
    output, _, history = trained
    card = (output / "model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert str(h.result(output)["layers"]) in card
    assert h.result(output)["base"]["sha256"] in card
    assert f"{history[-1]['calibration']['value']:.1f} +- " in card
    assert "as saved" in card


def test_final_epochs_without_a_known_end_are_refused(base, task, tmp_path):
    with pytest.raises(InputError, match="final-epochs needs a target besides the floor"):
        h.run(base, task, tmp_path / "run", depth=None, max_drop=5.0, final_epochs=2.0)


def test_settings_beside_a_config_are_refused(base, task, tmp_path):
    config = TrimConfig(model=str(base), task=str(task), output=str(tmp_path / "run"))
    with pytest.raises(InputError, match="not both"):
        progressive.trim(config, lr=1e-3)


def test_kept_depth_is_exported_as_it_was(trained, capsys):
    output, _, _ = trained
    assert cli.main(["export", str(output), "--depth", "4"]) == 0
    model = AutoModelForCausalLM.from_pretrained(output / "model-depth-4")
    kept = AutoModelForCausalLM.from_pretrained(output / "checkpoints" / "depth-4")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept.state_dict().values(), strict=True))
    assert json.loads((output / "model-depth-4" / "plan.json").read_text())["layers"]
    assert cli.main(["export", str(output), "--depth", "2"]) == 2
    assert "kept: 5, 4, 3" in capsys.readouterr().err


def test_a_result_that_is_gone_is_not_called_unfinished(trained, tmp_path, capsys):
    output, _, _ = trained
    lost = shutil.copytree(output, tmp_path / "lost")
    shutil.rmtree(lost / "model")
    (part := shutil.copytree(lost, tmp_path / "part")).joinpath("result.json").unlink()
    for run, what in ((lost, f"its result, {lost / 'model'}, is not there"), (part, "the run is not finished")):
        assert cli.main(["export", str(run), "--to", "gguf"]) == 2
        assert f"{run}: {what}: name a depth it kept with --depth (kept: 5, 4, 3)" in capsys.readouterr().err


def test_bfloat16_base_gives_a_bfloat16_checkpoint(task, tmp_path):
    base = h.save_base(tmp_path / "base", dtype=torch.bfloat16)
    model, _ = h.run(base, task, tmp_path / "run", depth=4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert h.result(tmp_path / "run")["bytes"] == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("target", "depth"),
    [
        ({"keep": 0.6}, 3),
        ({"depth": 4}, 4),
        ({"max_params": 87_904 - 2 * 7_000}, 3),
        ({"max_memory": (87_904 * 4 - 1) / 2**30}, 4),
        ({"target_speedup": 1.6}, 3),
        ({"max_params": 57_000, "min_depth": 3}, 3),
        ({"depth": 1, "min_depth": 4}, 4),
    ],
    ids=str,
)
def test_run_ends_at_its_target(base, task, tmp_path, target, depth):
    _, history = h.run(base, task, tmp_path / "run", **NO_TRAINING, **target)
    assert h.result(tmp_path / "run")["depth"] == history[-1]["depth"] == depth
    assert h.journal(tmp_path / "run", "drop")[-1]["reached"]


def test_a_target_that_is_not_met_and_a_depth_that_is_not_trained_are_said(base, task, tmp_path, capsys):
    progressive.trim(
        TrimConfig(**h.settings(base, task, tmp_path / "run", **NO_TRAINING, max_params=57_000, min_depth=4))
    )
    lines = capsys.readouterr().err
    assert "warning: --max-params 57000: not met, since the drops ended before: the minimum depth, 4\n" in lines
    assert "depth   5  not trained " in lines
    assert "fine-tuned" not in lines + (tmp_path / "run" / "model" / "README.md").read_text()
    warned = json.loads((tmp_path / "run" / "result.json").read_text())["warnings"]
    assert "--max-params 57000: not met, since the drops ended before: the minimum depth, 4" in warned


def test_a_target_of_a_run_that_is_begun_is_not_judged_again(base, task, tmp_path, monkeypatch):
    asked = {"depth": 4, **NO_TRAINING}
    h.killed_run((progressive.Run, "_drop", 1), base, task, tmp_path / "run", **asked)
    monkeypatch.setattr(targets, "check_possible", lambda *_: pytest.fail("it was taken once"))
    h.run(base, task, tmp_path / "run", resume=True, **asked)


def test_a_saved_model_that_is_slower_than_asked_is_said(base, task, tmp_path, capsys, monkeypatch):
    asked = h.settings(base, task, tmp_path / "run", **NO_TRAINING, target_speedup=1.6)
    progressive.trim(TrimConfig(**asked))
    assert "--target-speedup" not in capsys.readouterr().err, "5 to 3 layers: 1.67"
    monkeypatch.setattr(progressive.Recorder, "final_speedup", lambda *_: {"median": 1.55, "min": 1.5, "max": 1.575})
    progressive.trim(TrimConfig(**asked | {"output": str(tmp_path / "slower")}))
    warning = (
        "--target-speedup 1.6: the saved model decodes 1.55 times as fast as the base; when the drops ended it was "
        "1.67: measure it with trimllm bench"
    )
    assert f"warning: {warning}\n" in capsys.readouterr().err
    assert warning in h.result(tmp_path / "slower")["warnings"]


def test_a_run_that_drops_nothing_says_so(base, task, tmp_path, scripted, capsys):
    scripted({5: 80, 4: 10})
    progressive.trim(TrimConfig(**h.settings(base, task, tmp_path / "run", min_accuracy=70, report_depths=True)))
    told = capsys.readouterr().err
    assert "warning: nothing was dropped: the first drop fell below the accuracy floor\n" in told
    assert "points against" not in told
    assert (tmp_path / "run" / "answers" / "depth-5.json").exists()
    _few, worse, warned = json.loads((tmp_path / "run" / "result.json").read_text())["warnings"]
    assert worse.startswith("the calibration set got worse while depth 4 trained (acc 33.3 before, 10.0 after)")
    assert warned == "nothing was dropped: the first drop fell below the accuracy floor"
    assert h.result(tmp_path / "run")["above_full"] is None
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert ", with all of its 5 layers\n" in card
    assert f"fine-tuned on `{task.name}`, and no layer was dropped." in card


@pytest.mark.parametrize(
    ("accuracies", "target", "depth"),
    [
        ({5: 80, 4: 75, 3: 60, 2: 90}, {"min_accuracy": 70}, 4),
        ({5: 80, 4: 85, 3: 81, 2: 79}, {"max_drop": 5}, 3),
        ({5: 80, 4: 80, 3: 10}, {"min_accuracy": 70, "depth": 3}, 4),
        ({5: 80, 4: 80, 3: 70}, {"min_accuracy": 70, "depth": 3}, 3),
    ],
    ids=["min_accuracy", "max_drop below the best so far", "violated by the last depth", "exactly the floor"],
)
def test_smallest_depth_not_below_the_floor_is_exported(
    base, task, tmp_path, scripted, monkeypatch, accuracies, target, depth
):
    scripted(accuracies)
    saved = {}
    checkpoint = progressive.Run._checkpoint

    def keep(self, state):
        checkpoint(self, state)
        saved[len(state.layout)] = {k: v.clone() for k, v in state.model.state_dict().items()}

    monkeypatch.setattr(progressive.Run, "_checkpoint", keep)
    model, _ = h.run(base, task, tmp_path / "run", **target)
    result = h.result(tmp_path / "run")
    assert result["depth"] == decoder.depth(model) == depth
    assert len(result["layers"]) == depth
    assert all(torch.equal(tensor, saved[depth][name]) for name, tensor in model.state_dict().items())


def test_a_floor_raised_on_the_way_takes_a_depth_that_meets_it_or_says_that_it_is_gone(base, task, tmp_path, scripted):
    scripted({5: 90, 4: 82, 3: 80, 2: 90})
    h.killed_run((progressive.Run, "_stage", 4), base, task, tmp_path / "run", depth=2, min_accuracy=70)
    for floor, why in ((95, "no depth meets it"), (85, "the weights of the depth that meets it are gone")):
        line = rf"a floor of {floor}\.0 on .* set: {why}; there are those of 4 layers: 82\.0, 3 layers: 80\.0"
        with pytest.raises(InputError, match=line):
            h.run(base, task, tmp_path / "run", depth=2, min_accuracy=floor, resume=True)
    model, _ = h.run(base, task, tmp_path / "run", depth=2, min_accuracy=81, resume=True)
    assert decoder.depth(model) == 4


def test_floor_above_the_fine_tuned_model_is_an_error_that_says_so(base, task, tmp_path, scripted):
    scripted({5: 50})
    with pytest.raises(TrimError, match=r"only 50\.0 on the calibration set, below the floor of 90\.0"):
        h.run(base, task, tmp_path / "run", min_accuracy=90)


def test_run_without_depth_target_ends_when_only_protected_layers_are_left(base, task, tmp_path):
    h.run(base, task, tmp_path / "run", max_params=57_000, protect=(0, 2, -1), **NO_TRAINING)
    assert h.result(tmp_path / "run")["layers"] == [0, 2, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 5}, "only 5 layers"),
        ({"keep": 0.95}, "--keep 0.95"),
        ({"max_params": 10**9}, "already meets the target"),
        ({"protect": (5,)}, "--protect 5: the model has layers 0 to 4"),
        ({"depth": 2, "protect": (0, 1, 2)}, "--protect keeps 3 layers, and the run is to end with 2"),
        ({"max_params": 57_000, "protect": (0, 1, 2, 3, 4)}, "nothing is left to drop"),
        ({"max_params": 56_927}, "--max-params 56927: with one layer alone the model has 56,928: allow more"),
        ({"max_memory": 1e-4}, "--max-memory 0.0001: with one layer alone the model takes 0.000212 GiB: allow more"),
        ({"target_speedup": 5.1}, "--target-speedup 5.1: one of 5 layers cannot be more than 5 times as fast: ask for"),
        ({"one_shot": True, "max_drop": 2}, "--one-shot must know how many"),
        ({"one_shot": True, "unit": "pair"}, "--one-shot drops blocks only"),
        ({"strategy": "scan+norn"}, "did you mean 'scan+norm'"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(base, task, tmp_path, changes, message):
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        h.run(base, task, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_runs_and_drops_what_its_table_calls_least_important(base, task, tmp_path, strategy):
    h.run(base, task, tmp_path / "run", depth=4, strategy=strategy, **NO_TRAINING)
    table = json.loads((tmp_path / "run" / "scans" / "scan-000.json").read_text())
    assert (table["strategy"], len(table["units"])) == (strategy, 5)
    known = [row["importance"] for row in table["units"] if row["importance"] is not None]
    if "+" not in strategy:
        assert table["units"][table["dropped"][0]]["importance"] == min(known)
    if strategy in ("first", "last", "symmetric"):
        assert table["dropped"] == [{"first": 0, "last": 4, "symmetric": 2}[strategy]]


def test_equal_accuracies_alone_are_tied_unless_a_tolerance_is_asked_for(base, task, tmp_path):
    for asked, tied in ((None, 0.0), (0.0, 0.0), (2.0, 2.0)):
        config = h.settings(base, task, tmp_path / "run", strategy="scan+norm", tie_tolerance=asked)
        rules = Rules(TrimConfig(**config), tiny.build("llama", 4), 0)
        assert rules.tolerance == tied


@pytest.mark.parametrize(
    ("asked", "metric", "points"), [(None, "acc", 100 / 6), (None, "likelihood", 0), (2.0, "acc", 2)]
)
def test_what_a_set_of_drops_may_cost_is_a_question_or_the_ties_that_are_asked_for(
    base, task, tmp_path, asked, metric, points
):
    config = TrimConfig(**h.settings(base, task, tmp_path / "run", schedule="recover", tie_tolerance=asked))
    calibration = SimpleNamespace(items=[None] * 6)
    rules = Rules(config, tiny.build("llama", 4), 0)
    assert SetSearch(config, rules, calibration, metric, torch.float32).points == pytest.approx(points)


@pytest.mark.parametrize(
    ("strategy", "breaker", "sign"),
    [
        ("scan+norm", "s_norm", 1),
        ("scan+loss", "loss", 1),
        ("scan+probability", "probability", -1),
        ("scan", "s_norm", 1),
    ],
)
def test_ties_go_by_the_score_that_breaks_them_in_what_is_dropped_and_in_what_trains(
    base, task, tmp_path, strategy, breaker, sign, capsys
):
    ties = {"tie_tolerance": 50} if "+" in strategy else {}
    asked = {"train_ratio": 0.6, "depth": 4, "strategy": strategy}
    progressive.trim(**h.settings(base, task, tmp_path / "run", **ties, **asked, **HARDLY))
    table = json.loads((tmp_path / "run" / "scans" / "scan-000.json").read_text())
    units = table["units"]
    (dropped,) = table["dropped"]
    if "+" in strategy:
        assert len(table["tied"]) > 1
        assert sign * units[dropped][breaker] == min(sign * units[i][breaker] for i in table["tied"])
        name = {"s_norm": "largest norm", "loss": "least loss", "probability": "surest"}[breaker]
        assert f"are tied: the {name} goes" in capsys.readouterr().err
        assert h.journal(tmp_path / "run", "drop")[0]["why"][0].endswith(f"by the scan, {name}")
    order = sorted(range(5), key=lambda i: (units[i]["importance"], sign * units[i][breaker]), reverse=True)
    assert h.journal(tmp_path / "run", "drop")[0]["trains"] == sorted([i for i in order if i != dropped][:3])


def test_protected_layers_stay(base, task, tmp_path):
    h.run(base, task, tmp_path / "run", depth=2, strategy="last", protect=(0, -1), **NO_TRAINING)
    assert h.result(tmp_path / "run")["layers"] == [0, 4]


def test_pair_repacks_an_attention_with_a_later_mlp(base, task, tmp_path, monkeypatch):
    lowest = scores.Score((), lambda evidence: (evidence.position != 1.5).astype(float))
    monkeypatch.setitem(scores.SCORES, "last", lowest)
    model, _ = h.run(base, task, tmp_path / "run", unit="pair", strategy="last", depth=4, **NO_TRAINING)
    result = h.result(tmp_path / "run")
    assert result["drops"][0]["units"] == ["MLP 1 + attention 2"]
    assert [tuple(block.values()) for block in result["blocks"]] == [(0, 0), (1, 2), (3, 3), (4, 4)]
    assert result["layers"] is None
    assert "re-packed pairs" in (tmp_path / "run" / "model" / "README.md").read_text()
    original = blocks(AutoModelForCausalLM.from_pretrained(base))
    for mine, block in zip(blocks(model), result["blocks"], strict=True):
        for name, tensor in mine.items():
            half = "mlp" if name.startswith(("mlp", "post_attention")) else "attention"
            assert torch.equal(tensor, original[block[half]][name]), name


def test_of_pairs_the_halves_that_are_left_count_as_staying(base, task, tmp_path, monkeypatch):
    lowest = scores.Score((), lambda evidence: (evidence.position != 1.5).astype(float))
    monkeypatch.setitem(scores.SCORES, "last", lowest)
    monkeypatch.setattr(deciding.Decider, "_order", lambda *_: [2, 3, 1, 0, 4])
    h.run(
        base,
        task,
        tmp_path / "run",
        unit="pair",
        strategy="last",
        depth=3,
        train_ratio=0.2,
        **HARDLY,
    )
    first, second = h.journal(tmp_path / "run", "drop")
    assert (first["units"], second["units"]) == (["MLP 1 + attention 2"], ["MLP 2 + attention 3"])
    assert first["trains"] == [3], "the attention of 2 went"
    assert second["trains"] == [3], "its MLP is left"


def test_a_target_is_not_missed_by_a_depth_that_a_floor_took_back(base, task, tmp_path, scripted):
    scripted({5: 80, 4: 80, 3: 10})
    asked = {"max_params": 57_000, "min_depth": 3, "min_accuracy": 70.0}
    h.run(base, task, tmp_path / "run", **asked)
    result = h.result(tmp_path / "run")
    assert result["depth"] == 4
    assert result["drops"][-1]["reached"] == "the minimum depth, 3"
    assert not any("not met" in line for line in result["warnings"])


def test_the_card_says_of_every_unit_that_goes_at_once_why(base, task, tmp_path):
    h.run(base, task, tmp_path / "run", depth=2, one_shot=True, **PAPERS, tie_tolerance=100.0, **NO_TRAINING)
    (drop,) = h.journal(tmp_path / "run", "drop")
    assert [why.partition(" by")[0] for why in drop["why"]] == [
        "tied with 4 others",
        "tied with 3 others",
        "tied with 2 others",
    ]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    for unit, why in zip(drop["units"], drop["why"], strict=True):
        assert re.search(rf"\| {unit} \| .* \| {re.escape(why)} \|\n", card)
    assert "sparse update" not in card, "nothing trained"


@pytest.mark.parametrize(
    ("mode", "said"), [("off", "sparse update off)"), ("filled", "sparse update filled with r = 0.25)")]
)
def test_the_card_says_which_blocks_trained(base, task, tmp_path, mode, said):
    h.run(base, task, tmp_path / "run", depth=4, strategy="last", sparse_update=mode, warmup_epochs=0)
    assert said in (tmp_path / "run" / "model" / "README.md").read_text()


def test_one_shot_drops_all_by_one_scan_and_trains_as_long_as_the_stages(base, task, tmp_path):
    h.run(base, task, tmp_path / "one", depth=2, one_shot=True, strategy="last")
    h.run(base, task, tmp_path / "step", depth=2, strategy="last")
    (drop,) = h.journal(tmp_path / "one", "drop")
    assert drop["units"] == ["block 4", "block 3", "block 2"]
    assert h.result(tmp_path / "one")["layers"] == [0, 1]
    one, step = (h.journal(tmp_path / name, "stage") for name in ("one", "step"))
    assert len(one) == 2
    assert one[1]["train"]["steps"] == pytest.approx(sum(s["train"]["steps"] for s in step[1:]), abs=3)


def save_hybrid(path, layer_types):
    """An LFM2 of these layers, at least one of which must have attention."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=len(load_tokenizer(DEMO)),
        hidden_size=32,
        intermediate_size=48,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=len(layer_types),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        layer_types=layer_types,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return h.save_model(Lfm2ForCausalLM(config), path)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """Six layers, attention in the last two only: one of these must stay, and either may go."""
    return save_hybrid(tmp_path_factory.mktemp("hybrid"), ["conv"] * 4 + ["full_attention"] * 2)


def test_one_shot_goes_round_what_no_stock_model_can_lack_together(hybrid, task, tmp_path):
    h.run(hybrid, task, tmp_path / "run", depth=4, one_shot=True, strategy="last", **NO_TRAINING)
    assert h.drops(tmp_path / "run") == [["block 5", "block 3"]]


def test_a_run_that_no_stock_model_can_lack_is_not_dropped(hybrid, task, tmp_path, monkeypatch):
    nearest_last = {"angular": replace(scores.SCORES["angular"], compute=lambda evidence: -evidence.position)}
    monkeypatch.setattr(scores, "SCORES", scores.SCORES | nearest_last)
    h.run(hybrid, task, tmp_path / "run", depth=4, one_shot=True, strategy="angular", **NO_TRAINING)
    assert h.drops(tmp_path / "run") == [["block 3", "block 4"]]


@pytest.mark.parametrize(("length", "protect"), [(2, ()), (2, (1,)), (3, (1,))])
def test_one_shot_by_angular_distance_drops_the_run_that_is_nearest(base, task, tmp_path, length, protect):
    output, depth = tmp_path / "run", h.DEPTH - length
    h.run(base, task, output, depth=depth, one_shot=True, strategy="angular", protect=protect, **NO_TRAINING)
    (drop,) = h.journal(output, "drop")
    rows = json.loads((output / "scans" / "scan-000.json").read_text())["units"]
    assert [row["importance"] is None for row in rows] == [False] * (depth + 1) + [True] * (length - 1)
    starts = [i for i in range(depth + 1) if not set(range(i, i + length)) & set(protect)]
    nearest = min(starts, key=lambda i: rows[i]["importance"])
    assert drop["units"] == [f"block {i}" for i in range(nearest, nearest + length)]


def test_angular_distance_needs_a_run_that_may_go(base, task, tmp_path):
    settings = {"depth": 3, "one_shot": True, "strategy": "angular", "protect": (1, 3)}
    with pytest.raises(InputError, match=r"--strategy angular: no 2 adjacent layers may all go: protect fewer"):
        h.run(base, task, tmp_path / "run", **settings, **NO_TRAINING)
    assert not (tmp_path / "run").exists()


def test_angular_distance_needs_a_run_that_begins_with_a_layer_that_may_go(task, tmp_path):
    """Of eight layers, 5 to 7 may go; but the runs of four that there are begin with 0 to 4."""
    lonely = save_hybrid(tmp_path / "lonely", ["conv"] * 4 + ["full_attention"] + ["conv"] * 3)
    settings = {"depth": 4, "strategy": "angular", "protect": (0, 1, 2, 3)}
    with pytest.raises(InputError, match=r"--strategy angular: no run of 4 layers begins with one that may go: protec"):
        h.run(lonely, task, tmp_path / "run", **settings, **NO_TRAINING)
    assert not (tmp_path / "run").exists()
    config = TrimConfig(**h.settings(lonely, task, tmp_path / "run", **settings | {"protect": ()}))
    model = models.load(config).model
    decider = deciding.Decider(config, model, SimpleNamespace(items=[]), "acc", torch.float32)
    assert decider.stuck(model, whole(8)) is None
    decider.rules.protected = frozenset(range(4))
    assert decider.stuck(model, whole(8)).words == "no run of 4 layers begins with one that may go"


def test_several_drops_per_stage_each_have_their_own_scan(base, task, tmp_path):
    h.run(base, task, tmp_path / "run", depth=2, drops_per_stage=2)
    stages = h.journal(tmp_path / "run", "stage")
    assert [len(stage["dropped"]) for stage in stages] == [0, 2, 1]
    assert [stage["depth"] for stage in stages] == [5, 3, 2]
    assert len(list((tmp_path / "run" / "scans").glob("scan-*.json"))) == 3


@pytest.mark.parametrize("mode", ["static", "filled", "dynamic", "off"])
def test_sparse_update_trains_the_chosen_blocks_and_no_other(base, task, tmp_path, mode):
    output = tmp_path / "run"
    share = {} if mode == "off" else {"train_ratio": 0.2}
    h.run(base, task, output, depth=3, sparse_update=mode, keep_checkpoints=True, text_ratio=0, **share)
    drops = h.journal(output, "drop")
    before = AutoModelForCausalLM.from_pretrained(output / "checkpoints" / "depth-5")
    after = AutoModelForCausalLM.from_pretrained(output / "checkpoints" / "depth-4")
    kept = [block["attention"] for block in drops[0]["layout"]]
    moved = [layer for layer, now in zip(kept, blocks(after), strict=True) if not same(now, blocks(before)[layer])]
    assert moved == (kept if mode == "off" else drops[0]["trains"])
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    if mode == "off":
        assert drops[0]["trains"] is None
    else:
        assert len(drops[0]["trains"]) == 1
        assert not any(f"block {drops[0]['trains'][0]}" in drop["units"] for drop in drops[:1])


def test_frozen_embeddings_do_not_move_after_the_warm_up(base, task, tmp_path):
    output = tmp_path / "run"
    h.run(base, task, output, depth=4, train_embeddings=False, keep_checkpoints=True)
    before, after = (
        AutoModelForCausalLM.from_pretrained(output / "checkpoints" / f"depth-{depth}") for depth in (5, 4)
    )
    assert torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert torch.equal(before.model.norm.weight, after.model.norm.weight)
    original = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.equal(before.get_input_embeddings().weight, original.get_input_embeddings().weight)


@pytest.mark.parametrize("strategy", ["probability", "scan+norm"])
def test_a_run_says_of_a_drop_the_score_that_decided(strategy, base, task, tmp_path, capsys):
    progressive.trim(**h.settings(base, task, tmp_path / "run", depth=4, strategy=strategy, **NO_TRAINING))
    (drop,) = h.journal(tmp_path / "run", "drop")
    table = json.loads((tmp_path / "run" / "scans" / "scan-000.json").read_text())
    row = next(row for row in table["units"] if [row["unit"]] == drop["units"])
    sure = f"probability {row['probability']:.1f} and acc {row['value']:.1f} without it; intact probability "
    right = f", {row['value']:.1f} without it; intact {table['intact']['value']:.1f};"
    said = capsys.readouterr().err
    assert (sure in said, right in said) == (strategy == "probability", strategy == "scan+norm")


def test_a_run_by_loss_scans_by_likelihood_and_reports_accuracy(base, task, tmp_path, capsys):
    progressive.trim(**h.settings(base, task, tmp_path / "run", depth=4, strategy="loss", **NO_TRAINING))
    (drop,) = h.journal(tmp_path / "run", "drop")
    assert drop["metric"] == "likelihood"
    table = json.loads((tmp_path / "run" / "scans" / "scan-000.json").read_text())
    least = min(table["units"], key=lambda row: row["loss"])
    assert drop["units"] == [least["unit"]]
    assert least["value"] == pytest.approx(100 * math.exp(-least["loss"]))
    assert f"likelihood {least['value']:.1f} without it; intact likelihood" in capsys.readouterr().err
    assert h.result(tmp_path / "run")["test"]["metric"] == "acc"
    assert "| dropped | likelihood without it |" in (tmp_path / "run" / "model" / "README.md").read_text()
    h.run(base, task, tmp_path / "recover", depth=4, strategy="loss", schedule="recover", **NO_TRAINING)
    assert h.journal(tmp_path / "recover", "drop")[0]["metric"] == "acc"


def test_dozens_of_choices_are_pointed_out_where_another_strategy_would_ask_fewer(
    base, task, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(scan, "MANY_CHOICES", 2)
    ways = {"plain": {}, "racing": {"scan": "racing", **PAPERS}, "recover": {"schedule": "recover"}}
    ways["loss"] = {"strategy": "loss"}
    for name, changes in ways.items():
        progressive.trim(**h.settings(base, task, tmp_path / name, depth=4, **NO_TRAINING | changes))
        assert ("--strategy loss asks the right one only" in capsys.readouterr().err) == (name == "plain"), name
    output = tmp_path / "killed"
    h.killed_run((progressive.Run, "_drop", 1), base, task, output, depth=4, **NO_TRAINING)
    progressive.trim(output=str(output), resume=True)
    assert "--strategy loss" not in capsys.readouterr().err, "it cannot be changed any more"


def test_the_seconds_of_a_drop_cover_scores_from_gradients(base, task, tmp_path, monkeypatch):
    taylor, spent = weights.taylor, []

    def slow(*arguments):
        started = time.perf_counter()
        time.sleep(0.05)
        found = taylor(*arguments)
        spent.append(time.perf_counter() - started)
        return found

    monkeypatch.setattr(weights, "taylor", slow)
    h.run(base, task, tmp_path / "run", depth=4, strategy="taylor", **NO_TRAINING)
    (drop,) = h.journal(tmp_path / "run", "drop")
    assert drop["seconds"] >= spent[0] >= 0.05
    assert h.result(tmp_path / "run")["seconds"]["scans"] == drop["seconds"]


def test_blocks_to_train_are_chosen_anew_when_the_first_choice_is_gone(base, task, tmp_path, monkeypatch):
    order = deciding.Decider._order

    def worst(self, scanned):
        found = order(self, scanned)
        return [3, *found] if len(scanned.layout) == h.DEPTH else found

    monkeypatch.setattr(deciding.Decider, "_order", worst)
    h.run(base, task, tmp_path / "run", depth=3, strategy="last", train_ratio=0.2, train_embeddings=False)
    first, second = h.journal(tmp_path / "run", "drop")
    assert first["trains"] == [3]
    assert second["units"] == ["block 3"]
    assert second["trains"]
    assert set(second["trains"]) <= {0, 1, 2}
    assert h.journal(tmp_path / "run", "stage")[-1]["train"]["steps"] > 0


def test_blocks_that_may_not_go_are_the_first_to_train(base, task, tmp_path):
    h.run(base, task, tmp_path / "run", depth=4, strategy="last", train_ratio=0.4, protect=(3,), **HARDLY)
    (drop,) = h.journal(tmp_path / "run", "drop")
    assert drop["units"] == ["block 4"]
    assert drop["trains"] == [0, 3]


def test_with_angular_the_blocks_of_the_run_that_goes_are_the_last_to_train(base, task, tmp_path, monkeypatch):
    measured = scores.Evidence.__init__

    def lowest_at_two(self, *arguments, **more):
        measured(self, *arguments, **more | {"run_angle": np.array([0.3, 0.2, 0.1, np.nan, np.nan])})

    monkeypatch.setattr(scores.Evidence, "__init__", lowest_at_two)
    h.run(base, task, tmp_path / "run", depth=2, drops_per_stage=3, strategy="angular", train_ratio=0.4, **HARDLY)
    drop = h.journal(tmp_path / "run", "drop")[0]
    assert drop["units"] == ["block 2"]
    assert drop["trains"] == [0, 1]


def test_filled_is_always_as_many_blocks_as_were_asked_for(base, task, tmp_path):
    h.run(base, task, tmp_path / "run", depth=1, strategy="last", train_ratio=0.4, sparse_update="filled")
    for drop in h.journal(tmp_path / "run", "drop"):
        left = {block["attention"] for block in drop["layout"]}
        assert drop["trains"] is None if len(left) <= 2 else len(drop["trains"]) == 2 and left >= set(drop["trains"])


def test_zero_epochs_drop_greedily_without_a_step(base, task, tmp_path):
    _, history = h.run(base, task, tmp_path / "run", depth=2, **NO_TRAINING)
    assert [row["train"]["steps"] for row in history[1:-1]] == [0, 0, 0, 0]
    assert all(row["train"]["loss"] is None for row in history[1:-1])


def test_domain_text_is_trained_on(base, task, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The statute Wexford requires a permit. " * 40)
    with_text, without = tmp_path / "with", tmp_path / "without"
    h.run(base, task, with_text, depth=4, text=str(text))
    h.run(base, task, without, depth=4)
    tokens = [h.journal(run, "stage")[0]["train"]["tokens"] for run in (with_text, without)]
    assert tokens[0] > 1.5 * tokens[1]


def test_settings_that_do_not_exist_are_input_errors_in_python_too():
    with pytest.raises(InputError, match=r"unknown setting 'kep' \(did you mean 'keep'\?\)"):
        progressive.trim(model="demo", task="demo_law", output="x", kep=0.5)
    with pytest.raises(InputError, match="--task is required"):
        progressive.trim(model="demo", output="x")


def test_checkpoints_that_nobody_needs_are_deleted(base, task, tmp_path):
    h.run(base, task, tmp_path / "run", depth=2)
    assert rundir.RunDir(tmp_path / "run").kept_depths() == [3, 2]


def test_console_says_every_depth_once(base, task, tmp_path, capsys):
    progressive.trim(**h.settings(base, task, tmp_path / "run", depth=4))
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("depth   5  base") for line in lines) == 1
    assert sum(line.startswith("depth   4  - block") for line in lines) == 1
    assert lines[-2].startswith(f"saved {tmp_path / 'run' / 'model'}: 4 of 5 layers")
    faster = "decodes 1.25 times as fast as the base (1.25 to 1.25, measured in turn)"
    assert lines[-1] == f"  {faster}"
    assert f"This checkpoint: {faster}." in (tmp_path / "run" / "model" / "README.md").read_text()


def test_the_speed_at_the_end_is_the_results_over_the_bases(base, tmp_path):
    config = TrimConfig(model=str(base), task="t", output=str(tmp_path))
    recorder = progressive.Recorder(config, None, Console(quiet=True), None, None, torch.device("cpu"))
    found = FINAL_SPEEDUP(recorder, tiny.build("llama", depth=4))
    assert found == {"median": 1.25, "min": 1.25, "max": 1.25}


def test_a_model_that_is_no_better_than_guessing_is_said_before_drops_begin(base, task, tmp_path, scripted, capsys):
    chance = "depth 5, from which drops begin, has acc 33.3 on the calibration set, where guessing has 25.0: train"
    for name, accuracy in (("chance", 100 / 3), ("better", 90)):
        scripted({5: accuracy, 4: accuracy})
        progressive.trim(**h.settings(base, task, tmp_path / name, depth=4))
        few, *others = h.result(tmp_path / name)["warnings"]
        assert few.startswith("the calibration set has 6 rows: what is dropped is decided by chance")
        told = capsys.readouterr().err
        assert f"warning: {few}\n" in told
        assert (f"warning: {chance}" in told) is any(one.startswith(chance) for one in others) is (name == "chance")


def test_guessing_is_always_saying_the_most_frequent_answer_where_all_choices_are_the_same():
    items = [Item(f"f:{n}", f"q {n}", (" flu", " gout"), answer=int(n > 6)) for n in range(10)]
    row = {"depth": 8, "calibration": {"metric": "acc", "value": 71.0, "stderr": 2.0}}
    said = str(account.guessing(row, items))
    assert "has acc 71.0 on the calibration set, where always saying 'flu' has 70.0" in said
    assert account.guessing({"depth": 8, "calibration": row["calibration"] | {"value": 72.5}}, items) is None
    assert account.guessing({"depth": 8, "calibration": row["calibration"] | {"metric": "likelihood"}}, items) is None
    assert account.few_rows(items * 2) is None
    assert "has 19 rows" in str(account.few_rows((items * 2)[:19]))


ROW = {"depth": 4, "train": {"steps": 9}, "calibration": {"metric": "likelihood", "value": 10.4, "stderr": 1.1}}
DROP = {"units": ["block 3"], "metric": "likelihood", "value": [12.9]}


def test_training_that_makes_the_calibration_set_worse_is_said():
    base = {"calibration": {"metric": "likelihood", "value": 5.0, "stderr": 1.0}}
    line = account.worsened(ROW | {"dropped": [DROP]}, base)
    assert line is not None
    assert "while depth 4 trained (likelihood 12.9 before, 10.4 after)" in line
    assert account.worsened(ROW | {"dropped": []}, base) is None
    assert account.worsened(ROW | {"dropped": []}, {"calibration": {"value": 11.6}}) is not None
    for changes in (
        {"value": [11.4]},  # within the standard error
        {"value": [None]},
        {"metric": "acc"},
        {"units": ["block 3", "block 2"], "value": [12.9, 12.8]},  # what both together did is not known
    ):
        assert account.worsened(ROW | {"dropped": [DROP | changes]}, base) is None, changes
    assert account.worsened(ROW | {"dropped": [DROP, DROP]}, base) is None
    assert account.worsened(ROW | {"dropped": [DROP], "train": {"steps": 0}}, base) is None


def test_a_rate_that_is_far_too_high_is_told_by_the_calibration_set(base, tmp_path, capsys):
    rows = [{"question": f"What is {i}?", "answer_text": f"It is {i}, as all know."} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = {"lr": 5e-3, "warmup_epochs": 10, "keep_checkpoints": True}
    bad = {"lr": 0.5, "warmup_epochs": 0, "epochs_per_drop": 4}
    start = {"good": base, "bad": tmp_path / "good" / "checkpoints" / "depth-5"}
    for name, changes in (("good", good), ("bad", bad)):
        settings = h.settings(start[name], tmp_path / "rows.jsonl", tmp_path / name, depth=4, **changes)
        progressive.trim(**settings)
        said = "the calibration set got worse while depth 4 trained (likelihood"
        assert (f"warning: {said}" in capsys.readouterr().err) is (name == "bad")
        warned = json.loads((tmp_path / name / "result.json").read_text())["warnings"]
        assert any(line.startswith(said) for line in warned) is (name == "bad")


@pytest.mark.parametrize("update", ["filled", "off"])
def test_what_memory_had_room_for_in_one_stage_is_where_the_next_begins(base, task, tmp_path, monkeypatch, update):
    work, failed = losses.backward, []
    stage, begun = train.train_stage, []

    def backward(model, packed, *rest):
        if len(packed.spans) > 2:
            failed.append(decoder.depth(model))
            raise torch.OutOfMemoryError("no memory")
        return work(model, packed, *rest)

    def train_stage(*arguments, **more):
        begun.append(arguments[5].fitted)
        return stage(*arguments, **more)

    monkeypatch.setattr(losses, "backward", backward)
    monkeypatch.setattr(train, "train_stage", train_stage)
    _, history = h.run(base, task, tmp_path / "run", depth=3, sparse_update=update)
    anew = update != "off"
    assert set(failed) == {5, 4} if anew else {5}, "after the warm-up less trains, and more may fit"
    sizes = [row["train"]["micro_batch_size"] for row in history if row["event"] == "stage"]
    assert begun == [None, None if anew else sizes[0], sizes[1]]
    assert sizes[1] >= sizes[2]


def test_domain_text_of_white_space_is_refused(base, task, tmp_path):
    (tmp_path / "blank.jsonl").write_text('{"text": " \\n "}\n')
    with pytest.raises(InputError, match=r"--text .*blank.jsonl: there is no text of two tokens in it: give more"):
        h.run(base, task, tmp_path / "run", depth=3, text=str(tmp_path / "blank.jsonl"))


def test_an_empty_stage_says_nothing_about_memory(base, task, tmp_path, monkeypatch):
    stage, begun = train.train_stage, []
    monkeypatch.setattr(train, "train_stage", lambda *a, **more: begun.append(a[5].fitted) or stage(*a, **more))
    h.run(base, task, tmp_path / "run", depth=3, warmup_epochs=0, batch_size=300)
    assert begun == [None, None, 300]


@pytest.mark.parametrize("floor", [0.5, 1.0])
def test_a_floor_that_is_meant_as_a_share_is_refused_where_accuracy_is_asked(base, task, tmp_path, floor):
    told = rf"^--min-accuracy {floor:g} is in percent, so hardly a floor: .* give {100 * floor:g}$"
    with pytest.raises(InputError, match=told):
        h.run(base, task, tmp_path / "run", min_accuracy=floor)
    assert not (tmp_path / "run").exists()
    asked = {"min_accuracy": 0.001, "depth": h.DEPTH - 1, "epochs_per_drop": 0, "eval_batch_size": 512}
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} cats sat on {n * n} mats, and so on. " * 9 for n in range(40)))
    h.run(base, tmp_path / "text.txt", tmp_path / "other", **asked)


def test_a_result_of_which_no_answer_differs_is_called_so():
    same = account.above_line({"difference": 0.0, "stderr": 0.0}, 16)
    assert same == "every item scores as with all 16 layers, as they were before the drops"
    assert account.above_line({"difference": -0.3, "stderr": 0.8}, 16).startswith(
        "-0.3 +- 0.8 points against all 16 layers"
    )


@pytest.mark.parametrize(
    ("units", "said"),
    [
        (["block 7"], "block 7"),
        (["block 19", "block 2", "block 17", "block 18", "block 1", "block 3", "block 5"], "blocks 1-3, 5, 17-19"),
        (["block 4", "block 3"], "blocks 3, 4"),
        (["MLP 3 + attention 4", "block 7"], "MLP 3 + attention 4, block 7"),
        (["blocks 1 2", "blocks 5 6"], "blocks 1 2, blocks 5 6"),
        ([], ""),
    ],
)
def test_blocks_that_go_together_stand_on_a_line_in_short(units, said):
    assert in_short(units) == said


@pytest.mark.parametrize(("named", "wanted"), [(5, [5, 0]), ([5, 6], [5, 6, 0]), (None, 0), (0, 0), ([6, 0], [6, 0])])
def test_a_result_stops_where_its_training_ends_an_answer(base, task, tmp_path, named, wanted):
    """The tokenizer's EOS (0) closes what is learnt; the model's own settings may name others alone."""
    folder = shutil.copytree(base, tmp_path / "base")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": named}))
    h.run(folder, task, tmp_path / "run", depth=4, **HARDLY)
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == wanted
    model = models.load(EvalConfig(model=str(folder), task=str(task), device="cpu")).model
    assert set(generation.ends_of(model, load_tokenizer(DEMO))) == {*(wanted if isinstance(wanted, list) else [wanted])}


def test_a_result_that_nothing_trained_stops_where_its_base_does(base, task, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 5}))
    h.run(folder, task, tmp_path / "run", depth=4, **NO_TRAINING)
    assert json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())["eos_token_id"] == 5
