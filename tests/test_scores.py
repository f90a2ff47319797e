"""Importance scores: numbers worked out by hand, and which way each of them points."""

from __future__ import annotations

import numpy as np
import pytest

from trimllm.config import STRATEGIES
from trimllm.errors import InputError
from trimllm.importance import scores
from trimllm.importance.scores import SCORES, Evidence, breaking, deciding, importance, needs, s_norm, s_scan

PLACES = np.arange(8.0)


def evidence(**known):
    size = len(next(iter(known.values()))) if known else 8
    arrays = {name: np.array(values, dtype=float) for name, values in known.items()}
    return Evidence(depth=8, position=np.arange(float(size)), **arrays)


def order(name, known=None):
    """Candidates from the first to go to the last."""
    known = known or Evidence(depth=8, position=PLACES)
    return np.argsort(importance(name, known), kind="stable").tolist()


def test_s_scan_is_the_papers_formula():
    got = s_scan(np.array([0.0, 50.0, 100.0]), delta=0.1)
    assert got == pytest.approx([100 / 1.01, 50 / (1.01 + 1.1 * 50), 0.0])
    assert s_scan(np.array([80.0])) == pytest.approx([20 / (1.0001 + 1.01 * 80)])


def test_s_scan_falls_strictly_from_its_upper_bound_to_zero():
    values = s_scan(np.linspace(0, 100, 1001))
    assert (np.diff(values) < 0).all()
    assert values[0] == pytest.approx(100 / (1 + scores.DELTA**2))
    assert values[-1] == 0


def test_s_norm_is_the_papers_formula():
    assert s_norm(np.array([2.0, 4.0, 8.0])) == pytest.approx([100.0, 50.0, 25.0])
    values = s_norm(np.random.default_rng(0).uniform(0.1, 50, 100))
    assert ((values > 0) & (values <= 100)).all()
    assert values.max() == 100


def test_block_influence_angular_and_perplexity_by_hand():
    assert importance("bi", evidence(cosine=[1.0, 0.5, -1.0])).tolist() == [0.0, 0.5, 2.0]
    angular = importance("angular", evidence(run_angle=[0.0, 0.5, 1.0, 1 / 3, np.nan]))
    assert angular[:4].tolist() == [0.0, 0.5, 1.0, 1 / 3]
    assert angular[4] == np.inf
    assert importance("perplexity", evidence(loss=[0.0, 1.0])) == pytest.approx([1.0, np.e])
    assert np.isfinite(importance("perplexity", evidence(loss=[1e9]))).all()


@pytest.mark.parametrize(
    ("name", "field", "best_dropped", "kept"),
    [
        ("scan", "accuracy", 90.0, 10.0),
        ("norm", "norm", 30.0, 1.0),
        ("bi", "cosine", 0.99, 0.2),
        ("angular", "run_angle", 0.1, 0.4),
        ("loss", "loss", 1.0, 3.0),
        ("perplexity", "loss", 1.0, 3.0),
        ("taylor", "taylor", 0.1, 5.0),
        ("magnitude", "magnitude", 0.1, 5.0),
    ],
)
def test_the_unit_that_is_missed_least_scores_lowest(name, field, best_dropped, kept):
    values = importance(name, evidence(**{field: [kept, best_dropped, (kept + best_dropped) / 2]}))
    assert np.argsort(values).tolist() == [1, 2, 0]


def test_fixed_orders_of_eight_blocks():
    assert order("first") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert order("last") == [7, 6, 5, 4, 3, 2, 1, 0]
    assert order("alternate") == [6, 4, 2, 0, 7, 5, 3, 1]
    distance = importance("symmetric", Evidence(depth=8, position=PLACES))
    assert distance.tolist() == [3.5, 2.5, 1.5, 0.5, 0.5, 1.5, 2.5, 3.5]


def test_fixed_orders_go_on_the_same_way_after_blocks_are_gone():
    """Positions are original indices, so a plan does not depend on how many drops were made before."""
    left = np.array([0.0, 1, 2, 3, 5, 7])
    known = Evidence(depth=8, position=left)
    assert left[order("alternate", known)].tolist() == [2, 0, 7, 5, 3, 1]
    assert left[order("symmetric", known)].tolist()[0] == 3


def test_random_order_depends_on_the_seed_alone():
    drawn = [importance("random", Evidence(depth=8, position=PLACES, seed=seed)).tolist() for seed in (0, 0, 1, -7)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == sorted(drawn[3]) == PLACES.tolist()


@pytest.mark.parametrize("name", SCORES)
def test_every_score_reads_only_what_it_says(name):
    values = np.linspace(0.1, 0.9, 8)
    known = Evidence(depth=8, position=PLACES, **dict.fromkeys(SCORES[name].needs, values))
    assert importance(name, known).shape == (8,)
    if SCORES[name].needs:
        with pytest.raises(InputError, match=f"needs {SCORES[name].needs[0]}, which was not measured"):
            importance(name, Evidence(depth=8, position=PLACES))


def test_strategies_name_their_scores_and_needs():
    assert (deciding("scan+norm"), breaking("scan+norm"), breaking("scan")) == ("scan", "norm", None)
    assert needs("scan+norm") == {"accuracy", "norm"}
    assert needs("scan+loss") == {"accuracy", "loss"}
    assert needs("scan+probability") == {"accuracy", "probability"}
    assert needs("probability") == {"probability"}
    assert needs("scan") == {"accuracy"}
    assert needs("last") == set()
    for strategy in STRATEGIES:
        assert deciding(strategy) in SCORES
        assert breaking(strategy) in (None, *SCORES)


@pytest.mark.parametrize(
    ("wrong", "near"), [("scan+nrm", "scan+norm"), ("magnitud", "magnitude"), ("Taylor", "taylor")]
)
def test_unknown_strategy_names_the_nearest(wrong, near):
    with pytest.raises(InputError, match="did you mean") as failure:
        needs(wrong)
    assert repr(near) in str(failure.value)
    assert repr(wrong) in str(failure.value)


def test_unknown_strategy_that_is_near_to_none_lists_them_all():
    with pytest.raises(InputError, match=r"use one of probability, scan\+norm, scan\+probability, "):
        needs("zzz")


def test_every_strategy_that_the_settings_take_has_its_score():
    assert {"scan+norm", "scan+probability", "scan+loss", *SCORES} == set(STRATEGIES)
    assert len(set(STRATEGIES)) == len(STRATEGIES)
