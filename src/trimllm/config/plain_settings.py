"""Settings from plain values and back: YAML files, keyword arguments, and one line for what is wrong with them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from trimllm import files
from trimllm.config import Settings
from trimllm.config.shared import option
from trimllm.errors import InputError, did_you_mean

S = TypeVar("S", bound=Settings)
BEGUN = "# begun in "
"""First words of stored settings; the folder, as JSON, follows."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        InputError: if it cannot be read or is not a mapping; names the line where YAML breaks.
    """
    try:
        values = files.parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}: check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file: give a YAML file") from None
    except yaml.YAMLError as error:
        raise InputError(files.not_yaml(path, error)) from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `name: value` lines")
    named = {str(name).replace("-", "_"): value for name, value in values.items()}
    if len(named) < len(values):
        twice = next(name for name in named if sum(str(one).replace("-", "_") == name for one in values) > 1)
        raise InputError(f"{path}: {twice!r} stands there twice")
    return named


def stored(path: str | Path) -> dict[str, Any]:
    """The settings that a run or a comparison wrote to `path`; empty if there are none.

    Raises:
        InputError: see `read_yaml`.
    """
    return read_yaml(path) if files.there(path) else {}


def begun(path: str | Path) -> str | None:
    """The folder that relative paths in stored settings start from; None where they do not say."""
    if not files.there(path):
        return None
    first, _, _ = Path(path).read_text(encoding="utf-8").partition("\n")
    return json.loads(first.removeprefix(BEGUN)) if first.startswith(BEGUN) else None


LONGEST = 200
"""Characters of a value that a message repeats."""


def make(kind: type[S], values: dict[str, Any]) -> S:
    """The settings from plain values.

    Raises:
        InputError: in one line, for the first value that cannot be used.
    """
    try:
        return kind(**{name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in values.items()})
    except ValidationError as error:
        raise InputError(explain(error, kind)) from None


def explain(error: ValidationError, kind: type[BaseModel] | None = None) -> str:
    """One line for the first thing that is wrong with the settings, with the nearest name for an unknown one."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if not str(part).startswith(("function", "constrained"))]
    names = names[1:] if kind is None else names
    given_as = option(names[0]) if names else ""
    if first["type"] == "extra_forbidden" and kind is not None:
        return f"unknown setting {names[0]!r}{did_you_mean(names[0], kind.model_fields)}"
    if first["type"] == "missing":
        return f"{given_as} is required"
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if first["type"] == "literal_error":
        message += did_you_mean(str(first["input"]), re.findall("'(.+?)'", first["ctx"]["expected"]))
    if first["type"] == "less_than" and names[:1] == ["keep"] and 1 < (share := float(first["input"])) < 100:
        message += f" (a share: {share / 100:g} for {share:g} %)"
    if first["type"] == "sequence_str" or (first["type"] == "is_instance_of" and "Sequence" in message):
        message = f"write a list, as [{first['input']}]"
    given = str(first["input"])  # from Python it may be a model or a task
    given = given if len(given) <= LONGEST else f"{given[:LONGEST]}..."
    return f"{given_as} {given}".rstrip() + f": {message}" if given_as else message


def to_yaml(settings: Settings, folder: str | None = None) -> str:
    """The resolved settings as YAML that `--config` reads back, and the folder that their relative paths start from."""
    first = "" if folder is None else f"{BEGUN}{json.dumps(folder)}\n"
    return first + yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
