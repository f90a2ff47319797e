"""Pure metrics on numbers that can be checked by hand."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

from trimllm.tasks.metrics import exact_match, repetition, rouge_l


def test_exact_match_ignores_case_punctuation_and_articles():
    assert exact_match("The  Eiffel-Tower!", ["eiffeltower"]) == 1
    assert exact_match("Paris", ["London", "paris."]) == 1
    assert exact_match("Paris, France", ["Paris"]) == 0


def test_an_answer_of_which_normalizing_leaves_nothing_is_compared_as_it_stands():
    assert (
        exact_match("", ["A"]) == exact_match("The.", ["A"]) == exact_match("-", ["+"]) == exact_match("", ["+"]) == 0
    )
    assert exact_match(" a", ["A"]) == exact_match("+ ", ["-", "+"]) == exact_match("", [""]) == 1


def test_rouge_l_is_the_best_over_the_references():
    assert rouge_l("the cat sat", ["the cat sat"]) == 1
    assert rouge_l("the cat sat", ["dogs bark", "the cat ran"]) == pytest.approx(2 / 3)
    assert rouge_l("nothing", []) == 0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("привет мир", "Привет, мир!", 1),
        ("\u4f60\u597d\u4e16\u754c", "\u4f60\u597d\u3002", 2 * 2 / (4 + 2)),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e",
            "\u0939\u093f\u0928\u094d\u0926\u0940",
            2 / 3,
        ),
        ("cafe\u0301", "caf\u00e9", 1),
        ("Müllers Katze", "müllers hund", 1 / 2),
        ("it\u2019s the runner", "it's the running", 3 / 4),
    ],
)
def test_rouge_l_reads_other_scripts(answer, reference, expected):
    assert rouge_l(answer, [reference]) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["It's snake_case, 3.5 % of-all!", "Running runners ran; the END.", ""])
def test_rouge_l_of_latin_letters_is_the_librarys_own(text):
    own = RougeScorer(["rougeL"], use_stemmer=True)
    for other in ("its snake case 3 5 of all", "runner runs the end", text):
        assert rouge_l(text, [other]) == own.score(other, text)["rougeL"].fmeasure


def test_repetition_counts_repeated_four_grams():
    assert repetition(list("abcdef")) == 0
    assert repetition(["x"] * 10) == pytest.approx(6 / 7)
    assert repetition(["x"] * 3) == 0
