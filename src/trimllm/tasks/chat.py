"""A dialogue as prompt and target: the last assistant message is learned, everything before it is the prompt."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from trimllm.errors import one_line

ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
"""Roles as data in ShareGPT's form has them, beside keys `from` and `value`."""


TODAY = datetime(2024, 7, 26)
"""For templates that print the date (it is what Llama 3's say without a clock): rows read the same on every day."""
_NOW = re.compile(r"""strftime_now\((["'])(.*?)\1\)""")
_TAG = "(think|thinking|thought|reasoning)"
_THOUGHTS_END = re.compile(f"</{_TAG}>")
_THINKING = re.compile(rf"<{_TAG}>\s*\Z")
"""Where a chat template has the assistant begin to think (DeepSeek R1's, Qwen 3's for thinking models)."""
_STAND_IN = "TheAnswerStandsHere"


def _dated(tokenizer: Any) -> dict[str, str]:
    """The tokenizer's chat template with that date, as an argument of its `apply_chat_template`; none if it has no use
    for it."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" not in template:
        return {}
    return {"chat_template": _NOW.sub(lambda call: repr(TODAY.strftime(call[2])), template)}


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer brings a chat template of its own."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_prompt(messages: Any, tokenizer: Any = None) -> str:
    """Everything before the last assistant message, ending where the assistant begins to speak.

    With a chat template this is the template's own text, less a leading BOS where the tokenizer puts one there itself;
    without one a plain transcript.

    Raises:
        ValueError: if the messages are malformed or none is the assistant's.
    """
    turns = _turns(messages)[: _last(messages)]
    if not has_template(tokenizer):
        lines = [f"{ROLES.get(turn['role'], turn['role'])}: {turn['content']}\n" for turn in turns]
        return "".join(lines) + "Assistant:"
    return _rendered(turns, tokenizer, begins=True)


def chat_answer(messages: Any, tokenizer: Any = None) -> str:
    """The last assistant message as it goes on from the prompt: after what a chat template puts between the two (a
    blank, thoughts, or the end of none), and without a second beginning of thoughts that the prompt ends in."""
    turns = _turns(messages)[: _last(messages) + 1]
    answer = str(turns[-1]["content"]).strip()
    if not has_template(tokenizer):
        return answer
    prompt = chat_prompt(messages, tokenizer)
    thinking, thought = _THINKING.search(prompt), _THOUGHTS_END.search(answer)
    if thinking and thought:
        return answer.removeprefix(f"<{thinking[1]}>").lstrip()
    whole = _rendered([*turns[:-1], turns[-1] | {"content": _STAND_IN}], tokenizer, begins=False)
    before, found, _ = whole.partition(_STAND_IN)
    between = f"\n</{thinking[1]}>\n\n" if thinking else ""
    if found and before.startswith(prompt):
        between = before.removeprefix(prompt)
    return answer if thought and not between.isspace() else between + answer


def _rendered(turns: list[dict[str, Any]], tokenizer: Any, *, begins: bool) -> str:
    """The template's text, less a leading BOS where the tokenizer puts one there itself; with `begins` as far as where
    the assistant begins to speak."""
    try:
        made = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begins, **_dated(tokenizer))
    except TemplateError as error:
        raise ValueError(f"the model's chat template cannot write it ({one_line(error)})") from error
    text = str(made)
    start = tokenizer.bos_token or ""
    adds = bool(start) and tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(start) if adds else text


def _turns(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, str):
        messages = json.loads(messages)
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            "messages must be a list such as [{role: user, content: ...}, {role: assistant, content: ...}]"
        )
    messages = [_turn(_copied(turn)) for turn in messages]
    for number, turn in enumerate(messages):
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise ValueError(f"message {number} needs 'role' and 'content' (or 'from' and 'value'), both text")
    return messages


def _copied(value: Any) -> Any:
    """A row's value as plain lists and dicts: a chat template may write them as it likes."""
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def _turn(turn: Any) -> Any:
    """A message as chat templates have it."""
    if not isinstance(turn, dict) or "role" in turn or not {"from", "value"} <= turn.keys():
        return turn
    return {"role": _SHAREGPT.get(turn["from"], turn["from"]), "content": turn["value"]}


def _last(messages: Any) -> int:
    """Index of the last assistant message."""
    turns = _turns(messages)
    found = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not found or found[-1] == 0:
        raise ValueError("no assistant message that answers something; the last one is what is learned")
    return found[-1]
