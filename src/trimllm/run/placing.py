"""Relative paths in stored settings: they are of the folder where a run or comparison began, wherever it goes on.

`config.yaml` says in its first line which folder that was; later calls keep both.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimllm import files
from trimllm.config import EMBEDDED, Settings, TrimConfig, each_path, without_idle
from trimllm.config.plain_settings import begun, read_yaml, stored, to_yaml
from trimllm.errors import InputError
from trimllm.tasks.catalog import find_builtin

CONFIG = "config.yaml"
JOURNAL = "journal.jsonl"
STAGE = "stage.pt"
"""A stage of training that is under way."""
PATHS = ("model", "task", "text", "task_files", "also", "baselines_python")
"""Settings that may name files and folders."""


def kind_of(output: str | Path) -> str | None:
    """What began in a folder: `run`, `comparison`, or neither. (In a checkpoint `config.yaml` may be anybody's.)"""
    folder = Path(output).expanduser()
    path = folder / CONFIG
    if not files.there(path) or files.there(folder / "config.json"):
        return None
    return "comparison" if "methods" in read_yaml(path) else "run"


def may_go_on(output: str | Path, kind: type[Settings], *, resume: bool) -> bool:
    """Whether what has such settings has begun in a folder, to be gone on with.

    Raises:
        InputError: if it has, and `resume` is off; if the folder holds the other kind, or foreign files.
    """
    root, name = Path(output), _called(kind)
    if not (root / CONFIG).exists():
        if foreign := [path for path in root.glob("*") if not path.name.startswith(f".{CONFIG}")]:
            raise InputError(f"--output {root}: the directory already holds {foreign[0].name}: choose another one")
        return False
    if not resume:
        check_held(root, kind)
        raise InputError(
            f"--output {root}: the directory already holds a {name}: add --resume to go on with it, or choose another "
            "one"
        )
    return True


def check_held(output: str | Path, kind: type[Settings]) -> None:
    """Raise InputError where settings of a run are asked for and the folder holds a comparison, or the reverse."""
    wanted = _called(kind)
    if (found := kind_of(output)) not in (None, wanted):
        raise InputError(f"--output {output}: the directory holds a {found}, not a {wanted}: choose another one")


def _called(kind: type[Settings]) -> str:
    return "comparison" if "methods" in kind.model_fields else "run"


def holds_run(folder: str | Path) -> bool:
    """Whether `folder` holds a run. Raises InputError where it holds a comparison, and names a checkpoint in it."""
    found = kind_of(folder)
    if found == "comparison":
        made = sorted(Path(folder).glob("cells/*/model"))
        example = f", such as {made[0]}" if made else ""
        raise InputError(f"{folder} holds a comparison, not a run: give a checkpoint in it{example}")
    return found == "run"


def stored_settings(output: str | Path, kind: type[Settings] = TrimConfig) -> dict[str, Any]:
    """The settings of the run or comparison in `output`, for `--resume`; empty if there is none yet. Paths to what lies
    where it began, and not here, are whole. Raises as `check_held` does."""
    output = os.path.expanduser(output)
    path = Path(output) / CONFIG
    check_held(output, kind)
    values, folder = stored(path), begun(path)
    with suppress(TypeError):  # of values that are none of a setting: who makes settings of them says which
        values = without_idle(kind, values)  # an earlier version may have taken more
    if folder is None or folder == os.getcwd():
        return values
    placed = dict(values)
    for name in PATHS:
        if name in values:
            placed[name] = each_path(values[name], lambda one: _whole(one, output, folder))
    return placed


def run_of(model: str | Path) -> dict[str, Any]:
    """The settings of the run that made a checkpoint, by where it lies: `model` is the run's folder, its result or a
    depth that it kept. Empty where that is no run, or one that cannot be read."""
    path = Path(model).expanduser()
    for folder in (path, path.parent, path.parent.parent) if str(model) != EMBEDDED else ():
        if path.is_dir() and (folder / JOURNAL).exists():
            with suppress(InputError):
                return stored_settings(folder)
    return {}


def place(name: str, output: str | Path) -> str:
    """Where a path that the run in `output` was given lies, seen from here."""
    folder = begun(Path(output) / CONFIG)
    return name if folder is None or folder == os.getcwd() else _whole(name, output, folder)


def same(name: str, before: Any, now: Any) -> bool:
    """Whether two values of a setting, both seen from here, are equal or lead to the same file."""
    if name not in PATHS:
        return bool(before == now)
    return bool(each_path(before, _real) == each_path(now, _real))


def to_store(config: Settings, output: str | Path) -> str:
    """The text of `config.yaml`: paths that are still those that it holds stay as they stand there."""
    path = Path(output) / CONFIG
    folder = begun(path)
    if folder is None:
        return to_yaml(config, os.getcwd())
    before, here, kept = stored(path), stored_settings(output, type(config)), dict[str, Any]()
    for name in PATHS:
        if name in before:
            now = config.model_dump(mode="json")[name]
            whole = each_path(now, lambda one: _whole(one, output, os.getcwd()))
            kept[name] = before[name] if same(name, here[name], now) else whole
    return to_yaml(type(config)(**config.model_dump() | kept), folder)


def _real(name: str) -> str:
    return os.path.realpath(os.path.expanduser(name))


def _whole(name: str, output: str | Path, folder: str) -> str:
    """The path from the root to what `name` is in `folder`, or the name where nothing of the user's is there."""
    there = os.path.join(folder, name)
    ours = name == EMBEDDED or find_builtin(name) is not None or os.path.realpath(there) == os.path.realpath(output)
    return there if os.path.exists(there) and not ours else name
