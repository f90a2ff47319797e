"""Does a race find the winner of the exact scan, and what does it save? On recorded scans of real checkpoints.

    python benchmarks/racing.py RUN [RUN ...] --task demo_medicine
    python benchmarks/racing.py RUN [RUN ...] --task TASK --keep DIR      # records go there, and are used again

Every depth that a run kept (--keep-checkpoints) is scanned once on all reported questions of the task, and what every
candidate scores is recorded. From that, calibration sets are drawn; each is raced and decided exactly, by the
`racing.race` of a scan, fed from the record. Costs are what a scan computes: the blocks after each candidate, and the
intact model once for the exact scan and twice for a race. The last line is one JSON object: `ours` and `other` are
block passes per item, of race and exact scan; ratios are per recorded scan. results/racing.json is of 34 checkpoints
(docs/lab.md), with ties within one question, and stays as it is.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _sides import changed, finish, run

from trimllm import tasks
from trimllm.checkpoints import loading
from trimllm.checkpoints.loading import DEMO
from trimllm.evaluation import evaluate
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import racing, scan


def record(folder: Path, data: Any, keep: Path) -> Any:
    """Log-likelihoods (1 + candidates, items, choices), the intact model first, and the norms.

    From the folder `keep`, if they are there: a record is named by its weights and questions, wherever these lie.
    """
    asked = hashlib.sha256(f"{loading.fingerprint(folder)} {data.digest()}".encode()).hexdigest()
    path = keep / f"{folder.name}-{asked[:16]}.npz"
    if not path.exists():
        model = loading.load_model(folder)
        tokenizer = loading.load_tokenizer(folder if any(folder.glob("tokenizer*")) else DEMO)
        parts: dict[int, Any] = {}
        scorer = Scorer(model, tokenizer, data.test)
        result = scan.scan(model, scorer, "acc", on_part=lambda number, part: parts.__setitem__(number, part))
        ordered = [parts[number] for number in sorted(parts)]
        pieces = [[part.intact for part in ordered]]
        pieces += [[part.trials[i] for part in ordered] for i in range(len(result.candidates))]
        full = np.array([evaluate.gather(one, scorer.encoded).loglik for one in pieces], dtype=np.float32)
        answers = np.array([item.answer for item in data.test])
        keep.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, full=full, answers=answers, norm=result.norm)
        temporary.replace(path)
    return np.load(path)


def decide(recorded: Any, size: int, seed: int, confidence: float) -> tuple[bool, float, float]:
    """Whether race and exact scan choose the same on one calibration set, and the block passes per item of both."""
    full, answers = recorded["full"], recorded["answers"]
    items = np.arange(len(answers))
    right, others = full[:, items, answers], full.copy()
    others[:, items, answers] = -np.inf
    margins = right - others.max(axis=-1)
    drawn = np.random.default_rng(seed).choice(len(answers), size, replace=False)
    margins, hits = margins[0, drawn], margins[1:, drawn] > 0
    depth = len(hits)
    rule = racing.Rule(0.0, recorded["norm"], np.arange(float(depth)), np.ones(depth, dtype=bool))
    end = racing.race(lambda rows, some: hits[np.ix_(rows, some)], margins > 0, margins, rule, confidence, seed)
    left = list(end.running)
    ours = left[int(rule.of(left).winners(end.expected[left][:, None])[0])]
    exact = int(rule.winners(hits.sum(axis=1)[:, None])[0])
    behind = depth - 1 - np.arange(depth)
    return ours == exact, 2 * depth + float((behind * end.seen).sum()) / size, depth + float(behind.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--task", required=True)
    parser.add_argument("--keep", type=Path, default=Path("runs/recorded"))
    parser.add_argument("--size", type=int, default=200, help="items of a calibration set")
    parser.add_argument("--scans", type=int, default=200, help="recorded scans in all, at least")
    parser.add_argument("--confidence", type=float, default=0.999)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = tasks.load_task(arguments.task)
    folders = [folder for run in arguments.runs for folder in sorted((run / "checkpoints").glob("depth-*"))]
    if not folders:
        parser.error(f"{arguments.runs[0]}: no depth was kept there: run trimllm trim with --keep-checkpoints")
    draws = -(-arguments.scans // len(folders))
    same, ours, other = 0, [], []
    for folder in folders:
        recorded = record(folder, data, arguments.keep)
        for seed in range(draws):
            agrees, race, exact = decide(recorded, arguments.size, seed, arguments.confidence)
            same += agrees
            ours.append(race)
            other.append(exact)
        print(f"{folder}: {same} of {len(ours)} the same so far, {np.sum(other) / np.sum(ours):.2f}x saved", flush=True)
    finish(
        "racing",
        ours,
        other,
        "block passes per item",
        changed=changed(parser, arguments, "keep"),
        upside_down=True,
        scans=len(ours),
        same_winner=same / len(ours),
        checkpoints=len(folders),
        saving_overall=float(np.sum(other) / np.sum(ours)),
        confidence=arguments.confidence,
        items=arguments.size,
    )


if __name__ == "__main__":
    run(main)
