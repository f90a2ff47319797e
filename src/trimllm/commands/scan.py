"""`trimllm scan`: the importance of every unit, and with --analysis what may explain it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimllm import config, files, tasks
from trimllm.analysis import lens, summary
from trimllm.checkpoints import folders
from trimllm.commands import shared
from trimllm.console import Console, table
from trimllm.evaluation import encoding, inputs
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import scan
from trimllm.importance.ranking import Ranking, rank
from trimllm.importance.rules import Rules
from trimllm.parallel import ALONE
from trimllm.plot import analysis_plot, importance_plot
from trimllm.run import used_rows
from trimllm.run.scan_file import ScanFile

UNDERWAY = "scan-{}.jsonl"
"""What is scanned so far, by what it is of."""
OF_NO_TRIAL = {"output", "analysis_items", "threads"}
"""Settings by which trials are the same."""


@dataclass(frozen=True)
class _Prepared:
    """What a scan is made of: the model, what may go of it, and the calibration rows that it is asked."""

    model: Any
    rules: Rules
    data: tasks.TaskData
    scorer: Scorer
    asked: list[encoding.Encoded]
    """Questions of the analysis."""
    underway: Path
    """Where finished batches are kept until all is written."""


def run(command: config.ScanConfig) -> None:
    """Importance of every unit: table, scan.json, scan.png; with --analysis what may explain it."""
    output, console = Path(command.output), Console()
    cut = any(output.glob(UNDERWAY.format("*")))  # an analysis, perhaps, after scan.json was written
    if not cut:
        _fresh(command)
    folders.check_writable(output)
    inputs.check_task(command)
    prepared = _prepare(command, console)
    if cut and not prepared.underway.exists():  # that was of something else
        _fresh(command)
    found = _scan(command, prepared, console)
    record = _show(command, prepared, found)
    if command.analysis:
        _explain(command, prepared, found.result, record, console)
    prepared.underway.unlink(missing_ok=True)


def _fresh(command: config.ScanConfig) -> None:
    for product in ("scan.json", "analysis.json")[: 1 + command.analysis]:
        shared.fresh(Path(command.output), product)


def _prepare(command: config.ScanConfig, console: Console) -> _Prepared:
    """Load model and task, and refuse what cannot be scanned before anything is computed."""
    loaded = shared.load(command, evaluating=True)
    rules = Rules(command, loaded.model, command.seed)
    data = inputs.task_data(command, loaded.tokenizer)
    for note in data.notes:
        console.say(f"  {note}")
    for warning in used_rows.warnings(command.model, replace(data, test=()), command.seed):
        console.warn(warning)
    scorer = inputs.scorer(command, loaded.model, loaded.tokenizer, data.calibration)
    for note in encoding.row_notes(calibration=scorer.encoded):
        console.say(f"  {note}")
    asked = lens.questions(scorer) if command.analysis else []
    of = command.model_dump_json(exclude=OF_NO_TRIAL) + loaded.fingerprint + data.digest()
    underway = Path(command.output) / UNDERWAY.format(hashlib.sha256(of.encode()).hexdigest()[:12])
    return _Prepared(loaded.model, rules, data, scorer, asked, underway)


def _scan(command: config.ScanConfig, prepared: _Prepared, console: Console) -> Ranking:
    """Measure every candidate, or go on with it, and say what the user should know of it."""
    model, scorer, metric = prepared.model, prepared.scorer, prepared.data.metric
    file = ScanFile(prepared.underway, ALONE, mixed=scorer.autocast is not None)
    if finished := file.batches(metric):
        console.say(f"  goes on with a scan that was cut: {len(finished)} batches are there")
    # An analysis compares what it finds with accuracies too.
    asks_every_choice = command.analysis or command.metric is not None
    if not asks_every_choice and command.scan == "exact":
        slow = scan.many_choices_note(scorer, command.strategy)
        if slow:
            console.say(f"  {slow}")
    with console.progress("scan") as show:
        found = rank(
            model,
            scorer,
            metric,
            command,
            prepared.rules,
            every_choice=asks_every_choice,
            finished=finished,
            on_part=lambda number, part: file.keep_batch(number, part, metric),
            progress=show,
        )
    for note in found.result.notes:
        console.say(f"  {note}")
    return replace(found, record=found.record | {"seconds": file.seconds})


def _show(command: config.ScanConfig, prepared: _Prepared, found: Ranking) -> dict[str, Any]:
    """Print the table and what would go first; write scan.json, which is returned, and its picture."""
    output, choice, intact = Path(command.output), found.choice, found.result.intact
    record = found.record | {"model": command.model, "task": prepared.data.name}
    if choice is None:
        first = f"nothing: {found.reason}"
    elif command.unit == "sublayer" and len(choice.tied) == 1:  # "least important" is what its line begins with
        first = record["first"]
    else:
        first = f"{record['first']} ({choice.why})"
    print(f"intact: {intact.metric} {intact}")
    print(scan_table(record))
    print(f"{'least important' if command.unit == 'sublayer' else 'would go first'}: {first}")
    files.write_json(output / "scan.json", record)
    importance_plot(record, output / "scan.png")
    print(f"written: {output / 'scan.json'}, {output / 'scan.png'}")
    return record


def _explain(
    command: config.ScanConfig, prepared: _Prepared, result: scan.ScanResult, record: dict[str, Any], console: Console
) -> None:
    """Print and write what may explain the scan: analysis.json and its picture."""
    output = Path(command.output)
    with console.progress("tracing") as show:
        found = summary.measure(command, prepared.model, prepared.scorer, prepared.asked, result, show)
    for note in found["notes"]:
        console.say(f"  {note}")
    explained = summary.record(found, record, command.seed)
    print(f"\n{summary.report(explained)}")
    files.write_json(output / "analysis.json", explained)
    analysis_plot(explained, output / "analysis.png")
    print(f"written: {output / 'analysis.json'}, {output / 'analysis.png'}")


def scan_table(record: dict[str, Any]) -> str:
    """The units of a scan, most important first."""
    sure = record["intact"].get("probability") is not None
    rows = [
        [
            row["unit"],
            "-" if row["importance"] is None else f"{row['importance']:.4g}",
            *(["-" if row["probability"] is None else f"{row['probability']:.1f}"] if sure else []),
            f"{row['value']:.1f} +- {row['stderr']:.1f}" + (f" (foreseen from {row['n']})" if "stopped" in row else ""),
            "-" if row["loss"] is None else f"{row['loss']:.3f}",
            f"{row['norm']:.1f}",
        ]
        for row in sorted(record["units"], key=_by_importance)
    ]
    columns = ["probability"] if sure else []
    return table(["unit", "importance", *columns, f"{record['metric']} without it", "loss", "norm"], rows)


def _by_importance(row: dict[str, Any]) -> float:
    return -math.inf if row["importance"] is None else -row["importance"]
