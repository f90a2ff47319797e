"""A task as data: where the rows are, and how one row becomes a prompt, its continuations and the right answer.

The YAML files in `builtin/` are such specs; a user's own `my.yaml` is read the same way. Templates are Jinja, with
the convention of lm-evaluation-harness: a row's columns are the variables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from trimllm import files
from trimllm.errors import InputError, did_you_mean, one_line
from trimllm.tasks.answers import AnswerAs
from trimllm.tasks.items import Kind
from trimllm.tasks.world import DOMAINS

METRICS: dict[str, tuple[str, ...]] = {
    "choice": ("acc", "acc_norm"),
    "generation": ("likelihood",),
    "text": ("likelihood",),
}


def is_accuracy(metric: str) -> bool:
    """Whether a metric counts the questions whose right choice wins, and is no likelihood."""
    return metric in METRICS["choice"]


class Source(BaseModel):
    """Where rows come from: exactly one of `hub`, `files`, `world`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hub: str | None = None
    """Hugging Face Hub id of a data set stored as Parquet, CSV or JSON (loading scripts are never run)."""
    config: str | None = None
    """Configuration (subset) name on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; the newest when left out."""
    files: dict[str, str | list[str]] | None = None
    """Local files by split name; relative paths are relative to the YAML file."""
    world: str | None = None
    """A domain of the built-in fictional world: medicine, law or finance."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        given = [name for name in ("hub", "files", "world") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"source needs exactly one of hub, files, world; it has {', '.join(given) or 'none'}")
        if self.world is not None and self.world not in DOMAINS:
            raise ValueError(f"world {self.world!r} is unknown: use {', '.join(DOMAINS)}")
        return self


class Splits(BaseModel):
    """Which split of the source plays which part; a part without a split is left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str | None = None
    """Trained on; the calibration set is held out of it."""
    validation: str | None = None
    """Reported when there is no test split, otherwise unused."""
    test: str | None = None
    """Reported."""


class TaskSpec(BaseModel):
    """One task. `choices`, `answer` and `references` may be a column name, a `{{ expression }}` or a literal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """What the task is called in commands and reports."""
    description: str = ""
    """One line for the list of tasks."""
    aliases: tuple[str, ...] = ()
    """Other names the task is found by."""
    kind: Kind
    """choice (the likeliest continuation is the answer), generation (free text) or text (perplexity of documents)."""
    source: Source | None = None
    """Where the rows come from; may be left out when files are given at load time."""
    train_source: Source | None = None
    """Where the train split comes from when that is not `source`."""
    splits: Splits | None = None
    """Which split of the source is train, validation and test; local files are taken by name when left out."""
    where: str | None = None
    """Jinja expression; rows for which it is false are not part of the task."""
    prompt: str = ""
    """Template of what the model reads. Left out for kind text."""
    choices: str | list[Any] | None = None
    """choice: the options, as they follow the prompt."""
    answer: str | int | None = None
    """choice: which option is right."""
    answer_as: AnswerAs = "auto"
    """How `answer` names the option: its index (from 0), letter (from A), text, or whichever of these fits."""
    target: str | None = None
    """generation: template of the answer to learn. text: template of the document."""
    references: str | list[Any] | None = None
    """generation: all accepted answers; the target alone when left out."""
    group: str | None = None
    """Template of a key; rows that share it never stand on two sides of a split."""
    delimiter: str = " "
    """What stands between the prompt and a continuation."""
    metric: str | None = None
    """What is reported: acc or acc_norm (choice), likelihood (generation, text)."""

    @model_validator(mode="after")
    def _complete(self) -> TaskSpec:
        needed = {"choice": ("prompt", "choices", "answer"), "generation": ("prompt", "target"), "text": ("target",)}
        for field in needed[self.kind]:
            if getattr(self, field) in (None, "", []):
                raise ValueError(f"kind {self.kind} needs the field '{field}'")
        if isinstance(self.choices, list) and any(isinstance(choice, bool) for choice in self.choices):
            raise ValueError("choices must be text: YAML reads a bare yes or no as a truth value, so quote them")
        if self.source is not None and self.source.hub and self.splits is None:
            raise ValueError("a Hub source needs the field 'splits', such as {train: train, test: test}")
        check_metric(self.metric, self.kind)
        return self

    @property
    def default_metric(self) -> str:
        """`metric`, or the first one of the kind."""
        return self.metric or METRICS[self.kind][0]


def check_metric(metric: str | None, kind: str) -> None:
    """Raises InputError if a task of this kind is not measured by `metric` (`None`: the default, always fine)."""
    if metric is None or metric in METRICS[kind]:
        return
    guess = did_you_mean(metric, METRICS[kind])
    raise InputError(f"metric {metric!r} does not fit a {kind} task: use {' or '.join(METRICS[kind])}{guess}")


def read_spec(path: Path) -> TaskSpec:
    """The spec in a YAML file; its relative file paths are resolved against the file's folder.

    Raises:
        InputError: if the file is missing, is not YAML, or has unknown, missing or contradictory fields.
    """
    try:
        raw = files.parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the task file {path}: {error.strerror}; check the path") from error
    except yaml.YAMLError as error:
        raise InputError(files.not_yaml(path, error)) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} must be a YAML mapping with the fields {', '.join(TaskSpec.model_fields)}")
    raw.setdefault("name", path.stem)
    try:
        spec = TaskSpec.model_validate(raw)
    except (ValidationError, InputError) as error:
        raise InputError(f"{path}: {_explain(error)}") from error
    return _resolve(spec, path.parent)


def _explain(error: ValidationError | InputError) -> str:
    """The first problem of a failed validation, in one line."""
    if isinstance(error, InputError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        fields = [*TaskSpec.model_fields, *Source.model_fields, *Splits.model_fields]
        return f"unknown field '{place}'{did_you_mean(str(first['loc'][-1]), fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if place == "kind":
        message = f"{message} (to have texts classified: choice, with the labels as choices)"
    return f"field '{place}': {message}" if place else message


def _resolve(spec: TaskSpec, folder: Path) -> TaskSpec:
    """The spec with paths that no longer depend on where the YAML file is."""

    def absolute(source: Source | None) -> Source | None:
        if source is None or source.files is None:
            return source
        files: dict[str, str | list[str]] = {}
        for split, paths in source.files.items():
            given = [str(folder / Path(path).expanduser()) for path in ([paths] if isinstance(paths, str) else paths)]
            files[split] = given[0] if isinstance(paths, str) else given
        return source.model_copy(update={"files": files})

    return spec.model_copy(
        update={"source": absolute(spec.source), "train_source": absolute(spec.train_source)},
    )
