"""`trimllm compare`: methods one after the other, each in a process of its own, into one table.

Every finished row is on disk; a comparison that was interrupted goes on with --resume, and a method that cannot run is
a row that says why.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trimllm import files
from trimllm.baselines import METHODS, Cell, cell, cells, elsewhere, job
from trimllm.bench.benching import Lengths
from trimllm.blocks import adapters, decoder
from trimllm.checkpoints import arithmetic, backends, folders, loading, models
from trimllm.checkpoints.dtypes import DTYPES
from trimllm.compare_report import compare_plot, record, report, row_line
from trimllm.config import CompareConfig, plain_settings
from trimllm.console import Console
from trimllm.errors import InputError
from trimllm.evaluation import encoding, inputs, paired
from trimllm.run import placing, rundir, used_rows
from trimllm.tasks import NoTrainingRowsError, TaskData
from trimllm.training import training_rows

FREE_OF_CHOICE = {*rundir.COMPUTING, "methods", "keep", "baselines_python"} - {"attention"}
"""Settings that may differ when a comparison is resumed: more rows, and how they are computed; but for the attention,
since the speeds of all rows stand in one table (threads and device are compared by `same_conditions`)."""


def compare(command: CompareConfig, console: Console) -> dict[str, Any]:
    """Make the rows that are not there yet, print the table, and return what compare.json holds.

    Raises:
        InputError: if a method is unknown, --baselines-python is no program, or --output holds something else, a
            comparison with other settings, or rows made with other threads or on another device, or another process is
            at work there; see also `check`.
    """
    root = Path(command.output)
    wanted = cells(command.methods, command.keep)
    if command.baselines_python and shutil.which(command.baselines_python) is None:
        raise InputError(f"--baselines-python {command.baselines_python}: no such program: name a Python executable")
    with folders.held(root) as lock:
        checked = check(command, wanted)
        for note in checked.notes:
            console.say(f"  {note}")
        for warning in checked.warnings:
            console.warn(warning)
        whole = claim(command, root, checked.digests)
        epochs = command.warmup_epochs or command.epochs_per_drop or command.final_epochs
        used_rows.keep(root, checked.task, command.model, command.seed, trains=bool(epochs) and trains(wanted))
        for number, each in enumerate(wanted, 1):
            earlier = each.row(root)
            if earlier.get("status") != "done":
                console.say(f"[{number}/{len(wanted)}] {each.name}")
                if checked.untrainable and trains([each]):
                    not_made(each, root, "not run", checked.untrainable)
                else:
                    make_row(command, each, root, lock)
                earlier = each.row(root)
            console.say(f"[{number}/{len(wanted)}] {row_line(each, earlier)}")
            made = record(whole, against_full(finished(root), root))
            files.write_json(root / "compare.json", made)
        print(report(made))
        compare_plot(made, root / "compare.png")
    print(f"written: {root / 'compare.json'}, {root / 'compare.png'}")
    return made


def trains(wanted: Sequence[Cell]) -> bool:
    """Whether any of these rows needs a model that can be trained."""
    return any(each.method.name != "base" for each in wanted)


@dataclass(frozen=True)
class Checked:
    """What is known of a comparison before its first row is made."""

    task: TaskData
    digests: dict[str, str]
    """SHA-256 of data and base, by option."""
    notes: list[str]
    warnings: list[str]
    untrainable: str = ""
    """Why its task is of no use to methods that train, where others can run."""


def check(command: CompareConfig, wanted: Sequence[Cell]) -> Checked:
    """Whatever would end every row, or be met after hours of training: model, tasks, text, names, shares, lengths.

    Raises:
        InputError: for the first of these that cannot be used.
    """
    training = trains(wanted)
    dtype = DTYPES.get(command.dtype) or (DTYPES["float32"] if training else None)
    backends.check(command.attention, models.device_of(command.device), dtype, training=training)
    config = check_model(command)
    for each in wanted:
        if each.keep is not None:
            _ = job.Job(command, each, Path(command.output)).drops
    Lengths.of(command, encoding.context_length(config), command.model)
    path = loading.path_of(command.model)
    tokenizer = loading.load_tokenizer(path, trust_remote_code=command.trust_remote_code)
    digests = {"--model": mark} if (mark := weights_mark(path)) else {}
    notes, found = arithmetic_notes(command, path, training=training), list[Checked]()
    for settings in cell.tasks(command):
        data = check_task(settings, tokenizer, config, wanted, own=settings is command)
        if data.task.name in [each.task.name for each in found]:
            raise InputError(
                f"--also {settings.task}: its name, {data.task.name}, is that of another task: rename the folder or "
                "file"
            )
        found.append(data)
        digests |= data.digests
        notes += data.notes
    warnings = [line for data in found for line in data.warnings]
    return Checked(found[0].task, digests, notes, warnings, found[0].untrainable)


def arithmetic_notes(command: CompareConfig, path: str, *, training: bool) -> list[str]:
    """Lines for the user where a CPU emulates what rows compute in."""
    saved = models.saved_dtype(path, trust_remote_code=command.trust_remote_code) or DTYPES["float32"]
    slower = [arithmetic.evaluation_note(saved, command.dtype, models.device_of(command.device))]
    if training:
        place = models.training_device(command.device)
        slower.append(arithmetic.asked_note(command.dtype, place, command.mixed_precision))
    return list(dict.fromkeys(filter(None, slower)))


def check_task(settings: CompareConfig, tokenizer: Any, config: Any, wanted: Sequence[Cell], *, own: bool) -> Checked:
    """A task that models are evaluated on: the comparison's `own`, which may be trained on, or one of --also.

    Raises:
        InputError: if its rows cannot be used, or the text to train on; if there are none to train on, and all of the
            wanted rows train.
    """
    untrainable, sets = "", dict[str, Sequence[encoding.Cut]]()
    try:
        data = inputs.task_data(settings, tokenizer, reported_only=not own)
    except NoTrainingRowsError as lacking:
        if all(trains([each]) for each in wanted):
            raise
        data, untrainable = inputs.task_data(settings, tokenizer, reported_only=True), str(lacking)
    digests = {"--task" if own else f"--also {data.name}": data.digest()}
    longest = encoding.context_length(config, settings.max_length)
    asked = {"reported": data.test, **({"calibration": data.calibration} if data.calibration else {})}
    for name, items in asked.items():
        sets[name] = encoded = encoding.encode(tokenizer, items, longest, truncate=settings.truncate)
        encoding.check_vocabulary(tokenizer, encoding.rows_of(encoded), encoding.vocabulary_of(config))
    if own and trains(wanted) and not untrainable:
        sets["training"], text = training_rows.examples(settings, tokenizer, config, data.train, settings.batch_size)
        digests["--text"] = training_rows.digest(text)
    notes = [f"{data.name}: {note}" for note in (*data.notes, *encoding.row_notes(**sets))]
    return Checked(data, digests, notes, used_rows.warnings(settings.model, data, settings.seed), untrainable)


def check_model(command: CompareConfig) -> Any:
    """The config of a model that can be loaded, as far as can be told without its weights.

    Raises:
        InputError: if it is not there, is no causal language model, or its weights are missing or torn.
    """
    path = loading.path_of(command.model)
    config = models.checked_config(path, command)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"cannot use model {path!r}: it is an encoder-decoder, not a causal language model")
    try:
        with loading.quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=command.trust_remote_code)
    except Exception as error:
        raise InputError(loading.explain(path, error)) from error
    decoder.blocks(model)
    return config


def weights_mark(path: str) -> str:
    """SHA-256 of the safetensors files of the base, and of an adapter's base; empty where there are none on this
    disk."""
    parts = map(loading.on_disk, [path, *filter(None, [adapters.base_of(path)])])
    whole = [part for part in parts if part and (read := loading.weight_files(part)) and all(map(Path.exists, read))]
    return " ".join(map(loading.fingerprint, whole))


def finished(root: Path) -> list[dict[str, Any]]:
    """All rows that are there, also of earlier calls, in the order of the table."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in (root / "cells").glob("*/row.json")]
    order = list(METHODS)
    rows.sort(key=lambda row: (order.index(row["method"]), -(row["keep"] or 0)))
    made = [Cell(METHODS[row["method"]], row["keep"]) for row in rows]
    return [row | {"title": each.title, "source": each.method.source} for row, each in zip(rows, made, strict=True)]


def against_full(rows: list[dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    """The rows with `above_full`: by task, how far each is above full fine-tuning, with the paired standard error;
    empty where one of the two is not done."""

    def answers(row: dict[str, Any]) -> dict[str, Any]:
        each = Cell(METHODS[row["method"]], row["keep"])
        return files.read_json(each.answers(root)) if row["status"] == "done" else {}

    full = next((answers(row) for row in rows if row["method"] == "full"), {})
    found = []
    for row in rows:
        own = answers(row) if row["method"] != "full" else {}
        above = {task: paired.apart(said, full[task]) for task, said in own.items() if task in full}
        found.append(row | {"above_full": above})
    return found


def claim(command: CompareConfig, root: Path, data: dict[str, str]) -> CompareConfig:
    """Make the folder this comparison's own; its settings, with the methods and shares of earlier calls.

    Raises:
        InputError: see `compare`; or if its data or base, by these SHA-256, changed.
    """
    digests = root / "data.json"
    before = files.read_json(digests)
    if placing.may_go_on(root, CompareConfig, resume=command.resume):
        rundir.same_settings(command, root, FREE_OF_CHOICE)
        same_conditions(command, root)
        rundir.same_data(before, data, command, f"the comparison in {root}")
        command = joined(command, plain_settings.make(CompareConfig, placing.stored_settings(root, CompareConfig)))
    command = command.model_copy(update={"resume": False})
    files.write_atomic(root / placing.CONFIG, placing.to_store(command, root))
    files.write_json(digests, before | data)
    return command


def joined(command: CompareConfig, earlier: CompareConfig) -> CompareConfig:
    """The settings with the methods (none named: all) and the shares of both."""
    named = {*command.methods, *earlier.methods} if command.methods and earlier.methods else ()
    methods = tuple(name for name in METHODS if name in named)
    keep = tuple(sorted({*command.keep, *earlier.keep}, reverse=True))
    return command.model_copy(update={"methods": methods, "keep": keep})


def same_conditions(command: CompareConfig, root: Path) -> None:
    """Raises InputError if finished rows were computed elsewhere, or with other threads: one table, one machine."""
    now = cell.conditions(command)
    for then in (row["conditions"] for row in finished(root) if row["status"] == "done"):
        if then["device"] != now["device"]:
            raise InputError(
                f"--device {command.device} is {now['device']}, and finished rows in {root} were made on "
                f"{then['device']}: resume there, or start another comparison"
            )
        if then["threads"] != now["threads"]:
            raise InputError(
                f"--threads {now['threads']}: finished rows in {root} were made with {then['threads']}: give --threads "
                f"{then['threads']}, or start another comparison"
            )


def make_row(command: CompareConfig, each: Cell, root: Path, lock: int) -> None:
    """Run the row's process, which inherits the folder's `lock`; where it ends without a row, a row says so."""
    arguments = [str(root), each.method.name, *([f"{each.keep:g}"] if each.method.keeps else [])]
    path = each.file(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    python = command.baselines_python if cell.missing(each) else None
    if python and (lacks := elsewhere.lacking(python, each)):
        not_made(each, root, "not run", f"--baselines-python {python} {lacks}")
        return
    code = elsewhere.run(python, arguments, lock)
    if code == 0 and path.exists():
        return
    why = f"its process ended with exit code {code}; what it printed says why"
    if code < 0:
        why = f"its process was ended by signal {-code}" + (": perhaps memory ran out" if code == -9 else "")
    not_made(each, root, "failed", why)


def not_made(each: Cell, root: Path, status: str, why: str) -> None:
    """Write a row that says why there is none."""
    path = each.file(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"method": each.method.name, "keep": each.keep, "status": status, "why": why})
