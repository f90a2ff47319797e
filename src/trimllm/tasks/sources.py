"""The rows of a task by part (train, validation, test), from local files, the Hub or the built-in world."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from trimllm.errors import InputError, did_you_mean
from trimllm.tasks import world
from trimllm.tasks.columns import shortened
from trimllm.tasks.hub import read_hub
from trimllm.tasks.rows import Row, format_of, read_rows, stem_of
from trimllm.tasks.spec import Source, TaskSpec

Files = str | Path | Mapping[str, str | Path | list[str]]
"""Local files: one file, a folder whose file names say the split, or paths by part."""
Parts = dict[str, list[Row]]
"""Rows by part; an absent part has no key."""

PARTS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation"}
PARTS |= {"dev": "validation", "test": "test"}
_ABOUT = re.compile(r"(readme|licen[sc]e|changelog)([_.-]\w\w)?\.txt|(dataset_(infos?|dict)|croissant)\.json", re.I)
"""Names of what lies beside data and is none."""
_PROSE = re.compile(r"(readme|licen[sc]e|changelog|notice|citation)\b", re.I)
"""Beginnings of names of what is to be read by people."""
_NO_DATA = (".md", ".py", ".yaml", ".yml")
_SHOWN = 5
SPLIT = "split"
"""A column that may say the part of each row."""
_HOW = ("sft", "gen", "set", "split", "data")
"""What may stand beside the part in such a cell."""
_COMPOUND = re.compile(r"(sets?|data|split|rows)$")
"""What may end a word that speaks of a part: `testset`, `TrainData`."""


def spec_parts(spec: TaskSpec) -> Parts:
    """The rows of a spec that says itself where they are. Validation is only read when there is no test split."""
    source, splits = spec.source, spec.splits
    if source is None:
        raise InputError(f"task {spec.name!r} has no source: add one to its YAML or give files with --task-files")
    if splits is not None:
        validation = None if splits.test else splits.validation
        named = [("train", splits.train), ("validation", validation), ("test", splits.test)]
    elif source.files is not None:
        named = [(_part(split), split) for split in source.files]
    else:
        named = [(part, part) for part in world.SPLITS]
    places = [(part, source, split) for part, split in named if split is not None]
    if (train := spec.train_source) is not None:
        split = (splits and splits.train) or "train"
        places = [("train", train, split), *(place for place in places if place[0] != "train")]
    parts: Parts = {}
    for part, origin, split in places:
        parts.setdefault(part, []).extend(_read(origin, split, spec.name))
    return parts


def file_parts(files: Files) -> Parts:
    """The rows of local files; a single file or a folder without split names is all "train".

    Raises:
        InputError: if nothing is there, or a part is not train, validation or test.
    """
    if not isinstance(files, Mapping):
        return _path_parts(Path(files).expanduser())
    parts: Parts = {}
    for name, paths in files.items():
        several = [paths] if isinstance(paths, str | Path) else paths
        parts.setdefault(_part(name), []).extend(row for path in several for row in _rows_at(Path(path).expanduser()))
    return parts


def _part(name: str) -> str:
    """The part that a split's name means."""
    if name not in PARTS:
        raise InputError(f"unknown split {name!r}{did_you_mean(name, PARTS)}: use train, validation or test")
    return PARTS[name]


def data_files(folder: Path) -> list[Path]:
    """Readable data files right inside a folder, sorted by name.

    Raises:
        InputError: if it has none.
    """
    found = sorted(path for path in folder.iterdir() if path.is_file() and format_of(path) and path.name[0] != ".")
    if not found:
        raise _no_data(folder)
    return found


def _no_data(folder: Path) -> InputError:
    there = f"; there are {shortened(others, _SHOWN)}" if (others := _others(folder)) else ""
    return InputError(f"{folder} has no data files: expected train.jsonl, test.jsonl or the like{there}")


def _others(folder: Path) -> list[str]:
    """What else is in a folder and may be taken for data: files of other formats, and folders."""
    named = sorted(path for path in folder.iterdir() if path.name[0] not in "._" and not _PROSE.match(path.name))
    inside = [path for path in named if path.suffix.lower() not in _NO_DATA]
    return [f"{path.name}/" if path.is_dir() else path.name for path in inside if path.is_dir() or not format_of(path)]


def row_files(folder: Path) -> list[Path]:
    """`data_files` less those that are about the data; of texts only, if others are there.

    Raises:
        InputError: if nothing is left.
    """
    found = data_files(folder)
    rows = [path for path in found if not _ABOUT.fullmatch(path.name)]
    rows = rows or [path for path in found if path.suffix.lower() == ".txt"]
    if not rows:
        raise _no_data(folder)
    return rows


def by_column(parts: Parts, notes: list[str]) -> Parts:
    """Rows of one part by what a column `split` of theirs says, if that is what it says; with a note.

    Raises:
        InputError: if it says so in most rows, and not in all.
    """
    (rows,) = parts.values() if len(parts) == 1 else ([],)
    column = next((name for row in rows[:1] for name in row.values if name.strip().lower() == SPLIT), SPLIT)
    said = [_said(row.values.get(column)) for row in rows]
    named = [each for each in said if _one_part(each)]
    if 2 * len(named) <= len(rows) or len(set().union(*named)) < 2:
        return parts
    if odd := next((row for row, each in zip(rows, said, strict=True) if not _one_part(each)), None):
        raise InputError(
            f"{odd.place}: field {column!r} is {odd.values.get(column)!r}, and says train, validation or test in other "
            "rows: fill it in, or drop the row or the column"
        )
    found: Parts = {}
    for row, (part,) in zip(rows, said, strict=True):
        values = {name: value for name, value in row.values.items() if name != column}
        found.setdefault(part, []).append(Row(row.place, values))
    shown = ", ".join(f"{len(several):,} {part}" for part, several in found.items())
    notes.append(f"the column {column!r} says what rows are for: {shown}")
    return found


def _one_part(said: set[str]) -> bool:
    return len(said) == 1 and said <= set(PARTS.values())


def _said(value: object) -> set[str]:
    """The parts that a cell `split` names, if it says nothing else but how (`train_sft`, `test 1`)."""
    words = re.findall(r"[^\W\d_]+", str(value).lower())
    return {PARTS.get(word, word) for word in words if word not in _HOW}


def file_notes(files: Files) -> list[str]:
    """What the user should know of a folder: files that are not read, because they are about the data, are of no known
    format, or name no split while others do; files that are pooled, because none does; and those that may be the same
    rows twice."""
    folder = None if isinstance(files, Mapping) else Path(files).expanduser()
    if folder is None or not folder.is_dir():
        return []
    found = row_files(folder)
    notes = [f"not used: {file.name} (about the data)" for file in data_files(folder) if file not in found]
    if others := _others(folder):
        notes.append(f"not read: {shortened(others, _SHOWN)} (files of no known format, folders in the folder)")
    read = _read_of(found)
    if twice := _same_stem(read):
        notes.append(f"read as different rows: {'; '.join(twice)} (if they are the same rows, move all but one away)")
    notes += [f"not used: {file.name} (no train, valid or test in its name)" for file in found if file not in read]
    if len(read) > 1 and part_of(read[0]) is None:
        names = shortened([file.name for file in read], _SHOWN)
        notes.append(f"pooled, as no name has train, valid or test in it: {names}")
    return notes


def _read_of(files: list[Path]) -> list[Path]:
    """Those of a folder's files that are read: where names speak of parts, the ones that do."""
    return [file for file in files if part_of(file)] or files


def _same_stem(files: list[Path]) -> list[str]:
    """Files that differ only in their format, those of one name in one text."""
    groups = [[file.name for file in group] for _, group in groupby(sorted(files, key=stem_of), stem_of)]
    return [", ".join(names) for names in groups if len(names) > 1]


def part_of(path: Path) -> str | None:
    """The part a file name speaks of (`train`, `books_valid`, `data.test`, `test-00000-of-00001`), if any; if no word
    of it does, the part of a compound (`testset`, `TrainData`).

    Raises:
        InputError: if it speaks of several.
    """
    found = parts_named(path)
    if len(found) > 1:
        named = " and ".join(sorted(found))
        raise InputError(f"{path}: its name speaks of {named}: rename it, with one of them alone, or move it away")
    return next(iter(found), None)


def parts_named(path: Path) -> set[str]:
    """All parts that a file name speaks of."""
    words = re.split(r"[^a-z]+", path.name.lower())
    compounds = [_COMPOUND.sub("", word) for word in words]
    return {PARTS[word] for word in words if word in PARTS} or {PARTS[word] for word in compounds if word in PARTS}


def _path_parts(path: Path) -> Parts:
    if not path.is_dir():
        return {"train": read_rows(path)}
    parts: Parts = {}
    for file in _read_of(row_files(path)):
        parts.setdefault(part_of(file) or "train", []).extend(read_rows(file))
    return parts


def _rows_at(path: Path) -> list[Row]:
    if path.is_dir():
        return [row for file in row_files(path) for row in read_rows(file)]
    return read_rows(path)


def _read(source: Source, split: str, task: str) -> list[Row]:
    if source.files is not None:
        paths = source.files.get(split)
        if paths is None:
            raise InputError(f"task {task!r}: its source has no split {split!r}, only {', '.join(source.files)}")
        return [row for path in ([paths] if isinstance(paths, str) else paths) for row in _rows_at(Path(path))]
    if source.world is not None:
        if split not in world.SPLITS:
            raise InputError(f"task {task!r}: the world has no split {split!r}, only {', '.join(world.SPLITS)}")
        questions = world.questions(source.world, split)
        return [Row(f"{task}[{split}]:{number}", values) for number, values in enumerate(questions, 1)]
    return read_hub(source, split, task)
