"""The demo's claim over several seeds: half the depth against full fine-tuning and one-shot removal.

    python benchmarks/demo_seeds.py                      # three seeds, medicine; 15 minutes on 2 cores
    python benchmarks/demo_seeds.py --domain law --unit pair --seeds 0 1 2

Prints a table with the mean over seeds and its spread; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from _sides import run

from trimllm.config import DemoConfig
from trimllm.console import table
from trimllm.demo.demo import Line, demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="medicine", choices=["medicine", "law", "finance"])
    parser.add_argument("--unit", default="block", choices=["block", "pair"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", default="runs/demo-seeds")
    asked = parser.parse_args()
    found: dict[str, list[Line]] = {}
    for seed in asked.seeds:
        output = Path(asked.output) / f"{asked.unit}-{seed}"
        settings = DemoConfig(
            domain=asked.domain, unit=asked.unit, seed=seed, threads=asked.threads, output=str(output)
        )
        for line in demo(settings):
            found.setdefault(line.name, []).append(line)
    values = {name: [line.accuracy[asked.domain].value for line in lines] for name, lines in found.items()}
    rows = [
        [name, found[name][0].depth, f"{statistics.mean(v):.1f}", f"{min(v):.1f}-{max(v):.1f}"]
        for name, v in values.items()
    ]
    print(table(["", "depth", f"{asked.domain}, mean of {len(asked.seeds)} seeds", "range"], rows))
    difference = statistics.mean(values["trimmed"]) - statistics.mean(values["fully fine-tuned"])
    print(json.dumps({"name": "demo_seeds", "unit": asked.unit, "points": difference, **values}))


if __name__ == "__main__":
    run(main)
