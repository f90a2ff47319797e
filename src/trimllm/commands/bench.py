"""`trimllm bench`: how fast models are, measured in turn."""

from __future__ import annotations

from pathlib import Path

from trimllm import config, files
from trimllm.bench import benching, tables
from trimllm.checkpoints import arithmetic, folders
from trimllm.commands import shared
from trimllm.console import Console
from trimllm.plot import bench_plot


def run(command: config.BenchConfig) -> None:
    """Models in turn: tables, bench.json, bench.png."""
    output = Path(command.output) if command.output else None
    if output:
        shared.fresh(output, "bench.json")
        folders.check_writable(output)
    with Console().progress("bench") as show:
        record = tables.record(command, *benching.measure(command, show))
    if output:
        files.write_json(output / "bench.json", record)
    print(tables.report(record))
    if note := arithmetic.bench_note(record["models"]):
        Console().say(note)
    if output:
        bench_plot(record, output / "bench.png")
        print(f"written: {output / 'bench.json'}, {output / 'bench.png'}")
