"""Peak memory of one stage of training at r = 1/4 against full fine-tuning, and of a scan against the exhaustive way.

    python benchmarks/memory.py
    python benchmarks/memory.py --data FOLDER_WITH_ROWS --rounds 2

Every side runs in a process of its own: a round is six, two minutes on a quiet core. More of them (--rounds) only show
how little peaks differ. Peaks are resident memory (VmHWM, Linux) less that of the same process when imports, data and
model were loaded; `with_weights` adds the weights' bytes to both. Sides of a stage:

ours      a quarter of the blocks trains (spread evenly), with embeddings and head
frozen    a quarter of the blocks trains (the last ones), embeddings and head are frozen
full      our own stage, everything trains: what the sparse update alone saves
recipe    full fine-tuning the authors' way: 8 rows a step padded to the longest row of the data, all logits

Sides of a scan: `scan` tries every block in place; `copies` deletes it from a copy of the model, as by hand. The last
line is one JSON object about ours against recipe (`parts` holds all pairs), with --data .../cuad_clause_type --rows 24
also written to results/memory.json.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import _stages as stages
from _sides import finish, ratios, run

from trimllm import tasks
from trimllm.blocks import surgery
from trimllm.console import table
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import scan

BATCH_ROWS = 8
PAIRS = (("ours", "recipe"), ("ours", "full"), ("frozen", "recipe"), ("frozen", "full"), ("scan", "copies"))


def resident(field: str) -> int:
    """Bytes of this process, from /proc/self/status (VmRSS now, VmHWM at its peak)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def child(side: str, arguments: argparse.Namespace) -> dict[str, int]:
    """Do one side's work; returns the baseline and the peak above it, in bytes."""
    data = stages.data(arguments.data, arguments.rows)
    net = stages.model(len(data.tokenizer), arguments.blocks, arguments.hidden)
    batch = BATCH_ROWS * stages.tokens(data.rows) // len(data.rows)
    scorer: Any = None
    if side in ("scan", "copies"):
        items = tasks.load_task(arguments.data, tokenizer=data.tokenizer).calibration[: arguments.rows // 2]
        scorer = Scorer(net, data.tokenizer, items, max_length=stages.CONTEXT, truncate=True, token_budget=1024)
    chosen = stages.trained_blocks(arguments.blocks, top=side == "frozen") if side in ("ours", "frozen") else None
    parameters = stages.freeze(net, chosen, embeddings=side != "frozen")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak so far does not count
    before = resident("VmRSS")
    if side == "scan":
        scan.scan(net, scorer, "likelihood")
    elif side == "copies":
        for block in range(arguments.blocks):
            scorer.score(surgery.drop_layers(copy.deepcopy(net), [block]))
    elif side == "recipe":
        stages.recipe(net, parameters, data.rows[: 2 * BATCH_ROWS], data.longest, BATCH_ROWS)
    else:
        stages.ours(net, parameters, data.rows, batch, 1)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    return {"baseline": before, "peak": resident("VmHWM") - before, "weights": weights}


def main() -> None:
    parser = stages.parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(child(arguments.side, arguments)))
        return
    found: dict[str, list[dict[str, int]]] = {}
    for _ in range(arguments.rounds):
        for side in ("ours", "frozen", "full", "recipe", "scan", "copies"):
            words = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            found.setdefault(side, []).append(json.loads(done.stdout.splitlines()[-1]))
    parts = {}
    for a, b in PAIRS:
        ours, other = ([one["peak"] for one in found[side]] for side in (a, b))
        heavy = ([one["peak"] + one["weights"] for one in found[side]] for side in (a, b))
        with_weights = ratios(*heavy)["ratio"]
        parts[f"{a} / {b}"] = {"ours": ours[0], "other": other[0], **ratios(ours, other), "with_weights": with_weights}
    shown = [
        [name, *(f"{p[key] / 2**20:,.0f}" for key in ("ours", "other")), *(f"{p[key]:.2f}" for key in list(p)[2:])]
        for name, p in parts.items()
    ]
    print(table(["peak MiB above the loaded model", "ours", "other", "ratio", "least", "most", "with weights"], shown))
    ours, other = ([one["peak"] for one in found[side]] for side in ("ours", "recipe"))
    finish(
        "memory",
        ours,
        other,
        "bytes above imports, data and loaded model",
        changed=stages.changed(parser, arguments, rows=24),
        parts=parts,
        baseline=found["ours"][0]["baseline"],
        weights=found["ours"][0]["weights"],
        data=Path(arguments.data).name,
        rows=arguments.rows,
        blocks=arguments.blocks,
        hidden=arguments.hidden,
    )


if __name__ == "__main__":
    run(main)
