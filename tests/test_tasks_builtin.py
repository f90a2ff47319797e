"""Built-in tasks: what a model reads for rows that have the columns of the public data sets."""

import json

import pytest

from trimllm.errors import InputError
from trimllm.tasks import list_tasks, load_task
from trimllm.tasks.catalog import builtin_tasks, find_builtin
from trimllm.tasks.render import Renderer
from trimllm.tasks.rows import Row

PROBLEMS = [
    {"question": "Who wakes first?", "answer": "C", "options": ["Ann", "Bob", "the cat", "nobody"]},
    {"question": "Rain began at  _  .", "answer": "A", "options": ["noon", "dusk", "night", "dawn"]},
    {"question": "What is the tale about?", "answer": "D", "options": ["a ship", "a war", "a well", "a farm"]},
]
ROWS = {
    "piqa": {"goal": "Dry a wet shoe", "sol1": "Stuff it with paper.", "sol2": "Put it in a lake.", "label": 0},
    "sciq": {
        "support": " \n Cells are small.",
        "question": "What is small?",
        "distractor1": "suns",
        "distractor2": "seas",
        "distractor3": "hills",
        "correct_answer": "cells",
    },
    "medmcqa": {
        "question": "Which vitamin is made in skin?",
        "opa": "A",
        "opb": "B12",
        "opc": "C",
        "opd": "D",
        "cop": 3,
        "choice_type": "single",
    },
    "casehold": {"context": "See Roe (<HOLDING>).", "endings": ["one", "two", "three", "four", "five"], "label": 4},
    "finance_alpaca": {"instruction": "What is a bond?", "input": "", "output": " A loan to an issuer. ", "text": ""},
    "pubmedqa": {
        "QUESTION": "Does it work?",
        "CONTEXTS": ["Part one.", "Part two."],
        "final_decision": "maybe",
    },
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Start.  Mix it",
        "ctx_b": "the baker",
        "endings": ["stirs [step] slowly.", " sleeps.", "flies [title] away.", "sings."],
        "label": "2",
    },
    "openbookqa": {
        "question_stem": "Ice melts when it is",
        "choices": {"text": ["cold", "warm", "dark", "dry"], "label": ["A", "B", "C", "D"]},
        "answerKey": " B",
    },
    "arc_easy": {
        "question": "What do plants need?",
        "choices": {"text": ["light", "salt", "wax"], "label": ["1", "2", "3"]},
        "answerKey": "1",
    },
    "arc_challenge": {
        "question": "What erodes rock?",
        "choices": {"text": ["wind", "ink", "wool", "glue"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    },
    "race": {"article": "Long ago there was a farm.", "problems": repr(PROBLEMS)},
    "webqs": {"question": "where is the louvre", "answers": ["Paris", "France"], "url": "x"},
}
EXPECTED = {
    "piqa": ("Question: Dry a wet shoe\nAnswer:", (" Stuff it with paper.", " Put it in a lake."), 0),
    "sciq": ("Cells are small.\nQuestion: What is small?\nAnswer:", (" suns", " seas", " hills", " cells"), 3),
    "medmcqa": (
        "Question: Which vitamin is made in skin?\nChoices:\nA. A\nB. B12\nC. C\nD. D\nAnswer:",
        (" A", " B", " C", " D"),
        3,
    ),
    "casehold": ("Question: See Roe (<HOLDING>).\nAnswer:", (" one", " two", " three", " four", " five"), 4),
    "finance_alpaca": ("Question: What is a bond?\nAnswer:", (" A loan to an issuer.",), 0),
    "pubmedqa": ("Abstract: Part one.\nPart two.\nQuestion: Does it work?\nAnswer:", (" yes", " no", " maybe"), 2),
    "hellaswag": (
        "Baking: How to bake. Start. Mix it The baker",
        (" stirs slowly.", " sleeps.", " flies. away.", " sings."),
        2,
    ),
    "openbookqa": ("Ice melts when it is", (" cold", " warm", " dark", " dry"), 1),
    "arc_easy": ("Question: What do plants need?\nAnswer:", (" light", " salt", " wax"), 0),
    "arc_challenge": ("Question: What erodes rock?\nAnswer:", (" wind", " ink", " wool", " glue"), 0),
    "race": (
        "Article: Long ago there was a farm.\n\nQuestion: Who wakes first?\nAnswer: the cat\nRain began at noon\n"
        "What is the tale about?",
        (" a ship", " a war", " a well", " a farm"),
        3,
    ),
    "webqs": ("Question: where is the louvre\nAnswer:", (" Paris",), 0),
}


def render(name, row):
    return Renderer(find_builtin(name)).item(Row("here:1", row))


@pytest.mark.parametrize("name", EXPECTED)
def test_builtin_template_renders_the_public_columns(name):
    item = render(name, ROWS[name])
    assert (item.prompt, item.continuations, item.answer) == EXPECTED[name]
    assert item.lengths == tuple(len(continuation) - 1 for continuation in item.continuations)


def test_every_builtin_has_an_expected_rendering():
    rendered = set(EXPECTED) | {f"demo_{domain}" for domain in ("medicine", "law", "finance")}
    assert set(builtin_tasks()) == rendered
    assert [name for name, *_ in list_tasks()] == sorted(rendered)
    assert all(metric in ("acc", "likelihood") and text for _, _, metric, text in list_tasks())


def test_race_training_rows_have_the_shape_of_reported_ones():
    row = {"article": "A farm.", "question": "Why?", "options": ["a", "b", "c", "d"], "answer": "B", "example_id": "x"}
    item = render("race", row)
    assert item.prompt == "Article: A farm.\n\nWhy?"
    assert item.target == " b"
    assert item.group == "A farm."


def test_pubmedqa_reads_the_columns_of_both_copies():
    row = {"question": "Does it work?", "context": {"contexts": ["Part one.", "Part two."]}, "final_decision": "maybe"}
    assert render("pubmedqa", row) == render("pubmedqa", ROWS["pubmedqa"])


def test_finance_alpaca_shows_the_input_and_skips_rows_without_an_answer():
    row = {"instruction": "Classify.", "input": "Gold", "output": "metal"}
    assert render("finance_alpaca", row).prompt == "Question: Classify.\nGold\nAnswer:"
    keeps = Renderer(find_builtin("FinanceQA")).keeps
    assert keeps(Row("here:1", row))
    assert not keeps(Row("here:2", row | {"output": None}))


def test_webqs_accepts_every_listed_answer():
    assert render("webqs", ROWS["webqs"]).references == ("Paris", "France")


def test_an_index_is_no_text_where_choices_are_numbers():
    row = ROWS["arc_easy"] | {"choices": {"text": ["1", "2", "0"], "label": ["A", "B", "C"]}, "answerKey": "B"}
    assert render("arc_easy", row).target == " 2"
    numbers = {"distractor1": "3", "distractor2": "4", "distractor3": "5", "correct_answer": "6"}
    assert render("sciq", ROWS["sciq"] | numbers).target == " 6"


def test_builtin_task_reads_local_files(tmp_path):
    rows = [ROWS["sciq"] | {"question": f"Which part has number {n}?"} for n in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[10:]))
    task = load_task("SciQ", files={"train": str(tmp_path / "a.jsonl"), "test": tmp_path / "b.jsonl"})
    assert (task.name, task.kind, task.metric) == ("sciq", "choice", "acc")
    assert (len(task.train), len(task.calibration), len(task.test)) == (8, 2, 2)
    assert task.test[0].place == f"{tmp_path / 'b.jsonl'}:1"
    assert load_task("sciq", files=tmp_path / "a.jsonl", metric="acc_norm", calibration_size=1).metric == "acc_norm"


@pytest.mark.parametrize("domain", ["medicine", "law", "finance"])
def test_demo_keeps_entities_apart(domain):
    task = load_task(f"demo_{domain}")
    groups = [{item.group for item in part} for part in (task.train, task.calibration, task.test)]
    assert [len(part) for part in (task.train, task.calibration, task.test)] == [400, 100, 500]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 200
    item = task.train[0]
    assert item.prompt.startswith("Question: ")
    assert item.prompt.endswith("\nAnswer:")
    assert len(item.continuations) == 4


def test_hub_rows_are_read_by_split_without_running_code(monkeypatch):
    calls = []

    def fake(path, config, **settings):
        calls.append((path, config, settings))
        count = 40 if settings["split"] == "train" else 3
        return [{**ROWS["piqa"], "goal": f"{settings['split']} goal {n}"} for n in range(count)]

    monkeypatch.setattr("datasets.load_dataset", fake)
    task = load_task("piqa")
    assert [call[:2] for call in calls] == [("baber/piqa", None)] * 2
    assert [set(call[2]) for call in calls] == [{"split", "revision"}] * 2
    assert task.test[2].place == "baber/piqa[validation]:3"
    assert "no test split with answers: the 3 validation rows are reported" in task.notes
    assert "calibration: 8 of 40 training rows, one question = 12.50 points" in task.notes


def test_a_bad_hub_row_is_skipped_and_named_but_many_are_an_error(monkeypatch):
    def fake(path, config, *, split, revision, bad=1):
        rows = [{**ROWS["piqa"], "goal": f"{split} goal {n}"} for n in range(200)]
        for row in rows[:bad]:
            row["sol2"] = " "
        return rows

    monkeypatch.setattr("datasets.load_dataset", fake)
    note = "skipped 1 of 200 rows that cannot be used (first: baber/piqa[train]:1: field 'choices' has an empty entry"
    assert load_task("piqa").notes[1].startswith(note)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: fake(*a, **k, bad=3))
    with pytest.raises(InputError, match="has an empty entry"):
        load_task("piqa")


def test_unreachable_hub_says_how_to_use_local_files(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(InputError) as error:
        load_task("casehold")
    assert str(error.value) == (
        "task 'casehold': cannot load split 'train' of coastalcph/lex_glue/case_hold from the Hub (Couldn't reach the "
        "Hub); connect once to fill the cache, or give local copies with --task-files train=FILE,test=FILE"
    )
