"""What `trimllm compare` says of its rows: lines, the table, compare.json, the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimllm.baselines import METHODS, Cell, cells
from trimllm.bench import tables
from trimllm.config import CompareConfig
from trimllm.console import clock, table
from trimllm.evaluation.paired import shown, unanimous
from trimllm.plot import picture
from trimllm.tasks.spec import is_accuracy

LINE = 0.165
"""Inches of the picture's height for each name: a line of it, where the axes take four fifths of the height."""


def row_line(cell: Cell, row: dict[str, Any]) -> str:
    """A finished row in one line."""
    if row["status"] != "done":
        return f"{cell.name}: {row['status']}: {row['why']}"
    first, made = next(iter(row["accuracy"].values())), clock(row["train_seconds"] + row["compress_seconds"])
    return (
        f"{cell.name}: {first['metric']} {first['value']:.1f} +- {first['stderr']:.1f}, {row['depth']} layers, "
        f"{row['speed']['ratio']['median']:.2f}x the base's decode speed, {made}"
    )


def record(command: CompareConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The contents of compare.json."""
    return {
        "settings": command.model_dump(mode="json"),
        "machine": tables.machine(),
        "rows": rows,
    }


def report(found: dict[str, Any]) -> str:
    """Two tables of the same rows: how good they are and what making them took, how large and fast they are. Rows that
    have no figures say why below them."""
    done = [row for row in found["rows"] if row["status"] == "done"]
    metrics = {task: found["metric"] for row in done for task, found in row["accuracy"].items()}
    own, *also = metrics or [""]
    above = any(row["above_full"] for row in done)
    second = "acc_norm" if is_accuracy(metrics.get(own, "acc")) else "perplexity"
    out = ""
    if done:
        header = ["method", "layers", own, *(["above full"] if above else []), *also, second]
        header += ["M tokens", "train min", "compress min"]
        out = table(header, [_quality(row, list(metrics), second, above=above) for row in done])
        out += (
            f"\n{', '.join(f'{task}: {metric}' for task, metric in metrics.items())}, in percent +- standard error on "
            "the reported split; tokens and minutes: those of the method itself, without what it starts from"
        )
    if above:
        out += f"\nabove full: points of {own} above full fine-tuning, +- standard error over paired answers"
    if done:
        header = ["method", "layers", "M params", "disk MB", "peak MB"]
        header += ["prefill/s", "of the base's", "decode/s", "of the base's"]
        out += "\n\n" + table(header, [_size_and_speed(row) for row in done])
        out += (
            "\npeak: memory while decoding; speed: tokens a second at batch 1, each row in turn with the base and at "
            "another time than\nthe others, so compare rows by the columns *of the base's*"
        )
        out += "".join(f"\n{line}" for line in _dtypes(done))
    for row in done:
        if row["note"]:
            out += f"\n{row['title']}: {row['note']}"
    for row in found["rows"]:
        if row["status"] != "done":
            out += f"\n{row['title']}: {row['status']}: {row['why']}"
    there = {Cell(METHODS[row["method"]], row["keep"]).name for row in found["rows"]}
    asked = [each.name for each in cells(found["settings"]["methods"], found["settings"]["keep"])]
    if missing := [name for name in asked if name not in there]:
        out += f"\n--resume without --methods and --keep would also make: {', '.join(missing)}"
    return out


def _dtypes(done: list[dict[str, Any]]) -> list[str]:
    """Lines on the dtypes of the speeds, where they differ (a quantized model keeps its own), or a CPU emulates one."""
    titles: dict[str, list[str]] = {}
    for row in done:
        titles.setdefault(row["speed"]["dtype"], []).append(row["title"])
    usual, *others = sorted(titles, key=lambda dtype: -len(titles[dtype]))
    lines = []
    if others:
        apart = "; ".join(f"those of {', '.join(titles[dtype])} in {dtype}" for dtype in others)
        lines.append(f"speeds are in {usual}, {apart}")
    if emulated := sorted({row["speed"]["dtype"] for row in done if row["speed"]["slowdown"] > 1}):
        lines.append(f"this CPU emulates {' and '.join(emulated)}: prefill is faster with --dtype float32")
    return lines


def _quality(row: dict[str, Any], tasks: list[str], second: str, *, above: bool) -> list[Any]:
    accuracies = [row["accuracy"].get(task) for task in tasks]
    first, *others = (f"{found['value']:.1f} +- {found['stderr']:.1f}" if found else "-" for found in accuracies)
    name, own = next(iter(row["accuracy"].items()))
    apart = row["above_full"].get(name)
    return [
        row["title"],
        row["depth"],
        first,
        *([_apart(apart)] if above else []),
        *others,
        f"{own['perplexity']:.4g}" if second == "perplexity" else f"{own['acc_norm']:.1f}",
        f"{row['tokens'] / 1e6:.3g}",
        f"{row['train_seconds'] / 60:.1f}",
        f"{row['compress_seconds'] / 60:.1f}",
    ]


def _apart(found: dict[str, float] | None) -> str:
    if not found:
        return "-"
    return "same scores" if unanimous(found) else shown(found)


def _size_and_speed(row: dict[str, Any]) -> list[Any]:
    speed, ratio = row["speed"], row["speed"]["ratio"]
    return [
        row["title"],
        row["depth"],
        f"{row['parameters'] / 1e6:.2f}",
        f"{row['disk_bytes'] / 1e6:.1f}",
        "-" if speed["peak_bytes"] is None else f"{speed['peak_bytes'] / 1e6:.0f}",
        f"{speed['prefill_tokens_per_second']:.0f}",
        f"{speed['prefill_ratio']['median']:.2f}x",
        f"{speed['decode_tokens_per_second']:.1f}",
        f"{ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})",
    ]


def compare_plot(found: dict[str, Any], path: Path) -> None:
    """The metric on the task against decode speed, a point per row; nothing is drawn of no rows."""
    done = [row for row in found["rows"] if row["status"] == "done"]
    if not done:
        return
    height = max(6.0, LINE * len(done))
    with picture(path, figsize=(11, height)) as (_, axes):
        points = list[tuple[float, float, str, str]]()
        for row in done:
            own, ratio = next(iter(row["accuracy"].values())), row["speed"]["ratio"]["median"]
            ours = row["method"].startswith("trim")
            colour = "#c44e52" if ours else "#8c8c8c" if row["method"] in ("base", "full", "full-long") else "#4878a8"
            axes.errorbar(ratio, own["value"], yerr=own["stderr"], fmt="o", color=colour, capsize=2, markersize=5)
            points.append((ratio, own["value"], row["title"], colour))
        settings = found["settings"]
        axes.set_xlabel("decode speed at batch 1, of the base's")
        axes.set_ylabel(f"{next(iter(done[0]['accuracy'].values()))['metric']} on the reported split (%)")
        axes.set_title(f"{settings['model']} on {settings['task']}", fontsize=10)
        _label(axes, points, gap=LINE / height)


def _label(axes: Any, points: list[tuple[float, float, str, str]], gap: float) -> None:
    """Names of the points (x, y, name, colour) in a column beside the axes, in the order of y, a line to each."""
    points = sorted(points, key=lambda point: (point[1], -point[0]))
    low, high = axes.get_ylim()
    heights = _spread([(y - low) / (high - low) for _, y, _, _ in points], gap)
    for (x, y, name, colour), height in zip(points, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            (1.02, height),
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=7,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6, "relpos": (0, 0.5)},
        )


def _spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights, moved until they are `gap` apart: up, and down from 1 where that is too far."""
    found, least, most = list[float](), 0.0, 1.0
    for height in heights:
        found.append(max(height, least))
        least = found[-1] + gap
    for i in reversed(range(len(found))):
        found[i] = min(found[i], most)
        most = found[i] - gap
    return found
