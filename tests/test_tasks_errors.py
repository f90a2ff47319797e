"""Bad input is one line that names the value, the place and the remedy."""

import bz2
import gzip
import json
import lzma
import re
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
import zstandard

from trimllm.errors import InputError
from trimllm.tasks import load_task, load_text

CHOICES = 'a list such as ["yes", "no"] or texts by letter such as {"A": "yes", "B": "no"}'
NAMED = "name its texts in a task YAML (`| map(attribute='text') | list`)"
MEANT = ": say in a task YAML what of it is written (a part of it, or"
GOOD = {"question": "Why?", "choices": ["a", "b"], "answer": 0}


def message(path, **settings):
    with pytest.raises(InputError) as error:
        load_task(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(path), "FILE") if isinstance(path, Path) else str(error.value)


def write(tmp_path, *rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            "{oops",
            "FILE:2: not valid JSON (Expecting property name enclosed in double quotes at column 2); fix the line",
        ),
        ("[1]", 'FILE:2: a row must be a JSON object such as {"text": ...}, not list'),
        (
            {**GOOD, "choices": [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}]},
            f"FILE:2: field 'choices' holds an object ({{'id': 1, 'text': 'a'}}): {NAMED}",
        ),
        (
            {**GOOD, "choices": [[], ["c"]]},
            f"FILE:2: field 'choices' holds a list ([]): {NAMED}",
        ),
        (
            {**GOOD, "answer": ["B"]},
            f"FILE:2: field 'answer' holds a list (['B']){MEANT} `| join(' ')`)",
        ),
        (
            {**GOOD, "context": ["one passage", "another", "a third that makes it longer than what is shown"]},
            "FILE:2: cannot make the prompt: a column it uses holds a list (['one passage', 'another', 'a third that "
            f"makes it longer tha...){MEANT} `| join(' ')`)",
        ),
        (
            {**GOOD, "question": {"stem": "Why?"}},
            f"FILE:2: cannot make the prompt: a column it uses holds an object ({{'stem': 'Why?'}}){MEANT} `| tojson`)",
        ),
        (
            {**GOOD, "choices": ["a"]},
            "FILE:2: field 'choices' has one entry, which is always right: give several, or drop the row",
        ),
        ({**GOOD, "answer": ""}, "FILE:2: field 'answer' is empty; fill it in or drop the row"),
        (
            {**GOOD, "answer": 2},
            "FILE:2: field 'answer' is 2, but there are 2 choices (0 to 1); answers count from 0",
        ),
        ({**GOOD, "answer": -1}, "FILE:2: field 'answer' is -1, but there are 2 choices (0 to 1)"),
        ({**GOOD, "answer": "C"}, "FILE:2: field 'answer' is C, but there are 2 choices (A to B)"),
        (
            {**GOOD, "answer": "cc"},
            "FILE:2: field 'answer' is 'cc', which is no index, letter or text of the choices 'a', 'b'",
        ),
        (
            {**GOOD, "choices": ["b", "a"], "answer": "a"},
            "FILE:2: field 'answer' 'a' names choice 1 by text and choice 0 by letter; "
            "say which with answer_as in a task YAML",
        ),
        (
            {**GOOD, "choices": ["no", "yes"], "answer": True},
            "FILE:2: field 'answer' is 'True', which is no index, letter or text of the choices 'no', 'yes'",
        ),
        ({**GOOD, "choices": []}, "FILE:2: field 'choices' is empty; fill it in or drop the row"),
        ({**GOOD, "choices": ["a", ""]}, "FILE:2: field 'choices' has an empty entry; fill it in or drop the row"),
        ({**GOOD, "choices": 3}, f"FILE:2: field 'choices' must be {CHOICES}, not int"),
        ({**GOOD, "choices": {"text": ["a"], "label": ["A"]}}, f"FILE:2: field 'choices' must be {CHOICES}, not dict"),
        ({**GOOD, "choices": {"B": "a", "C": "b"}}, f"FILE:2: field 'choices' must be {CHOICES}, not dict"),
        (
            {**GOOD, "question": " "},
            "FILE:2: cannot make the prompt: field 'question' is empty; fill it in or drop the row",
        ),
        (
            {**GOOD, "question": None},
            "FILE:2: cannot make the prompt: field 'question' is empty; fill it in or drop the row",
        ),
        (
            {"question": "Why?", "choices": ["a", "b"]},
            "FILE:2: no value for the answer: 'answer' is undefined; columns found: question, choices",
        ),
    ],
)
def test_bad_choice_row(tmp_path, row, expected):
    assert message(write(tmp_path, GOOD, row, *[GOOD] * 8)) == expected


@pytest.mark.parametrize("answer", [1, 1.0, "1"])
def test_an_index_that_is_the_text_of_another_choice(tmp_path, answer):
    rows = [{"question": f"q {n}", "choices": ["1", "0"], "answer": answer} for n in range(9)]
    said = message(write(tmp_path, *rows))
    assert "field 'answer' '1' names choice 0 by text and choice 1 by index; say which with answer_as" in said


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "p", "completion": ""},
            "FILE:1: cannot make the target: field 'completion' is empty; fill it in or drop the row",
        ),
        (
            {"prompt": "", "completion": "c"},
            "FILE:1: cannot make the prompt: field 'prompt' is empty; fill it in or drop the row",
        ),
        (
            {"question": "q", "answer": []},
            "FILE:1: cannot make the target: field 'answer' is empty; fill it in or drop the row",
        ),
        ({"text": "t", "label": ["a", "b"]}, "FILE:1: field 'label' must be one text or number, not several"),
        ({"text": "  "}, "FILE:1: the target is empty; fill it in or drop the row"),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            "FILE:1: cannot make the prompt: no assistant message that answers something; "
            "the last one is what is learned",
        ),
        (
            {"messages": [{"role": "user"}]},
            "FILE:1: cannot make the prompt: message 0 needs 'role' and 'content' (or 'from' and 'value'), both text",
        ),
    ],
)
def test_bad_generation_row(tmp_path, row, expected):
    assert message(write(tmp_path, row)) == expected


def test_unknown_columns_are_listed_with_what_is_recognized(tmp_path):
    said = message(write(tmp_path, {"frage": 1, "antwort": 2}))
    assert said.startswith("data: cannot tell the task from the columns antwort, frage; recognized are messages (or ")
    assert said.endswith("rename the columns or name them in a task YAML (--task my.yaml)")


@pytest.mark.parametrize(("names", "answer"), [("first second", "B"), ("opt1 opt2", 2), ("a b", "1"), ("a b", 1)])
def test_columns_of_choices_that_are_not_known_are_named(tmp_path, names, answer):
    rows = [{"question": f"q {n}", **dict.fromkeys(names.split(), "red"), "answer": answer, "n": n} for n in range(9)]
    assert message(write(tmp_path, *rows)) == (
        f"data: every 'answer' is a letter or a small number (such as '{answer}'), and nothing reads the columns "
        f"{', '.join(names.split())}: if they are choices, name them A, B, C ... or option_a, option_b ... "
        "(answers by letter, by text, or by index from 0); if not, drop them"
    )


def test_label_that_train_does_not_have(tmp_path):
    write(tmp_path, *({"text": f"t {n}", "label": "ab"[n % 2]} for n in range(10)), name="train.jsonl")
    write(tmp_path, {"text": "t", "label": "zz"}, name="test.jsonl")
    expected = (
        "FILE/test.jsonl:1: field 'label' is 'zz', which is no text of the choices 'a', 'b': these are the labels of "
        "the training rows: add rows that have it, leave this one out, or list `choices` in a task YAML"
    )
    assert message(tmp_path) == expected
    (tmp_path / "own.yaml").write_text("kind: choice\nprompt: text\nchoices: [a, b]\nanswer: label\nanswer_as: text\n")
    said = message(tmp_path / "own.yaml", files={"train": tmp_path / "train.jsonl", "test": tmp_path / "test.jsonl"})
    assert said.endswith("which is no text of the choices 'a', 'b'")


def test_errors_name_the_columns_that_are_there(tmp_path):
    row = {"question": "Why?", "options": ["a", "b"], "answer": 0}
    for options, expected in [
        (["a", ""], "FILE:2: field 'options' has an empty entry; fill it in or drop the row"),
        (3, f"FILE:2: field 'options' must be {CHOICES}, not int"),
        ("a | b", f"FILE:2: field 'options' must be {CHOICES}, not str"),
        (
            '["a", b]',
            "FILE:2: field 'options' is not a valid JSON list (Expecting value; texts stand in double quotes); fix the "
            "cell",
        ),
    ]:
        assert message(write(tmp_path, row, {**row, "options": options}, *[row] * 8)) == expected


@pytest.mark.parametrize(
    ("columns", "renamed"),
    [
        ("Sentence Label", "'Sentence' to 'text' and 'Label' to 'label'"),
        ("question label", "'question' to 'text'"),
        ("sentence label", "'sentence' to 'text'"),
        ("prompt response", "'response' to 'completion'"),
        ("question choices answerKey", "'answerKey' to 'answer'"),
        ("instruction context response category", "'response' to 'output'"),
        ("conversation", "'conversation' to 'messages'"),
        ("question choices correct_answer", "'correct_answer' to 'answer'"),
    ],
)
def test_columns_of_nearly_the_right_names(tmp_path, columns, renamed):
    said = message(write(tmp_path, *[{name: f"{name} {n}" for name in columns.split()} for n in range(9)]))
    assert said == (
        f"data: cannot tell the task from the columns {', '.join(sorted(columns.split()))}: rename {renamed}, or name "
        "the columns in a task YAML (--task my.yaml)"
    )


def test_one_label_is_no_classification(tmp_path):
    said = message(write(tmp_path, *[{"text": "t", "label": "a"}] * 9))
    assert said == "data: column 'label' is 'a' in every row: give rows with two labels at the least"


def test_files_that_cannot_be_read(tmp_path):
    assert message(write(tmp_path, "", name="empty.jsonl")) == "FILE has no rows; give a file with at least one"
    assert message(write(tmp_path, " \n", name="blank.txt")) == "FILE has no rows; give a file with at least one"
    assert message(tmp_path / "none.jsonl").startswith(
        "FILE does not exist: give a task name, a YAML file, or a data file"
    )
    assert message(write(tmp_path, "x", name="a.docx")).startswith(
        "FILE: cannot tell the format from the name; use one of"
    )
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "caf\xe9"}')
    assert message(latin) == "FILE is not UTF-8 text (byte 13); convert it to UTF-8"
    (tmp_path / "half.jsonl.xz").write_bytes(b"\xfd7zXZ\x00\x00")
    assert message(tmp_path / "half.jsonl.xz").startswith("cannot read FILE: ")
    for ending, whole in {".xz": lzma, ".gz": gzip, ".bz2": bz2, ".zst": zstandard}.items():
        path = tmp_path / f"damaged.jsonl{ending}"
        packed = whole.compress(b"".join(b'{"text": "row %d"}\n' % number for number in range(999)))
        cut = packed + whole.compress(b'{"text": "one more"}\n')[:-2]
        for data in (b'{"text": "not compressed"}\n', packed[:30] + b"damage" * 20 + packed[150:], cut):
            path.write_bytes(data)
            said = message(path)
            assert said.startswith("cannot read FILE: ")
            assert said.endswith(f"; check that it is a whole {ending} file")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    assert message(tmp_path / "x.parquet").startswith("cannot read FILE: ")
    (tmp_path / "folder").mkdir()
    assert message(tmp_path / "folder") == "FILE has no data files: expected train.jsonl, test.jsonl or the like"


def test_malformed_csv_and_json(tmp_path):
    said = message(write(tmp_path, "question,answer", "a,b", "c", name="a.csv"))
    assert said == "FILE:3: fewer fields than the header's 2, parted by ','; fix the line"
    said = message(write(tmp_path, "question,answer", "a,b,c", name="b.csv"))
    assert said == "FILE:2: more fields than the header's 2, parted by ','; fix the line"
    said = message(write(tmp_path, "text,label,label", "a,b,c", name="twice.csv"))
    assert said == "FILE:1: column 'label' stands in the header more than once; rename one of them"
    said = message(write(tmp_path, '{"text": "a"}', '{"text": "b"}', name="c.json"))
    assert said == "FILE:2: not valid JSON (Extra data at column 1); one object per line is JSONL: name the file .jsonl"
    said = message(write(tmp_path, "question,choices,answer", 'a,"[""x"",",0', name="d.csv"))
    assert said.startswith("FILE:2: field 'choices' is not a valid JSON list")


def test_text_in_another_encoding_and_what_is_nested_or_long_beyond_use(tmp_path):
    path = tmp_path / "wide.csv"
    for encoding in ("utf-16-le", "utf-16-be", "utf-32"):
        path.write_bytes("text,label\na,b\n".encode(encoding))
        assert message(path) == "FILE is not UTF-8 text (it holds NUL bytes); convert it to UTF-8"
    assert message(write(tmp_path, "[" * 100_000)).endswith("nested too deep; flatten them")
    assert message(write(tmp_path, '{"text": "a", "label": ' + "1" * 5000 + "}")).startswith(
        "cannot read FILE: Exceeds"
    )


def test_a_missing_answer_is_not_the_choice_none(tmp_path):
    rows = [{"question": f"{n}?", "choice_a": "None", "choice_b": "NA", "correct_answer": "a"} for n in range(60)]
    assert "answer" in message(write(tmp_path, *rows)), "a column of a name that nothing reads"


@pytest.mark.parametrize(
    ("field", "text", "why"),
    [
        ("where", "10 / answer > 3", "division by zero"),
        ("answer", "'{{ 1 // answer }}'", "by zero"),
        ("prompt", '\'{{ question | regex_replace("[", "") }}\'', "unterminated character set"),
        ("prompt", "'{{ range(999999999) | list }}'", "range"),
    ],
)
def test_what_fails_in_a_template_names_the_row(tmp_path, field, text, why):
    data = write(tmp_path, *[{"question": f"{n}?", "a": "x", "b": "y", "answer": 0} for n in range(30)])
    fields = {"prompt": "'{{ question }}'", "choices": "'{{ [a, b] }}'", "answer": "answer", field: text}
    task = tmp_path / "task.yaml"
    lines = [f"{name}: {value}" for name, value in fields.items()]
    task.write_text("\n".join(["kind: choice", f"source: {{files: {{train: {data.name}}}}}", *lines]))
    assert f"{data.name}:1" in (told := message(str(task)))
    assert why in told


def test_unknown_names_suggest_the_nearest():
    assert message("hellaswg").startswith(
        "unknown task 'hellaswg' (did you mean 'hellaswag'?): use arc_challenge, arc_easy"
    )
    assert message("financeqq").startswith("unknown task 'financeqq' (did you mean 'financeqa'?)")
    assert message("nothing like it").startswith("unknown task 'nothing like it': use ")
    expected = "metric 'acc_nrom' does not fit a choice task: use acc or acc_norm (did you mean 'acc_norm'?)"
    assert message("sciq", metric="acc_nrom") == expected
    assert message("webqs", metric="acc") == "metric 'acc' does not fit a generation task: use likelihood"


def test_wrong_use_of_files(tmp_path):
    path = write(tmp_path, GOOD)
    said = message("sciq", files={"trian": path})
    assert said == "unknown split 'trian' (did you mean 'train'?): use train, validation or test"
    said = message("sciq", files={"train": path})
    assert (
        said == f"{path}:1: no value for the prompt: 'support' is undefined; columns found: question, choices, answer"
    )
    assert message("sciq", files={"test": path}).startswith("task 'sciq' has no training rows")
    assert message(path, files={"test": path}).startswith("task 'FILE': files can only stand in for a built-in task")
    assert message("sciq", files={"train": tmp_path / "gone.jsonl"}).endswith(
        "gone.jsonl does not exist; check the path"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: choise", "FILE: field 'kind': Input should be 'choice', 'generation' or 'text'"),
        ("kind: text\ntarget: x\npromt: y", "FILE: unknown field 'promt' (did you mean 'prompt'?)"),
        ("kind: text", "FILE: kind text needs the field 'target'"),
        ("kind: generation\nprompt: p", "FILE: kind generation needs the field 'target'"),
        (
            "kind: choice\nprompt: p\nanswer: 0\nchoices: [yes, no]",
            "FILE: choices must be text: YAML reads a bare yes or no as a truth value, so quote them",
        ),
        (
            "kind: text\ntarget: x\nmetric: acc",
            "FILE: metric 'acc' does not fit a text task: use likelihood",
        ),
        (
            "kind: text\ntarget: x\nsource: {hub: a/b, world: law}",
            "FILE: field 'source': source needs exactly one of hub, files, world; it has hub, world",
        ),
        (
            "kind: text\ntarget: x\nsource: {hub: a/b}",
            "FILE: a Hub source needs the field 'splits', such as {train: train, test: test}",
        ),
        ("kind: text\ntarget: x", "task 'task' has no source: add one to its YAML or give files with --task-files"),
        ("kind: classification\ntarget: x", "or 'text' (to have texts classified: choice, with the labels as choices)"),
        ("- a", "FILE must be a YAML mapping with the fields name,"),
        ("a: [", "FILE:1: not valid YAML: expected the node"),
        ("kind: text\ntarget: x\nkind: choice", "FILE:3: not valid YAML: 'kind' stands there twice"),
        (
            "kind: text\ntarget: '{{ x'\nsource: {files: {train: t.txt}}",
            "task 'task': template '{{ x' is not valid Jinja:",
        ),
        (
            "kind: text\ntarget: '{{ text }}'\nsource: {files: {train: t.txt}}\nsplits: {train: trane}",
            "task 'task': its source has no split 'trane', only train",
        ),
        (
            "kind: text\ntarget: '{{ ''''.__class__.__mro__ }}'\nsource: {files: {train: t.txt}}",
            "cannot make the target",
        ),
    ],
)
def test_bad_yaml(tmp_path, text, expected):
    (tmp_path / "t.txt").write_text("Some text.")
    said = message(write(tmp_path, text, name="task.yaml"))
    assert expected in said


def test_text_too_short_to_split_says_how_many_characters_it_takes(tmp_path):
    said = message(write(tmp_path, "A few words.", name="a.txt"))
    assert said == "12 characters of text are too few to train and to measure on: give at least 2,400 characters"


def test_missing_yaml(tmp_path):
    assert message(tmp_path / "x.yaml") == "cannot read the task file FILE: No such file or directory; check the path"


@pytest.mark.parametrize("asked", [{"piece": 0}, {"piece": -1}, {"per_entity": 0}])
def test_texts_are_of_one_character_or_more(tmp_path, asked):
    (tmp_path / "t.txt").write_text("abc")
    ((name, number),) = asked.items()
    with pytest.raises(InputError, match=f"{name}={number}: give at least 1"):
        load_text(tmp_path / "t.txt", **asked)


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.txt").write_text("\n\n".join(f"text number {n} of many, {n * 7919}." * 40 for n in range(40)))
    assert load_text("~/t.txt")
    assert load_task("~/t.txt").kind == "text"


def test_domain_text_errors(tmp_path):
    for given, expected in [
        (
            "demo_cooking",
            "unknown domain text 'demo_cooking': use demo_medicine, demo_law, demo_finance, a file or a folder",
        ),
        (tmp_path / "x.txt", "does not exist: give a file or folder with text"),
        (write(tmp_path, {"body": "x"}), "data.jsonl:1: no column 'text'; columns found: body"),
        (
            write(tmp_path, {"text": None}, name="null.jsonl"),
            "null.jsonl:1: 'text' is None, not text: leave the row out",
        ),
    ]:
        with pytest.raises(InputError) as error:
            load_text(given)
        assert expected in str(error.value)


def test_too_few_rows_of_one_file_say_how_many_are_needed(tmp_path):
    rows = [{**GOOD, "question": f"q {n}"} for n in range(5)]
    assert re.fullmatch(
        r"4 training rows \(from FILE:\d on\) are too few to hold out a calibration set: give at least 6 rows in all "
        r"\(1 held out for the report\)",
        message(write(tmp_path, *rows)),
    )
    load_task(write(tmp_path, *rows, {**GOOD, "question": "q 5"}))


def test_a_folder_without_training_rows_says_what_it_has(tmp_path):
    for name in ("blood_test.jsonl", "xray.jsonl"):
        write(tmp_path, GOOD, name=name)
    assert message(tmp_path).endswith("to be split) (not used: xray.jsonl (no train, valid or test in its name))")


def test_the_place_of_a_csv_record_is_its_first_line(tmp_path):
    said = message(write(tmp_path, "question,answer_text", "", "x,y", ",", "", '"a', "b", 'c",', name="a.csv"))
    assert said.startswith("FILE:6: ")
    said = message(write(tmp_path, "sep=,", "question,answer_text", "x,y", '"a"b,c', name="c.csv"))
    assert said.startswith("FILE:4: malformed CSV")
    said = message(write(tmp_path, "question,answer_text", "x,y", ",,z", name="b.csv"))
    assert said.startswith("FILE:3: more fields than the header's 2")


def test_bytes_are_text_or_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"text {n}".encode() for n in range(9)]
    for name, last in (("text", b"caf\xc3\xa9"), ("picture", b"\xff\xd8\xff")):
        columns = {"question": [*texts, last], "answer": ["yes"] * 10}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    task = load_task(tmp_path / "text.parquet")
    prompts = {item.prompt for item in (*task.train, *task.calibration, *task.test)}
    assert prompts == {f"Question: {text.decode()}\nAnswer:" for text in (*texts, b"caf\xc3\xa9")}
    assert message(tmp_path / "picture.parquet") == (
        "FILE:row 10: cannot make the prompt: a column it uses holds bytes that are no text (b'\\xff\\xd8\\xff'): "
        "leave it out"
    )


BRACED = """
kind: {kind}
source: {{files: {{train: rows.jsonl}}}}
prompt: "{prompt}"
choices: {choices}
answer: answer
target: "{{{{ question }}}}"
"""


@pytest.mark.parametrize(
    ("prompt", "choices", "kind", "named"),
    [
        ("Question: {question}", "[a, b]", "choice", "question"),
        ("{{ question }}", '["{choices}", b]', "choice", "choices"),
        ("Q: { question }", "", "generation", "question"),
    ],
)
def test_a_column_in_single_braces(tmp_path, prompt, choices, kind, named):
    write(tmp_path, {"other": 1}, *[{**GOOD, "question": f"q {n}"} for n in range(9)], name="rows.jsonl")
    (tmp_path / "own.yaml").write_text(BRACED.format(kind=kind, prompt=prompt, choices=choices))
    said = message(tmp_path / "own.yaml")
    assert said.startswith("task 'own': {")
    doubled = f"columns stand in double braces, as in {{{{ {named} }}}} (to have the braces: {{% raw %}}{{"
    assert f" is read as it stands: {doubled}" in said


@pytest.mark.parametrize(
    "prompt",
    [
        "{no_column}",
        r"write \\boxed{answer}",
        "{% raw %}{question}{% endraw %}",
        "{{ '{question}' }}",
        "{% set x = '{question}' %}",
    ],
)
def test_braces_that_are_no_columns(tmp_path, prompt):
    write(tmp_path, *[{**GOOD, "question": f"q {n}"} for n in range(9)], name="rows.jsonl")
    (tmp_path / "own.yaml").write_text(
        BRACED.format(kind="choice", prompt=f"{prompt} {{{{ question }}}}", choices="[a, b]")
    )
    assert len(load_task(tmp_path / "own.yaml").train) > 1


OPEN = """
kind: generation
source: {{files: {{train: rows.jsonl}}}}
prompt: "{prompt}"
target: answer
"""


@pytest.mark.parametrize(
    "prompt",
    [
        "trim",
        "lower",
        "replace('a', 'b')",
        "string",
        "upper",
        "join(', ')",
        "first",
        "tojson",
        "map('upper')",
        "list | trim",
        "list | lower",
        "list | pprint",
        "reverse",
    ],
)
def test_no_filter_writes_a_list_or_an_object_as_python_does(tmp_path, prompt):
    rows = [{"cell": [{"k": n}, {"k": "b'é"}], "answer": n} for n in range(9)]
    write(tmp_path, *rows, name="rows.jsonl")
    (tmp_path / "own.yaml").write_text(OPEN.format(prompt=f"{{{{ cell | {prompt} }}}}"))
    if prompt == "tojson":
        task = load_task(tmp_path / "own.yaml")
        assert all(item.prompt.endswith('}, {"k": "b\'é"}]') for item in task.train)
    else:
        refused = (
            r"rows.jsonl:1: cannot make the prompt: (a column it uses holds (a list|an object) \(|it ends in several)"
        )
        assert re.search(refused, message(tmp_path / "own.yaml"))
    (tmp_path / "own.yaml").write_text(OPEN.format(prompt="{{ 'a' ~ cell }}"))
    assert "holds a list" in message(tmp_path / "own.yaml")


def test_completions_that_are_no_text(tmp_path):
    for completion in ({"name": "x"}, [{"role": "assistant", "content": "x"}]):
        rows = [{"prompt": f"p {n}", "completion": completion} for n in range(9)]
        assert "cannot make the target: a column it uses holds a" in message(write(tmp_path, *rows))


@pytest.mark.parametrize("where", ["{{ lang }} == 'en'", "{lang} == 'en'", "{% if lang == 'en' %}True{% endif %}"])
def test_a_condition_that_is_text(tmp_path, where):
    rows = [{"question": f"q {n}", "answer": n, "lang": ["en", "de"][n % 2]} for n in range(20)]
    write(tmp_path, *rows, name="rows.jsonl")

    def spec(condition):
        text = OPEN.format(prompt="{{ question }}") + f"where: {json.dumps(condition)}\n"
        (tmp_path / "own.yaml").write_text(text)
        return tmp_path / "own.yaml"

    said = message(spec(where))
    assert f"where {where!r} is no expression (" in said
    assert said.endswith("): write one, as in jurisdiction == 'UK'")
    for good in ("lang == 'en'", "{{ lang == 'en' }}", "lang in {'en': {'b': 1}}", "'{lang}' != lang and lang == 'en'"):
        task = load_task(spec(good))
        assert len(task.train) + len(task.calibration) + len(task.test) == 10


def test_half_a_character_within_json_in_a_cell(tmp_path):
    rows = "".join(f'q {n},"[""a"", ""b \\ud83d""]",0\n' for n in range(9))
    (tmp_path / "data.csv").write_text(f"question,choices,answer\n{rows}")
    assert message(tmp_path / "data.csv").endswith("is half of a character: mend the text, or drop the row")


def test_a_group_may_be_a_list(tmp_path):
    rows = [{"question": f"q {n}", "answer": n, "tags": ["a", str(n // 2)]} for n in range(20)]
    write(tmp_path, *rows, name="rows.jsonl")
    (tmp_path / "own.yaml").write_text(OPEN.format(prompt="{{ question }}") + "group: tags\n")
    task = load_task(tmp_path / "own.yaml")
    assert len({item.group for item in task.train}) == len(task.train) / 2


def test_not_a_number_is_an_empty_cell(tmp_path):
    rows = [{"instruction": f"i {n}", "input": float("nan"), "output": f"o {n}"} for n in range(9)]
    prompts = [item.prompt for item in load_task(write(tmp_path, *rows)).train]
    assert prompts
    assert not any("nan" in prompt for prompt in prompts)


def test_answers_in_a_csv(tmp_path):
    path = tmp_path / "data.csv"
    for cell, target in (('{"text": ["Paris"], "answer_start": [5]}', " Paris"), ('["Paris", "paris"]', " Paris")):
        rows = "".join('q {},"{}"\n'.format(n, cell.replace('"', '""')) for n in range(9))
        path.write_text(f"question,answers\n{rows}")
        assert {item.target for item in load_task(path).train} == {target}
    for cell in ("['Paris']", "{'text': array(['Paris'], dtype=object)}"):
        path.write_text("question,answers\n" + "".join(f'q {n},"{cell}"\n' for n in range(9)))
        assert "field 'answers' is a list or an object as Python writes it: write JSON" in message(path)
    path.write_text("question,answers\n" + "".join(f'q {n},"[laughs] yes"\n' for n in range(9)))
    assert load_task(path).train[0].target == " [laughs] yes"


def test_half_a_character_in_a_domain_text(tmp_path):
    path = write(tmp_path, {"text": "whole"}, {"text": "half \ud83d"})
    with pytest.raises(InputError, match=r":2: '\\ud83d' is half of a character"):
        load_text(path)


def test_a_folder_of_a_saved_dataset_says_what_is_there(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "train").mkdir()
    assert message(tmp_path).endswith("expected train.jsonl, test.jsonl or the like; there are train/")


def test_rows_that_all_ask_the_same(tmp_path):
    rows = [{"question": f"q {n}", "answer": n % 2} for n in range(9)]
    write(tmp_path, *rows, name="rows.jsonl")
    (tmp_path / "own.yaml").write_text(BRACED.format(kind="choice", prompt="Which?", choices="[a, b]"))
    assert message(tmp_path / "own.yaml").startswith("task 'own': every row has the same prompt and the same choices (")


def test_a_file_name_of_two_parts(tmp_path):
    rows = [{**GOOD, "question": f"q {n}"} for n in range(9)]
    write(tmp_path, *rows, name="blood_test_train.jsonl")
    write(tmp_path, *rows, name="blood_test_dev.jsonl")
    assert message(tmp_path).endswith(
        "dev.jsonl: its name speaks of test and validation: rename it, with one of them alone, or move it away"
    )
    assert load_task(tmp_path / "blood_test_train.jsonl").train, "alone it is split, whatever its name"


def test_a_folder_without_data_files_says_what_is_there(tmp_path):
    (tmp_path / "rows.xlsx").touch()
    (tmp_path / "2024").mkdir()
    (tmp_path / "README").touch()
    assert message(tmp_path).endswith("expected train.jsonl, test.jsonl or the like; there are 2024/, rows.xlsx")
    write(tmp_path, *[{**GOOD, "question": f"q {n}"} for n in range(9)], name="train.jsonl")
    note = "not read: 2024/, rows.xlsx (files of no known format, folders in the folder)"
    assert load_task(tmp_path).notes[0] == note


def test_half_a_character_is_refused(tmp_path):
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(9)]
    path = write(tmp_path, *rows, {"text": "a smile, \ud83d cut", "label": "a"})
    assert message(path) == "FILE:10: '\\ud83d' is half of a character: mend the text, or drop the row"


def test_prompts_and_completions_may_be_numbers_but_not_null(tmp_path):
    rows = [{"prompt": n, "completion": 10 * n} for n in range(9)]
    assert sorted((item.prompt, item.target) for item in load_task(write(tmp_path, *rows)).train)[0] == ("0", " 0")
    for column in ("prompt", "completion"):
        path = write(tmp_path, *rows, {"prompt": 1, "completion": 2, column: None})
        said = message(path)
        assert said.startswith("FILE:10: cannot make the ")
        assert said.endswith(f": field '{column}' is empty; fill it in or drop the row")


@pytest.mark.parametrize("more", ['group: "{question}"', 'references: ["{answer}"]', 'references: "{answer}"'])
def test_single_braces_in_fields_that_no_model_reads(tmp_path, more):
    write(tmp_path, *[{"question": f"q {n}", "answer": n} for n in range(9)], name="rows.jsonl")
    (tmp_path / "own.yaml").write_text(OPEN.format(prompt="{{ question }}") + more + "\n")
    assert "is read as it stands: columns stand in double braces" in message(tmp_path / "own.yaml")


def test_a_group_that_is_null_names_its_row(tmp_path):
    rows = [{"question": f"q {n}", "answer": n, "of": None if n == 4 else n} for n in range(9)]
    write(tmp_path, *rows, name="rows.jsonl")
    (tmp_path / "own.yaml").write_text(OPEN.format(prompt="{{ question }}") + "group: of\n")
    assert message(tmp_path / "own.yaml").endswith("jsonl:5: cannot make the group: a column it uses is null")


def test_bytes_within_parquet_cells(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"question": [f"q {n}" for n in range(9)], "choices": [[b"yes", b"no"]] * 9, "answer": [0] * 9}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    assert {item.continuations for item in load_task(tmp_path / "data.parquet").train} == {(" yes", " no")}
    pictures = {"picture": [b"\xff\xd8"] * 9, "answer": [str(n) for n in range(9)]}
    pq.write_table(pa.table(pictures), tmp_path / "pictures.parquet")
    files = "source: {files: {train: pictures.parquet}}"
    text = OPEN.format(prompt="{{ picture | string }}").replace("source: {files: {train: rows.jsonl}}", files)
    (tmp_path / "own.yaml").write_text(text)
    assert "a column it uses holds bytes that are no text (b'\\xff\\xd8')" in message(tmp_path / "own.yaml")


def test_a_world_or_split_of_it_that_there_is_not_is_one_line(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(OPEN.format(prompt="{{ question }}").replace("{files: {train: rows.jsonl}}", "{world: physics}"))
    assert message(own).endswith("world 'physics' is unknown: use medicine, law, finance")
    own.write_text(own.read_text().replace("physics", "law") + "splits: {train: train, test: dev}\n")
    assert message(own) == "task 'own': the world has no split 'dev', only train, test"


def test_a_tilde_in_a_task_yaml_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, *({"question": f"q {n}", "answer": n} for n in range(9)), name="rows.jsonl")
    folder = tmp_path / "tasks"
    folder.mkdir()
    own = folder / "own.yaml"
    own.write_text(OPEN.format(prompt="{{ question }}").replace("rows.jsonl", "~/rows.jsonl"))
    assert len(load_task(own).train) > 0
    assert len(load_task(own, files={"train": "~/rows.jsonl"}).train) > 0


def test_labels_that_look_like_templates_are_labels(tmp_path):
    labels = ["{{ x }}", "{% raw", "it's {{\n}}"]
    write(tmp_path, *({"text": f"t {n}", "label": labels[n % 3]} for n in range(30)), name="rows.jsonl")
    item = load_task(tmp_path / "rows.jsonl").train[0]
    assert sorted(text.strip() for text in item.continuations) == sorted(labels)


def test_dates_and_decimals_of_parquet_are_labels(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"t {n}" for n in range(20)]
    for labels in ([Decimal("3.50"), Decimal("4.25")], [date(2024, 2, 29), date(2024, 3, 1)]):
        pq.write_table(pa.table({"text": texts, "label": labels * 10}), tmp_path / "x.parquet")
        item = load_task(tmp_path / "x.parquet").train[0]
        assert [text.strip() for text in item.continuations] == [str(label) for label in labels]


def test_a_folder_of_one_text_that_is_called_readme(tmp_path):
    (tmp_path / "README.TXT").write_text("A domain's only text.")
    assert load_text(tmp_path) == ["A domain's only text."]
