"""Columns of own data that are not what they seem: nearly the right names, labels by other names, unread ones."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable

from jinja2 import meta

from trimllm.errors import InputError
from trimllm.tasks.answers import answer_index, read_list
from trimllm.tasks.render import environment
from trimllm.tasks.rows import Row, blank
from trimllm.tasks.spec import TaskSpec

_SHAPES = (
    ("messages",),
    ("text", "label"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
)
_ASKED = ("question", "input")
_ACCEPTED = {"question": _ASKED, "answer": ("answer", "answer_text", "answers")}
"""Names that are read, where there are several."""
_LABELS = ("label", "labels", "category", "categories", "class", "classes", "target", "answer")
"""What a column of labels is called; others (`source`, `type`) are as often something else."""
_NEAR = {
    "messages": ("conversation", "dialogue", "dialog", "chat"),
    "text": ("sentence", "clause", "document", "content", *_ASKED),
    "label": ("category", "class", "target", "type", "topic", "intent", "sentiment"),
    "completion": ("response", "output", "answer"),
    "output": ("response", "completion", "answer"),
    "answer": ("answerkey", "answeridx", "correctanswer", "correct", "cop", "label", "output", "response"),
}
"""What others call it, in small letters alone."""
_OPTION = re.compile(r"(option|opt|op|choice)?_?[a-d]", re.IGNORECASE)
"""What columns that hold a choice each are called."""
_BRACED = re.compile(r"(?<!\{)\{\s*([^\W\d]\w*)\s*\}(?!\})")
"""A name in single braces."""
_OTHER_BRACES = re.compile(
    r"\{%[-+]?\s*raw\s*[-+]?%\}.*?\{%[-+]?\s*endraw\s*[-+]?%\}|\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}"
    r"|\\[A-Za-z]+(?:\{[^{}]*\})+|[_^]\{\w+\}",
    re.DOTALL,
)
"""What is Jinja in a template, or escaped in it, and what is LaTeX."""
_SHOWN = 8
_LONGEST_LABEL = 60
_MOST_LABELS = 200
_FEW = 10
"""Written answers that are no more than this may be meant as choices."""
_ENOUGH = 20
"""Rows from which on what is in none of them says something."""


def renames(rows: Iterable[Row]) -> str:
    """`'sentence' to 'text' and 'class' to 'label'`: the fewest new names that make a task; empty if none do."""
    return " and ".join(f"{column!r} to {name!r}" for column, name in _new_names(rows))


def respelled(parts: dict[str, list[Row]], notes: list[str]) -> dict[str, list[Row]] | None:
    """The rows with columns called as they are read, and a note, where only case and signs are to be changed (`Text`
    and `Label`); else None."""
    pairs = dict(_new_names(parts.get("train") or next(iter(parts.values()))))
    if not pairs or any(_plain(column) != _plain(name) for column, name in pairs.items()):
        return None
    notes.append("columns read: " + ", ".join(f"{column!r} as {name!r}" for column, name in pairs.items()))

    def read(row: Row) -> Row:
        return row._replace(values={pairs.get(column, column): value for column, value in row.values.items()})

    return {part: list(map(read, rows)) for part, rows in parts.items()}


def _new_names(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """(column, its new name): the fewest that make a task."""
    values = [(column, value) for row in rows for column, value in row.values.items()]
    nested = {column for column, value in values if isinstance(value, dict)}
    columns = sorted({column for column, _ in values} - nested)
    shapes = [shape for shape in _SHAPES if "answer" not in shape or not nested & {"choices", "options"}]
    found = [pairs for shape in shapes if (pairs := _fitted(shape, columns))]
    return min(found, key=len) if found else _fitted(("text",), [each for each in columns if each not in _ASKED])


def unread(spec: TaskSpec, rows: Collection[Row]) -> list[str]:
    """The columns, in the order of the rows, that no template of a recognized spec names."""
    templates = [
        each
        for each in (spec.prompt, spec.choices, spec.answer, spec.target, spec.references, spec.group)
        if isinstance(each, str)
    ]
    read = meta.find_undeclared_variables(environment().parse("\n".join(templates))) | set(templates)
    if spec.answer == "answer" and isinstance(spec.choices, str) and spec.choices.isidentifier():
        read.add("answer_idx")
    return [column for column in dict.fromkeys(column for row in rows for column in row.values) if column not in read]


def unread_note(spec: TaskSpec, rows: Collection[Row]) -> list[str]:
    """A note that names them, if there are any."""
    columns = unread(spec, rows)
    if not columns:
        return []
    doubt = spec.kind == "text" and any(_named_like_labels(each) or _like_labels(each, rows) for each in columns)
    hint = " (if one of them holds labels, rename it to 'label')" if doubt else ""
    if spec.kind == "generation" and len([each for each in columns if _OPTION.fullmatch(each)]) > 1:
        hint = " (if they are choices: most answers name none of them, by letter, text or index from 0)"
    return [f"columns not read: {shortened(columns, _SHOWN)}{hint}"]


def refuse_single_braces(spec: TaskSpec, rows: Iterable[Row]) -> None:
    """Columns in single braces are not columns: the model would read their names.

    Raises:
        InputError: if a template of the spec has the name of a column in such.
    """
    columns = {column for row in rows for column in row.values}
    fields = (spec.prompt, spec.target, spec.answer, spec.group, spec.choices, spec.references)
    each = [one for field in fields for one in (field if isinstance(field, list) else [field]) if isinstance(one, str)]
    for template in each:
        for found in _BRACED.finditer(_OTHER_BRACES.sub(" ", template)):
            if found[1] in columns:
                raise InputError(
                    f"task {spec.name!r}: {found[0]} is read as it stands: columns stand in double braces, as in "
                    f"{{{{ {found[1]} }}}} (to have the braces: {{% raw %}}{found[0]}{{% endraw %}})"
                )


def named_choices_note(spec: TaskSpec, rows: Iterable[Row]) -> list[str]:
    """A note where a list of choices is one of columns' names: are these words meant, or what stands in the columns?"""
    choices = spec.choices if isinstance(spec.choices, list) else []
    if not choices or not {column for row in rows for column in row.values}.issuperset(map(str, choices)):
        return []
    names = [each if str(each).isidentifier() else f"row[{each!r}]" for each in choices]
    return [
        f"choices are the words {shortened([*map(str, choices)], _SHOWN)}: to have what stands in the columns of these "
        f'names, write choices: "{{{{ [{", ".join(map(str, names))}] }}}}"'
    ]


def refuse_labelled_texts(name: str, spec: TaskSpec, rows: Collection[Row]) -> None:
    """Texts beside labels that nothing reads are to be classified, not learned.

    Raises:
        InputError: if there is a column that is called like labels and looks like them.
    """
    for column in unread(spec, rows):
        called = _plain(column) == "label" and any(not blank(row.values.get(column)) for row in rows)
        if called or (_named_like_labels(column) and _like_labels(column, rows)):
            raise InputError(
                f"{name}: column {column!r} looks like labels, and nothing reads it: rename it to 'label', or, to "
                "learn the texts, give a task YAML of kind text"
            )


def contradictions_note(spec: TaskSpec, rows: Iterable[Row]) -> list[str]:
    """A note on rows whose `answer_idx` (a letter beside the answer's text) is another choice, if there are any."""
    asked = [row for row in rows if "answer_idx" in row.values] if spec.answer == "answer" else []
    places = [row.place for row in asked if _contradicts(row, spec)]
    if not places:
        return []
    share = f"in {len(places):,} of {len(asked):,} rows"
    return [f"{share} 'answer_idx' is another choice than 'answer', which counts (first: {places[0]})"]


def one_based_note(spec: TaskSpec, rows: Collection[Row]) -> list[str]:
    """A note where no answer by index is the first choice: they may count from 1."""
    if spec.answer_as != "index" or not isinstance(spec.answer, str) or len(rows) < _ENOUGH:
        return []
    values = {str(value).removesuffix(".0") for row in rows if not blank(value := row.values.get(spec.answer))}
    if not values or "0" in values:
        return []
    doubt = "if these count from 1, every one is read wrong: subtract one from each"
    return [f"no '{spec.answer}' is 0, the first choice: answers count from 0; {doubt}"]


def few_answers_note(spec: TaskSpec, rows: Collection[Row]) -> list[str]:
    """A note where written answers are the same few again and again: they may be meant as choices."""
    read = re.search(r"accepted\('(\w+)'\)", str(spec.target))
    if read is None or len(rows) < _ENOUGH or any(not blank(row.values.get("context")) for row in rows):
        return []
    column = read[1]
    if not _like_labels(column, rows):
        return []
    texts = sorted({str(row.values[column]).strip() for row in rows if not blank(row.values.get(column))})
    if len(texts) > _FEW:
        return []
    return [
        f"answers are to be written, though all are among {len(texts)} ({shortened(texts, 3)}): to have these as "
        "choices, rename the columns to 'text' and 'label'"
    ]


def doubtful_labels_note(spec: TaskSpec, rows: Iterable[Row]) -> list[str]:
    """Notes on labels that say nothing, differ in case alone, or stand in one row."""
    labels = spec.choices if isinstance(spec.choices, list) else []
    counts = Counter(str(row.values.get("label")).strip() for row in rows) if labels else {}
    once = sum(count == 1 for count in counts.values())
    notes = [f"{label!r} is a label like any other: drop its rows if it means none" for label in labels if _none(label)]
    by_case: dict[str, list[str]] = {}
    for label in labels:
        by_case.setdefault(label.casefold(), []).append(label)
    same = [alike for alike in by_case.values() if len(alike) > 1]
    if 2 * once > len(labels):
        notes.append(f"{once:,} of {len(labels):,} labels stand in one row, from which they can hardly be learned")
    return notes + [f"labels that differ in case alone: {', '.join(map(repr, alike))}" for alike in same]


def _none(label: str) -> bool:
    return label.casefold() in ("nan", "none", "null", "n/a", "na")


def shortened(names: list[str], most: int) -> str:
    """Names as a note shows them: not all of seventy."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _contradicts(row: Row, spec: TaskSpec) -> bool:
    choices = tuple(map(str, read_list(row.values.get(str(spec.choices)))))
    try:
        letter = answer_index(row.values["answer_idx"], choices, "auto", row.place)
        return choices[letter] != choices[answer_index(row.values.get("answer"), choices, spec.answer_as, row.place)]
    except InputError:  # of the answer it is raised where the row is used
        return False


def _fitted(shape: Iterable[str], columns: list[str]) -> list[tuple[str, str]]:
    """(column, its new name) for what a shape lacks; empty if no column comes near."""
    left, pairs = list(columns), []
    for role in shape:
        pair = _nearest(role, left)
        if pair is None:
            return []
        left.remove(pair[0])
        pairs.append(pair)
    return [(column, name) for column, name in pairs if column != name]


def _nearest(role: str, columns: list[str]) -> tuple[str, str] | None:
    """(column, the name it should have): the one so called, save for case and signs, or called by another word."""
    accepted = _ACCEPTED.get(role, (role,))
    plain = {_plain(column): column for column in columns}
    alike = [(column, name) for name in accepted for column in (name, plain.get(_plain(name))) if column in columns]
    if alike:
        return alike[0]
    near = [name for name in _NEAR.get(role, ()) if name in plain]
    near += difflib.get_close_matches(role, plain, n=1, cutoff=0.8)
    return (plain[near[0]], role) if near else None


def _plain(column: str) -> str:
    return re.sub(r"[\W_]+", "", column.lower())


def _named_like_labels(column: str) -> bool:
    return _plain(column) in _LABELS


def _like_labels(column: str, rows: Iterable[Row]) -> bool:
    """Short values, each of them several times."""
    values = [value for row in rows if not blank(value := row.values.get(column))]
    if not all(isinstance(value, str | int | float) for value in values):
        return False
    texts = {str(value).strip() for value in values}
    return 2 <= len(texts) <= _MOST_LABELS and 3 * len(texts) <= len(values) and max(map(len, texts)) <= _LONGEST_LABEL
