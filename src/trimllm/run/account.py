"""What is said of a run: its lines on the way, its table, and result.json."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from trimllm.blocks.layout import Layout, describe, in_short, whole_layers
from trimllm.config import TrimConfig
from trimllm.console import clock, table
from trimllm.evaluation import fluency
from trimllm.evaluation.judging import Evaluation
from trimllm.evaluation.paired import shown, unanimous
from trimllm.importance.joint import Joint, accepted
from trimllm.importance.scan import ScanResult
from trimllm.importance.scores import deciding
from trimllm.importance.select import Choice
from trimllm.run import targets
from trimllm.run.outcome import Outcome
from trimllm.run.targets import Size
from trimllm.tasks import Item
from trimllm.tasks.spec import is_accuracy
from trimllm.tasks.splits import majority

LIBRARIES = ("trimllm", "torch", "transformers", "accelerate", "tokenizers", "safetensors")


FEW = 20
"""Calibration rows, below which they decide nothing."""
STEPS = {"base": "base", "stage": "fine-tuned", "saved": "as saved"}
"""What a row without a drop is."""


def what(row: dict[str, Any]) -> str:
    """What a row without a drop is; a warm-up of no steps trained nothing."""
    trained = (row.get("train") or {}).get("steps", 1)
    return STEPS[row["event"]] if trained else "not trained"


def percent(record: dict[str, Any] | None) -> str:
    """`87.2 +- 1.5` of a journaled evaluation."""
    return f"{record['value']:.1f} +- {record['stderr']:.1f}" if record else "-"


def above_line(above: dict[str, float], depth: int) -> str:
    """`-0.3 +- 0.8 points ...`: the saved model against the one that the drops began with."""
    whole = f"all {depth} layers, as they were before the drops"
    if unanimous(above):
        return f"every item scores as with {whole}"
    return f"{shown(above)} points against {whole} (paired answers)"


def faster_line(speedup: dict[str, float]) -> str:
    """`decodes 1.80 times as fast as the base ...`."""
    least, most = speedup["min"], speedup["max"]
    return f"decodes {speedup['median']:.2f} times as fast as the base ({least:.2f} to {most:.2f}, measured in turn)"


def depth_table(history: list[dict[str, Any]]) -> str:
    """One line per depth: what went, accuracies, size, speed."""
    rows = []
    for row in history:
        dropped = in_short([unit for drop in row.get("dropped", []) for unit in drop["units"]])
        rows.append(
            [
                row["depth"],
                dropped or what(row),
                percent(row["calibration"]),
                percent(row["test"]),
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['tokens_per_second']:.0f}",
            ]
        )
    return table(["depth", "dropped", "calibration", "test", "M params", "MB", "tokens/s"], rows)


def result(run: Outcome) -> dict[str, Any]:
    """The contents of result.json."""
    data = run.data
    return {
        "base": run.origin.record(),
        "task": data.name,
        "metric": data.metric,
        "test": run.saved["test"],
        "above_full": run.above,
        "calibration": run.saved["calibration"],
        "depth": run.good["depth"],
        "base_depth": run.base_depth,
        "blocks": run.good["layout"],
        "layers": whole_layers(run.layout),
        "parameters": run.good["parameters"],
        "bytes": run.good["bytes"],
        "decode_speedup": run.speedup,
        "verified": vars(run.verified),
        "rows": {
            "train": len(data.train),
            "calibration": len(data.calibration),
            "test": len(data.test),
            "left_out": list(data.left_out),
        },
        "notes": list(data.notes),
        "warnings": warnings(run),
        "history": run.history,
        "drops": run.drops,
        "tokens": tokens(run.stages),
        "settings": run.config.model_copy(update={"resume": False}).model_dump(mode="json"),
        "seconds": {
            "training": sum(row["train"]["seconds"] for row in run.stages),
            "scans": sum(drop["seconds"] for drop in run.drops),
        },
        "machine": {"system": platform.platform(), "python": platform.python_version()},
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def worsened(stage: dict[str, Any], base: dict[str, Any]) -> str | None:
    """One line if training made a depth worse on the calibration set, by more than its standard error.

    What it was before is the base's value, or what the scan found without the one unit that went; None where that was
    not measured. Arguments are journaled rows.
    """
    now, drops = stage["calibration"], stage["dropped"]
    alone = len(drops) == 1 and len(drops[0]["units"]) == 1
    if drops and not (alone and drops[0]["metric"] == now["metric"]):
        return None
    before = drops[0]["value"][0] if drops else base["calibration"]["value"]
    if not stage["train"]["steps"] or before is None or now["value"] >= before - now["stderr"]:
        return None
    return (
        f"the calibration set got worse while depth {stage['depth']} trained ({now['metric']} {before:.1f} "
        f"before, {now['value']:.1f} after): train for fewer epochs, at a lower --lr, or on more rows"
    )


def after_stage(
    stage: dict[str, Any], base: dict[str, Any], config: TrimConfig, calibration: Sequence[Item]
) -> list[str]:
    """Warnings about a depth that was trained, and about the first, with which drops begin; rows are journaled ones."""
    begin = [guessing(stage, calibration), loose(config, stage)] if stage["stage"] == 0 else []
    return [line for line in (*begin, worsened(stage, base)) if line]


def few_rows(items: Sequence[Item]) -> str | None:
    """One line if the calibration set is too small to decide anything."""
    if len(items) >= FEW:
        return None
    return (
        f"the calibration set has {len(items)} rows: what is dropped is decided by chance, and accuracies say little; "
        "give more rows"
    )


def guessing(row: dict[str, Any], items: Sequence[Item]) -> str | None:
    """One line if a journaled model is no better on the calibration set than answers without reading, within its
    standard error."""
    now = row["calibration"]
    if not is_accuracy(now["metric"]):
        return None
    most = majority(items)
    chance = most[1] if most else statistics.fmean(1 / len(item.continuations) for item in items)
    if now["value"] > 100 * chance + now["stderr"]:
        return None
    how = f"always saying {most[0]!r}" if most else "guessing"
    return (
        f"depth {row['depth']}, from which drops begin, has {now['metric']} {now['value']:.1f} on the calibration set, "
        f"where {how} has {100 * chance:.1f}: train for longer, at another --lr, or on more rows"
    )


def loose(config: TrimConfig, warm: dict[str, Any]) -> str | None:
    """One line if --max-drop is a floor that nothing can fall below; `warm` is the journaled row of the warm-up."""
    value = warm["calibration"]["value"]
    if config.max_drop is None or value > config.max_drop:
        return None
    return (
        f"--max-drop {config.max_drop:g}: {warm['calibration']['metric']} is {value:.1f} on the calibration set, and "
        "no depth can be so far below it: give a smaller one"
    )


def other_rates(stages: Sequence[dict[str, Any]]) -> str | None:
    """One line if a run went on with another learning rate, which the settings do not show."""
    rates = dict.fromkeys(row["train"]["lr"] for row in stages if row["train"]["steps"])
    if len(rates) < 2:
        return None
    told = ", then ".join(f"{rate:g}" for rate in rates)
    return f"stages were trained at --lr {told}: the settings hold the last one"


def at_the_end(run: Outcome) -> list[str]:
    """Warnings about the result as a whole."""
    none = "nothing was dropped: the first drop fell below the accuracy floor"
    found = [none] if run.saved["depth"] == run.base_depth else []
    collapsed = fluency.warning(run.base["fluency"], run.saved["fluency"])
    slower = targets.slower(run.config, run.ended, run.speedup)
    return [*found, *filter(None, [collapsed, slower, other_rates(run.stages)])]


def warnings(run: Outcome) -> list[str]:
    """Everything that the user was warned of on the way, in that order, but for the disk."""
    found = list(run.warned)
    for row in run.stages:
        found += after_stage(row, run.base, run.config, run.data.calibration)
    missed = targets.missed(run.config, run.ended) if run.ended else None
    return [*found, *([missed] if missed else []), *at_the_end(run)]


def tokens(stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Training tokens per stage, in total, and in units of the first stage, which is one full fine-tune."""
    each = [row["train"]["tokens"] for row in stages]
    return {"stages": each, "total": sum(each), "full_fine_tunes": sum(each) / each[0] if each[0] else None}


def drop_line(choices: list[Choice], layout: Layout, result: ScanResult, tried: list[Joint], strategy: str) -> str:
    """What goes and why, for the user; `tried` are the sets that were tried as a whole."""
    found = accepted(choices, tried)
    names = in_short([describe(choice.unit, layout) for choice in choices])
    if found is not None:
        return (
            f"drop {names}: {len(choices)} at once (joint {found.value:.1f}, intact {result.intact.value:.1f}; loss "
            f"{found.loss:.3f}, intact {result.intact.loss:.3f}; {len(tried)} sets tried; "
            f"scan {clock(result.seconds)})"
        )
    intact = f"intact {_asked(result.intact, strategy)}; scan {clock(result.seconds)}"
    if len(choices) > 1:
        return f"drop {names} at once ({intact})"
    score = f", {_asked(result.trials[choices[0].index], strategy)} without it" if result.trials else ""
    return f"drop {names} ({choices[0].why}{score}; {intact})"


def _asked(found: Evaluation, strategy: str) -> str:
    """What a trial deletion was asked, the score that decides first."""
    if not is_accuracy(found.metric):
        return f"likelihood {found.value:.1f}"
    sure = found.probability is not None and deciding(strategy) == "probability"
    return f"probability {found.probability:.1f} and {found.metric} {found.value:.1f}" if sure else f"{found.value:.1f}"


def depth_row(
    event: str, size: Size, calibration: Evaluation, test: Evaluation | None, speed: float, more: dict[str, Any]
) -> str:
    """The line that a user sees for a depth."""
    dropped = in_short([unit for drop in more.get("dropped", []) for unit in drop["units"]])
    named = f"- {dropped}" if dropped else what({"event": event, **more})
    report = more.get("train") or {}
    trained = f"  loss {report['loss']:.3f} in {clock(report['seconds'])}" if report.get("loss") is not None else ""
    if (watch := report.get("recovery")) and watch["losses"]:
        end = "is back at" if watch["recovered"] else "is not back in the budget:"
        trained += f"  calibration loss {end} {watch['losses'][-1]:.3f} (asked {watch['limit']:.3f})"
    tested = f"  test {test}" if test else ""
    return (
        f"depth {size.depth:3d}  {named:24s}  calibration {calibration}{tested}  "
        f"{size.parameters / 1e6:.2f} M parameters  {speed:.0f} tokens/s{trained}"
    )
