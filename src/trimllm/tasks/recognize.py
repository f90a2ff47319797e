"""Own data without a YAML file: the columns say what kind of task it is."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import meta

from trimllm.errors import InputError
from trimllm.tasks.answers import common_reading, names_one, written
from trimllm.tasks.chat import has_template
from trimllm.tasks.columns import refuse_labelled_texts, renames
from trimllm.tasks.render import environment
from trimllm.tasks.rows import Row, blank
from trimllm.tasks.spec import TaskSpec

RECOGNIZED = (
    "messages (or conversations) | question, choices (or A, B ... or option_a, option_b ...), answer | text, label | "
    "prompt, completion | instruction, output | question (or input), answer_text (or answer, answers) | text"
)
"""The column sets, in the order they are looked for; further columns are ignored (`context` is used where it is)."""

_CONTEXT = "{% if context is defined and context %}{{ context }}\n{% endif %}"
_GROUP = "{{ context | digest if context is defined else '' }}"
_INPUT = "{% if input is defined and input %}\n{{ input }}{% endif %}"
_GLUED = (
    "{% set end = (prompt | plain | string)[-1:] %}"
    "{% set answer = completion | required('completion') | plain | string %}"
    "{{ '' if end.isspace() or answer[:1].isspace() else ' ' }}{{ answer }}"
)

_OPTIONS = [
    [before + letter for letter in letters]
    for before in ("option_", "option", "opt_", "opt", "op", "choice_", "choice", "")
    for letters in (string.ascii_uppercase, string.ascii_lowercase)
]
"""Names of columns that hold a choice each, in the order they are looked for."""

_ANSWERS = ("answerKey", "answer", "label")
"""Columns that may say which choice is right."""

_KEYED = {"text", "label"}
"""What a cell of choices holds that has a label for each."""

_PASSAGES = 10
"""Fewer different contexts than this, each in more rows than this on average, are instructions, not passages."""


class Columns(NamedTuple):
    """Which of the accepted column names a file uses; `None` where it has none of them."""

    question: str | None
    choices: str | None
    answer: str | None


def recognize(name: str, rows: Collection[Row], tokenizer: Any = None) -> TaskSpec:
    """The spec that fits rows of this shape (those of the training split: labels are taken from them).

    Raises:
        InputError: if the columns fit no known shape.
    """
    present = {column for row in rows for column in row.values}
    columns = _columns(present)
    if "messages" in present:
        return _chat(name, "messages", tokenizer)
    if any(_listed(row.values.get("conversations")) for row in rows):
        return _chat(name, "conversations", tokenizer)
    if columns.choices and (spec := _keyed_choice(name, columns.choices, rows)):
        return spec
    if columns.choices and columns.question and columns.answer:
        return _choice(name, columns, rows)
    if columns.question and "answer_text" not in present and (spec := _lettered_choice(name, columns.question, rows)):
        return spec
    if {"text", "label"} <= present:
        return _classification(name, rows)
    if {"prompt", "completion"} <= present:
        if any(isinstance(row.values.get("prompt"), list) for row in rows):
            return _chat(name, "(prompt + completion)", tokenizer)
        return TaskSpec(name=name, kind="generation", prompt=_required("prompt"), target=_GLUED, delimiter="")
    if {"instruction", "output"} <= present:
        prompt = f"Question: {_required('instruction')}{_INPUT}\nAnswer:"
        return TaskSpec(name=name, kind="generation", prompt=prompt, target=_required("output"))
    if columns.question and columns.answer:
        _refuse_unread_choices(name, columns, rows)
        return _answers(name, columns)
    if "text" in present:
        spec = TaskSpec(name=name, kind="text", target="{{ text }}")
        refuse_labelled_texts(name, spec, rows)
        return spec
    unknown = f"{name}: cannot tell the task from the columns {', '.join(sorted(present))}"
    if near := renames(rows):
        raise InputError(f"{unknown}: rename {near}, or name the columns in a task YAML (--task my.yaml)")
    raise InputError(
        f"{unknown}; recognized are {RECOGNIZED}; rename the columns or name them in a task YAML (--task my.yaml)"
    )


def without_shared_context(spec: TaskSpec, rows: Collection[Row], notes: list[str]) -> TaskSpec:
    """A recognized spec that does not group by `context` where the context is an instruction rather than a passage.

    Grouping by a text that half of the rows share would put all of them on one side of every split.
    """
    counts = Counter(str(row.values["context"]) for row in rows if row.values.get("context"))
    if spec.group is None or not counts:
        return spec
    most, total = max(counts.values()), counts.total()
    if 2 * most < len(rows) and (len(counts) >= _PASSAGES or total <= _PASSAGES * len(counts)):
        return spec
    notes.append(
        f"column 'context' has {len(counts):,} different values in {total:,} rows, one of them in {most:,}: taken as "
        "an instruction, so rows that share it may stand on both sides of a split"
    )
    return spec.model_copy(update={"group": None})


def labelled(rows: Collection[Row], spec: TaskSpec) -> bool:
    """Whether any row of a choice split has an answer (test sets are often published without): in the column that the
    task reads, or, where the rows lack that, in another one, which is to be renamed."""
    if spec.kind != "choice":
        return True
    template = str(spec.answer) if "{{" in str(spec.answer) else "{{ " + str(spec.answer) + " }}"
    read = meta.find_undeclared_variables(environment().parse(template))
    there = {column for row in rows for column in row.values}
    given = (row.values.get(column) for row in rows for column in read & there & {*_ANSWERS} or _ANSWERS)
    return any(not blank(value) and value not in (-1, "-1") for value in given)


def _columns(present: set[str]) -> Columns:
    def first(*names: str) -> str | None:
        return next((name for name in names if name in present), None)

    choices = first("choices", "options")
    answer = first("answer", "label") if choices else first("answer_text", "answer", "answers")
    return Columns(first("question", "input"), choices, answer)


def _listed(value: Any) -> bool:
    """Whether a cell is a list, also as JSON in a string."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _required(column: str) -> str:
    return "{{ " + column + f" | required('{column}')" + " }}"


def _choice(name: str, columns: Columns, rows: Iterable[Row]) -> TaskSpec:
    """Whether answers are indices, letters or texts is settled by all rows together."""
    question, choices, answer = (str(column) for column in columns)
    return TaskSpec(
        name=name,
        kind="choice",
        prompt=f"{_CONTEXT}Question: {_required(question)}\nAnswer:",
        choices=choices,
        answer=answer,
        answer_as=common_reading((row.values.get(answer), row.values.get(choices)) for row in rows),
        group=_GROUP,
    )


def _keyed_choice(name: str, choices: str, rows: Collection[Row]) -> TaskSpec | None:
    """Choices as `{"text": [...], "label": ["A", ...]}` and the label of the right one, as ARC and OpenBookQA have
    them; None if they are otherwise."""
    present = {column for row in rows for column in row.values}
    question = next((column for column in ("question", "question_stem", "input") if column in present), None)
    given = {column for row in rows for column in _ANSWERS if not blank(row.values.get(column))}
    answer = next((column for column in _ANSWERS if column in given), None)
    cells = [row.values.get(choices) for row in rows]
    if not (question and answer and cells) or not all(
        isinstance(each, dict) and each.keys() == _KEYED for each in cells
    ):
        return None
    return TaskSpec(
        name=name,
        kind="choice",
        prompt=f"{_CONTEXT}Question: {_required(question)}\nAnswer:",
        choices="{{ " + choices + ".text }}",
        answer="{{ " + f"{choices}.label | place_of({answer}, '{answer}')" + " }}",
        answer_as="index",
        group=_GROUP,
    )


def _lettered_choice(name: str, question: str, rows: Collection[Row]) -> TaskSpec | None:
    """Choices in columns of their own (A, B, C ...); those that a row leaves empty at the end it does not have. None
    where there are no such columns, or most answers are something else."""
    present = {column for row in rows for column in row.values}
    found = (list(takewhile(present.__contains__, options)) for options in _OPTIONS)
    letters = next((options for options in found if len(options) > 1), [])
    answer = next((column for column in ("answer", "label") if column in present), "")
    asked = [(row.values.get(answer), [v for x in letters if not blank(v := row.values.get(x))]) for row in rows]
    if letters[:1] == ["a"]:  # with numbers for answers, a and b may as well be what a sum adds
        asked = [each for each in asked if _worded(each[0])]
    if 2 * sum(names_one(*each) for each in asked) <= len(rows):
        return None
    listed = ", ".join(f"{letter} | default(none)" for letter in letters)
    names = ", ".join(map(repr, letters))
    return TaskSpec(
        name=name,
        kind="choice",
        prompt=f"{_CONTEXT}Question: {_required(question)}\nAnswer:",
        choices="{{ [" + listed + "] | filled(" + names + ") }}",
        answer=answer,
        answer_as=common_reading(asked),
        group=_GROUP,
    )


def _refuse_unread_choices(name: str, columns: Columns, rows: Collection[Row]) -> None:
    """Letters or small numbers as answers beside texts that nothing reads: choices in columns of other names.

    Raises:
        InputError: if there are two or more such columns.
    """
    cells = [(column, value) for row in rows for column, value in row.values.items()]
    read = {columns.question, columns.answer, "context"}
    unread = list(dict.fromkeys(column for column, value in cells if column not in read and _worded(value)))
    answers = {written(value) for column, value in cells if column == columns.answer and not blank(value)}
    short = {*string.ascii_letters, *map(str, range(len(unread) + 1))}
    if columns.answer == "answer" and len(unread) > 1 and answers and answers <= short:
        raise InputError(
            f"{name}: every 'answer' is a letter or a small number (such as {min(answers)!r}), and nothing reads the "
            f"columns {', '.join(unread)}: if they are choices, name them A, B, C ... or option_a, option_b ... "
            "(answers by letter, by text, or by index from 0); if not, drop them"
        )


def _worded(value: Any) -> bool:
    """Whether a cell is text, and no number."""
    try:
        float(value)
    except (TypeError, ValueError):
        return isinstance(value, str) and not blank(value)
    return False


def _answers(name: str, columns: Columns) -> TaskSpec:
    """Question and free answer; a list of answers, also as SQuAD has it, means that each is accepted and the first is
    learned."""
    question, answer = str(columns.question), str(columns.answer)
    given = f"{answer} | accepted('{answer}')"
    return TaskSpec(
        name=name,
        kind="generation",
        prompt=f"{_CONTEXT}Question: {_required(question)}\nAnswer:",
        target="{{ " + given + f" | first | default('') | required('{answer}')" + " }}",
        references="{{ " + given + " }}",
        group=_GROUP,
    )


def _chat(name: str, messages: str, tokenizer: Any) -> TaskSpec:
    """With a chat template the answer follows its text directly; in the plain transcript it follows `Assistant: `."""
    return TaskSpec(
        name=name,
        kind="generation",
        prompt="{{ " + messages + " | chat_prompt }}",
        target="{{ " + messages + " | chat_answer }}",
        delimiter="" if has_template(tokenizer) else " ",
    )


def _classification(name: str, rows: Iterable[Row]) -> TaskSpec:
    """Every label becomes a choice. Underscores become spaces where that keeps the labels apart: words score fairly."""
    for row in rows:
        if not isinstance(row.values.get("label", ""), str | int | float | None):
            raise InputError(f"{row.place}: field 'label' must be one text or number, not several")
    labels = {label for row in rows if not blank(label := row.values.get("label"))}
    names = list(dict.fromkeys(str(label).strip() for label in sorted(labels, key=_label_order)))
    if len(names) < 2:
        what = f"is {names[0]!r} in every row" if names else "is empty in every row"
        raise InputError(f"{name}: column 'label' {what}: give rows with two labels at the least")
    readable = [label.replace("_", " ") for label in names]
    plain = len(set(readable)) < len(names)
    return TaskSpec(
        name=name,
        kind="choice",
        prompt=f"{_required('text')}\nCategory:",
        choices=[_literally(label) for label in (names if plain else readable)],
        answer=_required("label") if plain else "{{ (label | required('label') | string).replace('_', ' ') }}",
        answer_as="text",
    )


def _literally(text: str) -> str:
    """The entry of a spec's choices that gives this text, also where it would be taken for a template."""
    return "{{ " + repr(text) + " }}" if "{{" in text else text


def _label_order(label: Any) -> tuple[bool, float, str]:
    """Numbers by size before texts by alphabet."""
    number = isinstance(label, int | float)
    return not number, label if number else 0, str(label).strip()
