"""Rows that a model was made with: what it was trained on, and what its layers were chosen by.

A run and a comparison keep short hashes of them (and of those of the run that made their base) in `used_rows.json`, so
that whoever asks one of their models anything is told which rows it has seen, wherever these stand by then. The file
stays out of the checkpoints, which are handed on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from trimllm import files
from trimllm.config import EMBEDDED
from trimllm.tasks import Item, TaskData
from trimllm.tasks.splits import spaced

FILE = "used_rows.json"
FOLDERS = 4
"""A checkpoint of a comparison lies three folders below the file."""


class Used(NamedTuple):
    """Hashes of rows, and the seed that split them."""

    trained: frozenset[str] = frozenset()
    decided: frozenset[str] = frozenset()
    """Calibration rows."""
    seed: int | None = None
    """None also where a run and that of its base had different ones."""


def keep(folder: Path, data: TaskData, base: str, seed: int, *, trains: bool = True) -> None:
    """Write what a run or comparison in `folder` uses, and what its `base` was made with; what stands there stays."""
    there, before = _read(folder), of(base)
    trained = frozenset(map(_hash, data.train if trains else ())).union(there.trained, before.trained)
    decided = frozenset(map(_hash, data.calibration)).union(there.decided, before.decided)
    alike = all(each in (Used(), each._replace(seed=seed)) for each in (there, before))
    common = seed if alike else None
    if (used := Used(trained, decided, common)) != there:
        record = {"seed": used.seed, "trained": sorted(trained), "decided": sorted(decided)}
        files.write_json(folder / FILE, record)


def of(model: str | Path) -> Used:
    """What a checkpoint was made with, by where it lies: in the folder of a run or comparison, or below."""
    path = Path(model).expanduser()
    if path.is_dir() and str(model) != EMBEDDED:
        for start in (path.absolute(), path.resolve()):  # a link leads to a run, or out of one
            for folder in [start, *start.parents][:FOLDERS]:
                if (folder / FILE).exists():
                    return _read(folder)
    return Used()


def _read(folder: Path) -> Used:
    found = files.read_json(folder / FILE)
    return Used(frozenset(found["trained"]), frozenset(found["decided"]), found["seed"]) if found else Used()


def warnings(model: str | Path, data: TaskData, seed: int, *, at: Path | None = None) -> list[str]:
    """Lines on reported rows that the model was made with, and on calibration rows that it was trained on. `at`: where
    it lies, if it is called otherwise."""
    used, found = of(at or model), list[str]()
    remedy = f": give --seed {used.seed}, as there" if used.seed not in (None, seed) else ""
    if count := _among(data.test, used.trained | used.decided):
        rows = f"{count:,} of {len(data.test):,} reported rows"
        told = f"{model} was made with {rows} (trained on, or chosen by), and is kind to them"
        found.append(told + (remedy if data.drawn else ""))
    if count := _among(data.calibration, used.trained):
        rows = f"{count:,} of {len(data.calibration):,} calibration rows"
        found.append(f"{model} was trained on {rows}, by which layers are to be chosen{remedy}")
    return found


def _among(items: Iterable[Item], used: frozenset[str]) -> int:
    return sum(_hash(item) in used for item in items) if used else 0


def _hash(item: Item) -> str:
    """Of the question and its answer, save for case and white space; other wrong choices do not make another row."""
    text = f"{spaced(item.prompt)}\n{spaced(item.target)}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
