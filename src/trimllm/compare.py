"""`trimllm compare`: methods one after the other, each in a process of its own, into one table.

Every finished row is on disk; a comparison that was interrupted goes on with --resume, and a method that cannot run is
a row that says why.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from trimllm import folders, journal, plain_settings, rundir
from trimllm.baselines import METHODS, Cell, cell, cells, elsewhere
from trimllm.compare_report import picture, record, report, row_line
from trimllm.config import CompareConfig
from trimllm.console import Console
from trimllm.errors import InputError

FREE_OF_CHOICE = (
    *("resume", "output", "methods", "keep", "threads", "device", "micro_batch_size", "eval_batch_size"),
    *("gradient_checkpointing", "baselines_python"),
)
"""Settings that may differ when a comparison is resumed: more rows, and where they are computed."""


def compare(command: CompareConfig, console: Console) -> dict[str, Any]:
    """Make the rows that are not there yet, print the table, and return what compare.json holds.

    Raises:
        InputError: if a method is unknown, --baselines-python is no program, or --output holds something else, or a
            comparison with other settings.
    """
    root = Path(command.output)
    wanted = cells(command.methods, command.keep)
    if command.baselines_python and shutil.which(command.baselines_python) is None:
        raise InputError(f"--baselines-python {command.baselines_python}: no such program: name a Python executable")
    check(command)
    claim(command, root)
    for number, each in enumerate(wanted, 1):
        earlier = each.row(root)
        if earlier.get("status") != "done":
            console.say(f"[{number}/{len(wanted)}] {each.name}")
            make_row(command, each, root)
            earlier = each.row(root)
        console.say(f"[{number}/{len(wanted)}] {row_line(each, earlier)}")
        made = record(command, finished(root))
        journal.write_json(root / "compare.json", made)
    print(report(made))
    picture(made, root / "compare.png")
    print(f"written: {root / 'compare.json'}, {root / 'compare.png'}")
    return made


def check(command: CompareConfig) -> None:
    """What would only be met after hours of training: the length of rows for the speed, and the tasks of --also.

    Raises:
        InputError: if the model's context is too short, or a task cannot be loaded.
    """
    from transformers import AutoConfig

    from trimllm import adapters, encoding, inputs, loading, models

    path = models.path_of(command.model)
    loading.check_path(path)
    if command.sequence is not None and not adapters.base_of(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=command.trust_remote_code)
        context = encoding.context_length(config)
        if command.sequence > context:
            raise InputError(f"--sequence {command.sequence}: the model takes at most {context} tokens: ask for less")
    if command.also:
        tokenizer = loading.load_tokenizer(path, trust_remote_code=command.trust_remote_code)
        for task in command.also:
            inputs.task_data(command.model_copy(update={"task": task, "task_files": None, "metric": None}), tokenizer)


def finished(root: Path) -> list[dict[str, Any]]:
    """All rows that are there, also of earlier calls, in the order of the table."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in (root / "cells").glob("*/row.json")]
    order = list(METHODS)
    rows.sort(key=lambda row: (order.index(row["method"]), -(row["keep"] or 0)))
    return [row | {"title": METHODS[row["method"]].title} for row in rows]


def claim(command: CompareConfig, root: Path) -> None:
    """Make the folder this comparison's own.

    Raises:
        InputError: see `compare`.
    """
    settings = root / "config.yaml"
    if root.exists() and not root.is_dir():
        raise InputError(f"--output {root}: this is a file: name a directory")
    if settings.exists():
        if not command.resume:
            raise InputError(
                f"--output {root}: the directory already holds a comparison: add --resume to go on with it, or choose "
                "another one"
            )
        rundir.same_settings(command, root, FREE_OF_CHOICE)
    elif root.exists() and any(root.iterdir()):
        raise InputError(f"--output {root}: the directory is not empty: choose another one")
    folders.check_writable(root)
    journal.write_atomic(settings, plain_settings.to_yaml(command.model_copy(update={"resume": False})))


def make_row(command: CompareConfig, each: Cell, root: Path) -> None:
    """Run the row's process; where it ends without a row, a row says so."""
    arguments = [str(root), each.method.name, *([f"{each.keep:g}"] if each.method.keeps else [])]
    path = each.file(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if command.baselines_python and cell.missing(each):
        if lacks := elsewhere.lacking(command.baselines_python, each):
            why = f"--baselines-python {command.baselines_python} {lacks}"
            journal.write_json(path, {"method": each.method.name, "keep": each.keep, "status": "not run", "why": why})
            return
        code = elsewhere.run(command.baselines_python, arguments)
    else:
        code = subprocess.run([sys.executable, "-m", "trimllm.baselines.cell", *arguments]).returncode
    if code == 0 and path.exists():
        return
    why = f"its process ended with exit code {code}; what it printed says why"
    if code < 0:
        why = f"its process was ended by signal {-code}" + (": perhaps memory ran out" if code == -9 else "")
    journal.write_json(path, {"method": each.method.name, "keep": each.keep, "status": "failed", "why": why})
