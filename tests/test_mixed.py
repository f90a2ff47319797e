"""Where training computes in mixed precision, scans and accuracies do, too; the result is measured as saved."""

from functools import partial
from types import SimpleNamespace

import helpers_run as h
import numpy as np
import pytest
import reference
import tiny
import torch
from accelerate.state import AcceleratorState

from trimllm.checkpoints import mixed
from trimllm.evaluation import evaluate
from trimllm.evaluation.evaluate import MIXED, Scorer
from trimllm.importance import deletion, scan
from trimllm.run import progressive

AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)


def tables(model, scorer, unit="pair"):
    """Log-likelihoods of the intact model and of every trial, and the result."""
    parts = {}
    result = scan.scan(model, scorer, "acc", unit, on_part=parts.__setitem__)
    gathered = [[part.intact for part in parts.values()]]
    gathered += [[part.trials[i] for part in parts.values()] for i in range(len(result.candidates))]
    return [np.concatenate(evaluate.gather(pieces, scorer.encoded).loglik) for pieces in gathered], result


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mamba"])
def test_trials_in_mixed_precision_are_those_of_models_without_the_unit(family, tokenizer, questions):
    model = tiny.build(family, 4)
    unit = "block" if family == "mamba" else "pair"
    scorer = Scorer(model, tokenizer, questions, token_budget=60, autocast=AUTOCAST)
    (intact, *found), result = tables(model, scorer, unit)
    (exact, *_), plain = tables(model, Scorer(model, tokenizer, questions, token_budget=60), unit)
    assert result.notes == plain.notes, "the forward pass is resumed where it is in float32"
    assert 1e-4 < np.abs(intact - exact).max() < 0.2
    for candidate, trial in zip(result.candidates, found, strict=True):
        twin = reference.deleted(model, candidate)
        expected = np.concatenate(scorer.score(twin).loglik)
        assert trial == pytest.approx(expected, abs=1e-5), candidate
        assert trial != pytest.approx(intact, abs=1e-3)
    assert "forward" not in vars(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_is_measured_knows_how(tokenizer, questions):
    model = tiny.build("llama", 2)
    scorer = Scorer(model, tokenizer, questions, autocast=AUTOCAST)
    assert scorer.evaluate(model, "acc").dtype == MIXED
    assert scorer.right_only(model).evaluate(model, "likelihood").dtype == MIXED
    assert scorer.plain().evaluate(model, "acc").dtype == "float32"
    model.bfloat16()
    assert scorer.plain().evaluate(model, "acc").dtype == "bfloat16"


def test_copies_of_weights_last_as_long_as_their_use():
    made = []
    accelerator = SimpleNamespace(mixed_precision="bf16", autocast=lambda **named: made.append(named))
    mixed.measuring(accelerator)()
    mixed.training(accelerator)()
    measured, trained = made
    assert measured["autocast_handler"].cache_enabled is False
    assert trained == {}
    accelerator.mixed_precision = "no"
    assert (mixed.measuring(accelerator), mixed.training(accelerator)) == (None, None)


def dtypes(output, part="calibration"):
    rows = [row for row in h.journal(output) if row["event"] in ("base", "stage", "saved") and row[part]]
    return [(row["event"], row[part]["dtype"]) for row in rows]


@pytest.mark.parametrize("changes", [{}, {"schedule": "recover", "depth": 2, "recover_tolerance": 0.0}])
@pytest.mark.usefixtures("fast")
def test_a_run_measures_in_mixed_precision_but_for_the_result(base, task, tmp_path, monkeypatch, changes):
    """And goes on so."""
    monkeypatch.setattr(mixed, "measuring", lambda _: AUTOCAST)
    seen, work = [], scan.scan

    def scanning(model, scorer, *arguments, **more):
        seen.append(scorer.autocast)
        return work(model, scorer, *arguments, **more)

    monkeypatch.setattr(scan, "scan", scanning)
    h.killed_run((deletion, "measure", 2), base, task, tmp_path / "run", **changes)
    h.run(base, task, tmp_path / "run", resume=True, **changes)
    *way, saved = dtypes(tmp_path / "run")
    assert {dtype for _, dtype in way} == {MIXED}
    assert saved == ("saved", "float32")
    assert set(seen) == {AUTOCAST}
    assert dtypes(tmp_path / "run", "test")[-1] == saved


@pytest.mark.usefixtures("fast")
def test_batches_of_another_precision_are_scanned_again(base, task, tmp_path, monkeypatch):
    """A run that was begun on a GPU goes on on a CPU."""
    output, scanned, part = tmp_path / "run", [], deletion.measure
    with monkeypatch.context() as patch:
        patch.setattr(mixed, "measuring", lambda _: AUTOCAST)
        h.killed_run((deletion, "measure", 2), base, task, output)
    (batches,) = (output / "scans").glob("*.jsonl")
    assert len(batches.read_text().splitlines()) == 1
    monkeypatch.setattr(deletion, "measure", lambda *a, **k: scanned.append(1) or part(*a, **k))
    h.killed_run((progressive.Run, "_drop", 1, True), base, task, output, resume=True)
    again = len(scanned)
    scanned.clear()
    h.killed_run((progressive.Run, "_drop", 1, True), base, task, tmp_path / "plain")
    assert again == len(scanned)


@pytest.mark.usefixtures("fast")
def test_what_trains_nothing_computes_in_the_dtype_of_its_weights(base, task, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed, "measuring", lambda _: AUTOCAST)
    h.run(base, task, tmp_path / "run", warmup_epochs=0, epochs_per_drop=0)
    assert {dtype for _, dtype in dtypes(tmp_path / "run")} == {"float32"}


@pytest.mark.usefixtures("fast")
def test_a_run_in_float32_measures_in_float32(base, task, tmp_path):
    h.run(base, task, tmp_path / "run")
    assert {dtype for _, dtype in dtypes(tmp_path / "run")} == {"float32"}


@pytest.fixture
def fresh_accelerate():
    """accelerate fixes the mixed precision of a process at its first use."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fast", "fresh_accelerate")
def test_a_run_measures_as_it_trains(base, task, tmp_path):
    h.run(base, task, tmp_path / "run", mixed_precision="bf16", depth=4)
    assert dict(dtypes(tmp_path / "run")) == {"base": MIXED, "stage": MIXED, "saved": "float32"}
