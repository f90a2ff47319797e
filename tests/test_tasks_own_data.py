"""Own data without a YAML file: every recognized shape and format, YAML tasks, dialogues and domain text."""

import csv
import gzip
import json
import lzma
from pathlib import Path

import pytest
from conftest import make_tokenizer

from trimllm.errors import InputError
from trimllm.tasks import load_task, load_text
from trimllm.tasks.sources import part_of
from trimllm.tasks.text import pieces

QUESTIONS = [
    {"question": f"How much is {n} plus one?", "choices": [str(n), "x", f"{n + 1}."], "answer": 2} for n in range(20)
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def first(path, **settings):
    """The item of the first row, wherever the split put it."""
    task = load_task(path, **settings)
    items = {item.place: item for item in (*task.train, *task.calibration, *task.test)}
    return task, next(item for place, item in items.items() if place.rsplit(":", 1)[1] in ("1", "row 1", "2"))


def test_multiple_choice(tmp_path):
    task, item = first(jsonl(tmp_path / "q.jsonl", QUESTIONS[:1] + QUESTIONS[5:]))
    assert (task.name, task.kind, task.metric) == ("q", "choice", "acc")
    assert item.prompt == "Question: How much is 0 plus one?\nAnswer:"
    assert (item.continuations, item.target) == ((" 0", " x", " 1."), " 1.")


@pytest.mark.parametrize("answer", [1, 1.0, "1", "B", "b", "green", " green "])
def test_answer_by_index_letter_or_text(tmp_path, answer):
    rows = [{"question": f"q {n}", "choices": ["red", "green"], "answer": answer} for n in range(9)]
    assert load_task(jsonl(tmp_path / "q.jsonl", rows)).train[0].target == " green"


LETTERED = [{"question": f"q {n}", "A": "red", "B": "green", "C": "blue"} for n in range(9)]


@pytest.mark.parametrize("answer", ["B", "b", "B.", "B)", "(b)", "option B", "green", 1, "1"])
def test_choices_in_lettered_columns(tmp_path, answer):
    for column in ("answer", "label"):
        rows = jsonl(tmp_path / "q.jsonl", [{**row, column: answer, "Z": "no choice"} for row in LETTERED])
        task = load_task(rows)
        assert (task.kind, task.train[0].prompt[:12]) == ("choice", "Question: q ")
        assert {item.continuations for item in task.train} == {(" red", " green", " blue")}
        assert {item.target for item in task.train} == {" green"}


def notes(path, **settings):
    return " | ".join(load_task(path, **settings).notes)


def test_answers_that_may_count_from_one_are_pointed_out(tmp_path):
    rows = [{"question": f"q {n}", "choices": ["a", "b", "c", "d"], "answer": 1 + n % 3} for n in range(24)]
    doubt = "no 'answer' is 0, the first choice: answers count from 0; if these count from 1, every one is read wrong"
    assert doubt in notes(jsonl(tmp_path / "one.jsonl", rows))
    assert doubt not in notes(jsonl(tmp_path / "zero.jsonl", [*rows, {**rows[0], "question": "q", "answer": 0}]))
    assert doubt not in notes(jsonl(tmp_path / "letters.jsonl", [{**row, "answer": "B"} for row in rows]))


def test_columns_that_may_be_choices_are_pointed_out_where_few_answers_name_one(tmp_path):
    rows = [{**row, "answer": "B" if n % 3 == 0 else f"the {n}th one"} for n, row in enumerate(LETTERED)]
    told = notes(jsonl(tmp_path / "q.jsonl", rows))
    assert "columns not read: A, B, C (if they are choices: most answers name none of them, by letter, text or" in told
    unread = [{"question": f"q {n}", "answer": f"a {n}", "id": n} for n in range(9)]
    assert "columns not read: id |" in notes(jsonl(tmp_path / "r.jsonl", unread)) + " |"


def test_written_answers_that_are_the_same_few_are_pointed_out(tmp_path):
    rows = [{"question": f"Is {n} even?", "answer": ("yes", "no")[n % 2]} for n in range(24)]
    told = notes(jsonl(tmp_path / "q.jsonl", rows))
    assert "answers are to be written, though all are among 2 (no, yes): to have these as choices, rename" in told
    assert "to be written" not in notes(
        jsonl(tmp_path / "r.jsonl", [{**row, "answer": row["question"]} for row in rows])
    )


def test_labels_that_may_mean_none_or_the_same_are_pointed_out(tmp_path):
    lines = [f"text {n},{('NaN', 'acute', 'Acute')[n % 3]}" for n in range(24)]
    (tmp_path / "d.csv").write_text("\n".join(["text,label", *lines]))
    told = notes(tmp_path / "d.csv")
    assert "'NaN' is a label like any other: drop its rows if it means none" in told
    assert "labels that differ in case alone: 'Acute', 'acute'" in told


def test_a_single_file_is_split_though_its_name_says_test_and_that_is_said(tmp_path):
    path = jsonl(tmp_path / "test.jsonl", QUESTIONS)
    asked = load_task(path, reported_only=True)
    assert (len(asked.test), asked.drawn) == (4, True)
    assert "test.jsonl alone is split, whatever its name: to have all of it reported, give its folder" in asked.notes
    folder = load_task(tmp_path, reported_only=True)
    assert (len(folder.test), folder.drawn) == (20, False)


def test_training_rows_may_come_from_elsewhere_with_and_without_named_splits(tmp_path):
    for name, rows in (("own", QUESTIONS[:6]), ("others", QUESTIONS[6:20])):
        jsonl(tmp_path / f"{name}.jsonl", rows)
    elsewhere = "train_source: {files: {train: others.jsonl}}\n"
    spec = "kind: choice\nprompt: '{{ question }}'\nchoices: choices\nanswer: answer\nanswer_as: index\n" + elsewhere
    for files, splits in (
        ("{test: own.jsonl}", ""),
        ("{train: own.jsonl, test: own.jsonl}", ""),
        ("{test: own.jsonl}", "splits: {test: test}\n"),
    ):
        (tmp_path / "t.yaml").write_text(f"{spec}source: {{files: {files}}}\n{splits}")
        task = load_task(tmp_path / "t.yaml")
        assert len(task.test) == 6
        assert {Path(item.place.rsplit(":", 1)[0]).name for item in (*task.train, *task.calibration)} == {
            "others.jsonl"
        }


def test_a_path_that_has_the_name_of_a_built_in_task_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_law").mkdir()
    jsonl(tmp_path / "demo_law" / "train.jsonl", QUESTIONS)
    assert (
        load_task("demo_law").notes[0] == "demo_law is the built-in task: what has this name here would be ./demo_law"
    )
    assert len(load_task("./demo_law").test) < 10


def test_few_rows_are_enough_where_nothing_is_decided(tmp_path):
    three = load_task(jsonl(tmp_path / "three.jsonl", QUESTIONS[:3]), reported_only=True)
    assert (len(three.test), three.calibration, three.drawn) == (1, (), True)
    grouped = [{**row, "context": "one" if n < 6 else "other"} for n, row in enumerate(QUESTIONS[:12])]
    jsonl(tmp_path / "groups.jsonl", grouped)
    source = "kind: choice\nsource: {files: {train: groups.jsonl}}\n"
    spec = "prompt: '{{ question }}'\nchoices: choices\nanswer: answer\nanswer_as: index\ngroup: '{{ context }}'\n"
    (tmp_path / "groups.yaml").write_text(source + spec)
    with pytest.raises(InputError, match="would go into the calibration set"):
        load_task(tmp_path / "groups.yaml")
    asked = load_task(tmp_path / "groups.yaml", reported_only=True)
    assert (len(asked.test), asked.drawn) == (6, True)


def test_columns_that_only_seem_to_be_dialogues_or_choices_are_read_as_before(tmp_path):
    rows = [{"question": f"q {n}", "answer": f"a {n}", "conversations": n} for n in range(9)]
    assert load_task(jsonl(tmp_path / "counts.jsonl", rows)).train[0].prompt.startswith("Question: q ")
    rows = [{"question": f"{n} less 1?", "A": n, "B": 1, "answer": n - 1} for n in range(9)]
    assert load_task(jsonl(tmp_path / "sums.jsonl", rows)).kind == "generation"
    rows = [{"question": f"q {n}", "a": 1, "b": 2, "answer": (n if n % 4 else "seven")} for n in range(12)]
    assert load_task(jsonl(tmp_path / "numbers.jsonl", rows)).kind == "generation"
    rows = [{"question": f"q {n}", "choices": ["C.", "B.", "A."], "answer": "A."} for n in range(9)]
    assert load_task(jsonl(tmp_path / "texts.jsonl", rows)).train[0].target == " A."
    turns = [{"role": "user", "content": "2?", "from": "x", "value": "y"}, {"role": "assistant", "content": "3"}]
    rows = [{"messages": [{**turns[0], "content": f"{n}?"}, turns[1]]} for n in range(9)]
    assert load_task(jsonl(tmp_path / "chat.jsonl", rows)).train[0].prompt.startswith("User: ")


def test_dialogues_as_sharegpt_has_them(tmp_path):
    def dialogue(n):
        turns = [("system", "Be brief."), ("human", f"{n} + 2?"), ("gpt", str(n + 2))]
        return {"conversations": [{"from": role, "value": text} for role, text in turns]}

    _, item = first(jsonl(tmp_path / "chat.jsonl", [dialogue(n) for n in range(9)]))
    assert item.prompt == "System: Be brief.\nUser: 0 + 2?\nAssistant:"
    assert item.target == " 2"
    with (tmp_path / "chat.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["conversations"], *([json.dumps(dialogue(n)["conversations"])] for n in range(9))])
    assert load_task(tmp_path / "chat.csv").train[0].target.strip().isdigit()


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("sep=;\nquestion;answer_text", "q, {n};a"),
        ("question|answer_text", "q, {n}|a"),
        ("question;answer_text;note, free", "q {n};a;x\n;;"),
        ("question;answer_text;note, free", 'q, "{n}";a;x\nq {n}, and ten;a;"x\ny"'),
        ("question\tanswer_text", "q, {n}\ta"),
        ("question,answer_text", '"q, {n}",a\n,'),
        ('question,answer_text,"remark (x; y; z)"', "q {n},a,x;y;z"),
        ("id,question,answer_text,alt;b;c;d", "{n},q {n},a,x;b;c;d"),
        ("question\tanswer_text", "q {n}\ta"),
    ],
)
def test_csv_by_what_parts_its_header_and_the_line_after_it(tmp_path, head, row):
    (tmp_path / "q.csv").write_text("\n".join([head, *(row.format(n=n) for n in range(9))]))
    task = load_task(tmp_path / "q.csv")
    records = 18 if "and ten" in row else 9
    assert len(task.train) + len(task.calibration) + len(task.test) == records, "empty rows are none"
    assert task.train[0].prompt.startswith("Question: q")
    assert task.train[0].target == " a"


def test_what_is_about_the_data_is_no_data(tmp_path):
    jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    (tmp_path / "README.txt").write_text("What this is.")
    (tmp_path / "dataset_infos.json").write_text("{}")
    told = notes(tmp_path)
    assert "not used: README.txt (about the data)" in told
    assert "not used: dataset_infos.json (about the data)" in told
    (tmp_path / "laws").mkdir()
    jsonl(tmp_path / "laws" / "license-train.jsonl", QUESTIONS)
    assert len(load_task(tmp_path / "laws").train) > 5
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notice.txt").write_text("it was a long day. " * 400)
    (tmp_path / "texts" / "README.txt").write_text("Read me. " * 900)
    assert not any("Read me." in piece for piece in load_text(tmp_path / "texts"))


@pytest.mark.parametrize("names", ["a b c", "option_a option_b option_c", "opa opb opc", "choiceA choiceB choiceC"])
@pytest.mark.parametrize("answer", ["B", "b", "green"])
def test_columns_of_choices_by_other_names(tmp_path, names, answer):
    cells = dict(zip(names.split(), ("red", "green", "blue"), strict=True))
    rows = [{"question": f"q {n}", **cells, "topic": "colour", "answer": answer} for n in range(9)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    assert {(item.continuations, item.target) for item in task.train} == {((" red", " green", " blue"), " green")}


def test_a_and_b_beside_a_number_are_no_choices(tmp_path):
    rows = [{"question": f"Is {n} more than 4?", "a": n, "b": 4, "answer": int(n > 4)} for n in range(9)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    assert (task.kind, {item.target for item in task.train}) == ("generation", {" 0", " 1"})


@pytest.mark.parametrize("row", [{"answer": "7"}, {"answer": "Blue"}, {"answer": "Y", "note": ""}])
def test_further_columns_are_no_choices_where_answers_are_words_or_larger_numbers(tmp_path, row):
    rows = [{"question": f"q {n}", "topic": "colour", "note": "easy", **row} for n in range(9)]
    assert load_task(jsonl(tmp_path / "q.jsonl", rows)).train[0].target == f" {row['answer']}"


def test_lettered_choices_may_end_sooner(tmp_path):
    table = "question,A,B,C,answer\n" + "".join(f"q {n},red,green,{'blue' * (n % 2)},B\n" for n in range(12))
    (tmp_path / "q.csv").write_text(table)
    task = load_task(tmp_path / "q.csv")
    items = (*task.train, *task.calibration, *task.test)
    assert {item.continuations for item in items} == {(" red", " green", " blue"), (" red", " green")}
    (tmp_path / "q.csv").write_text(table + "q,red,,blue,C\n")
    with pytest.raises(InputError, match=r"q.csv:14: cannot make the choices: field 'B' is empty; fill it in or drop"):
        load_task(tmp_path / "q.csv")
    (tmp_path / "q.csv").write_text(table + "q,,,,C\n")
    with pytest.raises(InputError, match=r"q.csv:14: cannot make the choices: field 'A' is empty"):
        load_task(tmp_path / "q.csv")


@pytest.mark.parametrize("labels", [["A", "B", "C"], ["1", "2", "3"], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("names", ["question answerKey", "question_stem answerKey", "question answer"])
def test_choices_with_a_label_each(tmp_path, labels, names):
    question, answer = names.split()
    choices = {"text": ["red", "green", "blue"], "label": labels}
    rows = [{"id": n, question: f"q {n}", "choices": choices, answer: labels[1]} for n in range(12)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    assert {(item.continuations, item.target) for item in task.train} == {((" red", " green", " blue"), " green")}
    assert task.train[0].prompt.startswith("Question: q ")
    for wrong, message in (("E", "is 'E', which is none of the labels"), ("", "is empty")):
        with pytest.raises(InputError, match=rf"q.jsonl:13: .*field '{answer}' {message}"):
            load_task(jsonl(tmp_path / "q.jsonl", [*rows, rows[0] | {answer: wrong}]))


@pytest.mark.parametrize("more", [{"label": "hard"}, {"label": "2", "answerKey": None}], ids=str)
def test_the_key_is_the_column_that_is_most_surely_one(tmp_path, more):
    choices = {"text": ["red", "green", "blue"], "label": ["1", "2", "3"]}
    rows = [{"question": f"q {n}", "choices": choices, "answer": "3", **more} for n in range(12)]
    assert {item.target for item in load_task(jsonl(tmp_path / "q.jsonl", rows)).train} == {" blue"}


def test_a_test_file_with_keys_is_reported_and_one_without_is_not(tmp_path):
    rows = [
        {"question": f"q {n}", "choices": {"text": ["red", "green"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
        for n in range(24)
    ]
    jsonl(tmp_path / "train.jsonl", rows[:20])
    jsonl(tmp_path / "test.jsonl", rows[20:])
    own = {f"Question: q {n}\nAnswer:" for n in range(20, 24)}
    assert {item.prompt for item in load_task(tmp_path).test} == own
    for more in ({}, {"label": "hard"}):  # which is no key, since the training rows have another column for it
        jsonl(tmp_path / "test.jsonl", [row | {"answerKey": "", **more} for row in rows[20:]])
        assert not {item.prompt for item in load_task(tmp_path).test} & own
    jsonl(tmp_path / "test.jsonl", [{**row, "label": row["answerKey"], "answerKey": None} for row in rows[20:]])
    assert not {item.prompt for item in load_task(tmp_path).test} & own
    for row in rows[20:]:
        row["label"] = row.pop("answerKey")
    jsonl(tmp_path / "test.jsonl", rows[20:])
    with pytest.raises(InputError, match=r"test.jsonl:1: .*'answerKey' is undefined; columns found: .*label"):
        load_task(tmp_path)


MEDQA = [
    {
        "question": f"q {n}",
        "options": {"B": "green", "A": "red", "C": "blue"},
        "answer": ["green", "blue"][n % 2],
        "answer_idx": "BC"[n % 2],
    }
    for n in range(9)
]


@pytest.mark.parametrize("answer", ["text", "letter"])
def test_choices_as_texts_by_letter(tmp_path, answer):
    rows = [{**row, "answer": row["answer_idx"]} if answer == "letter" else row for row in MEDQA]
    rows[0] = {**rows[0], "options": {**rows[0]["options"], "D": None}}  # as Parquet fills up
    rows[1] = {**rows[1], "options": json.dumps(rows[1]["options"])}  # as a CSV cell holds it
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    items = (*task.train, *task.calibration, *task.test)
    assert {item.continuations for item in items} == {(" red", " green", " blue")}
    assert {int(item.prompt.split()[2]): item.target for item in items} == {
        n: [" green", " blue"][n % 2] for n in range(9)
    }
    assert not [note for note in task.notes if "answer_idx" in note]


def test_an_answer_that_its_letter_contradicts_counts_and_is_noted(tmp_path):
    twice = {**MEDQA[7], "options": {"A": "blue", "B": "red", "C": "blue"}}
    rows = [*MEDQA[:7], twice, {**MEDQA[8], "answer_idx": "A"}]
    path = jsonl(tmp_path / "q.jsonl", rows)
    task = load_task(path)
    items = (*task.train, *task.calibration, *task.test)
    assert next(item.target for item in items if "q 8" in item.prompt) == " green"
    assert f"in 1 of 9 rows 'answer_idx' is another choice than 'answer', which counts (first: {path}:9)" in task.notes


def test_answers_are_read_one_way_in_all_rows(tmp_path):
    rows = [{"question": f"q {n}", "choices": ["A", "AB", "B"][n % 2 :], "answer": "AB"[n % 2]} for n in range(9)]
    letters = load_task(jsonl(tmp_path / "letters.jsonl", [{**row, "choices": ["O", "A", "x"]} for row in rows]))
    assert {item.target for item in letters.train} == {" O", " A"}
    texts = load_task(jsonl(tmp_path / "texts.jsonl", [*rows, {**rows[0], "answer": "AB"}]))
    assert {item.target for item in texts.train} >= {" A", " B"}


def test_truth_values_are_texts_and_no_indices(tmp_path):
    rows = [{"question": f"q {n}", "choices": [True, False], "answer": n % 3 > 0} for n in range(9)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    parts = (task.train, task.calibration, task.test)
    assert {int(item.prompt.split()[2]): item.target for part in parts for item in part} == {
        n: f" {n % 3 > 0}" for n in range(9)
    }


def test_whole_numbers_kept_as_floats_are_read_one_way_in_all_rows(tmp_path):
    rows = [{"question": f"q {n}", "choices": ["1", "0", "x"], "answer": float(n % 3)} for n in range(9)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    assert {item.target for part in (task.train, task.calibration, task.test) for item in part} == {" 1", " 0", " x"}


def test_choices_of_numbers_are_named_by_their_value(tmp_path):
    choices = [0.5, 1.0, 1.5, 2.0]
    rows = [{"question": f"q {n}", "choices": choices, "answer": choices[n % 4]} for n in range(12)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    parts = (task.train, task.calibration, task.test)
    assert {int(item.prompt.split()[2]): item.target for part in parts for item in part} == {
        n: f" {choices[n % 4]}" for n in range(12)
    }


@pytest.mark.parametrize("kind", [float, int, str])
def test_a_number_that_is_one_choice_by_value_and_another_by_index_is_refused(tmp_path, kind):
    rows = [{"question": f"q {n}", "choices": [1.0, 2.0, 3.0, 4.0], "answer": kind(1 + n % 2)} for n in range(9)]
    with pytest.raises(InputError, match=r"names choice \d by text and choice \d by index; say which with answer_as"):
        load_task(jsonl(tmp_path / "q.jsonl", rows))


def test_context_stands_before_the_question_and_keeps_its_questions_together(tmp_path):
    rows = [{**row, "context": f"Text {n // 4}."} for n, row in enumerate(QUESTIONS)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    assert task.train[0].prompt.startswith("Text ")
    assert ".\nQuestion: How much" in task.train[0].prompt
    groups = [{item.group for item in part} for part in (task.train, task.calibration, task.test)]
    assert [len(group) for group in groups] == [3, 1, 1]
    assert len(set.union(*groups)) == 5


@pytest.mark.parametrize("contexts", [["Answer in one word."], ["Answer.", "Be brief.", "Think."]])
def test_context_that_is_an_instruction_does_not_group(tmp_path, contexts):
    rows = [{**QUESTIONS[0], "question": f"q {n}", "context": contexts[n % len(contexts)]} for n in range(60)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    assert [len(part) for part in (task.train, task.calibration, task.test)] == [39, 9, 12]
    assert {item.group for item in task.train} == {None}
    said = f"column 'context' has {len(contexts)} different values in 60 rows, one of them in {60 // len(contexts)}: "
    assert task.notes[0].startswith(said + "taken as an instruction")


def test_contexts_that_begin_alike_are_different_groups(tmp_path):
    rows = [{**row, "context": f"{'Read this. ' * 30}Text {n // 4}."} for n, row in enumerate(QUESTIONS)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    assert len({item.group for part in (task.train, task.calibration, task.test) for item in part}) == 5


def test_classification_turns_labels_into_readable_choices(tmp_path):
    rows = [{"text": f"text {n}", "label": ["card_lost", "age limit"][n % 2]} for n in range(20)]
    jsonl(tmp_path / "train.jsonl", rows[:15])
    jsonl(tmp_path / "test.jsonl", rows[15:])
    task = load_task(tmp_path)
    assert task.test[0].prompt == "text 15\nCategory:"
    assert task.test[0].continuations == (" age limit", " card lost")
    assert (task.test[0].target, task.test[1].target) == (" age limit", " card lost")
    assert task.train[0].continuations is task.train[1].continuations


def test_labels_stay_as_they_are_when_spaces_would_make_two_the_same(tmp_path):
    rows = [{"text": f"text {n}", "label": ["a_b", "a b"][n % 2]} for n in range(10)]
    assert load_task(jsonl(tmp_path / "c.jsonl", rows)).train[0].continuations == (" a b", " a_b")


@pytest.mark.parametrize("row", [{"answer": "Because."}, {"answer": "x y", "label": "B"}, {"answer_text": "red"}])
def test_columns_named_like_letters_are_no_choices_where_answers_are_not(tmp_path, row):
    task = load_task(jsonl(tmp_path / "q.jsonl", [{"label": "B", **each, **row} for each in LETTERED]))
    assert (task.kind, task.train[0].target) == ("generation", " " + next(iter(row.values())))


def test_labels_that_read_alike_are_one(tmp_path):
    labels = ["yes", "yes ", " yes", "no", 1, "1"]
    rows = [{"text": f"t {n}", "label": labels[n % 6]} for n in range(18)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    assert {item.continuations for item in task.train} == {(" 1", " no", " yes")}


@pytest.mark.parametrize("label", [None, "", " ", float("nan")])
@pytest.mark.parametrize("names", [("yes", "no"), ("a_b", "a b")])
def test_a_row_without_a_label_is_named(tmp_path, label, names):
    rows = [{"text": f"t {n}", "label": label if n == 3 else names[n % 2]} for n in range(9)]
    with pytest.raises(InputError, match=r"q.jsonl:4: .*field 'label' is empty"):
        load_task(jsonl(tmp_path / "q.jsonl", rows))


def test_number_labels_are_taken_by_text_and_sorted_as_numbers(tmp_path):
    rows = [{"text": f"text {n}", "label": [10, 2, 1][n % 3]} for n in range(12)]
    task = load_task(jsonl(tmp_path / "c.jsonl", rows))
    assert task.train[0].continuations == (" 1", " 2", " 10")
    wanted = {f"text {n}": f" {[10, 2, 1][n % 3]}" for n in range(12)}
    assert all(item.target == wanted[item.prompt.split("\n")[0]] for item in task.train)


@pytest.mark.parametrize(
    ("row", "prompt", "target"),
    [
        ({"prompt": "Translate: chat", "completion": "cat"}, "Translate: chat", " cat"),
        ({"prompt": "Translate: chat\n", "completion": "cat"}, "Translate: chat\n", "cat"),
        ({"prompt": "Translate: chat", "completion": "\ncat"}, "Translate: chat", "\ncat"),
        ({"question": "Why?", "answer_text": "Because."}, "Question: Why?\nAnswer:", " Because."),
        ({"input": "Why?", "answer": "Because."}, "Question: Why?\nAnswer:", " Because."),
        (
            {"context": "It rains.", "question": "Why?", "answer_text": "So."},
            "It rains.\nQuestion: Why?\nAnswer:",
            " So.",
        ),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Question: Add.\n1 2\nAnswer:", " 3"),
    ],
)
def test_generation(tmp_path, row, prompt, target):
    filler = dict.fromkeys(row, "other")
    rows = [row, *({**filler, next(iter(row)): f"number {n}"} for n in range(8))]
    task, item = first(jsonl(tmp_path / "g.jsonl", rows), calibration_size=1)
    assert (task.kind, task.metric) == ("generation", "likelihood")
    assert (item.prompt, item.continuations) == (prompt, (target,))
    assert item.references == (target.strip(),)


def test_a_column_without_a_name_is_left_out(tmp_path):
    """`DataFrame.to_csv` writes its index so."""
    path = tmp_path / "q.csv"
    path.write_text(",prompt,completion\n" + "".join(f"{n},say {n},it is {n}\n" for n in range(9)), encoding="utf-8")
    _, item = first(path)
    assert (item.prompt, item.target) == ("say 0", " it is 0")


CITY = ["Paris", "City of Light"]


@pytest.mark.parametrize(
    "answer",
    [
        {"answer": CITY},
        {"answers": CITY},
        {"answers": json.dumps(CITY)},
        {"answers": {"text": CITY, "answer_start": [4, 17]}},
        {"answers": [{"text": text, "answer_start": 4} for text in CITY]},
    ],
    ids=str,
)
def test_a_list_of_answers_is_learned_by_the_first_and_accepts_all(tmp_path, answer):
    rows = [{"question": f"q {n}", **answer} for n in range(9)]
    item = load_task(jsonl(tmp_path / "g.jsonl", rows)).train[0]
    assert (item.target, item.references) == (" Paris", ("Paris", "City of Light"))


@pytest.mark.parametrize("answer", ["Paris", {"text": "Paris", "answer_start": 4}, ["Paris"]], ids=str)
@pytest.mark.parametrize("column", ["answer", "answers"])
def test_a_single_answer_is_itself(tmp_path, column, answer):
    item = load_task(jsonl(tmp_path / "g.jsonl", [{"question": f"q {n}", column: answer} for n in range(9)])).train[0]
    assert (item.target, item.references) == (" Paris", ("Paris",))


def test_an_answer_in_brackets_stays_what_it_is(tmp_path):
    rows = [{"question": f"q {n}", "answer": "[1, 2]"} for n in range(9)]
    assert load_task(jsonl(tmp_path / "g.jsonl", rows)).train[0].target == " [1, 2]"


def test_a_question_that_its_passage_does_not_answer_is_named(tmp_path):
    """As SQuAD 2.0 writes them."""
    rows = [{"context": f"c {n}", "question": "q", "answers": {"text": ["yes"], "answer_start": [0]}} for n in range(9)]
    assert load_task(jsonl(tmp_path / "g.jsonl", rows)).train[0].prompt.endswith("\nQuestion: q\nAnswer:")
    rows.append(rows[0] | {"answers": {"text": [], "answer_start": []}})
    with pytest.raises(InputError, match=r"g.jsonl:10: .*field 'answers' is empty; fill it in or drop the row"):
        load_task(jsonl(tmp_path / "g.jsonl", rows))


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you. "},
]


def chat_file(tmp_path):
    rows = [{"messages": [*MESSAGES[:3], {"role": "user", "content": f"Bye {n}"}, MESSAGES[4]]} for n in range(9)]
    return jsonl(tmp_path / "chat.jsonl", [{"messages": MESSAGES}, *rows])


def test_chat_without_a_template_is_a_transcript(tmp_path):
    _, item = first(chat_file(tmp_path))
    assert item.prompt == "System: Be brief.\nUser: Hi\nAssistant: Hello.\nUser: Bye\nAssistant:"
    assert item.continuations == (" See you.",)


def test_chat_in_prompt_and_completion_is_the_same(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"Hi {n}"}], "completion": MESSAGES[2:3]} for n in range(9)]
    _, item = first(jsonl(tmp_path / "chat.jsonl", [{"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}, *rows]))
    assert item.prompt == "System: Be brief.\nUser: Hi\nAssistant: Hello.\nUser: Bye\nAssistant:"
    assert item.target == " See you."


def test_chat_uses_the_tokenizers_template_without_a_second_bos(tmp_path):
    class Tokenizer:
        chat_template = "set"
        bos_token, bos_token_id = "<s>", 1
        own = (1,)

        def __call__(self, text, **_):
            return {"input_ids": [*self.own, 5]}

        def apply_chat_template(self, messages, *, tokenize, add_generation_prompt, **_):
            assert not tokenize
            end = "[assistant]" if add_generation_prompt else ""
            return "<s>" + "".join(f"[{turn['role']}]{turn['content']}" for turn in messages) + end

    _, item = first(chat_file(tmp_path), tokenizer=Tokenizer())
    assert item.prompt == "[system]Be brief.[user]Hi[assistant]Hello.[user]Bye[assistant]"
    assert item.continuations == ("See you.",)
    Tokenizer.own = ()  # one that puts no BOS before a text: the template's own is all there is
    _, bare = first(chat_file(tmp_path), tokenizer=Tokenizer())
    assert bare.prompt == f"<s>{item.prompt}"


def chat_template(user: str, assistant: str, begins: str) -> str:
    """One that writes turns so, and has the assistant begin so."""
    turn = f"{{% if m.role == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}"
    return f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{begins}{{% endif %}}"


SAID, LAST = "{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"
EMPTY = "{% if '</think>' not in m.content %}<think></think>{% endif %}"
LLAMA_2 = chat_template(f"[INST] {SAID} [/INST]", f" {SAID} {{{{ eos_token }}}}", "")
CHATML = chat_template(f"<|user|>\n{SAID}<|end|>\n", f"<|assistant|>\n{SAID}<|end|>\n", "<|assistant|>\n")
MAY_THINK = chat_template(f"Q: {SAID} A:", f"{EMPTY}{SAID}", "")
THINKS = chat_template(f"Q: {SAID} A:", f"<think>\n\n</think>\n\n{LAST}", "<think>\n")
FORGETS = chat_template(f"Q: {SAID} A:", LAST, "<think>\n")
THOUGHT = "<think>\nSo.\n</think>\n\nIt is."


@pytest.mark.parametrize(
    ("template", "answer", "prompt", "target"),
    [
        (LLAMA_2, "It is. ", "[INST] q 0 [/INST]", " It is."),
        (LLAMA_2, THOUGHT, "[INST] q 0 [/INST]", f" {THOUGHT}"),
        (CHATML, "It is. ", "<|user|>\nq 0<|end|>\n<|assistant|>\n", "It is."),
        (MAY_THINK, "It is.", "Q: q 0 A:", "<think></think>It is."),
        (MAY_THINK, "think", "Q: q 0 A:", "<think></think>think"),
        (MAY_THINK, THOUGHT, "Q: q 0 A:", THOUGHT),
        (THINKS, "It is.", "Q: q 0 A:<think>\n", "\n</think>\n\nIt is."),
        (THINKS, THOUGHT, "Q: q 0 A:<think>\n", "So.\n</think>\n\nIt is."),
        (FORGETS, "It is.", "Q: q 0 A:<think>\n", "\n</think>\n\nIt is."),
        (FORGETS, THOUGHT, "Q: q 0 A:<think>\n", "So.\n</think>\n\nIt is."),
        (FORGETS, THOUGHT.removeprefix("<think>\n"), "Q: q 0 A:<think>\n", "So.\n</think>\n\nIt is."),
    ],
)
def test_an_answer_goes_on_from_its_prompt_as_the_template_has_it(tmp_path, template, answer, prompt, target):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    turns = [[{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": answer}] for n in range(9)]
    _, item = first(jsonl(tmp_path / "q.jsonl", [{"messages": each} for each in turns]), tokenizer=tokenizer)
    assert (item.prompt, item.target) == (prompt, target)


def test_a_template_may_write_tool_calls_as_it_likes(tmp_path):
    class Tokenizer:
        chat_template = "set"
        bos_token = None

        def apply_chat_template(self, messages, **_):
            return " ".join(str(turn.get("tool_calls", turn["content"])) for turn in messages)

    calls = [{"name": "look", "arguments": {"at": ["it"]}}]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    turns += [{"role": "tool", "content": "seen"}, {"role": "assistant", "content": "It is."}]
    rows = [{"messages": [{"role": "user", "content": f"q {n}"}, turns[3]]} for n in range(9)]
    _, item = first(jsonl(tmp_path / "chat.jsonl", [{"messages": turns}, *rows]), tokenizer=Tokenizer())
    assert item.prompt == f"Hi {calls} seen"


def test_a_template_that_prints_the_date_reads_the_same_every_day(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') ~ strftime_now(\"%Y\") ~ messages[0].content }}"
    turns = [[{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}] for n in range(9)]
    file = jsonl(tmp_path / "q.jsonl", [{"messages": each} for each in turns])
    task = load_task(file, tokenizer=tokenizer)
    assert {item.prompt[:-1] for item in (*task.train, *task.calibration, *task.test)} == {"26 Jul 20242024q "}


def test_text_rows_and_long_documents_are_cut_and_kept_together(tmp_path):
    long = "".join(f"Line {n} of the document.\n\n" for n in range(1000))
    rows = [{"text": f"Document {n}.\n{long if n % 2 else ''}"} for n in range(10)]
    task = load_task(jsonl(tmp_path / "t.jsonl", rows))
    assert (task.kind, task.metric) == ("text", "likelihood")
    parts = (task.train, task.calibration, task.test)
    assert max(len(item.target) for part in parts for item in part) <= 8_000
    places = [{item.place.split(" part")[0] for item in part} for part in parts]
    assert sum(map(len, places)) == len(set.union(*places)) == 10
    assert task.train[0].prompt == ""


def test_one_plain_text_file_is_split_itself(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"Paragraph {n}. {'word ' * 40}\n\n" for n in range(500)))
    task = load_task(tmp_path / "book.txt")
    assert min(len(part) for part in (task.train, task.calibration, task.test)) > 0
    assert task.train[0].place == f"{tmp_path / 'book.txt'}:1 part 1"


def test_a_short_plain_text_file_is_cut_finer(tmp_path):
    path = tmp_path / "note.txt"
    for size in (2_400, 6_000, 90_000):
        path.write_text("".join(f"Line {n} of it is no longer than this.\n" for n in range(10_000))[:size])
        task = load_task(path)
        parts = (task.train, task.calibration, task.test)
        assert min(map(len, parts)) > 0
        longest = max(200, size // 100)
        assert max(len(item.target) for part in parts for item in part) <= 2 * longest
        assert task.notes[0] == f"{path}:1: a short text, cut in pieces of about {longest:,} characters"


def test_pieces_put_together_are_the_text():
    for text in ("word " * 5000, "x" * 20_000, "a\n" * 9000, "short", "a paragraph\n \n" * 900):
        cut = pieces(text, 1000)
        assert "".join(cut) == text
        assert max(map(len, cut)) <= 2000


def test_formats_give_the_same_items(tmp_path):
    rows = [{**row, "choices": json.dumps(row["choices"])} for row in QUESTIONS]
    with (tmp_path / "q.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (tmp_path / "q.json").write_text(json.dumps({"data": QUESTIONS}))
    (tmp_path / "q.jsonl").write_text("\ufeff" + lines)
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write(lines)
    with lzma.open(tmp_path / "q.jsonl.xz", "wt") as file:
        file.write(lines)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(QUESTIONS), tmp_path / "q.parquet")
    names = ("q.jsonl", "q.csv", "q.json", "q.jsonl.gz", "q.jsonl.xz", "q.parquet")
    loaded = [load_task(tmp_path / name) for name in names]
    texts = [[(item.prompt, item.continuations, item.answer) for item in task.train] for task in loaded]
    assert all(each == texts[0] for each in texts)
    assert [task.train[0].place for task in loaded[:3]] == [
        f"{tmp_path}/q.jsonl:1",
        f"{tmp_path}/q.csv:2",
        f"{tmp_path}/q.json:row 1",
    ]


def test_a_csv_cell_may_hold_a_long_document(tmp_path):
    context = "word " * 40_000
    table = "context,prompt,completion\n" + "".join(f"{context},say {n},it is {n}\n" for n in range(9))
    (tmp_path / "q.csv").write_text(table)
    assert first(tmp_path / "q.csv")[1].target == " it is 0"


def test_zstandard(tmp_path):
    import zstandard

    lines = [(json.dumps(row) + "\n").encode() for row in QUESTIONS]
    for frames in ([b"".join(lines)], lines):
        (tmp_path / "q.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, frames)))
        assert len(load_task(tmp_path / "q.jsonl.zst").test) == 4


def test_folder_by_file_names(tmp_path):
    jsonl(tmp_path / "my_train.jsonl", QUESTIONS[:10])
    jsonl(tmp_path / "dev.jsonl", QUESTIONS[10:14])
    task = load_task(tmp_path)
    assert {item.place.split("/")[-1].split(":")[0] for item in task.test} == {"dev.jsonl"}
    assert "no test split with answers: the 4 validation rows are reported" in task.notes
    jsonl(tmp_path / "test-00000-of-00001.jsonl", QUESTIONS[14:])
    jsonl(tmp_path / "extra.jsonl", QUESTIONS)
    task = load_task(tmp_path)
    assert len(task.test) == 6
    assert task.notes[0] == "not used: extra.jsonl (no train, valid or test in its name)"
    assert task.notes[1] == "validation: 4 rows not used (calibration is held out of train)"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("name", ["data.{}", "my-data.v2_{}", "{}.v2", "a.b.{}-00000-of-00001"])
def test_a_split_anywhere_in_a_file_name_is_kept_apart(tmp_path, name, ending):
    write = gzip.open if ending.endswith(".gz") else open
    for part, rows in (("train", QUESTIONS[:10]), ("valid", QUESTIONS[10:14]), ("test", QUESTIONS[14:])):
        with write(tmp_path / (name.format(part) + ending), "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(tmp_path)
    assert len(task.train) + len(task.calibration) == 10
    assert {item.prompt for item in task.test} == {f"Question: {row['question']}\nAnswer:" for row in QUESTIONS[14:]}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("trainset", "testset"),
        ("TrainData", "TestData"),
        ("Train_2024", "TestSet"),
        ("my_traindata", "my_testdata"),
        ("trainSplit", "devRows"),
    ],
)
def test_a_split_in_a_compound_of_a_file_name_is_kept_apart(tmp_path, train, test):
    jsonl(tmp_path / f"{train}.jsonl", QUESTIONS[:12])
    jsonl(tmp_path / f"{test}.jsonl", QUESTIONS[12:])
    task = load_task(tmp_path)
    assert {item.place.split("/")[-1].split(":")[0] for item in task.test} == {f"{test}.jsonl"}
    assert len(task.test) == 8


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, None) for name in ("contest", "latest", "trainer_notes", "testament", "Attestation", "data_set")),
        *((name, None) for name in ("DevOps", "TestPrep", "ABTest", "TrainStation", "RetrieVal")),
        *((name, None) for name in ("device", "values", "restrain", "datasets", "TestamentData")),
        ("testset_of_train", "train"),  # a word alone counts before a compound
        ("validSet", "validation"),
        ("TESTSET", "test"),
    ],
)
def test_file_names_that_only_look_like_a_split(name, part):
    assert part_of(Path(f"{name}.csv")) == part


def test_files_that_are_pooled_are_named(tmp_path):
    for number in range(7):
        jsonl(tmp_path / f"part{number}.jsonl", QUESTIONS[2 * number : 2 * number + 2])
    said = (
        "pooled, as no name has train, valid or test in it: part0.jsonl, part1.jsonl, part2.jsonl, part3.jsonl, "
        "part4.jsonl and 2 more"
    )
    assert load_task(tmp_path).notes[0] == said
    (tmp_path / "own.yaml").write_text("kind: text\ntarget: question\n")
    assert load_task(tmp_path / "own.yaml", files=tmp_path).notes[0] == said
    for number in range(1, 7):
        (tmp_path / f"part{number}.jsonl").unlink()
    jsonl(tmp_path / "part0.jsonl", QUESTIONS)
    assert "pooled" not in str(load_task(tmp_path).notes)


def test_files_that_may_be_the_same_rows_twice_are_named(tmp_path):
    for name in ("train.jsonl", "train.k.jsonl", "train.ndjson", "notes.jsonl", "notes.csv"):
        jsonl(tmp_path / name, QUESTIONS)
    notes = load_task(tmp_path).notes
    same = "(if they are the same rows, move all but one away)"
    assert f"read as different rows: train.jsonl, train.ndjson {same}" in notes


def test_a_split_without_answers_is_said(tmp_path):
    rows = [{"text": f"t {n}", "label": "ab"[n % 2]} for n in range(30)]
    jsonl(tmp_path / "train.jsonl", rows[:20])
    jsonl(tmp_path / "test.jsonl", [{"text": row["text"]} for row in rows[20:]])
    task = load_task(tmp_path)
    assert task.notes[0] == "not used: the 10 test rows, of which none has an answer (first: " + (
        f"{tmp_path / 'test.jsonl'}:1)"
    )
    assert len(task.test) == 4


@pytest.mark.parametrize("column", ["category", "labels", "class", "target", "answer"])
def test_texts_with_labels_in_a_column_of_another_name_are_refused(tmp_path, column):
    rows = [{"text": f"t {n}", column: ["flu", "heart", "skin"][n % 3]} for n in range(12)]
    with pytest.raises(InputError) as error:
        load_task(jsonl(tmp_path / "q.jsonl", rows))
    assert str(error.value) == (
        f"q: column {column!r} looks like labels, and nothing reads it: rename it to 'label', or, to learn the texts, "
        "give a task YAML of kind text"
    )


@pytest.mark.parametrize(
    ("columns", "note", "kind"),
    [
        ("Text Label", "columns read: 'Text' as 'text', 'Label' as 'label'", "choice"),
        ("text LABEL", "columns read: 'LABEL' as 'label'", "choice"),
        ("Question A B C Answer", "columns read: 'Question' as 'question', 'Answer' as 'answer'", "choice"),
        ("QUESTION ANSWER", "columns read: 'QUESTION' as 'question', 'ANSWER' as 'answer'", "generation"),
        ("Text", "columns read: 'Text' as 'text'", "text"),
    ],
)
def test_columns_that_are_spelt_otherwise_are_read(tmp_path, columns, note, kind):
    names = columns.split()
    cells = {"label": "ab", "answer": "ABC" if "A" in names else [f"answer {n}" for n in range(40)]}
    texts = {name: cells.get(name.lower(), [f"{name} {n}, of words" * 9 for n in range(40)]) for name in names}
    for part in ("train", "test"):
        rows = [{name: several[n % len(several)] for name, several in texts.items()} for n in range(40)]
        jsonl(tmp_path / f"{part}.jsonl", rows[: 20 if part == "test" else 40])
    task = load_task(tmp_path)
    assert (task.kind, note in task.notes) == (kind, True)


def test_columns_whose_names_are_no_words_stand_in_row(tmp_path):
    rows = [
        {"the question": f"q {n}", "opt 1": f"a {n}", "opt 2": f"b {n}", "right": n % 2, "age": str(n)}
        for n in range(40)
    ]
    jsonl(tmp_path / "rows.jsonl", rows)
    spec = "kind: choice\nsource: {files: {train: rows.jsonl}}\nprompt: \"{{ row['the question'] }}\"\nanswer: right\n"
    read, words = "choices: \"{{ [row['opt 1'], row['opt 2']] }}\"\n", "choices: ['opt 1', 'opt 2']\n"
    (tmp_path / "t.yaml").write_text(f"{spec}{read}where: age | int < 20")
    task = load_task(tmp_path / "t.yaml")
    assert sum(map(len, (task.train, task.calibration, task.test))) == 20
    number = task.train[0].prompt.removeprefix("q ")
    assert task.train[0].continuations == (f" a {number}", f" b {number}")
    (tmp_path / "t.yaml").write_text(spec + words)
    said = load_task(tmp_path / "t.yaml").notes[0]
    assert said == (
        "choices are the words opt 1, opt 2: to have what stands in the columns of these names, write "
        "choices: \"{{ [row['opt 1'], row['opt 2']] }}\""
    )
    for line, expected in (
        (
            f"{read}where: age < 20",
            r"cannot make the where: '<' not supported .*: cells may be text: write NAME \| int",
        ),
        ('choices: "{{ [opt_1, opt_2] }}"', r"columns found: .*, age \(in a template: row\['the question'\]\)"),
    ):
        (tmp_path / "t.yaml").write_text(spec + line)
        with pytest.raises(InputError, match=expected):
            load_task(tmp_path / "t.yaml")


@pytest.mark.parametrize(
    ("cells", "note"),
    [
        ({"source": ["web", "book"]}, "columns not read: source (if one of them holds labels, rename it to 'label')"),
        ({"id": list(range(12)), "lang": ["en"]}, "columns not read: id, lang"),
        (
            {"target": [f"the answer {n}" for n in range(12)]},
            "columns not read: target (if one of them holds labels, rename it to 'label')",
        ),
        ({"class": [["a", "b"]]}, "columns not read: class (if one of them holds labels, rename it to 'label')"),
        ({f"c{n}": [n] for n in range(10)}, "columns not read: c0, c1, c2, c3, c4, c5, c6, c7 and 2 more"),
    ],
)
def test_columns_that_are_not_read_are_said_and_texts_stay_texts(tmp_path, cells, note):
    rows = [{"text": f"t {n}", **{name: each[n % len(each)] for name, each in cells.items()}} for n in range(12)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    assert (task.kind, task.notes[0]) == ("text", note)


def test_columns_of_other_tasks_that_are_not_read_are_said(tmp_path):
    task = load_task(jsonl(tmp_path / "q.jsonl", [{**row, "context": "", "subject": "sums"} for row in QUESTIONS]))
    assert task.notes[0] == "columns not read: subject"
    task = load_task(jsonl(tmp_path / "q.jsonl", [{**row, "answer": "A", "subject": "sums"} for row in LETTERED]))
    assert task.notes[0] == "columns not read: subject"


def test_labels_that_were_made_floats_are_said_and_stay(tmp_path):
    rows = [{"text": f"t {n}", "label": float(n % 11)} for n in range(33)]
    task = load_task(jsonl(tmp_path / "q.jsonl", rows))
    assert task.train[0].continuations[10] == " 10.0"
    assert (
        task.notes[0]
        == "labels are numbers, asked for as they stand ('0.0', '1.0' ...): words would tell the model more"
    )


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_csv_with_another_separator(tmp_path, separator, quote, ending):
    import zstandard

    opened = {"": open, ".gz": gzip.open, ".zst": zstandard.open}[ending]
    with opened(tmp_path / f"q.csv{ending}", "wt") as file:
        for cells in (("prompt", "completion"), *((f"say, {n}", f"it is {n},5") for n in range(9))):
            file.write(separator.join(f"{quote}{cell}{quote}" for cell in cells) + "\n")
    _, item = first(tmp_path / f"q.csv{ending}")
    assert (item.prompt, item.target) == ("say, 0", " it is 0,5")
    assert item.place.endswith(":2")


def test_a_column_that_says_what_rows_are_for(tmp_path):
    said = ["train"] * 12 + [" Test"] * 5 + ["dev"] * 3
    rows = [{**row, "split": part} for row, part in zip(QUESTIONS, said, strict=True)]
    task = load_task(jsonl(tmp_path / "test.jsonl", rows))
    assert task.notes[:2] == (
        "the column 'split' says what rows are for: 12 train, 5 test, 3 validation",
        "validation: 3 rows not used (calibration is held out of train)",
    )
    assert [item.prompt for item in task.test] == [
        f"Question: How much is {n} plus one?\nAnswer:" for n in range(12, 17)
    ]
    assert len(task.train) + len(task.calibration) == 12
    assert not any("not read" in note or "alone is split" in note for note in task.notes)
    for more in ({"split": "other"}, {"split": None}, {}):
        odd = r"rows.jsonl:21: field 'split' is .*, and says train, validation or test in other rows: fill it in"
        with pytest.raises(InputError, match=odd):
            load_task(jsonl(tmp_path / "rows.jsonl", [*rows, {**QUESTIONS[0], **more}]))
    capital = [{("Split" if name == "split" else name): value for name, value in row.items()} for row in rows]
    task = load_task(jsonl(tmp_path / "capital.jsonl", capital))
    assert (task.notes[0], len(task.test)) == (
        "the column 'Split' says what rows are for: 12 train, 5 test, 3 validation",
        5,
    )
    named = [{**row, "split": f"{row['split'].strip().lower()}_sft"} for row in rows]
    assert len(load_task(jsonl(tmp_path / "rows.jsonl", named)).test) == 5
    free = [{**row, "split": f"banana {part}"} for row, part in zip(QUESTIONS, said, strict=True)]
    assert "columns not read: split" in load_task(jsonl(tmp_path / "rows.jsonl", free)).notes
    streets = [{**row, "split": ("test street" if n == 3 else f"{n} street")} for n, row in enumerate(rows)]
    assert "columns not read: split" in load_task(jsonl(tmp_path / "rows.jsonl", streets)).notes
    alike = load_task(jsonl(tmp_path / "rows.jsonl", [{**row, "split": "train"} for row in QUESTIONS]))
    assert (len(alike.test), "columns not read: split" in alike.notes) == (4, True)


def test_labels_that_cannot_be_learned_are_said(tmp_path):
    said = "11 of 20 labels stand in one row, from which they can hardly be learned"
    for once, note in ((11, [said]), (10, [])):
        labels = [*range(once), *[n for n in range(once, 20) for _ in range(2)]]
        rows = [{"text": f"t {n}", "label": f"name {label}"} for n, label in enumerate(labels)]
        notes = load_task(jsonl(tmp_path / "rows.jsonl", rows)).notes
        assert [each for each in notes if "in one row" in each] == note


def test_one_column_of_a_csv_may_hold_semicolons(tmp_path):
    (tmp_path / "q.csv").write_text("text\n" + "".join(f"one; two {n}\n" for n in range(9)))
    assert load_task(tmp_path / "q.csv").train[0].target.startswith("one; two")


def test_test_split_without_answers_gives_way_to_validation(tmp_path):
    jsonl(tmp_path / "train.jsonl", QUESTIONS[:10])
    jsonl(tmp_path / "valid.jsonl", QUESTIONS[10:14])
    jsonl(tmp_path / "test.jsonl", [{**row, "answer": -1} for row in QUESTIONS[14:]])
    assert len(load_task(tmp_path).test) == 4


def test_a_test_set_alone_can_be_reported(tmp_path):
    jsonl(tmp_path / "test.jsonl", QUESTIONS)
    with pytest.raises(InputError, match="no training rows"):
        load_task(tmp_path)
    alone = load_task(tmp_path, reported_only=True)
    assert (len(alone.test), alone.train, alone.calibration) == (20, (), ())
    jsonl(tmp_path / "train.jsonl", [{**row, "question": "another: " + row["question"]} for row in QUESTIONS])
    for limit in (None, 7):
        both, reported = (load_task(tmp_path, max_test=limit, reported_only=only) for only in (False, True))
        assert both.test == reported.test
        assert (len(both.train), reported.train) == (16, ())
    (tmp_path / "test.jsonl").unlink()
    assert load_task(tmp_path, reported_only=True).test == load_task(tmp_path).test


def test_a_test_set_alone_takes_its_labels_from_its_rows(tmp_path):
    jsonl(tmp_path / "test.jsonl", [{"text": f"t {n}", "label": "ab"[n % 2]} for n in range(8)])
    task = load_task(tmp_path, reported_only=True)
    assert task.test[0].continuations == (" a", " b")
    assert task.notes == ("choices are the 2 labels of the rows at hand, as there are no training rows",)
    jsonl(tmp_path / "train.jsonl", [{"text": f"s {n}", "label": "abc"[n % 3]} for n in range(9)])
    task = load_task(tmp_path, reported_only=True)
    assert (task.test[0].continuations, task.notes) == ((" a", " b", " c"), ())


def test_a_test_set_without_usable_rows_is_held_out_of_train_or_said(tmp_path):
    jsonl(tmp_path / "train.jsonl", QUESTIONS)
    jsonl(tmp_path / "test.jsonl", QUESTIONS[:4])
    files = "source: {files: {train: train.jsonl, test: test.jsonl}}"
    spec = f"kind: choice\nprompt: '{{{{ question }}}}'\nchoices: choices\nanswer: answer\nanswer_as: index\n{files}\n"
    (tmp_path / "own.yaml").write_text(spec + "where: question not in asked | default([])\n")
    rows = [{**row, "asked": [row["question"]]} for row in QUESTIONS[:4]]
    jsonl(tmp_path / "test.jsonl", rows)
    whole, reported = (load_task(tmp_path / "own.yaml", reported_only=only) for only in (False, True))
    assert whole.test == reported.test != ()
    (tmp_path / "own.yaml").write_text(spec + "where: question == 'no'\n")
    with pytest.raises(InputError, match=r"there are no rows \(`where` keeps none of them\)"):
        load_task(tmp_path / "own.yaml", reported_only=True)
    for name in ("train.jsonl", "own.yaml"):
        (tmp_path / name).unlink()
    jsonl(tmp_path / "test.jsonl", [{**row, "answer": float("nan")} for row in QUESTIONS])
    with pytest.raises(InputError, match="has no rows with answers: give a test split that has them"):
        load_task(tmp_path, reported_only=True)


def test_folder_without_train_learns_from_validation(tmp_path):
    jsonl(tmp_path / "val.jsonl", QUESTIONS[:14])
    jsonl(tmp_path / "test.jsonl", QUESTIONS[14:])
    task = load_task(tmp_path)
    assert (len(task.train) + len(task.calibration), len(task.test)) == (14, 6)
    assert task.notes[0] == "no train split: the 14 validation rows are trained on"


SPEC = """
kind: choice
source: {files: {train: data/a.jsonl, test: data/b.jsonl}}
prompt: "{{ frage }}\\nAntwort:"
choices: "{{ optionen }}"
answer: loesung
group: "{{ thema }}"
where: "sprache == 'de'"
delimiter: "\\n"
metric: acc_norm
"""


def test_yaml_names_own_columns_relative_to_itself(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = [
        {"frage": f"Frage {n}", "optionen": ["ja", "nein"], "loesung": "nein", "thema": n // 2, "sprache": "de"}
        for n in range(24)
    ]
    rows[3]["sprache"] = "en"
    jsonl(tmp_path / "data" / "a.jsonl", rows[:20])
    jsonl(tmp_path / "data" / "b.jsonl", rows[20:])
    (tmp_path / "quiz.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path / "data")
    task = load_task("../quiz.yaml")
    assert (task.name, task.metric) == ("quiz", "acc_norm")
    assert len(task.train) + len(task.calibration) == 19
    assert task.test[0].prompt == "Frage 20\nAntwort:"
    assert (task.test[0].target, task.test[0].group) == ("\nnein", "10")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
def test_what_excel_calls_unicode_text_is_read(tmp_path, encoding):
    text = "text\tlabel\r\n" + "".join(f"Größe {n}\t{'ja' if n % 2 else 'nein'}\r\n" for n in range(40))
    begin = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "rows.tsv").write_bytes(begin + text.encode(encoding))
    task = load_task(tmp_path / "rows.tsv")
    assert task.train[0].prompt.startswith("Größe ")
    assert task.train[0].continuations == (" ja", " nein")


def test_domain_text(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": "One."}, {"text": "Two."}])
    (tmp_path / "b.txt").write_text("Three.\n\nStill three.")
    assert load_text(tmp_path / "a.jsonl") == ["One.", "Two."]
    assert load_text(tmp_path) == ["One.", "Two.", "Three.\n\nStill three."]
    texts = load_text("demo_medicine", per_entity=2)
    assert len(texts) == 400
    assert texts == load_text("demo_medicine", per_entity=2)


def test_a_folder_that_has_the_name_of_a_built_in_text_is_given_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo_law", "demo_own"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "a.jsonl", [{"text": "One."}])
    assert len(load_text("demo_law")) > 1
    assert load_text("./demo_law") == load_text("demo_own") == ["One."]


def test_importing_tasks_stays_light():
    import subprocess
    import sys

    heavy = "[m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'pandas') if m in sys.modules]"
    code = f"import sys; from trimllm.tasks import list_tasks; list_tasks(); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
