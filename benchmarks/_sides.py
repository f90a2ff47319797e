"""Two sides of a benchmark, measured in turn in one run, its last line (one JSON object), and how it ends."""

from __future__ import annotations

import argparse
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

from trimllm.bench import tables
from trimllm.errors import TrimError
from trimllm.files import finite, write_json

RESULTS = Path(__file__).parent / "results"
SHAPES = Path(__file__).parent / "shapes"
RATIO = ("ratio", "ratio_min", "ratio_max")


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
    return dict(zip(RATIO, (statistics.median(each), min(each), max(each)), strict=True))


def machine() -> str:
    """Processor, cores, system and the libraries that matter."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    system = f"{platform.system()}, Python {platform.python_version()}, {libraries}, OMP_NUM_THREADS {threads}"
    return f"{tables.processor()}, {os.cpu_count()} cores, {system}"


def changed(parser: argparse.ArgumentParser, options: argparse.Namespace, *free: str, **kept: Any) -> list[str]:
    """Options other than those of the result in benchmarks/results: `kept`, else the defaults; `free` may be any."""
    return [
        f"--{name.replace('_', '-')}"
        for name, value in vars(options).items()
        if name not in free and value != kept.get(name, parser.get_default(name))
    ]


def finish(
    name: str,
    ours: Sequence[float],
    other: Sequence[float],
    unit: str,
    *,
    changed: Sequence[str],
    upside_down: bool = False,
    **more: Any,
) -> None:
    """End with a record of two sides; without rounds their figures are null. `upside_down`: the ratio is other / ours.

    It goes where `write` puts it.
    """
    measured = bool(ours and other)
    record = {
        "name": name,
        "ours": statistics.median(ours) if measured else None,
        "other": statistics.median(other) if measured else None,
        "unit": unit,
        **((ratios(other, ours) if upside_down else ratios(ours, other)) if measured else dict.fromkeys(RATIO)),
        "machine": machine(),
        **more,
    }
    write(name, record, changed)


def write(name: str, record: dict[str, Any], changed: Sequence[str]) -> None:
    """Print a record as the last line, and keep it as benchmarks/results/NAME.json unless options were `changed`."""
    path = RESULTS / f"{name}.json"
    if changed:
        print(f"{path.name} stays as it is: it is of another {', '.join(changed)}")
    else:
        write_json(path, record)
    print(json.dumps(finite(record), allow_nan=False), flush=True)


def run(main: Callable[[], int | None]) -> NoReturn:
    """End with what `main` returns; what a user can get wrong is one line, with the exit code that the command has."""
    try:
        sys.exit(main())
    except TrimError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except subprocess.CalledProcessError as error:  # one of its own processes, which has said why
        sys.exit(error.returncode if error.returncode > 0 else 1)
