"""Does a GPU give what the CPU gives? Every command on both, on the embedded model, in float32.

    python benchmarks/device.py --device cuda      # or another that torch and accelerate know
    python benchmarks/device.py                    # a simulated device: no GPU needed, but a C++ compiler and ninja

The simulated device computes as the CPU does and refuses tensors of two devices in one operator, as a GPU does: what
forgets to move a tensor fails there. It knows nothing of a GPU's kernels, 16-bit formats, memory or speed.

Compared is what was dropped, and what was measured on the way (losses, scores, probabilities). A run is killed after
its second drop and resumed on either device. Exit code 1 if a command fails on the device alone, drops something else,
or finds a figure that differs by more than TOLERANCE. The last line is one JSON object; nothing is kept. On the
simulated device it takes some half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _simulated_device as simulated
from _sides import machine, run

from trimllm import cli
from trimllm.console import table
from trimllm.errors import TrimError
from trimllm.files import finite
from trimllm.run.rundir import RunDir

SCRIPTS = Path(__file__).parent
TOLERANCE = 0.05
"""Of figures, relative to the largest of their kind: rounding grows from one training step to the next."""
FIGURES = (
    *("loss", "norm", "cosine", "probability", "block_influence", "lens_probability", "promotion"),
    *("tracing_state", "tracing_output", "rouge_l", "repetition"),
)
CHOICES = ("layers", "blocks", "first", "method", "status")
DATA = "--task demo_medicine --dtype float32 --threads 1"
SMALL = "--max-train 60 --max-test 20 --calibration-size 20 --batch-size 1024 --lr 2e-3 --epochs-per-drop 0.2"
TRIM = f"trim --model demo {DATA} {SMALL}"
FROZEN = "--no-train-embeddings --cache-frozen-prefix memory --optimizer-state fresh"
PAIRS = "--unit pair --strategy scan+norm --scan racing --distill 0.5 --gradient-checkpointing"
SCAN = f"scan --model demo {DATA} --calibration-size 20"
METHODS = "trim-pair,one-shot,taylor,magnitude,sleb,streamline,layer-drop"
CASES = {
    "trim": (f"{TRIM} --text demo_medicine --keep 0.75", "result.json"),
    "trim, killed and resumed": (f"{TRIM} --keep 0.75 --final-epochs 1 --checkpoint-minutes 0.001", "result.json"),
    "trim, frozen blocks kept": (f"{TRIM} {FROZEN} --depth 14", "result.json"),
    "trim, pairs with a teacher": (f"{TRIM} {PAIRS} --depth 14", "result.json"),
    "scan": (SCAN, "scan.json"),
    "scan, what explains it": (f"{SCAN} --analysis", "analysis.json"),
    "scan of sub-layers": (f"{SCAN} --unit sublayer --strategy loss", "scan.json"),
    "eval": (f"eval --model {{place}}/trimmed --against demo {DATA} --max-test 20", ""),
    "eval, writing": ("eval --model demo --task {place}/answers.jsonl --generate --dtype float32 --threads 1", ""),
    "drop": ("drop --model demo --layers 3,7 --dtype float32", "plan.json"),
    "compare": (f"compare --model demo {DATA} {SMALL} --keep 0.75 --repeats 1 --methods {METHODS}", "compare.json"),
}
"""A command each, and the file of its output folder with what it found; without one the output is that file."""
KILLED = "trim, killed and resumed"


def prepare(place: Path) -> None:
    """What the cases find in `place`: a trimmed model, rows with written answers, and what makes every Python that has
    the folder in its path know the simulated device."""
    (place / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(SCRIPTS)!r})\nimport _simulated_device\n"
        f"_simulated_device.register({str(place)!r})\n",
        encoding="utf-8",
    )
    cli.main(["drop", "--model", "demo", "--layers", "5", "--output", str(place / "trimmed"), "--device", "cpu"])
    rows = ({"prompt": f"The {drug} is", "completion": " given to adults."} for drug in ("first", "second", "third"))
    (place / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def outcome(name: str, device: str, place: Path) -> tuple[dict[str, Any] | None, str]:
    """What the command of a case has found on the device, or None and the last line that it said."""
    text, file = CASES[name]
    folder = place / f"{name} on {device}"
    output = folder if file else folder.with_suffix(".json")
    words = [*text.format(place=place).split(), "--output", str(output)]
    program, log = [sys.executable, "-m", "trimllm"], folder.with_suffix(".log")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if device == simulated.NAME:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as said:
        process = subprocess.Popen([*program, *words, "--device", device], stdout=said, stderr=said, env=environment)
        if name == KILLED:
            if not within_a_stage(process, RunDir(folder)):
                return None, "it ended before it could be killed"
            process.kill()
            process.wait()
            words = ["trim", "--output", str(output), "--resume", "--device", device]
            process = subprocess.Popen([*program, *words], stdout=said, stderr=said, env=environment)
        code = process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    path = output / file if file else output
    if code or not path.exists():
        return None, lines[-1]
    return json.loads(path.read_text(encoding="utf-8")), ""


def within_a_stage(process: subprocess.Popen[bytes], run: RunDir) -> bool:
    """Wait until a run has dropped two blocks and saved the stage after that on its way; False if it ended before."""
    while process.poll() is None:
        if run.journal.exists() and run.journal.read_bytes().count(b'"drop"') > 1 and run.underway.exists():
            return True
        time.sleep(0.05)
    return False


def leaves(found: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """What is compared of a result, in order: choices, and figures as numbers."""
    if key in CHOICES:
        yield key, found
    elif isinstance(found, dict):
        for name, value in found.items():
            yield from leaves(value, name)
    elif isinstance(found, list):
        for value in found:
            yield from leaves(value, key)
    elif key in FIGURES and isinstance(found, float) and math.isfinite(found):
        yield key, found


def difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, int, str]:
    """The largest difference of a figure, relative to the largest of its kind; how many there are; what was chosen
    otherwise."""
    ours, theirs = list(leaves(one)), list(leaves(other))
    if [key for key, _ in ours] != [key for key, _ in theirs]:
        return math.inf, 0, "other figures"
    pairs = [(key, a, b) for (key, a), (_, b) in zip(ours, theirs, strict=True)]
    chosen = sorted({key for key, a, b in pairs if key in CHOICES and a != b})
    figures = [(key, a, b) for key, a, b in pairs if key in FIGURES]
    scale = {kind: max(abs(a) for key, a, _ in figures if key == kind) or 1.0 for kind in {key for key, *_ in figures}}
    return max((abs(a - b) / scale[key] for key, a, b in figures), default=0.0), len(figures), ", ".join(chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=simulated.NAME)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    options = parser.parse_args()
    rows, record, good = [], {}, True
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        if options.device == simulated.NAME:
            simulated.build(place)
        prepare(place)
        for number, name in enumerate(options.cases):
            here, said = outcome(name, "cpu", place)
            undone = [value for key, value in leaves(here) if key == "status" and value != "done"]
            if here is None or undone:
                raise TrimError(f"{name} fails on the CPU: {said or undone[0]}")
            there, said = outcome(name, options.device, place)
            largest, figures, chosen = difference(here, there) if there else (math.inf, 0, said)
            fine = largest <= TOLERANCE and not chosen
            good = good and fine
            rows.append([name, "the same" if fine else chosen or "differs", figures, f"{largest:.2%}"])
            record[name] = {"same": fine, "figures": figures, "difference": largest, "chosen_otherwise": chosen}
            print(f"{number + 1} of {len(options.cases)}: {name}: {rows[-1][1]}", flush=True)
    print(table(["", options.device, "figures", "largest difference"], rows))
    print(json.dumps(finite({"name": "device", "device": options.device, "cases": record, "machine": machine()})))
    return 0 if good else 1


if __name__ == "__main__":
    run(main)
