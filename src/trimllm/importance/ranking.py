"""A scan by the rules of a run, and what it says: for `trimllm scan`, and in Python for a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimllm.blocks import decoder
from trimllm.blocks.layout import describe, whole
from trimllm.config import ScanSettings, plain_settings
from trimllm.errors import InputError
from trimllm.evaluation.evaluate import TOKEN_BUDGET, Scorer
from trimllm.importance import scan
from trimllm.importance.deletion import Part
from trimllm.importance.rules import Rules
from trimllm.importance.scan import ScanResult
from trimllm.importance.select import Choice
from trimllm.tasks.items import Item


@dataclass(frozen=True)
class Ranking:
    """What a scan found."""

    result: ScanResult
    record: dict[str, Any]
    """As `scan.table` makes it, with the metric of the trials and the unit that would go `first`."""
    choice: Choice | None
    """What would go first; None where nothing may, and then `reason` says why."""
    reason: str


def rank(
    model: Any,
    scorer: Scorer,
    metric: str,
    settings: ScanSettings,
    rules: Rules,
    *,
    every_choice: bool = False,
    finished: Mapping[int, Part] | None = None,
    on_part: Callable[[int, Part], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Scan a model, none of whose layers are dropped. With `every_choice` wrong answers are asked, too, where the
    strategy goes by right ones alone. `finished` and `on_part` as in `scan.scan`.

    Raises:
        InputError: if runs are longer than the model, or nothing can be scanned.
    """
    depth = decoder.depth(model)
    if settings.run is not None and settings.run > depth:
        raise InputError(f"--run {settings.run}: the model has only {depth} layers")
    intact = whole(depth)
    questions = (scorer, metric) if every_choice else scan.asked(model, scorer, metric, settings.strategy)
    result = scan.scan(
        model,
        *questions,
        settings.unit,
        length=rules.length,
        run=settings.run or max(1, depth // 2),
        race=rules.race(model, intact),
        finished=finished,
        on_part=on_part,
        progress=progress,
    )
    scanned = rules.scanned(model, intact, result, rules.evidence(model, intact, scorer, result))
    names = [describe(unit, intact) for unit in result.candidates]
    choice, reason = rules.first(scanned)
    first = names[choice.index] if choice else None
    record = scan.table(result, scanned.evidence, settings.strategy, names)
    return Ranking(result, record | {"metric": result.intact.metric, "first": first}, choice, reason)


def scan_layers(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    metric: str | None = None,
    *,
    max_length: int | None = None,
    truncate: bool = False,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Measure how important every layer of a model in memory is, by the rules of `trimllm scan`; the model stays as it
    is.

        data = trimllm.load_task("cases.jsonl", tokenizer=tokenizer)
        found = trimllm.scan_layers(model, tokenizer, data.calibration, data.metric)
        found["first"], [row["importance"] for row in found["units"]]

    Args:
        items: rows to answer, such as those of `load_task(...).calibration`.
        metric: acc, acc_norm or likelihood; by default acc for choices, likelihood for others.
        max_length: the longest row in tokens; by default the model's context.
        truncate: cut rows that exceed it; otherwise they are an error.
        seed: of whatever is random (strategy random, races).
        settings: options of `trimllm scan` by name, such as strategy, unit, protect, run.

    Returns:
        What scan.json holds: `strategy`, `metric`, `intact` (accuracy and loss of the model), `units` in order of depth
        (each with its `importance`, and with `value`, `stderr`, `probability` and `loss` of the model without it), the
        unit that would go `first` (None if none may), `seconds`, `notes`.

    Raises:
        InputError: if a setting is none, items are missing or too long, or nothing can be scanned.
    """
    made = plain_settings.make(ScanSettings, settings)
    budget = made.eval_batch_size or TOKEN_BUDGET
    scorer = Scorer(model, tokenizer, items, token_budget=budget, max_length=max_length, truncate=truncate)
    if metric is None:
        metric = "acc" if all(len(item.continuations) > 1 for item in scorer.items) else "likelihood"
    return rank(model, scorer, metric, made, Rules(made, model, seed)).record
