"""Whether a scan in mixed precision finds what one in float32 finds, and how long each takes.

    python benchmarks/mixed_scan.py runs/law runs/finance [--device cuda]

For every depth whose checkpoint a run of `trimllm trim` has kept (--keep-checkpoints), the run's calibration rows are
scanned twice: by products in float32, and in bfloat16 on the same float32 weights (--mixed-precision bf16). By depth:
how many of the candidates have the same place in both orders, whether the same one goes, by how many points the mean
probabilities of the right choice differ, and seconds. A CPU that emulates bfloat16 is several times slower in it. The
last line is one JSON object, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _sides import machine, run

from trimllm.checkpoints import loading, models
from trimllm.config import TrimConfig, plain_settings
from trimllm.console import table
from trimllm.evaluation import inputs
from trimllm.importance import scan
from trimllm.run import placing
from trimllm.run.rundir import RunDir


def compared(output: Path, depth: int, device: torch.device) -> dict[str, Any]:
    """Both scans of the checkpoint of one depth."""
    settings = plain_settings.make(TrimConfig, {**placing.stored_settings(output), "output": str(output)})
    folder = RunDir(output).checkpoint(depth)
    model, tokenizer = loading.load_model(folder, dtype=torch.float32, device=device), loading.load_tokenizer(folder)
    data = inputs.task_data(settings, tokenizer)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, cache_enabled=False)
    found, seconds = [], []
    for each in (None, autocast):
        scorer = inputs.scorer(settings, model, tokenizer, data.calibration, each)
        begun = time.perf_counter()
        trials = scan.scan(model, scorer, data.metric).trials
        seconds.append(time.perf_counter() - begun)
        found.append(np.array([scan.sureness(trial) for trial in trials]))
    orders = [np.argsort(-each, kind="stable") for each in found]
    apart = np.abs(found[0] - found[1])
    return {
        "run": str(output),
        "depth": depth,
        "same_place": int((orders[0] == orders[1]).sum()),
        "same_first": bool(orders[0][0] == orders[1][0]),
        "mean_apart": float(apart.mean()),
        "most_apart": float(apart.max()),
        "first_ahead": float(np.diff(np.sort(found[0])[-2:])[0]),
        "seconds": [round(each, 2) for each in seconds],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="outputs of trimllm trim")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--depths", type=int, nargs="+", help="of these depths alone")
    options = parser.parse_args()
    device, rows = models.device_of(options.device), []
    for output in options.runs:
        for depth in RunDir(output).kept_depths():
            if depth > 1 and (not options.depths or depth in options.depths):
                rows.append(compared(output, depth, device))
    if not rows:
        parser.error(f"no checkpoint to scan in {', '.join(map(str, options.runs))}: runs need --keep-checkpoints")
    columns = ("run", "depth", "same place", "same first", "points apart, mean", "most", "first ahead by", "seconds")
    lines = [
        [
            each["run"],
            each["depth"],
            f"{each['same_place']} of {each['depth']}",
            "yes" if each["same_first"] else "no",
            *(f"{each[name]:.3f}" for name in ("mean_apart", "most_apart", "first_ahead")),
            "{:.1f}, {:.1f}".format(*each["seconds"]),
        ]
        for each in rows
    ]
    print(table(columns, lines))
    print(json.dumps({"name": "mixed_scan", "machine": machine(), "rows": rows}))
    return 0


if __name__ == "__main__":
    run(main)
