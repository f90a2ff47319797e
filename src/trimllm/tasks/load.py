"""A task by name, file, folder or YAML: rows are read, rendered and split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimllm.config import RESOLUTION
from trimllm.errors import InputError, did_you_mean
from trimllm.tasks.catalog import builtin_tasks, find_builtin
from trimllm.tasks.columns import (
    contradictions_note,
    doubtful_labels_note,
    few_answers_note,
    named_choices_note,
    one_based_note,
    refuse_single_braces,
    respelled,
    unread_note,
)
from trimllm.tasks.items import Item, TaskData
from trimllm.tasks.recognize import labelled, recognize, without_shared_context
from trimllm.tasks.render import Renderer
from trimllm.tasks.rows import Row
from trimllm.tasks.sources import Files, Parts, by_column, file_notes, file_parts, parts_named, spec_parts
from trimllm.tasks.spec import TaskSpec, check_metric, read_spec
from trimllm.tasks.splits import NoTrainingRowsError, split
from trimllm.tasks.text import PIECE, SMALL_PIECE, cut, piece_for

_UNKNOWN_LABEL = (
    ": these are the labels of the training rows: add rows that have it, leave this one out, or list `choices` in a "
    "task YAML"
)


def load_task(
    name_or_path: str | Path,
    *,
    tokenizer: Any = None,
    calibration_size: int | None = None,
    resolution: float = RESOLUTION,
    max_train: int | None = None,
    max_test: int | None = None,
    files: Files | None = None,
    metric: str | None = None,
    seed: int = 0,
    reported_only: bool = False,
) -> TaskData:
    """Loads, renders and splits a task.

    Args:
        name_or_path: a built-in task, a YAML file, a data file, or a folder with train / valid / test files.
        tokenizer (*optional*): only its chat template is used, for dialogues.
        calibration_size (*optional*): rows held out of train for decisions; chosen from `resolution` by default.
        resolution (defaults to 0.5): percentage points one calibration question may weigh (0.5: 200 questions).
        max_train, max_test (*optional*): seeded subsamples of the training and the reported rows.
        files (*optional*): local files to use in place of the task's own source, by part or as a file or folder.
        metric (*optional*): in place of the task's own.
        seed (defaults to 0): of every split and subsample.
        reported_only (defaults to False): nothing is trained or decided: where there are test rows, only these need be
            right.

    Raises:
        InputError: if the task, its data or an option cannot be used; the message says where and what to do.
    """
    spec, parts, notes = _find(name_or_path, files, metric, tokenizer)
    refuse_single_braces(spec, (row for rows in parts.values() for row in rows))
    train_rows, reported_rows = _roles(spec.name, parts, notes, reported_only=reported_only)
    own = files is None and spec.source is None
    if not own:
        notes += named_choices_note(spec, train_rows or reported_rows)
    renderer = Renderer(spec, tokenizer, _UNKNOWN_LABEL if own and isinstance(spec.choices, list) else "")
    lenient = files is None and spec.source is not None and spec.source.hub is not None
    reported = _items(renderer, reported_rows, lenient, notes) if reported_only else []
    train = [] if reported else _items(renderer, train_rows, lenient, notes)
    reported = reported or _items(renderer, reported_rows, lenient, notes)
    _check_questions(spec, [*train, *reported])
    if spec.kind == "text" and len(train_rows) == 1 and train:
        _check_length(train, bool(reported))
    done = split(
        train,
        reported,
        reported_only=reported_only,
        calibration_size=calibration_size,
        resolution=resolution,
        max_train=max_train,
        max_test=max_test,
        seed=seed,
    )
    return TaskData(
        name=spec.name,
        kind=spec.kind,
        metric=metric or spec.default_metric,
        train=done.train,
        calibration=done.calibration,
        test=done.test,
        left_out=done.left_out,
        drawn=done.drawn,
        notes=(*notes, *done.notes),
    )


def find_spec(name_or_path: str | Path, *, files: Files | None = None, metric: str | None = None) -> TaskSpec | None:
    """The spec of a built-in task or a YAML file; None of a data file or folder, whose columns say what it is.

    No row is read: what is wrong with the name alone shows before a model is loaded.

    Raises:
        InputError: if there is no such task, file or folder, the YAML file is wrong, the task has no such metric, or
            `files` cannot stand in for it.
    """
    path = Path(name_or_path).expanduser()
    spec = find_builtin(str(name_or_path))
    if spec is None and path.suffix.lower() in (".yaml", ".yml"):
        spec = read_spec(path)
    if spec is not None:
        check_metric(metric, spec.kind)
    elif files is not None:
        raise InputError(
            f"task {str(name_or_path)!r}: files can only stand in for a built-in task or one from a YAML file"
        )
    elif not path.exists():
        raise _unknown(str(name_or_path))
    return spec


def _find(
    name_or_path: str | Path, files: Files | None, metric: str | None, tokenizer: Any
) -> tuple[TaskSpec, Parts, list[str]]:
    """The spec, the raw rows by part, and notes."""
    path, spec = Path(name_or_path).expanduser(), find_spec(name_or_path, files=files, metric=metric)
    if spec is None:
        return _own(path, metric, tokenizer)
    if files is not None:
        return spec, file_parts(files), file_notes(files)
    shadowed = find_builtin(str(name_or_path)) is not None and path.exists()
    notes = [f"{path} is the built-in task: what has this name here would be ./{path}"] if shadowed else []
    return spec, spec_parts(spec), notes


def _own(path: Path, metric: str | None, tokenizer: Any) -> tuple[TaskSpec, Parts, list[str]]:
    """A file or folder of the user's: the columns say what it is. A single file is train, whatever its name."""
    notes = file_notes(path)
    parts = by_column(file_parts(path), notes)
    if len(parts) == 1 and not path.is_dir() and "test" in parts_named(path):
        notes.append(f"{path.name} alone is split, whatever its name: to have all of it reported, give its folder")
    name = path.resolve().name.split(".")[0]
    rows = parts.get("train") or next(iter(parts.values()))
    try:
        found = recognize(name, rows, tokenizer)
    except InputError:
        if (again := respelled(parts, notes)) is None:
            raise
        parts, rows = again, again.get("train") or next(iter(again.values()))
        found = recognize(name, rows, tokenizer)
    spec = without_shared_context(found, rows, notes)
    if "train" not in parts and isinstance(spec.choices, list):
        notes.append(f"choices are the {len(spec.choices)} labels of the rows at hand, as there are no training rows")
    check_metric(metric, spec.kind)
    notes += [*unread_note(spec, rows), *one_based_note(spec, rows), *few_answers_note(spec, rows)]
    notes += doubtful_labels_note(spec, rows)
    notes += contradictions_note(spec, (row for several in parts.values() for row in several))
    if isinstance(spec.choices, list) and all(re.fullmatch(r"-?\d+(\.\d+)?", choice) for choice in spec.choices):
        shown = ", ".join(map(repr, spec.choices[:2]))
        notes.append(f"labels are numbers, asked for as they stand ({shown} ...): words would tell the model more")
    for part in [part for part, rows in parts.items() if part != "train" and not labelled(rows, spec)]:
        out = parts.pop(part)
        notes.append(f"not used: the {len(out):,} {part} rows, of which none has an answer (first: {out[0].place})")
    return spec, parts, notes


def _roles(name: str, parts: Parts, notes: list[str], *, reported_only: bool) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows to report): validation stands in for whichever of train and test is missing."""
    train, validation, test = (parts.get(part, []) for part in ("train", "validation", "test"))
    if not train and not validation:
        if reported_only and test:
            return [], test
        if reported_only:
            raise InputError(f"task {name!r} has no rows with answers: give a test split that has them")
        known = f" ({'; '.join(notes)})" if notes else ""
        raise NoTrainingRowsError(
            f"task {name!r} has no training rows: give a train split (or a single file, to be split){known}"
        )
    if not train:
        notes.append(f"no train split: the {len(validation):,} validation rows are trained on")
        return validation, test
    if test:
        if validation:
            notes.append(f"validation: {len(validation):,} rows not used (calibration is held out of train)")
        return train, test
    if validation:
        notes.append(f"no test split with answers: the {len(validation):,} validation rows are reported")
    return train, validation


def _items(renderer: Renderer, rows: Sequence[Row], lenient: bool, notes: list[str]) -> list[Item]:
    """Rows rendered; documents cut to pieces. `lenient` (rows from the Hub, which the user cannot mend) skips bad rows.

    Raises:
        InputError: on a bad row; if `lenient`, only when more than one in a hundred is bad.
    """
    items, bad = [], []
    for row in rows:
        try:
            if renderer.keeps(row):
                items.append(renderer.item(row))
        except InputError as error:
            bad.append(error)
            if not lenient or len(bad) > len(rows) / 100:
                raise
    if bad:
        notes.append(f"skipped {len(bad):,} of {len(rows):,} rows that cannot be used (first: {bad[0]})")
    if renderer.spec.kind != "text":
        return items
    piece = piece_for(items)
    if piece < PIECE:
        notes.append(f"{items[0].place}: a short text, cut in pieces of about {piece:,} characters")
    return cut(items, piece)


def _check_questions(spec: TaskSpec, items: Sequence[Item]) -> None:
    """Raises InputError if all rows ask the same and offer the same, and are answered differently."""
    asked = {(item.prompt, item.continuations) for item in items}
    if spec.kind == "choice" and len(asked) == 1 and len({item.answer for item in items}) > 1:
        raise InputError(
            f"task {spec.name!r}: every row has the same prompt and the same choices (first: {items[0].place}): name "
            "the column with the question in the prompt, as in {{ question }}"
        )


def _check_length(pieces: Sequence[Item], tested: bool) -> None:
    """A single document must give pieces for train, calibration and (unless there is a test set) test."""
    needed = 5 if tested else 6
    if len(pieces) < needed:
        raise InputError(
            f"{sum(len(item.target) for item in pieces):,} characters of text are too few to train and to measure on: "
            f"give at least {2 * needed * SMALL_PIECE:,} characters"
        )


def _unknown(name: str) -> InputError:
    if "/" in name or "." in name:
        return InputError(f"{name} does not exist: give a task name, a YAML file, or a data file or folder")
    known = list(builtin_tasks())
    aliases = [alias.lower() for spec in builtin_tasks().values() for alias in spec.aliases]
    return InputError(
        f"unknown task {name!r}{did_you_mean(name, known + aliases)}: use {', '.join(known)}, a YAML file or own data"
    )
