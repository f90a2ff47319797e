"""Two sides of a benchmark, measured in turn in one run, its last line (one JSON object), and how it ends."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from trimllm.errors import TrimError

RESULTS = Path(__file__).parent / "results"
SHAPES = Path(__file__).parent / "shapes"


def cut_shape(shape: Path, blocks: int, file: Path) -> Path:
    """The config in `shape` with so many blocks, written to `file`."""
    values = json.loads(shape.read_text(encoding="utf-8"))
    file.write_text(json.dumps(values | {"num_hidden_layers": blocks}), encoding="utf-8")
    return file


def alternate(sides: Mapping[str, Callable[[], float]], repeats: int, *, warm_up: int = 1) -> dict[str, list[float]]:
    """What every side returns in each round, the sides in turn; the first `warm_up` rounds do not count."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(warm_up + repeats):
        for name, side in sides.items():
            value = side()
            if round_ >= warm_up:
                found[name].append(value)
    return found


def ratios(ours: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of the round-by-round ratios ours / other."""
    each = [a / b for a, b in zip(ours, other, strict=True)]
    return {"ratio": statistics.median(each), "ratio_min": min(each), "ratio_max": max(each)}


def machine() -> str:
    """Processor, cores, system and the libraries that matter."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    system = f"{platform.system()}, Python {platform.python_version()}, {libraries}, OMP_NUM_THREADS {threads}"
    return f"{processor}, {os.cpu_count()} cores, {system}"


def finish(
    name: str, ours: Sequence[float], other: Sequence[float], unit: str, *, upside_down: bool = False, **more: Any
) -> None:
    """Write benchmarks/results/NAME.json, and print it as the last line. `upside_down`: the ratio is other / ours."""
    record = {
        "name": name,
        "ours": statistics.median(ours),
        "other": statistics.median(other),
        "unit": unit,
        **(ratios(other, ours) if upside_down else ratios(ours, other)),
        "machine": machine(),
        **more,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)


def run(main: Callable[[], int | None]) -> NoReturn:
    """End with what `main` returns; what a user can get wrong is one line, with the exit code that the command has."""
    try:
        sys.exit(main())
    except TrimError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except subprocess.CalledProcessError as error:  # one of its own processes, which has said why
        sys.exit(error.returncode if error.returncode > 0 else 1)
