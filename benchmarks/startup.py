"""How long the command takes to say something, against the import of the libraries that it stands on.

    python benchmarks/startup.py

In turn: `trimllm --help`, `import trimllm`, `trimllm eval` on the embedded model (20 questions) until its first output,
and `import torch, transformers` alone; every one in a process of its own. The last line is one JSON object about
`eval` against that import (`sides` holds the seconds of all), without options also written to results/startup.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from _sides import alternate, changed, finish, ratios, run

from trimllm.console import table

PLAIN = "import torch, transformers"
EVAL = ["-m", "trimllm", "eval", "--model", "demo", "--task", "demo_law", "--max-test", "20", "--device", "cpu"]
SIDES = {
    PLAIN: ["-c", PLAIN],
    "trimllm --help": ["-m", "trimllm", "--help"],
    "import trimllm": ["-c", "import trimllm"],
    "trimllm eval": EVAL,
}


def seconds(words: list[str]) -> float:
    """Until the first byte of output, or the end if there is none; the process must end well."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        taken = time.perf_counter() - started
        rest = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed: {(first + rest).decode()}")
    return taken if first else time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count (default: 7)")
    options = parser.parse_args()
    found = alternate({name: lambda words=words: seconds(words) for name, words in SIDES.items()}, options.repeats)
    rows = []
    for name, values in found.items():
        ratio = ratios(values, found[PLAIN])
        spread = f"{ratio['ratio']:.3f} ({ratio['ratio_min']:.3f}-{ratio['ratio_max']:.3f})"
        rows.append([name, f"{statistics.median(values):.2f}", spread])
    print(table(["", "seconds", f"of `{PLAIN}`"], rows))
    unit, others = "seconds to the first output", changed(parser, options)
    finish("startup", found["trimllm eval"], found[PLAIN], unit, changed=others, sides=found)
    return 0


if __name__ == "__main__":
    run(main)
