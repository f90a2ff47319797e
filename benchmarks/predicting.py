"""Which score of a scan tells best what a block is worth: on calibration rows, against accuracy on the reported ones.

    python benchmarks/predicting.py runs/study full/checkpoints/depth-16         # the study's fully fine-tuned models
    python benchmarks/predicting.py runs/study late-carried-exact-ties/8/model   # its models of half the depth

Of each model that `benchmarks/study.py` left in the demo world's parts, every block is deleted on trial, and both sets
are asked. Per score: Spearman's rank correlation over the blocks with the accuracy of the reported questions, and how
many points of that accuracy the block costs that the score would drop beyond the one that costs least. The last line is
one JSON object: means over the models, and their standard errors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from _sides import machine, run
from study import mean_of

from trimllm.analysis.ranks import spearman
from trimllm.blocks import decoder
from trimllm.checkpoints.loading import load_model, load_tokenizer
from trimllm.console import table
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import scan
from trimllm.importance.scores import importance
from trimllm.importance.select import choose
from trimllm.tasks import load_task

SCORES = ("scan", "loss", "probability", "scan+norm", "scan+probability")


def measure(folder: Path, part: str, seed: int, calibration: int) -> dict[str, tuple[float, float]]:
    """Per score: rank correlation (of those without a second score) and points lost by what it would drop."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    data = load_task(f"demo_{part}", calibration_size=calibration, seed=seed)
    asked, reported = (Scorer(model, tokenizer, items) for items in (data.calibration, data.test))
    found = scan.scan(model, asked, "acc")
    worth = np.array([trial.value for trial in scan.scan(model, reported, "acc").trials])
    depth = decoder.depth(model)
    evidence = found.evidence(np.arange(float(depth)), depth)
    result = {}
    for score in SCORES:
        dropped = choose(found.candidates, evidence, score).index
        result[score] = spearman(-importance(score, evidence), worth), float(worth.max() - worth[dropped])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="--output of benchmarks/study.py")
    parser.add_argument("model", help="a checkpoint's place below each PART-SEED of it")
    parser.add_argument("--calibration-size", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for folder in sorted(arguments.root.glob(f"*-*/{arguments.model}")):
        part, _, seed = folder.relative_to(arguments.root).parts[0].rpartition("-")
        rows.append(measure(folder, part, int(seed), arguments.calibration_size))
        print(f"{part} {seed}: " + ", ".join(f"{k} {a:.2f} {b:.1f}" for k, (a, b) in rows[-1].items()), flush=True)

    summary = {score: [mean_of([row[score][which] for row in rows]) for which in (0, 1)] for score in SCORES}
    shown = [
        [score, *(f"{value:.2f}" + ("" if error is None else f" +- {error:.2f}") for value, error, _ in pair)]
        for score, pair in summary.items()
    ]
    print(table(["score", "rank correlation", "points lost"], shown))
    record = {"name": "predicting", "unit": "points", "models": len(rows), "at": arguments.model, "scores": summary}
    print(json.dumps(record | {"machine": machine()}))


if __name__ == "__main__":
    run(main)
