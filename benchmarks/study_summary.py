"""What the recorded runs of the study say together: a table, and a picture of accuracy by depth.

    python benchmarks/study_summary.py                                    # the newest record, the demo world
    python benchmarks/study_summary.py benchmarks/results/study*.json     # all, other versions and machines too
    python benchmarks/study_summary.py FILE ... --arms one-shot --picture curve.png

Points of accuracy against the full fine-tuning of the same part, seed and file. Two standard errors stand behind each
mean: over runs, which are not independent (seeds share their reported questions, files their seeds), and over the
means of the parts, which are three.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _sides import RESULTS, run

from trimllm.console import table
from trimllm.plot import picture

FILES = (RESULTS / "study-2026-11-29.json",)
WORLD = ("law", "finance", "medicine")
ARMS = {
    "late, carried, probability, filled": "trimllm (default)",
    "late, carried, probability": "trimllm --sparse-update static",
    "late, carried, exact ties": "trimllm --strategy scan+norm --sparse-update static",
    "late, carried, probability, r=1": "trimllm --sparse-update off",
    "late, carried": "trimllm (until 2026-11-29)",
    "late, carried, twice as long": "trimllm (until 2026-11-29), trained twice as long",
    "one-shot, probability": "one-shot by the same scan",
    "one-shot, exact ties": "one-shot by scan+norm",
    "one-shot": "one-shot by the scan until 2026-11-29",
    "perplexity": "one-shot by perplexity (Shortened LLaMA)",
    "taylor": "one-shot by Taylor (Shortened LLaMA)",
    "angular": "one-shot by angular distance",
    "shortgpt": "one-shot by block influence (ShortGPT)",
    "trimllm": "an epoch after every drop",
    "full, as long": "all blocks, trained as long as for that share",
}
"""Arms of the table, and what they are called in the picture."""
DRAWN = (
    "late, carried, probability, filled",
    "late, carried, probability",
    "late, carried, exact ties",
    "late, carried, probability, r=1",
    "one-shot, probability",
    "perplexity",
    "taylor",
    "shortgpt",
    "full, as long",
)
"""Those of the picture: of the defaults, the present one alone."""


@dataclass(frozen=True)
class Run:
    """One arm at one share of the blocks: points against full fine-tuning, and percent of it."""

    part: str
    points: float
    kept: float


def load(files: Sequence[Path], arms: Sequence[str]) -> dict[str, dict[float, list[Run]]]:
    """The runs by arm and share, one of each part, seed and file."""
    found: dict[str, dict[float, list[Run]]] = {arm: {} for arm in arms}
    for file in files:
        records: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["raw"]
        for record in records:
            if record["part"] in WORLD and record["arm"] in found:
                full = record["accuracy"]["1"]["value"]
                for keep, value in record["accuracy"].items():
                    if keep != "1":
                        run = Run(record["part"], value["value"] - full, 100 * value["value"] / full)
                        found[record["arm"]].setdefault(float(keep), []).append(run)
    return found


def error(values: Sequence[float]) -> float:
    """Standard error of the mean; NaN of a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def by_part(runs: Sequence[Run]) -> list[float]:
    """The mean of each part that is there."""
    parts = sorted({run.part for run in runs})
    return [statistics.mean(run.points for run in runs if run.part == part) for part in parts]


def row(arm: str, keep: float, runs: Sequence[Run]) -> list[str]:
    points = [run.points for run in runs]
    errors = [f"{each:.1f}" if math.isfinite(each) else "-" for each in (error(points), error(by_part(runs)))]
    return [
        arm,
        f"{keep:.0%}",
        f"{len(runs)}",
        f"{statistics.mean(points):+.1f}",
        *errors,
        f"{min(points):+.1f}",
        f"{sum(each >= -1 for each in points)} of {len(points)}",
        f"{statistics.mean(run.kept for run in runs):.1f}",
    ]


HEADERS = ("", "blocks", "runs", "against full", "+- runs", "+- parts", "worst", "within 1 point", "kept, %")


def draw(found: dict[str, dict[float, list[Run]]], path: Path) -> None:
    """Mean points against full fine-tuning by share of the blocks, with the standard error over runs."""
    with picture(path, figsize=(7, 4.2)) as (_, axes):
        axes.axhline(0, color="#8c8c8c", linewidth=1)
        for arm, by in found.items():
            keeps = [keep for keep in sorted(by, reverse=True) if len(by[keep]) > 1]
            if not keeps:
                continue
            values = [[run.points for run in by[keep]] for keep in keeps]
            means, errors = [statistics.mean(each) for each in values], [error(each) for each in values]
            counts = dict.fromkeys((min(map(len, values)), max(map(len, values))))
            label = f"{ARMS.get(arm, arm)} ({'-'.join(map(str, counts))} runs)"
            axes.errorbar(
                [100 * keep for keep in keeps], means, errors, marker="o", markersize=4, capsize=2, label=label
            )
        axes.invert_xaxis()
        axes.set_xlabel("blocks kept (%)")
        axes.set_ylabel("points of accuracy\nagainst full fine-tuning")
        axes.set_title("The demo world: three domains, mean and standard error over runs", fontsize=10)
        axes.legend(frameon=False, fontsize=8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=list(FILES), help="study.json of benchmarks/study.py")
    parser.add_argument("--arms", nargs="+", help="arms of the table and the picture (default: the main ones)")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    found = load(options.files, options.arms or list(ARMS))
    rows = [row(arm, keep, by[keep]) for arm, by in found.items() for keep in sorted(by, reverse=True)]
    print(table(list(HEADERS), rows))
    if options.picture:
        draw({arm: found[arm] for arm in options.arms or DRAWN if found[arm]}, options.picture)
        print(f"written: {options.picture}")
    return 0


if __name__ == "__main__":
    run(main)
