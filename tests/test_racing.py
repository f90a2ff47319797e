"""Races: the rule that finds the winner is that of `select`, and what is stopped could not have won."""

from __future__ import annotations

import itertools
import json
import re

import helpers_run as h
import numpy as np
import pytest
import torch
from helpers_run import DEPTH

import trimllm
from trimllm import cli, tasks
from trimllm.blocks.layout import units, whole
from trimllm.checkpoints.loading import DEMO
from trimllm.commands.scan import scan_table
from trimllm.errors import InputError
from trimllm.evaluation import judging
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import racing, scan
from trimllm.importance.deletion import Part
from trimllm.importance.racing import Rule
from trimllm.importance.rules import Rules
from trimllm.importance.scores import Evidence
from trimllm.importance.select import choose

EVERY = np.ones(6, dtype=bool)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 3.0])
def test_winner_is_the_unit_that_select_chooses(tolerance):
    generator = np.random.default_rng(0)
    for _ in range(200):
        hits, norms = generator.integers(20, 26, 6), generator.integers(1, 4, 6).astype(float)
        allowed = generator.random(6) < 0.7
        allowed[generator.integers(6)] = True
        places = np.arange(6.0)
        evidence = Evidence(depth=6, position=places, accuracy=100 * hits / 40, norm=norms)
        chosen = choose(
            units("block", whole(6)),
            evidence,
            "scan+norm",
            tolerance=100 * tolerance / 40,
            allowed=np.flatnonzero(allowed).tolist(),
        )
        assert Rule(tolerance, norms, places, allowed).winners(hits[:, None]).tolist() == [chosen.index]


def test_rounds_begin_with_what_the_intact_model_is_least_sure_of():
    margins = np.array([3.0, -0.1, 9.0, 0.5] * 30)
    rounds = racing.hardest_first(margins)
    assert sorted(item for items in rounds for item in items) == list(range(120))
    assert len(rounds[0]) == 15
    sure = [np.abs(margins[items]) for items in rounds]
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(sure))
    assert racing.hardest_first(np.ones(9)) == [list(range(9))]


def test_least_likely_winners_are_stopped_as_long_as_the_risk_lasts():
    assert racing.stopped(np.array([0.004, 0.9, 0.0, 0.003, 0.093]), 0.0069) == [2, 3]
    assert racing.stopped(np.array([0.0, 0.0]), 0.5) == [0], "one goes on, whatever the risk"


def outcomes(rates, count, seed):
    """Recorded outcomes of candidates that differ from the intact model at these rates, more so where it is unsure."""
    generator = np.random.default_rng(seed)
    margins = generator.exponential(2.0, count) * np.where(generator.random(count) < 0.9, 1, -1)
    chance = np.clip(np.array(rates)[:, None] * 3 * np.exp(-np.abs(margins)), 0, 0.9)
    intact = margins > 0
    return intact, margins, intact ^ (generator.random((len(rates), count)) < chance)


def run_race(rates, seed, count=240, confidence=0.999, norms=None):
    intact, margins, table = outcomes(rates, count, seed)
    norms = np.arange(len(rates))[::-1].astype(float) if norms is None else norms
    rule = Rule(1.0, norms, np.arange(float(len(rates))), np.ones(len(rates), dtype=bool))
    asked = []

    def compute(running, items):
        asked.append((tuple(running), len(items)))
        return table[np.ix_(running, items)]

    end = racing.race(compute, intact, margins, rule, confidence, seed)
    winner = int(rule.winners(table.sum(axis=1)[:, None])[0])
    left = rule.of(end.running).winners(end.expected[list(end.running)][:, None])[0]
    assert end.computed == sum(len(running) * items for running, items in asked)
    return end, end.running[left], winner, table


def test_race_finds_the_winner_of_the_whole_set_and_saves_trials():
    rates = [0.9, 0.02, 0.05, 0.3, 0.5, 0.02, 0.2, 0.7]
    found = [run_race(rates, seed) for seed in range(20)]
    assert sum(ours == winner for _, ours, winner, _ in found) >= 19
    saved = [1 - end.computed / (len(rates) * 240) for end, *_ in found]
    assert np.mean(saved) > 0.25


def test_who_is_not_stopped_has_its_true_value_and_the_others_are_expected_to_be_worse():
    end, _, _, table = run_race([0.9, 0.02, 0.05, 0.3, 0.5, 0.02, 0.2, 0.7], 3)
    true = table.sum(axis=1)
    whole_way = [i for i in end.running if end.seen[i] == 240]
    assert [end.expected[i] for i in whole_way] == [true[i] for i in whole_way]
    others = [i for i in range(8) if i not in end.running]
    assert max(end.expected[i] for i in others) < min(end.expected[i] for i in end.running)
    assert max(true[i] for i in others) < max(true)
    assert len(end.running) < 8


def test_candidates_that_may_not_go_never_win_and_leave_first():
    intact, margins, table = outcomes([0.0, 0.3, 0.4, 0.5], 240, 0)
    rule = Rule(1.0, np.ones(4), np.arange(4.0), np.array([False, True, True, True]))
    asked = []

    def compute(running, items):
        asked.append(list(running))
        return table[np.ix_(running, items)]

    end = racing.race(compute, intact, margins, rule, 0.999)
    assert asked[0] == [0, 1, 2, 3]
    assert all(0 not in running for running in asked[1:])
    assert 0 not in end.running
    assert 0 not in racing.race(compute, intact, margins, rule, 0.999, seed=-7).running


@pytest.fixture(scope="module")
def knowing():
    """Six blocks of the embedded model, the calibration questions they are asked, and their scorer."""
    model = trimllm.load_model(DEMO, dtype=torch.float32)  # not what a CPU may emulate
    tokenizer = trimllm.load_tokenizer(DEMO)
    trimllm.drop_layers(model, [1, 2, 3, 5, 6, 7, 9, 10, 13, 14])
    return model, Scorer(model, tokenizer, tasks.load_task("demo_law").test[:96], token_budget=1024)


def test_scan_that_races_finds_what_the_exact_one_finds(knowing):
    model, scorer = knowing
    exact = scan.scan(model, scorer, "acc")
    tolerance = 100 / 96
    kept = {}
    racing_scan = scan.scan(
        model, scorer, "acc", race=scan.Race(0.999, tolerance), on_part=lambda n, part: kept.__setitem__(n, part)
    )
    assert racing_scan.intact == exact.intact
    assert np.array_equal(racing_scan.norm, exact.norm)
    chosen = [
        choose(
            result.candidates,
            result.evidence(np.arange(6.0), 6),
            "scan+norm",
            tolerance=tolerance,
            allowed=result.running,
        ).unit
        for result in (exact, racing_scan)
    ]
    assert chosen[0] == chosen[1]
    for i in racing_scan.running:
        if racing_scan.trials[i].n == 96:
            assert racing_scan.trials[i].value == pytest.approx(exact.trials[i].value)
    said = re.fullmatch(r"race: (\d) of 6 candidates to the end, (\d+)% of the trials computed", racing_scan.notes[-1])
    assert said
    assert int(said[1]) == len(racing_scan.running)
    assert int(said[2]) < 100
    assert sum(len(trial) > 0 for part in kept.values() for trial in part.trials) < 6 * len(kept)
    # what was finished before an interruption is not computed again
    half = {n: Part.load(kept[n].dump()) for n in sorted(kept)[: len(kept) // 2]}
    made = []
    again = scan.scan(
        model,
        scorer,
        "acc",
        race=scan.Race(0.999, tolerance),
        finished=half,
        on_part=lambda n, part: made.append(n),
    )
    assert made == sorted(kept)[len(kept) // 2 :]
    assert [trial.value for trial in again.trials] == [trial.value for trial in racing_scan.trials]
    assert again.running == racing_scan.running
    # a part that lacks a candidate which runs now (numbers may round otherwise elsewhere) is computed again
    last = max(kept)
    torn = {n: Part.load(part.dump()) for n, part in kept.items()}
    torn[last].trials[racing_scan.running[0]] = {}
    made.clear()
    third = scan.scan(
        model, scorer, "acc", race=scan.Race(0.999, tolerance), finished=torn, on_part=lambda n, part: made.append(n)
    )
    assert made == [last]
    assert [trial.value for trial in third.trials] == [trial.value for trial in racing_scan.trials]


def test_too_few_items_and_likelihoods_are_scanned_exactly_and_the_user_is_told(knowing):
    model, scorer = knowing
    few = Scorer(model, trimllm.load_tokenizer(DEMO), scorer.items[:12])
    result = scan.scan(model, few, "acc", race=scan.Race(0.99))
    assert result.running is None
    assert "no race" in result.notes[-1]
    assert "no race" in scan.scan(model, few, "likelihood", race=scan.Race(0.99)).notes[-1]


def test_run_by_races(tmp_path, monkeypatch):
    h.fast(monkeypatch)
    task = h.save_task(tmp_path / "task", train=120)
    output = tmp_path / "run"
    h.run(
        h.save_base(tmp_path / "base"),
        task,
        output,
        scan="racing",
        strategy="scan+norm",
        calibration_size=24,
        protect=(1,),
    )
    drops = h.drops(output)
    assert len(drops) == DEPTH - 3
    assert ["block 1"] not in drops
    record = (output / "scans" / "scan-000.json").read_text()
    assert "NaN" not in record


def test_table_of_a_race_says_which_accuracies_are_foreseen():
    units_, ones = units("block", whole(2)), np.ones(2)
    base, seen, foreseen = (judging.estimate(share, n, "acc") for share, n in ((1.0, 24), (0.5, 24), (0.25, 8)))
    result = scan.ScanResult(units_, base, [seen, foreseen], ones, ones, ones, ones, 0.0, running=(0,))
    record = scan.table(result, result.evidence(np.arange(2.0), 2), "scan+norm", ["block 0", "block 1"])
    assert ["n" in row for row in record["units"]] == [False, True]
    lines = scan_table(record | {"metric": "acc"}).splitlines()
    assert ["(foreseen from 8)" in line for line in lines[-2:]] == [True, False]


PAPERS = ("--strategy", "scan+norm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scan", "racing", "--confidence", "1"], "--confidence 1: must be less than 1"),
        (["--scan", "racing", "--confidence", "0"], "--confidence 0: must be greater than 0"),
        (["--confidence", "0.9"], "--confidence 0.9 is for --scan racing"),
        (["--scan", "racing", "--strategy", "norm"], "--scan racing compares accuracies"),
        (["--scan", "racing", "--strategy", "scan+loss"], "--strategy scan+loss something else: add --strat"),
        (
            ["--scan", "racing"],
            "--strategy probability something else: add --strategy scan+norm, or leave --scan racing out",
        ),
        (["--scan", "racing", *PAPERS, "--one-shot"], "--one-shot ranks all candidates"),
        (["--scan", "racing", *PAPERS, "--schedule", "recover"], "--schedule recover ranks all candidates"),
        (["--scan", "rasing"], "did you mean 'racing'"),
    ],
)
def test_what_does_not_fit_a_race_is_one_line(options, message):
    with pytest.raises(InputError) as error:
        cli.parse(["trim", "--model", "demo", "--task", "demo_law", "--output", "x", *options])
    assert message in str(error.value)


@pytest.mark.usefixtures("fast")
def test_a_run_says_once_that_there_is_no_race(base, task, tmp_path, capsys):
    words = h.arguments(
        h.settings(
            base, task, tmp_path / "run", scan="racing", strategy="scan+norm", warmup_epochs=0, epochs_per_drop=0
        )
    )
    assert cli.main(["trim", *words]) == 0
    assert capsys.readouterr().err.count("no race: it needs choices, and items enough") == 1


def test_a_scan_races_in_the_order_of_a_runs_first(base, task, tmp_path, monkeypatch):
    seeds, race = [], Rules.race

    def watched(*given):
        seeds.append(race(*given).seed)
        return race(*given)

    monkeypatch.setattr(Rules, "race", watched)
    h.fast(monkeypatch)
    asked = {"scan": "racing", "strategy": "scan+norm", "seed": 5}
    h.run(base, task, tmp_path / "run", depth=DEPTH - 1, warmup_epochs=0, epochs_per_drop=0, **asked)
    words = {"model": base, "task": task, "output": tmp_path / "scan", "calibration_size": 6, **asked}
    assert cli.main(["scan", *h.arguments(words)]) == 0
    assert len(seeds) > 1
    assert set(seeds) == {5 + DEPTH}


def test_a_scan_of_random_scores_names_what_a_run_would_drop_first(base, task, tmp_path, monkeypatch):
    h.fast(monkeypatch)
    run = {"strategy": "random", "depth": DEPTH - 1, "warmup_epochs": 0, "epochs_per_drop": 0}
    for seed in (0, 1, 2):
        h.run(base, task, tmp_path / f"run-{seed}", seed=seed, **run)
        asked = {"model": base, "task": task, "output": tmp_path / f"scan-{seed}", "strategy": "random", "seed": seed}
        assert cli.main(["scan", *h.arguments(asked | {"calibration_size": 6})]) == 0
        first = json.loads((tmp_path / f"scan-{seed}" / "scan.json").read_text())["first"]
        assert [[first]] == h.drops(tmp_path / f"run-{seed}")
