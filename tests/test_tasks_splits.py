"""Train, calibration and reported items share no item, group or text; sizes and subsamples are seeded and noted."""

import pytest

from trimllm.errors import InputError
from trimllm.tasks.items import Item
from trimllm.tasks.splits import distinct, normalize, split, without_overlap


def choice(number, text=None, group=None):
    return Item(f"f:{number}", text or f"Question {number}?", (" a", " b"), number % 2, group=group)


def generation(number, prompt, target):
    return Item(f"f:{number}", prompt, (" " + target,))


def places(items):
    return {item.place for item in items}


ITEMS = [choice(number) for number in range(1000)]
TEST = [choice(number) for number in range(2000, 2300)]


def test_default_calibration_has_the_resolution_and_says_so():
    done = split(ITEMS, TEST)
    assert len(done.calibration) == 200
    assert done.notes == ("calibration: 200 of 1,000 training rows, one question = 0.50 points",)
    assert len(split(ITEMS, TEST, resolution=1.0).calibration) == 100
    assert len(split(ITEMS, TEST, resolution=0.1).calibration) == 200, "never more than a fifth of train"
    assert len(split(ITEMS, TEST, calibration_size=300).calibration) == 300


def test_parts_are_disjoint_complete_and_in_order():
    done = split(ITEMS, TEST)
    assert places(done.train) | places(done.calibration) == places(ITEMS)
    assert not places(done.train) & places(done.calibration)
    assert done.test == tuple(TEST)
    assert [*done.train] == sorted(done.train, key=ITEMS.index)


def test_same_seed_same_split_other_seed_another():
    assert split(ITEMS, TEST) == split(ITEMS, TEST)
    assert split(ITEMS, TEST).calibration != split(ITEMS, TEST, seed=1).calibration
    assert split(ITEMS, []).test != split(ITEMS, [], seed=1).test


def test_missing_test_set_is_held_out_and_noted():
    done = split(ITEMS, [])
    assert (len(done.train), len(done.calibration), len(done.test)) == (640, 160, 200)
    assert done.notes[0] == "no test split: 200 of 1,000 rows held out for the report (seed 0)"
    assert not places(done.test) & (places(done.train) | places(done.calibration))


def test_a_test_set_that_is_held_out_is_a_fifth_and_a_thousand_rows_at_most():
    done = split([choice(number) for number in range(6000)], [])
    assert (len(done.train) + len(done.calibration), len(done.test)) == (5000, 1000)


def test_groups_stay_on_one_side():
    items = [choice(number, group=f"entity {number // 7}") for number in range(700)]
    done = split(items, [])
    groups = [{item.group for item in part} for part in (done.train, done.calibration, done.test)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 100
    assert 112 <= len(done.calibration) < 119
    (note,) = split(items, TEST, calibration_size=8).notes
    assert note == "calibration: 14 of 700 training rows (whole groups; 8 asked for), one question = 7.14 points"


def test_training_rows_of_a_reported_group_are_left_out():
    items = [*ITEMS, choice(1500, group="g")]
    done = split(items, [choice(3000, group="g")])
    assert done.left_out == ("f:1500",)
    assert (
        done.notes[0]
        == "left out 1 of 1,001 training rows that share text or group with the reported set (first: f:1500)"
    )


def test_training_rows_whose_text_is_reported_or_calibrates_are_left_out_and_named():
    leak = choice(1500, "  question\u00a02000 ")
    done = split([*ITEMS, leak], TEST)
    assert done.left_out == ("f:1500",)
    assert "f:1500" not in places(done.train) | places(done.calibration)
    doubled = [*ITEMS, *(choice(number + 5000, f"QUESTION {number}") for number in range(1000))]
    done = split(doubled, TEST)
    assert 150 < len(done.left_out) <= 200
    texts = [{normalize(item.prompt) for item in part} for part in (done.train, done.calibration, done.test)]
    assert sum(map(len, texts)) == len(set.union(*texts))


def test_a_prompt_that_is_an_instruction_does_not_make_rows_equal():
    items = [generation(number, "Write a headline.", f"headline {number}") for number in range(100)]
    done = split(items, [generation(200, "Write a headline.", "Headline 7")])
    assert done.left_out == ("f:7",)


def test_documents_are_compared_by_their_text():
    items = [Item(f"f:{number}", "", (f"Document {number}.",)) for number in range(50)]
    done = split(items, [Item("g:1", "", ("document 3",))])
    assert done.left_out == ("f:3",)
    assert done.notes[1] == "calibration: 9 of 49 training rows"


def test_limits_are_seeded_subsamples_and_noted():
    done = split(ITEMS, TEST, max_train=50, max_test=20)
    assert (len(done.train), len(done.calibration), len(done.test)) == (50, 200, 20)
    assert done == split(ITEMS, TEST, max_train=50, max_test=20)
    assert done.notes[1:] == ("50 of 800 training rows used (seed 0)", "20 of 300 reported rows used (seed 0)")
    assert split(ITEMS, TEST, max_train=800, max_test=300) == split(ITEMS, TEST), "a limit that leaves all of them"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"calibration_size": 1000},
            "calibration_size 1000 needs more than the 1000 training rows (from f:0 on): give more or ask less",
        ),
        ({"calibration_size": 0}, "calibration_size is 0: give at least 1"),
        ({"max_test": -1}, "max_test is -1: give at least 1"),
        ({"resolution": 0}, "resolution is 0: give percentage points above 0, 50 at most"),
    ],
)
def test_impossible_sizes(settings, message):
    with pytest.raises(InputError) as error:
        split(ITEMS, TEST, **settings)
    assert str(error.value) == message


def test_too_few_rows():
    with pytest.raises(
        InputError, match=r"4 training rows \(from f:0 on\) are too few to hold out .*: give at least 5"
    ):
        split(ITEMS[:4], TEST)
    with pytest.raises(InputError, match=r"2 rows \(from f:0 on\) are too few to hold out a test and a"):
        split(ITEMS[:2], [])
    with pytest.raises(InputError, match="all 10 training rows would go into the calibration set"):
        split([choice(number, group="one") for number in range(10)], TEST)
    with pytest.raises(InputError, match="all 10 rows would be held out for the report, because they are of one group"):
        split([choice(number, group="one") for number in range(10)], [])
    with pytest.raises(InputError, match="there are no training rows"):
        split([], TEST)
    with pytest.raises(InputError, match=r"1 different training rows \(from f:0 on\) are too few"):
        split([choice(number, "same") for number in range(10)], TEST)
    with pytest.raises(InputError, match="every training row also stands in the calibration set"):
        split([other(number, "same") for number in range(10)], TEST)


def other(number, text):
    """A row with choices that no other has."""
    return Item(f"f:{number}", text, (f" a{number}", f" b{number}"))


def test_no_question_is_drawn_twice_and_its_copies_are_not_trained_on():
    items = [choice(number, f"Question {number % 250}?") for number in range(1000)]
    done = split(items, [])
    for part, size in ((done.test, 50), (done.calibration, 40)):
        assert len({item.prompt for item in part}) == len(part) == size
    assert len({item.prompt for item in done.train}) == 160
    assert len(done.train) == 640
    assert done.notes[0] == "no test split: 50 of 1,000 rows held out for the report (seed 0)"
    grouped = [choice(number, f"Question {number % 250}?", group=f"g {number % 50}") for number in range(1000)]
    test = split(grouped, []).test
    assert len({item.prompt for item in test}) == len(test) == 50


def test_rows_of_one_prompt_and_other_choices_or_answers_are_different_questions():
    items = [other(number, f"Which is right, {number % 250}?") for number in range(1000)]
    assert len(split(items, []).test) == 200
    items = [generation(number, f"Write {number % 250}.", f"text {number}") for number in range(1000)]
    assert len(split(items, []).test) == 200


def test_a_draw_without_copies_is_what_it_always_was():
    """Resumed runs compare their rows with those they began with."""
    done = split(ITEMS, [])
    assert [item.place for item in done.test[:4]] == ["f:0", "f:2", "f:10", "f:13"]
    assert [item.place for item in done.calibration[:4]] == ["f:26", "f:29", "f:31", "f:35"]


def test_reported_rows_that_stand_there_twice_are_counted():
    twice = [*TEST, *TEST[:20], TEST[0]]
    said = "41 of 321 reported rows stand there more than once (first: f:2000): the standard error counts each of them"
    for only in (False, True):
        done = split(ITEMS, twice, reported_only=only)
        assert done.test == tuple(twice)
        assert said in done.notes
    assert not [note for note in split(ITEMS, twice, max_test=1).notes if "more than once" in note]


def test_questions_that_differ_in_signs_alone_are_different_ones():
    signs = [f"{n} {sign} 3 is" for n in range(40) for sign in "+-*/"]
    items = [Item(f"f:{i}", prompt, (" a", " b"), answer=i % 2) for i, prompt in enumerate(signs)]
    assert distinct(items) == len(items)
    found = split(items, [], calibration_size=20)
    assert (len(found.test), len(found.calibration)) == (32, 20)
    assert not any("stand there" in note or "otherwise" in note for note in found.notes)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("When will my top-up process?", "when  will my top up process", True),
        ("Is it red - or ' blue ' ?", "is it red - or blue?", True),
        ("A dose of a drug is:-", "a dose of a drug is", True),
        ("« Quoi ? »", "Quoi?", True),
        ("What is 5 + 3", "What is 5 - 3", False),
        ("What is -3 + 1", "What is 3 + 1", False),
        ("5! is", "5 is", False),
        ("a[i] in C++", "a(i) in C++", False),
        ("a pointer in C++", "a pointer in C#", False),
        ("की", "का", False),
        ("?!", "!?", False),
    ],
)
def test_punctuation_makes_no_text_another_one_and_signs_do(one, other, same):
    items, held_out = ([Item("f:1", text, (" a", " b"), answer=0)] for text in (one, other))
    assert bool(without_overlap(items, held_out)[1]) == same


def test_equal_questions_with_other_answers_are_counted():
    items = [*ITEMS, Item("g:7", "question  7?", (" b", " a"), answer=1)]
    said = "2 of 1,301 rows ask what another row asks and answer it otherwise (first: f:7)"
    assert said in split(items, TEST).notes
    assert not [
        note for note in split([*ITEMS, Item("g:7", "question 7", (" b", " a"), answer=0)], TEST).notes if "ask" in note
    ]


def test_an_answer_that_is_most_of_the_reported_rows_is_said():
    def rows(first, share, count=100):
        return [Item(f"f:{first + n}", f"Question {first + n}?", (" a", " b"), int(n >= share)) for n in range(count)]

    said = "'a' is 90 % of the reported rows: always saying it scores 90.0"
    assert said in split(rows(0, 50), rows(2000, 90)).notes
    assert said in split([], rows(2000, 90), reported_only=True).notes
    assert not [note for note in split(rows(0, 500, 1000), rows(2000, 60)).notes if "always" in note]
    (note,) = (note for note in split(rows(0, 95), rows(2000, 50)).notes if "always" in note)
    assert note.startswith("'a' is ")
    assert "% of the calibration rows: always saying it scores" in note
    own = [Item(f"f:{n}", f"Question {n}?", (f" a{n}", f" b{n}")) for n in range(100)]
    assert not [note for note in split(own, []).notes if "always" in note]
    words = [generation(n, f"Question {n}?", "the same") for n in range(100)]
    assert not [note for note in split(words, []).notes if "always" in note]
