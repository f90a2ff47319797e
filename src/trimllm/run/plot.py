"""Pictures of what was measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trimllm.files import disk_errors


def importance_plot(record: dict[str, Any], path: Path) -> None:
    """Per unit of a scan, in order of depth: the metric when it is deleted (with its standard error), and its norm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = record["units"]
    places = range(len(rows))
    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(max(6.0, 0.36 * len(rows) + 2), 6), height_ratios=[2, 1], layout="constrained"
    )
    top.bar(places, [row["value"] for row in rows], yerr=[row["stderr"] for row in rows], color="#4878a8", capsize=2)
    top.axhline(record["intact"]["value"], color="#c44e52", linewidth=1, label="intact")
    top.set_ylabel(f"{record['metric']} without it (%)")
    top.set_title(f"{record['model']} on {record['task']}: what each layer is worth", fontsize=10)
    top.legend(frameon=False)
    bottom.bar(places, [row["norm"] for row in rows], color="#8c8c8c")
    bottom.set_ylabel("activation norm")
    bottom.set_xticks(list(places), [row["unit"] for row in rows], rotation=90, fontsize=8)
    with disk_errors(path):
        figure.savefig(path, dpi=130)
    pyplot.close(figure)


def analysis_plot(record: dict[str, Any], path: Path) -> None:
    """Per measure of an analysis a panel, in order of depth, with the loss that the scan found without each unit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = record["units"]
    places = list(range(len(rows)))
    panels = [(row["measure"], row["loss"]["rho"]) for row in record["correlations"] if row["measure"] != "depth"]
    height, width = 2.2 * ((len(panels) + 2) // 2), max(8.0, 0.4 * len(rows) + 5)
    figure, grid = pyplot.subplots(
        (len(panels) + 2) // 2, 2, sharex=True, figsize=(width, height), layout="constrained", squeeze=False
    )
    first, *others = grid.flat
    lost = [record["intact"]["value"] - row["value"] for row in rows]
    first.bar(places, lost, color="#8c8c8c")
    first.set_ylabel("points", fontsize=8)
    first.set_title(f"the scan: {record['metric']} lost without it", fontsize=9)
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    for axes in (first, *others[: len(panels)]):
        beside = axes.twinx()
        (line,) = beside.plot(places, losses, color="#c44e52", marker=".", linewidth=1, label="loss without it (nats)")
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
        axes.set_title(label if math.isnan(rho) else f"{label}: rank correlation with the loss {rho:+.2f}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xticks(places, [row["unit"] for row in rows], rotation=90)
    if len(panels) % 2 == 0:  # nothing stands below the panel that is last but one
        grid[-1, 1].set_axis_off()
        grid[-2, 1].tick_params(axis="x", labelbottom=True, labelrotation=90)
    figure.legend(handles=[line], loc="outside lower right", frameon=False, fontsize=8)
    figure.suptitle(f"{record['model']} on {record['task']}: what may explain the scan", fontsize=10)
    with disk_errors(path):
        figure.savefig(path, dpi=130)
    pyplot.close(figure)


def bench_plot(record: dict[str, Any], path: Path) -> None:
    """Per batch size: decode speed of every model, and its ratio to the first one's, measured against ideal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = record["rows"]
    several = len({row["batch"] for row in rows}) > 1
    places = list(range(len(rows)))
    names = [Path(row["model"]).name + (f"\nbatch {row['batch']}" if several else "") for row in rows]
    ratios = [row["ratio"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(max(7.0, 1.4 * len(rows) + 3), 4), layout="constrained")
    spread = [
        [row["decode_tokens_per_second"] - min(row["decode_rounds"]) for row in rows],
        [max(row["decode_rounds"]) - row["decode_tokens_per_second"] for row in rows],
    ]
    left.bar(places, [row["decode_tokens_per_second"] for row in rows], yerr=spread, color="#4878a8", capsize=3)
    left.set_ylabel("decode tokens/s")
    errors = [[r["median"] - r["min"] for r in ratios], [r["max"] - r["median"] for r in ratios]]
    right.bar(places, [r["median"] for r in ratios], yerr=errors, color="#8c8c8c", capsize=3, label="measured")
    right.scatter(places, [r["ideal"] for r in ratios], color="#c44e52", marker="_", s=600, label="ideal (bytes read)")
    right.set_ylabel(f"speed, times that of {Path(rows[0]['model']).name}")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    for axes in (left, right):
        axes.set_xticks(places, names, rotation=20, ha="right", fontsize=8)
    with disk_errors(path):
        figure.savefig(path, dpi=130)
    pyplot.close(figure)
