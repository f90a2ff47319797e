"""Kill a run at random moments, resume it each time, and compare it with a run that nobody interrupted.

    python benchmarks/kill_resume.py --kills 10 --seed 0 --output runs/kill_resume

Every run is a process of its own (`python -m trimllm trim`) on the embedded model, killed twice with SIGKILL. Then it
may end and is compared, and the next one begins in a new directory, until all kills are done. The last line is one JSON
object; the exit code is 1 if any run dropped other layers or ended with other weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _sides import run

from trimllm.checkpoints.loading import DEMO
from trimllm.console import table

SETTINGS = (
    "--task demo_law --text demo_law --calibration-size 60 --max-train 60 --max-test 40 --lr 1e-3 --batch-size 1024 "
    "--eval-batch-size 256 --warmup-epochs 1 --epochs-per-drop 1 --no-report-depths --threads 1 --device cpu"
)


def command(model: Path, output: Path, depth: int, *more: str) -> list[str]:
    program = [sys.executable, "-m", "trimllm", "trim", "--model", str(model), "--output", str(output)]
    return [*program, "--depth", str(depth), *SETTINGS.split(), *more]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})


def outcome(output: Path) -> dict[str, Any]:
    """What two runs must have in common: drops in order, and the weights."""
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    files = sorted((output / "model").glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {"drops": [drop["units"] for drop in result["drops"]], "test": result["test"]["value"], "sha256": digest}


def on_disk(output: Path) -> list[Any]:
    """Where a killed run stood: finished events, the last of them, and batches of an unfinished scan."""
    journal = output / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    last = json.loads(lines[-1])["event"] if lines else "-"
    batches = sum(path.read_bytes().count(b"\n") for path in (output / "scans").glob("*.jsonl"))
    return [len(lines), last, batches]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how often a run is killed (default: 10)")
    parser.add_argument("--per-run", type=int, default=2, help="kills of one run, after which it may end (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--depth", type=int, default=14, help="layers to keep, of 16 (default: 14)")
    parser.add_argument("--output", type=Path, default=Path("runs/kill_resume"), help="a new directory for all runs")
    options = parser.parse_args()
    root, rng = options.output, random.Random(options.seed)
    if root.exists():
        parser.error(f"{root} exists: choose another --output")
    root.mkdir(parents=True)
    model = Path(shutil.copytree(DEMO, root / "base"))
    log = root / "log.txt"

    began = time.perf_counter()
    if start(command(model, root / "straight", options.depth), log).wait():
        raise SystemExit(f"the uninterrupted run failed: see {log}")
    whole = time.perf_counter() - began
    wanted = outcome(root / "straight")
    seconds = whole
    print(f"uninterrupted: {seconds:.0f} s, drops {wanted['drops']}, SHA-256 {wanted['sha256'][:16]}", flush=True)

    rows: list[list[Any]] = []
    ended: list[dict[str, Any]] = []
    output = root / "killed-0"
    while len(rows) < options.kills or (output / "config.yaml").exists():
        resume = (output / "config.yaml").exists()
        began = time.perf_counter()
        process = start(command(model, output, options.depth, *(["--resume"] if resume else [])), log)
        here = sum(row[1] == output.name for row in rows)
        more = len(rows) < options.kills and here < options.per_run
        moment = rng.uniform(0.1, 1.0) * whole if more else None
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            rows.append([len(rows) + 1, output.name, f"{moment:.1f}", *on_disk(output)])
            print(f"kill {rows[-1][0]} of {options.kills} after {moment:.1f} s", flush=True)
            continue
        if code:
            raise SystemExit(f"a resumed run failed with exit code {code}: see {log}")
        if not resume:  # on a busy machine the first run may have been a slow one
            whole = min(whole, time.perf_counter() - began)
        ended.append(outcome(output))
        output = root / f"killed-{len(ended)}"

    print(table(["kill", "run", "after s", "events on disk", "last", "scan batches on disk"], rows))
    same_drops = sum(found["drops"] == wanted["drops"] for found in ended)
    same_weights = sum(found["sha256"] == wanted["sha256"] for found in ended)
    print(f"{len(ended)} runs killed {len(rows)} times: {same_drops} with the same drops, {same_weights} bit-equal")
    record = {
        "kills": len(rows),
        "runs": len(ended),
        "same_drops": same_drops,
        "same_weights": same_weights,
        "uninterrupted": wanted | {"seconds": round(seconds, 1)},
        "seed": options.seed,
    }
    print(json.dumps(record))
    return 0 if same_drops == same_weights == len(ended) else 1


if __name__ == "__main__":
    run(main)
