"""Which choice a row's `answer` names: by index, by letter, or by the choice's own text."""

from __future__ import annotations

from typing import Any

from trimllm.errors import InputError


def answer_index(answer: Any, choices: tuple[str, ...], answer_as: str, place: str) -> int:
    """Index into `choices`. Numbers are indices; strings are tried as text, letter and index.

    `answer_as` (index, letter or text) says which of these it is; "auto" does not.

    Raises:
        InputError: if the answer is out of range, names no choice, or names two different ones.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and answer_as in ("auto", "index"):
        return _in_range(int(answer), choices, place)
    text = str(answer).strip()
    readings = _readings(text, choices)
    if answer_as != "auto":
        readings = {answer_as: readings[answer_as]} if answer_as in readings else {}
    if not readings:
        raise InputError(
            f"{place}: field 'answer' is {text!r}, which is no index, letter or text of the choices {_shown(choices)}"
        )
    if len(set(readings.values())) > 1:
        both = " and ".join(f"choice {index} by {kind}" for kind, index in readings.items())
        raise InputError(f"{place}: field 'answer' {text!r} names {both}; say which with answer_as in a task YAML")
    return _in_range(next(iter(readings.values())), choices, place)


def _readings(text: str, choices: tuple[str, ...]) -> dict[str, int]:
    """Every way the string can be meant."""
    readings = {}
    stripped = [choice.strip() for choice in choices]
    if text in stripped:
        readings["text"] = stripped.index(text)
    if len(text) == 1 and "A" <= text.upper() <= "Z":
        readings["letter"] = ord(text.upper()) - ord("A")
    if text.removeprefix("-").isdecimal():
        readings["index"] = int(text)
    if (
        "text" in readings and len(readings) > 1
    ):  # a choice reads "7" or "x" by chance: the impossible index is no rival
        readings = {kind: index for kind, index in readings.items() if kind == "text" or 0 <= index < len(choices)}
    return readings


def _shown(choices: tuple[str, ...]) -> str:
    """The choices as an error shows them: not all of seventy."""
    return ", ".join(repr(choice) for choice in choices[:5]) + (
        f" and {len(choices) - 5} more" if len(choices) > 5 else ""
    )


def _in_range(index: int, choices: tuple[str, ...], place: str) -> int:
    if not 0 <= index < len(choices):
        raise InputError(
            f"{place}: field 'answer' is {index}, but there are {len(choices)} choices (0 to {len(choices) - 1})"
        )
    return index
