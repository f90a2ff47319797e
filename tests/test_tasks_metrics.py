"""Pure metrics on numbers that can be checked by hand."""

import pytest

from trimllm.tasks.metrics import exact_match, repetition, rouge_l


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
