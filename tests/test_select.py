"""Which unit goes: ties, protection, and the reasons that are given."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from trimllm.blocks.layout import Block, Unit, units, whole
from trimllm.errors import InputError
from trimllm.importance.at_once import most_apart
from trimllm.importance.scores import Evidence
from trimllm.importance.select import (
    choose,
    droppable,
    one_question,
    protected,
    touches,
)

BLOCKS = units("block", whole(5))


def evidence(accuracy, norm=None):
    values = np.array(accuracy, dtype=float)
    norms = None if norm is None else np.array(norm, dtype=float)
    return Evidence(depth=len(values), position=np.arange(float(len(values))), accuracy=values, norm=norms)


def test_the_highest_accuracy_after_deletion_goes():
    choice = choose(BLOCKS, evidence([70, 80, 60, 75, 79], [9, 1, 9, 9, 9]), "scan+norm")
    assert (choice.unit, choice.index, choice.tied) == (Unit("block", 1), 1, (1,))
    assert choice.why == "least important"
    assert choice.importance == pytest.approx(20 / (1.0001 + 1.01 * 80))


def test_within_the_tolerance_the_largest_norm_goes():
    known = evidence([70, 80, 78, 78.1, 77.9], [9, 1, 3, 2, 8])
    assert choose(BLOCKS, known, "scan+norm", tolerance=2).index == 2
    assert choose(BLOCKS, known, "scan+norm", tolerance=2).tied == (1, 2, 3)
    assert choose(BLOCKS, known, "scan+norm", tolerance=2).why == "tied with 2 others by the scan, largest norm"
    assert choose(BLOCKS, known, "scan+norm", tolerance=2.2).index == 4
    assert choose(BLOCKS, known, "scan+norm", tolerance=0).index == 1


def test_within_the_tolerance_the_least_loss_goes():
    known = replace(evidence([70, 80, 78, 78.1, 77.9]), loss=np.array([0.1, 0.9, 0.3, 0.2, 0.1]))
    choice = choose(BLOCKS, known, "scan+loss", tolerance=2)
    assert (choice.index, choice.tied) == (3, (1, 2, 3))
    assert choice.why == "tied with 2 others by the scan, least loss"
    assert choose(BLOCKS, known, "scan+loss").index == 1


def test_one_question_of_tolerance_is_not_lost_to_rounding():
    for n in range(2, 60):
        for right in range(1, n + 1):
            known = evidence([100 * right / n, 100 * (right - 1) / n, 100 * (right - 2) / n], [1, 2, 9])
            assert choose(BLOCKS[:3], known, "scan+norm", tolerance=one_question("acc", n)).tied == (0, 1), (n, right)


def test_without_a_tie_breaker_the_tolerance_is_not_used_and_equals_go_to_the_deeper():
    known = evidence([80, 79.9, 80, 60, 70], [9, 99, 1, 1, 1])
    choice = choose(BLOCKS, known, "scan", tolerance=5)
    assert (choice.index, choice.tied) == (2, (0, 2))
    assert choice.why == "tied with 1 other in importance, deepest"


def test_equal_norms_go_to_the_deeper():
    assert choose(BLOCKS, evidence([80, 80, 80, 60, 70], [5, 5, 4, 9, 9]), "scan+norm").index == 1


def test_a_score_that_is_no_number_never_wins():
    known = replace(evidence([70, 80, 60, 75, 79]), cosine=np.array([np.nan, 0.7, 0.8, np.nan, 0.6]))
    assert choose(BLOCKS, known, "bi").index == 2
    with pytest.raises(InputError, match="none of the 2 candidates has a score that is a number"):
        choose(BLOCKS, known, "bi", allowed=[0, 3])


def test_only_allowed_candidates_count_even_for_the_ties():
    known = evidence([99, 80, 79.5, 70, 60], [1, 2, 3, 4, 5])
    choice = choose(BLOCKS, known, "scan+norm", tolerance=1, allowed={1, 2, 3})
    assert (choice.index, choice.tied) == (2, (1, 2))


def test_no_candidate_left_is_an_error():
    with pytest.raises(InputError, match="every remaining layer is protected"):
        choose(BLOCKS, evidence([1, 2, 3, 4, 5], [1] * 5), "scan+norm", allowed=[])


def test_one_question_is_worth_nothing_where_there_are_likelihoods():
    assert one_question("acc", 50) == 2.0
    assert one_question("acc_norm", 200) == 0.5
    assert one_question("likelihood", 50) == 0.0


def test_protected_layers_count_from_both_ends():
    assert protected([0, -1, 3], 8) == {0, 3, 7}
    for wrong in (8, -9):
        with pytest.raises(InputError, match=rf"--protect {wrong}: the model has layers 0 to 7"):
            protected([wrong], 8)


def test_pairs_that_touch_a_protected_block_stay():
    candidates = units("pair", whole(4))
    left = [candidates[i] for i in droppable(candidates, whole(4), {2})]
    assert left == [Unit("block", 0), Unit("pair", 0), Unit("block", 1), Unit("block", 3)]


def test_protection_follows_original_blocks_through_repacked_ones():
    layout = (Block(0, 1), Block(2, 2), Block(4, 5))
    candidates = units("pair", layout)
    assert [touches(unit, layout) for unit in candidates] == [{0, 1}, {1, 2}, {2}, {2, 4}, {4, 5}]
    assert [candidates[i] for i in droppable(candidates, layout, {1})] == [
        Unit("block", 1),
        Unit("pair", 1),
        Unit("block", 2),
    ]
    assert touches(Unit("attention", 2), layout) == {4}
    assert touches(Unit("mlp", 2), layout) == {5}


@pytest.mark.parametrize(
    ("starts", "length", "most"),
    [([], 1, 0), ([0, 1, 2], 1, 3), ([0, 1, 2], 2, 2), ([0, 1, 2, 3, 4], 3, 2), ([1, 5, 3], 3, 2), ([2, 3], 4, 1)],
)
def test_the_most_units_that_share_no_block(starts, length, most):
    every = [Unit("block", start, length) for start in starts]
    assert most_apart(every) == most
    sets = (some for count in range(len(every) + 1) for some in itertools.combinations(every, count))
    apart = (some for some in sets if len({b for one in some for b in one.blocks}) == length * len(some))
    assert max(map(len, apart)) == most
