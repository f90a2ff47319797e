"""Pictures of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimllm.folders import disk_errors


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
