"""Training tokens for half the depth: --schedule recover against the published one epoch per drop.

    python benchmarks/schedule.py                       # medicine, seed 0: under 10 minutes on one core
    python benchmarks/schedule.py --domains medicine law finance --seeds 0 1 2 --full-epochs 1 2    # 1 to 2 hours

Both sides are the demo's recipe, in turn. Tokens are counted in full fine-tunes: the warm-up stage that both begin
with. Shorter full fine-tunes (--full-epochs) show whether fewer tokens had been enough for an accuracy like the trimmed
model's. Runs are kept in --output; finished ones are not repeated, others go on where they stood. The last line is one
JSON object, of three domains and seeds without --full-epochs also written to results/schedule.json; the exit code is 1
if recover took more than 3 full fine-tunes, or if its accuracy, meant over all pairs, is below that of published by
more than the binomial error of that difference.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from _sides import changed, finish, run
from study import result_of

from trimllm.config import DemoConfig
from trimllm.console import table
from trimllm.demo.demo import settings
from trimllm.tasks.world import DOMAINS

BOTH = {
    "epochs_per_drop": 1.0,
    "optimizer_state": "fresh",
    "strategy": "scan+norm",
    "tie_tolerance": 1.0,
    "sparse_update": "static",
}
SIDES: dict[str, dict[str, Any]] = {
    "published": {**BOTH, "schedule": "epoch", "final_epochs": 4.0},
    "recover": {**BOTH, "schedule": "recover", "final_epochs": 3.5},
}
"""What differs from the demo's recipe. At half the depth the published side ends with 5 epochs, recover with 3.5."""


def result(command: DemoConfig, output: Path, **changes: Any) -> dict[str, Any]:
    """The result.json of the demo's run with `changes`, which is made, or gone on with, if it is not there."""
    more = {"report_depths": True, "keep_checkpoints": False, "resume": True}
    return result_of(settings(command, output, **more, **changes))


def fine_tuned(found: dict[str, Any]) -> dict[str, Any]:
    """Tokens and reported accuracy of a run's first stage, which trains the whole model at full depth."""
    stage = next(row for row in found["history"] if row["event"] == "stage")
    return {"tokens": stage["train"]["tokens"], "accuracy": stage["test"]["value"], "stderr": stage["test"]["stderr"]}


def trimmed(found: dict[str, Any]) -> dict[str, Any]:
    """What a finished run took and gave; minutes are those of training and scans."""
    return {
        "tokens": found["tokens"]["total"],
        "full_fine_tunes": found["tokens"]["full_fine_tunes"],
        "accuracy": found["test"]["value"],
        "stderr": found["test"]["stderr"],
        "depth": found["depth"],
        "drops": [drop["units"] for drop in found["drops"]],
        "minutes": sum(found["seconds"].values()) / 60,
    }


def compare(command: DemoConfig, root: Path, full_epochs: list[float]) -> dict[str, Any]:
    """Both sides for one domain and seed; the side that begins changes with the seed."""
    folder = root / f"{command.domain}-{command.seed}"
    order = list(SIDES) if command.seed % 2 == 0 else list(SIDES)[::-1]
    runs = {side: result(command, folder / side, **SIDES[side]) for side in order}
    untrimmed = {"keep": None, "depth": 15, "epochs_per_drop": 0.0, "final_epochs": 0.0}
    shorter = [
        {
            "epochs": epochs,
            **fine_tuned(result(command, folder / f"full-{epochs:g}", warmup_epochs=epochs, **untrimmed)),
        }
        for epochs in full_epochs
    ]
    whole = {"epochs": runs["recover"]["settings"]["warmup_epochs"], **fine_tuned(runs["recover"])}
    part: dict[str, Any] = {
        "domain": command.domain,
        "seed": command.seed,
        **{side: trimmed(found) for side, found in runs.items()},
        "fully_fine_tuned": [*shorter, whole],
    }
    ours, other = part["recover"], part["published"]
    part["error"] = math.hypot(ours["stderr"], other["stderr"])
    equal = [full["tokens"] for full in part["fully_fine_tuned"] if full["accuracy"] >= ours["accuracy"]]
    part["of_equal_accuracy"] = ours["tokens"] / min(equal) if equal else None
    return part


def rows(part: dict[str, Any]) -> list[list[Any]]:
    name, unit = f"{part['domain']} {part['seed']}", part["fully_fine_tuned"][-1]["tokens"]
    lines = [
        [
            f"{name} fully fine-tuned, {full['epochs']:g} epochs",
            f"{full['tokens'] / unit:.2f}",
            _accuracy(full),
            "-",
            "-",
        ]
        for full in part["fully_fine_tuned"]
    ]
    for side in SIDES:
        run = part[side]
        sizes = "+".join(str(len(units)) for units in run["drops"])
        lines.append([f"{name} {side}", f"{run['tokens'] / unit:.2f}", _accuracy(run), sizes, f"{run['minutes']:.1f}"])
    return lines


def _accuracy(found: dict[str, Any]) -> str:
    return f"{found['accuracy']:.1f} +- {found['stderr']:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", default=["medicine"], choices=list(DOMAINS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--full-epochs", type=float, nargs="*", default=[], help="shorter full fine-tunes")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, default=Path("runs/schedule"), help="folder of all runs")
    options = parser.parse_args()
    parts = []
    for seed in options.seeds:
        for domain in options.domains:
            command = DemoConfig(domain=domain, seed=seed, threads=options.threads)
            parts.append(compare(command, options.output, options.full_epochs))
            print(f"{domain} {seed}: done, {len(parts)} of {len(options.seeds) * len(options.domains)}", flush=True)
    header = ["", "tokens / full fine-tune", "accuracy", "dropped at once", "minutes"]
    print(table(header, [line for part in parts for line in rows(part)]))
    ours, other = ([part[side]["full_fine_tunes"] for part in parts] for side in ("recover", "published"))
    equal = [part["of_equal_accuracy"] for part in parts if part["of_equal_accuracy"] is not None]
    points = [part["recover"]["accuracy"] - part["published"]["accuracy"] for part in parts]
    error = math.hypot(*(part["error"] for part in parts)) / len(parts)
    spread = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else None
    mean = statistics.mean(points)
    pairs = "" if spread is None else f", over pairs {spread:.1f}"
    print(f"recover less published: {mean:+.1f} points, binomial error {error:.1f}{pairs}")
    finish(
        "schedule",
        ours,
        other,
        "training tokens, in full fine-tunes of the warm-up's length",
        changed=changed(parser, options, "threads", "output", domains=list(DOMAINS), seeds=[0, 1, 2]),
        recover_max=max(ours),
        points_over_published=mean,
        binomial_error=error,
        standard_error_over_pairs=spread,
        shortest_full_fine_tune_of_equal_accuracy=statistics.median(equal) if equal else None,
        pairs=len(parts),
        parts=parts,
    )
    return 0 if max(ours) <= 3 and mean >= -error else 1


if __name__ == "__main__":
    run(main)
