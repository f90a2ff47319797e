"""Which choice a row's `answer` names: by index, by letter, or by the choice's own text."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal

from trimllm.errors import InputError
from trimllm.tasks.rows import blank

Reading = Literal["index", "letter", "text"]
AnswerAs = Literal["auto", "index", "letter", "text"]
READINGS: tuple[Reading, ...] = ("index", "letter", "text")
_LETTER = re.compile(r"(?:(?:option|choice)\s*)?[(\[]?([a-z])[)\].:]?", re.IGNORECASE)
"""`B` as people write it: `b`, `B.`, `(B)`, `option B`."""


def answer_index(
    answer: Any,
    choices: tuple[str, ...],
    answer_as: AnswerAs,
    place: str,
    field: str = "answer",
    remedy: str = "",
) -> int:
    """Index into `choices`. The answer is tried as text, letter and index; a truth value (`true`) as text only.

    `answer_as` (index, letter or text) says which of these it is; "auto" does not. `field` is what the user calls it;
    `remedy`, for one that names no choice.

    Raises:
        InputError: if the answer is out of range, names no choice, or names two different ones.
    """
    text = written(answer)
    if not text:
        raise InputError(f"{place}: field '{field}' is empty; fill it in or drop the row")
    readings = _readings(answer, choices)
    if answer_as != "auto":
        readings = {answer_as: readings[answer_as]} if answer_as in readings else {}
    if not readings:
        wanted = "index, letter or text" if answer_as == "auto" else answer_as
        raise InputError(
            f"{place}: field '{field}' is {text!r}, which is no {wanted} of the choices {_shown(choices)}{remedy}"
        )
    if len(set(readings.values())) > 1:
        both = " and ".join(f"choice {index} by {kind}" for kind, index in readings.items())
        raise InputError(f"{place}: field '{field}' {text!r} names {both}; say which with answer_as in a task YAML")
    index = next(iter(readings.values()))
    if not 0 <= index < len(choices):
        last = chr(ord("A") + len(choices) - 1) if "letter" in readings else len(choices) - 1
        first = "A" if "letter" in readings else 0
        hint = "; answers count from 0" if "index" in readings and index == len(choices) else ""
        raise InputError(
            f"{place}: field '{field}' is {text}, but there are {len(choices)} choices ({first} to {last}){hint}"
        )
    return index


def common_reading(rows: Iterable[tuple[Any, Any]]) -> AnswerAs:
    """The one reading that fits every row's (answer, choices); "auto" if none or several do."""
    common = set(READINGS)
    for answer, choices in rows:
        texts = tuple(str(choice) for choice in read_list(choices))
        fits = _readings(answer, texts)
        common &= {kind for kind, index in fits.items() if 0 <= index < len(texts)}
    return next(iter(common)) if len(common) == 1 else "auto"


def names_one(answer: Any, choices: list[Any]) -> bool:
    """Whether an answer can be meant as one of two or more choices."""
    readings = _readings(answer, tuple(map(str, choices)))
    return len(choices) > 1 and any(0 <= index < len(choices) for index in readings.values())


def written(answer: Any) -> str:
    """An answer as text; 2.0 is 2, since whole numbers with gaps between them are often kept as floats."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return "" if answer is None else str(answer).strip()


def accepted(value: Any, column: str) -> list[Any]:
    """Every answer that counts, the first of which is learned: a text or number, a list of them, or SQuAD's
    `{"text": [...]}` or `[{"text": ...}]`. In a column `answers`, a list or object may be JSON in a string.

    Raises:
        ValueError: if such a string is not JSON.
    """
    if column == "answers" and isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
        if isinstance(value, str) and _as_python_writes_it(value):
            raise ValueError(
                f'field \'{column}\' is a list or an object as Python writes it: write JSON, as in ["one", "another"]'
            )
    if isinstance(value, dict):
        value = value.get("text")
    values = value if isinstance(value, list | tuple) else [] if value is None else [str(value)]
    return [each.get("text") if isinstance(each, dict) else each for each in values]


def _as_python_writes_it(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), list | dict)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return re.match(r"\s*(\[|\{'text': )\s*array\(", text) is not None


def read_list(value: Any) -> list[Any]:
    """A list, or texts by letter, also as JSON in a string (a CSV cell); empty for anything else."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return []
    value = by_letter(value)
    return list(value) if isinstance(value, list | tuple) else []


def by_letter(value: Any) -> Any:
    """The texts of `{"A": "yes", "B": "no"}` by letter, without empty ones at the end; anything else as it is."""
    texts = {str(key).strip().upper(): text for key, text in value.items()} if isinstance(value, dict) else {}
    if not texts or sorted(texts) != list(string.ascii_uppercase[: len(texts)]):
        return value
    return without_blank_end([texts[letter] for letter in sorted(texts)])


def without_blank_end(values: list[Any]) -> list[Any]:
    """The values without the empty ones at the end."""
    last = max((n for n, value in enumerate(values, 1) if not blank(value)), default=0)
    return values[:last]


def _readings(answer: Any, choices: tuple[str, ...]) -> dict[Reading, int]:
    """Every way the answer can be meant."""
    readings: dict[Reading, int] = {}
    if answer is None:
        return readings
    stripped, text = [choice.strip() for choice in choices], written(answer)
    whole = [choice.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", choice) else choice for choice in stripped]
    for literal, texts in ((str(answer).strip(), stripped), (text, stripped), (text, whole)):  # 2.0 is 2, 2 is 2.0
        if literal and literal in texts:
            readings["text"] = texts.index(literal)
            break
    if (letter := _LETTER.fullmatch(text)) and (len(text) == 1 or "text" not in readings):
        readings["letter"] = ord(letter[1].upper()) - ord("A")
    if text.removeprefix("-").isdecimal():
        readings["index"] = int(text)
    if "text" in readings and len(readings) > 1:
        # A choice reads "7" or "x" by chance: the impossible index is no rival.
        readings = {kind: index for kind, index in readings.items() if kind == "text" or 0 <= index < len(choices)}
    return readings


def _shown(choices: tuple[str, ...]) -> str:
    """The choices as an error shows them: not all of seventy."""
    return ", ".join(repr(choice) for choice in choices[:5]) + (
        f" and {len(choices) - 5} more" if len(choices) > 5 else ""
    )
