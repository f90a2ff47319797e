"""What Python gives of a model in memory is what the commands give of it on disk."""

import json

import helpers_run as h
import pytest

import trimllm
from trimllm import cli
from trimllm.errors import InputError

CASES = {
    "default": {},
    "tied by the norm, as published": {"strategy": "scan+norm", "tie_tolerance": 20.0},
    "of gradients": {"strategy": "taylor"},
    "by runs": {"strategy": "angular", "run": 2},
    "halves of blocks": {"unit": "sublayer", "strategy": "loss"},
    "a layer that stays": {"unit": "pair", "protect": (0,), "eval_batch_size": 96},
    "raced": {"strategy": "scan", "scan": "racing", "confidence": 0.9},
}


@pytest.fixture(scope="module")
def model(base):
    return trimllm.load_model(base)


@pytest.fixture(scope="module")
def tokenizer(base):
    return trimllm.load_tokenizer(base)


@pytest.mark.parametrize("case", CASES)
def test_a_scan_is_that_of_the_command(base, task, model, tokenizer, tmp_path, case):
    settings = CASES[case]
    values = {name: ",".join(map(str, value)) if name == "protect" else value for name, value in settings.items()}
    words = h.arguments(
        {"model": str(base), "task": str(task), "calibration_size": 16, "output": str(tmp_path), **values}
    )
    assert cli.main(["scan", *words]) == 0
    record = json.loads((tmp_path / "scan.json").read_text(encoding="utf-8"))
    data = trimllm.load_task(task, tokenizer=tokenizer, calibration_size=16)
    found = trimllm.scan_layers(model, tokenizer, data.calibration, **settings)
    for each in (record, found):
        del each["seconds"]
    assert record == found | {"model": str(base), "task": data.name}
    assert found["first"] in [row["unit"] for row in found["units"]]
    assert model.config.num_hidden_layers == h.DEPTH


def test_an_evaluation_is_that_of_the_command(base, task, model, tokenizer, tmp_path):
    data = trimllm.load_task(task, tokenizer=tokenizer)
    found = trimllm.evaluate(model, tokenizer, data.test, data.metric)
    output = tmp_path / "eval.json"
    assert cli.main(["eval", "--model", str(base), "--task", str(task), "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert (record["value"], record["stderr"], record["n"]) == (found.value, found.stderr, found.n)


@pytest.mark.parametrize("strategy", ["taylor", "magnitude"])
def test_weights_that_are_codes_have_no_size_and_no_gradient(task, model, tokenizer, monkeypatch, strategy):
    monkeypatch.setattr(model, "is_quantized", True, raising=False)
    data = trimllm.load_task(task, tokenizer=tokenizer, calibration_size=6)
    with pytest.raises(InputError, match=f"--strategy {strategy}: the weights of a quantized model are codes"):
        trimllm.scan_layers(model, tokenizer, data.calibration, strategy=strategy)
    assert trimllm.scan_layers(model, tokenizer, data.calibration, strategy="bi")["first"]


def test_text_is_scanned_by_its_likelihood(model, tokenizer):
    data = trimllm.load_task("demo_law", tokenizer=tokenizer, calibration_size=8)
    written = [item.right_only() for item in data.calibration]
    found = trimllm.scan_layers(model, tokenizer, written)
    assert (found["metric"], len(found["units"])) == ("likelihood", h.DEPTH)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "scam"}, "unknown strategy 'scam'"),
        ({"strategies": "scan"}, "strategies"),
        ({"strategy": "angular", "run": 9}, "--run 9: the model has only 5 layers"),
        ({"run": 2}, "--run 2 is for --strategy angular"),
        ({"protect": (9,)}, "protect"),
        ({"metric": "f1"}, "unknown metric 'f1'"),
        ({"max_length": 5}, "tokens"),
    ],
)
def test_what_cannot_be_scanned_is_one_line(task, model, tokenizer, settings, message):
    data = trimllm.load_task(task, tokenizer=tokenizer, calibration_size=6)
    with pytest.raises(InputError, match=message) as found:
        trimllm.scan_layers(model, tokenizer, data.calibration, **settings)
    assert "\n" not in str(found.value)
