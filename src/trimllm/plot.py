"""Pictures of what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimllm.files import disk_errors


@contextmanager
def picture(path: Path, *panels: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, as `pyplot.subplots` makes them; a file when the block ends. matplotlib is loaded here.

    Raises:
        TrimError: if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*panels, layout="constrained", **options)
    try:
        yield figure, axes
        with disk_errors(path):
            figure.savefig(path, dpi=130)
    finally:
        pyplot.close(figure)


def importance_plot(record: dict[str, Any], path: Path) -> None:
    """Per unit of a scan, in order of depth: the metric when it is deleted (with its standard error), and its norm."""
    rows = record["units"]
    places = range(len(rows))
    size = (max(6.0, 0.36 * len(rows) + 2), 6)
    with picture(path, 2, 1, sharex=True, figsize=size, height_ratios=[2, 1]) as (_, (top, bottom)):
        top.bar(
            places, [row["value"] for row in rows], yerr=[row["stderr"] for row in rows], color="#4878a8", capsize=2
        )
        top.axhline(record["intact"]["value"], color="#c44e52", linewidth=1, label="intact")
        top.set_ylabel(f"{record['metric']} without it (%)")
        top.set_title(f"{record['model']} on {record['task']}: what each layer is worth", fontsize=10)
        top.legend(frameon=False)
        bottom.bar(places, [row["norm"] for row in rows], color="#8c8c8c")
        bottom.set_ylabel("activation norm")
        bottom.set_xticks(list(places), [row["unit"] for row in rows], rotation=90, fontsize=8)


def analysis_plot(record: dict[str, Any], path: Path) -> None:
    """Per measure of an analysis a panel, in order of depth, with the loss that the scan found without each unit."""
    rows = record["units"]
    places = list(range(len(rows)))
    panels = [(row["measure"], row["loss"]["rho"]) for row in record["correlations"] if row["measure"] != "depth"]
    lines = (len(panels) + 2) // 2
    size = (max(8.0, 0.4 * len(rows) + 5), 2.2 * lines)
    with picture(path, lines, 2, sharex=True, figsize=size, squeeze=False) as (figure, grid):
        first, *others = grid.flat
        lost = [record["intact"]["value"] - row["value"] for row in rows]
        first.bar(places, lost, color="#8c8c8c")
        first.set_ylabel("points", fontsize=8)
        first.set_title(f"the scan: {record['metric']} lost without it", fontsize=9)
        losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
        for axes in (first, *others[: len(panels)]):
            beside = axes.twinx()
            (line,) = beside.plot(
                places, losses, color="#c44e52", marker=".", linewidth=1, label="loss without it (nats)"
            )
            beside.set_yscale("log")
            beside.tick_params(labelsize=7, which="both")
            beside.yaxis.set_visible(axes is first)  # the same scale in all panels
            beside.yaxis.set_major_formatter("{x:g}")
            beside.yaxis.set_minor_formatter("{x:g}")
            axes.tick_params(labelsize=7)
        for axes, (name, rho) in zip(others, panels, strict=False):
            label, unit = record["measures"][name].values()
            spread = [row.get(f"{name}_stderr", 0.0) for row in rows]
            axes.bar(places, [row[name] for row in rows], yerr=spread, color="#4878a8", capsize=2)
            axes.set_ylabel(unit, fontsize=8)
            axes.set_title(
                label if math.isnan(rho) else f"{label}: rank correlation with the loss {rho:+.2f}", fontsize=9
            )
        for axes in grid[-1]:
            axes.set_xticks(places, [row["unit"] for row in rows], rotation=90)
        if len(panels) % 2 == 0:  # nothing stands below the panel that is last but one
            grid[-1, 1].set_axis_off()
            grid[-2, 1].tick_params(axis="x", labelbottom=True, labelrotation=90)
        figure.legend(handles=[line], loc="outside lower right", frameon=False, fontsize=8)
        figure.suptitle(f"{record['model']} on {record['task']}: what may explain the scan", fontsize=10)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each path, cut to as many of its last parts as tell it from the others."""
    parts = {name: Path(name).parts for name in names}

    def apart(name: str) -> str:
        for count in range(1, len(parts[name]) + 1):
            end = parts[name][-count:]
            if sum(other[-count:] == end for other in parts.values()) == 1:
                return str(Path(*end))
        return name

    return {name: apart(name) for name in parts}


def bench_plot(record: dict[str, Any], path: Path) -> None:
    """Per batch size: decode speed of every model, and its ratio to the first one's, measured against ideal."""
    rows = record["rows"]
    several = len({row["batch"] for row in rows}) > 1
    places = list(range(len(rows)))
    short = short_names([row["model"] for row in rows])
    names = [short[row["model"]] + (f"\nbatch {row['batch']}" if several else "") for row in rows]
    ratios = [row["ratio"] for row in rows]
    with picture(path, 1, 2, figsize=(max(7.0, 1.4 * len(rows) + 3), 4)) as (figure, (left, right)):
        spread = [
            [row["decode_tokens_per_second"] - min(row["decode_rounds"]) for row in rows],
            [max(row["decode_rounds"]) - row["decode_tokens_per_second"] for row in rows],
        ]
        left.bar(places, [row["decode_tokens_per_second"] for row in rows], yerr=spread, color="#4878a8", capsize=3)
        left.set_ylabel("decode tokens/s")
        errors = [[r["median"] - r["min"] for r in ratios], [r["max"] - r["median"] for r in ratios]]
        right.bar(places, [r["median"] for r in ratios], yerr=errors, color="#8c8c8c", capsize=3, label="measured")
        right.scatter(
            places, [r["ideal"] for r in ratios], color="#c44e52", marker="_", s=600, label="ideal (bytes read)"
        )
        right.set_ylabel(f"speed, times that of {short[rows[0]['model']]}")
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
        for axes in (left, right):
            axes.set_xticks(places, names, rotation=20, ha="right", fontsize=8)
