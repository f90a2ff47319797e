"""Rows into items: the templates of a spec, applied to one row after the other."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Sequence, ValuesView
from functools import lru_cache, wraps
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined, UndefinedError
from jinja2.sandbox import SandboxedEnvironment

from trimllm.errors import InputError, one_line
from trimllm.tasks.answers import accepted, answer_index, by_letter, without_blank_end, written
from trimllm.tasks.chat import chat_answer, chat_prompt
from trimllm.tasks.items import Item
from trimllm.tasks.rows import Row, blank
from trimllm.tasks.spec import TaskSpec

Column = Callable[[dict[str, Any]], Any]
"""What a compiled template or expression is: a function of a row's values."""

NESTED = (dict, list, tuple, bytes)
"""What is no text, and would be written as Python writes it."""
_OF_TEXT = ("string", "trim", "lower", "upper", "title", "capitalize", "replace", "truncate", "pprint", "indent")
_SHOWN = 60
_COLUMN = re.compile(r"(?:\{\{\s*\(?\s*(?=\w+\s*\|))?([^\W\d]\w*)(?=$|\s*\|)")
"""A column alone, or one that an expression begins with and filters."""
_EXPRESSION = re.compile(r"\s*\{\{((?:(?!\}\}|\{\{|\{%).)*)\}\}\s*", re.DOTALL)


_FAILS = (ValueError, LookupError, SyntaxError, AttributeError, ArithmeticError, RecursionError, re.error)
"""What else than Jinja's own errors templates end with."""


class Renderer:
    """The compiled templates of one spec; `item` turns a row into an item.

    A tokenizer is only used for its chat template (`chat_prompt` filter). `remedy` is what to do about an answer that
    names no choice.
    """

    def __init__(self, spec: TaskSpec, tokenizer: Any = None, remedy: str = "") -> None:
        self.spec = spec
        self._remedy = remedy
        self._environment = environment(tokenizer)
        self._where = self._condition(spec.where) if spec.where else None
        self._prompt = self._text(spec.prompt)
        self._target = self._text(spec.target or "")
        self._group = self._value(spec.group) if spec.group else None
        self._choices = self._values(spec.choices or [])
        self._answer = self._value(spec.answer)
        self._answer_name = _column_of(spec.answer) or "answer"
        self._choices_name = _column_of(spec.choices) or "choices"
        self._references = self._values(spec.references) if spec.references else None

    def keeps(self, row: Row) -> bool:
        """Whether the row is part of the task (`where`)."""
        return self._where is None or bool(self._apply("where", self._where, row))

    def item(self, row: Row) -> Item:
        """The row as the model sees it.

        Raises:
            InputError: if a column is missing, a prompt, choice or target is empty, or the answer names no choice.
        """
        build = {"choice": self._choice, "generation": self._generation, "text": self._document}[self.spec.kind]
        nested = any(isinstance(value, NESTED) for value in row.values.values())
        item = build(row._replace(values=_guarded(row.values)) if nested else row, self._group_of(row))
        for text in (item.prompt, *item.continuations, *item.references):
            check_whole(text, row.place)
        return item

    def _choice(self, row: Row, group: str | None) -> Item:
        prompt = self._filled("prompt", self._prompt, row)
        choices = _texts(self._apply("choices", self._choices, row), self._choices_name, row.place)
        if len(choices) == 1:
            raise InputError(
                f"{row.place}: field '{self._choices_name}' has one entry, which is always right: give several, or "
                "drop the row"
            )
        given = self._apply("answer", self._answer, row)
        if isinstance(given, NESTED):
            raise InputError(f"{row.place}: field '{self._answer_name}' {not_text(given)}")
        answer = answer_index(given, choices, self.spec.answer_as, row.place, self._answer_name, self._remedy)
        return Item(
            place=row.place,
            prompt=prompt,
            continuations=_continuations(self.spec.delimiter, choices),
            answer=answer,
            lengths=tuple(len(choice) for choice in choices),
            group=group,
        )

    def _generation(self, row: Row, group: str | None) -> Item:
        prompt = self._filled("prompt", self._prompt, row)
        target = self._filled("target", self._target, row)
        references: tuple[str, ...] = (target.strip(),)
        if self._references is not None:
            references = _texts(self._apply("references", self._references, row), "references", row.place, single=True)
        continuation = self.spec.delimiter + target
        return Item(row.place, prompt, (continuation,), lengths=(len(target),), references=references, group=group)

    def _document(self, row: Row, group: str | None) -> Item:
        text = self._filled("target", self._target, row)
        return Item(row.place, "", (text,), lengths=(len(text),), group=group)

    def _group_of(self, row: Row) -> str | None:
        """The key of the row's group; a list or an object is one as it stands."""
        if self._group is None:
            return None
        key = self._apply("group", self._group, row)
        if key is None:
            raise InputError(f"{row.place}: cannot make the group: a column it uses is null")
        return (repr(key) if isinstance(key, NESTED) else str(key)) or None

    def _filled(self, field: str, template: Column, row: Row) -> str:
        """A rendered template that must not come out blank."""
        text = str(self._apply(field, template, row))
        if not text.strip():
            raise InputError(f"{row.place}: the {field} is empty; fill it in or drop the row")
        return text

    def _apply(self, field: str, template: Column, row: Row) -> Any:
        """Calls a template; whatever goes wrong inside becomes one line that names the row and the field."""
        try:
            value = template({"row": row.values, **row.values})
            for each in (value, *value) if isinstance(value, list | tuple) else (value,):
                if isinstance(each, Undefined):
                    each._fail_with_undefined_error()
            return value
        except UndefinedError as error:
            found, odd = ", ".join(map(str, row.values)), [c for c in row.values if not str(c).isidentifier()]
            hint = f" (in a template: row[{odd[0]!r}])" if odd else ""
            raise InputError(
                f"{row.place}: no value for the {field}: {error.message}; columns found: {found}{hint}"
            ) from error
        except TypeError as error:
            numbers = "not supported between" in str(error) and "'str'" in str(error)
            hint = ": cells may be text: write NAME | int for a number" if numbers else ""
            raise InputError(f"{row.place}: cannot make the {field}: {one_line(error)}{hint}") from error
        except (*_FAILS, TemplateError) as error:
            raise InputError(f"{row.place}: cannot make the {field}: {one_line(error)}") from error

    def _text(self, template: str) -> Column:
        """A template that renders to a string; a bare word is the column of that name."""
        if template.isidentifier():
            return self._compile("{{ " + template + " }}")
        return self._compile(template)

    def _compile(self, template: str) -> Column:
        try:
            return self._environment.from_string(template).render
        except TemplateError as error:
            raise InputError(f"task {self.spec.name!r}: template {template!r} is not valid Jinja: {error}") from error

    def _value(self, template: Any) -> Column:
        """An expression that keeps its type (a list stays a list); anything that is not a string is itself."""
        if not isinstance(template, str):
            return lambda _: template
        match = _EXPRESSION.fullmatch(template)
        if match is None and "{" in template:
            return self._compile(template)
        expression = match[1] if match else template
        try:
            return self._environment.compile_expression(expression, undefined_to_none=False)
        except TemplateError as error:
            raise InputError(f"task {self.spec.name!r}: {expression!r} is not a valid expression: {error}") from error

    def _condition(self, template: str) -> Column:
        """An expression, in double braces or without; text, which nearly always holds, is refused."""
        match = re.fullmatch(r"\s*\{\{(.*)\}\}\s*", template, re.DOTALL)
        try:
            return self._environment.compile_expression(match[1] if match else template, undefined_to_none=False)
        except TemplateError as error:
            raise InputError(
                f"task {self.spec.name!r}: where {template!r} is no expression ({error}): write one, as in "
                "jurisdiction == 'UK'"
            ) from error

    def _values(self, template: str | list[Any]) -> Column:
        """A list: by one expression, or one entry at a time (entries with `{{` are templates, others plain text)."""
        if isinstance(template, str):
            return self._value(template)
        entries = [self._compile(each) if isinstance(each, str) and "{{" in each else each for each in template]
        return lambda values: [each(values) if callable(each) else each for each in entries]


def _column_of(template: Any) -> str | None:
    """The column that an expression is, or begins with."""
    named = _COLUMN.match(template) if isinstance(template, str) else None
    return named[1] if named else None


@lru_cache(maxsize=1)
def _continuations(delimiter: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """The choices as they follow the prompt; rows with the same choices (all labels) share one tuple."""
    return tuple(delimiter + choice for choice in choices)


def _texts(values: Any, field: str, place: str, *, single: bool = False) -> tuple[str, ...]:
    """A list of non-blank strings; a string is read as JSON, as a CSV cell holds it. A `single` text may stand for a
    list of one, texts by letter for one of several."""
    if isinstance(values, str) and values.lstrip().startswith("[" if single else ("[", "{")):
        try:
            values = json.loads(values)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{place}: field '{field}' is not a valid JSON list ({error.msg}; texts stand in double quotes); fix "
                "the cell"
            ) from error
    if single and isinstance(values, str):
        values = [values]
    if not single:
        values = by_letter(values)
    if not isinstance(values, list | tuple):
        or_texts = "" if single else ' or texts by letter such as {"A": "yes", "B": "no"}'
        wanted = f'a list such as ["yes", "no"]{or_texts}'
        raise InputError(f"{place}: field '{field}' must be {wanted}, not {type(values).__name__}")
    if not values or any(map(blank, values)):
        what = "has an empty entry" if values else "is empty"
        raise InputError(f"{place}: field '{field}' {what}; fill it in or drop the row")
    if nested := [value for value in values if isinstance(value, NESTED)]:
        what, _ = _no_text(nested[0])
        named = "name its texts in a task YAML (`| map(attribute='text') | list`)"
        raise InputError(f"{place}: field '{field}' {what}: {named}")
    return tuple(str(value) for value in values)


def environment(tokenizer: Any = None) -> SandboxedEnvironment:
    """What templates may use."""
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_plain)
    environment.filters.update(
        regex_replace=lambda text, pattern, replacement="": re.sub(pattern, replacement, text),
        literal=ast.literal_eval,
        required=_required,
        accepted=accepted,
        plain=_plain,
        tojson=_json,
        **{name: _of_text(environment.filters[name]) for name in _OF_TEXT},
        place_of=_place_of,
        filled=_filled,
        digest=_digest,
        chat_prompt=lambda messages: chat_prompt(messages, tokenizer),
        chat_answer=lambda messages: chat_answer(messages, tokenizer),
    )
    return environment


def _digest(value: Any) -> str:
    """A short key for a long text; the empty key for none."""
    return hashlib.sha256(str(value).encode("utf-8", "surrogatepass")).hexdigest()[:16] if value else ""


def _plain(value: Any) -> Any:
    """What a template may write as it is."""
    if blank(value) and not isinstance(value, str):
        raise ValueError("a column it uses is null")
    if isinstance(value, NESTED):
        raise ValueError(f"a column it uses {not_text(value)}")
    if isinstance(value, Iterator | KeysView | ValuesView | ItemsView):
        raise ValueError("it ends in several values: end it with `| join(' ')`")
    return value


class _List(list[Any]):
    """A list of a row: filters and operators that make text of all they are given are not given it as Python writes
    it."""

    def __str__(self) -> str:
        raise ValueError(f"a column it uses {not_text(self)}")


class _Object(dict[str, Any]):
    """An object of a row, which is no text either."""

    def __str__(self) -> str:
        raise ValueError(f"a column it uses {not_text(self)}")


class _Bytes(bytes):
    def __str__(self) -> str:
        raise ValueError(f"a column it uses {not_text(self)}")


for _kind, _name in ((_List, "list"), (_Object, "dict"), (_Bytes, "bytes")):  # as Jinja's errors call them
    _kind.__name__ = _kind.__qualname__ = _name
    _kind.__module__ = "builtins"


def _guarded(value: Any) -> Any:
    """A row's value that templates can take apart, and not write."""
    if isinstance(value, list | tuple):
        return _List(map(_guarded, value))
    if isinstance(value, dict):
        return _Object((name, _guarded(each)) for name, each in value.items())
    return _Bytes(value) if isinstance(value, bytes) else value


def check_whole(text: str, place: str) -> None:
    """Raises InputError if a text holds half a character, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise InputError(f"{place}: {half!r} is half of a character: mend the text, or drop the row") from error


def _of_text(make: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that makes text of what it is given, for text alone: what others make of a row's lists are
    lists of Python's again."""

    @wraps(make)
    def checked(*values: Any, **settings: Any) -> Any:
        for value in values:
            if isinstance(value, NESTED):
                raise ValueError(f"a column it uses {not_text(value)}")
        return make(*values, **settings)

    return checked


def _json(value: Any, indent: int | None = None) -> str:
    """JSON as a model reads it: Jinja's own escapes apostrophes and letters for web pages."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def not_text(value: Any) -> str:
    """What a value is, if it is no text, with what to write in a task YAML."""
    return ": ".join(_no_text(value))


def _no_text(value: Any) -> tuple[str, str]:
    """What a value is that is no text, and what to do."""
    shown = repr(value)[:_SHOWN] + ("..." if len(repr(value)) > _SHOWN else "")
    if isinstance(value, bytes):
        return f"holds bytes that are no text ({shown})", "leave it out"
    kind, example = ("a list", "join(' ')") if isinstance(value, list | tuple) else ("an object", "tojson")
    return f"holds {kind} ({shown})", f"say in a task YAML what of it is written (a part of it, or `| {example}`)"


def _required(value: Any, column: str) -> Any:
    """The value, unless it is blank: then the row cannot be used."""
    if blank(value):
        raise ValueError(_empty(column))
    return value


def _place_of(labels: Sequence[Any], answer: Any, column: str) -> int:
    """Which of the labels an answer is."""
    texts, text = [written(label) for label in labels], written(_required(answer, column))
    if text not in texts:
        raise ValueError(f"field '{column}' is {text!r}, which is none of the labels {', '.join(texts)}")
    return texts.index(text)


def _filled(values: list[Any], *columns: str) -> list[Any]:
    """The values of these columns without the empty ones at the end; none before may be empty."""
    filled = without_blank_end(values)
    for value, column in zip(filled or values[:1], columns, strict=False):
        if blank(value):
            raise ValueError(_empty(column))
    return filled


def _empty(column: str) -> str:
    return f"field '{column}' is empty; fill it in or drop the row"
