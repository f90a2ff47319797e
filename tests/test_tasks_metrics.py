"""Pure metrics on numbers that can be checked by hand."""

import math

import pytest

from trimllm.tasks.metrics import binomial_stderr, exact_match, repetition, rouge_l


def test_binomial_standard_error_is_that_of_a_mean_of_zeros_and_ones():
    assert binomial_stderr(0.5, 101) == pytest.approx(0.05)
    assert binomial_stderr(1.0, 20) == 0
    assert math.isnan(binomial_stderr(1.0, 1))


def test_exact_match_ignores_case_punctuation_and_articles():
    assert exact_match("The  Eiffel-Tower!", ["eiffeltower"]) == 1
    assert exact_match("Paris", ["London", "paris."]) == 1
    assert exact_match("Paris, France", ["Paris"]) == 0


def test_rouge_l_is_the_best_over_the_references():
    assert rouge_l("the cat sat", ["the cat sat"]) == 1
    assert rouge_l("the cat sat", ["dogs bark", "the cat ran"]) == pytest.approx(2 / 3)
    assert rouge_l("nothing", []) == 0


def test_repetition_counts_repeated_four_grams():
    assert repetition(list("abcdef")) == 0
    assert repetition(["x"] * 10) == pytest.approx(6 / 7)
    assert repetition(["x"] * 3) == 0
