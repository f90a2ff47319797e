"""`trimllm scan`: the importance of every unit, and with --analysis what may explain it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimllm import config, files, tasks
from trimllm.analysis import lens, summary
from trimllm.blocks import decoder, legality
from trimllm.blocks.layout import Unit, describe, remove, units, whole
from trimllm.checkpoints import folders
from trimllm.commands import shared
from trimllm.console import Console, table
from trimllm.errors import InputError
from trimllm.evaluation import encoding, inputs
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import scan, select, weights
from trimllm.importance.scores import Evidence
from trimllm.plot import analysis_plot, importance_plot
from trimllm.run.deciding import race_of


@dataclass(frozen=True)
class _Prepared:
    """What a scan is made of: the model, what must stay of it, and the calibration rows that it is asked."""

    model: Any
    protected: frozenset[int]
    length: int
    """Blocks in the runs that go together (--keep-pattern)."""
    data: tasks.TaskData
    scorer: Scorer
    tolerance: float
    asked: list[encoding.Encoded]
    """Questions of the analysis."""


def run(command: config.ScanConfig) -> None:
    """Importance of every unit: table, scan.json, scan.png; with --analysis what may explain it."""
    output, console = Path(command.output), Console()
    for product in ("scan.json", "analysis.json")[: 1 + command.analysis]:
        shared.fresh(output, product)
    folders.check_writable(output)
    prepared = _prepare(command, console)
    result = _scan(command, prepared, console)
    record = _show(command, prepared, result)
    if command.analysis:
        _explain(command, prepared, result, record)


def _prepare(command: config.ScanConfig, console: Console) -> _Prepared:
    """Load model and task, and refuse what cannot be scanned before anything is computed."""
    loaded = shared.load(command, evaluating=True)
    depth = decoder.depth(loaded.model)
    if command.run is not None and command.run > depth:
        raise InputError(f"--run {command.run}: the model has only {depth} layers")
    protected = select.protected(command.protect, depth)
    length = legality.run_length(loaded.model, command.unit, keep_pattern=command.keep_pattern)
    data = inputs.task_data(command, loaded.tokenizer)
    for note in data.notes:
        console.say(f"  {note}")
    tolerance = select.tolerance_points(data.metric, len(data.calibration), command.tie_tolerance)
    scorer = inputs.scorer(command, loaded.model, loaded.tokenizer, data.calibration)
    for note in encoding.row_notes(calibration=scorer.encoded):
        console.say(f"  {note}")
    asked = lens.questions(scorer) if command.analysis else []
    return _Prepared(loaded.model, protected, length, data, scorer, tolerance, asked)


def _scan(command: config.ScanConfig, prepared: _Prepared, console: Console) -> scan.ScanResult:
    """Measure every candidate, and say what the user should know of it."""
    model, scorer, metric = prepared.model, prepared.scorer, prepared.data.metric
    depth = decoder.depth(model)
    every = units(command.unit, whole(depth), prepared.length)
    may_go = [every[i] for i in _open(command, model, every, prepared.protected)[0]]
    # An analysis compares what it finds with accuracies too.
    asks_every_choice = command.analysis or command.metric is not None
    if not asks_every_choice and command.scan == "exact":
        slow = scan.many_choices_note(scorer, command.strategy)
        if slow:
            console.say(f"  {slow}")
    questions = (scorer, metric) if asks_every_choice else scan.asked(model, scorer, metric, command.strategy)
    with console.progress("scan") as show:
        result = scan.scan(
            model,
            *questions,
            command.unit,
            length=prepared.length,
            run=command.run or max(1, depth // 2),
            race=race_of(command, prepared.tolerance, may_go, command.seed + depth),  # as a run's first scan
            progress=show,
        )
    for note in result.notes:
        console.say(f"  {note}")
    return result


def _show(command: config.ScanConfig, prepared: _Prepared, result: scan.ScanResult) -> dict[str, Any]:
    """Print the table and what would go first; write scan.json, which is returned, and its picture."""
    model, depth, output = prepared.model, decoder.depth(prepared.model), Path(command.output)
    extra = weights.evidence(command.strategy, model, prepared.scorer, result.candidates)
    evidence = result.evidence(scan.positions(result.candidates, range(depth)), depth, command.seed + depth, **extra)
    names = [describe(unit, whole(depth)) for unit in result.candidates]
    record = scan.table(result, evidence, command.strategy, names)
    choice, reason = _first(command, model, result, evidence, prepared.protected, prepared.tolerance)
    record |= {"model": command.model, "task": prepared.data.name, "metric": result.intact.metric}
    record["first"] = names[choice.index] if choice else None
    if choice is None:
        first = f"nothing: {reason}"
    elif command.unit == "sublayer" and len(choice.tied) == 1:  # "least important" is what its line begins with
        first = names[choice.index]
    else:
        first = f"{names[choice.index]} ({choice.why})"
    print(f"intact: {result.intact.metric} {result.intact}")
    print(scan_table(record))
    print(f"{'least important' if command.unit == 'sublayer' else 'would go first'}: {first}")
    files.write_json(output / "scan.json", record)
    importance_plot(record, output / "scan.png")
    print(f"written: {output / 'scan.json'}, {output / 'scan.png'}")
    return record


def _explain(command: config.ScanConfig, prepared: _Prepared, result: scan.ScanResult, record: dict[str, Any]) -> None:
    """Print and write what may explain the scan: analysis.json and its picture."""
    output = Path(command.output)
    explained = summary.analyse(command, prepared.model, prepared.scorer, prepared.asked, result, record)
    print(f"\n{summary.report(explained)}")
    files.write_json(output / "analysis.json", explained)
    analysis_plot(explained, output / "analysis.png")
    print(f"written: {output / 'analysis.json'}, {output / 'analysis.png'}")


def _first(
    command: config.ScanConfig,
    model: Any,
    result: scan.ScanResult,
    evidence: Evidence,
    protected: frozenset[int],
    tolerance: float,
) -> tuple[select.Choice | None, str]:
    """What a run would drop first, or None and why nothing may go."""
    free, reason = _open(command, model, result.candidates, protected)
    allowed = result.eligible(free, command.strategy)
    if free and not allowed:
        reason = "no run fits after a layer that may go: ask for a shorter --run"
    if not allowed:
        return None, reason
    return select.choose(result.candidates, evidence, command.strategy, tolerance=tolerance, allowed=allowed), ""


def _open(
    command: config.ScanConfig, model: Any, candidates: list[Unit], protected: frozenset[int]
) -> tuple[list[int], str]:
    """Which candidates may go, and why none may; sub-layers never go alone, so only protection counts for them."""
    intact = whole(decoder.depth(model))
    free = select.droppable(candidates, intact, protected)
    if command.unit == "sublayer" or not free:
        return free, "every layer is protected"
    if len(intact) == 1:
        return [], "the model has only one layer"
    refusals = [legality.refusal(model, remove(intact, candidates[i])) for i in free]
    return [i for i, why in zip(free, refusals, strict=True) if why is None], refusals[0] or ""


def scan_table(record: dict[str, Any]) -> str:
    """The units of a scan, most important first."""
    rows = [
        [
            row["unit"],
            "-" if row["importance"] is None else f"{row['importance']:.4g}",
            f"{row['value']:.1f} +- {row['stderr']:.1f}" + (f" (foreseen from {row['n']})" if "stopped" in row else ""),
            "-" if row["loss"] is None else f"{row['loss']:.3f}",
            f"{row['norm']:.1f}",
        ]
        for row in sorted(record["units"], key=_by_importance)
    ]
    return table(["unit", "importance", f"{record['metric']} without it", "loss", "norm"], rows)


def _by_importance(row: dict[str, Any]) -> float:
    return -math.inf if row["importance"] is None else -row["importance"]
