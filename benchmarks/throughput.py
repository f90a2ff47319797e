"""Tokens per second of a trimmed model beside those of quantized ones: the throughput table of the TrimLLM paper.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --llamacpp .venv-llamacpp/bin/python --threads 1

Random weights, batch 1: decoding after a prompt, up to a row of 512 tokens. On an NVIDIA GPU the shape of LLaMA-7B in
float16, elsewhere one of 1.1 B parameters in bfloat16, and its files in llama.cpp. Every model has a process of its
own, and all have their turn in every round; where memory does not hold them all, in several groups, the plain model in
each. A row that cannot be measured says why. The last line is one JSON object about half the blocks, also written to
results/throughput.json if no option was given but --llamacpp and, on a CPU, --threads 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from _llamacpp import PYTHON, Engine, bytes_per_token, speed_files
from _quantized import WAYS, linears
from _sides import SHAPES, alternate, changed, cut_shape, finish, ratios, run
from transformers import AutoConfig, AutoModelForCausalLM

import trimllm
from trimllm.bench import benching, shapes, tables
from trimllm.checkpoints.models import device_of
from trimllm.config import BenchConfig
from trimllm.console import Console, table
from trimllm.errors import InputError, TrimError, one_line

PAPER = {
    "source": "TrimLLM, arXiv 2412.11242: tokens/s of LLaMA-7B, sequence 512, batch 1",
    "columns": ["FP16", "SparseGPT 2:4", "LLM.int8()", "GPTQ int4", "AWQ int4", "TrimLLM 50 %"],
    "A100": [42.3, 58.9, 29.6, 46.5, 115.3, 103.1],
    "V100": [16.6, 14.5, 10.2, 6.1, 11.0, 34.9],
    "RTX 3090": [13.4, 13.0, 7.5, 6.9, 7.9, 26.8],
}
TYPES = ("f16", "q8_0", "q4_0")
PROCESS = 600e6
"""Bytes that a process needs beside its weights: libraries, cache, activations (on a GPU: its context)."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what share of the blocks is kept, and how their weights are."""

    way: str
    kept: float = 1.0

    @property
    def name(self) -> str:
        """As the table shows it."""
        parts = [f"trimmed to {self.kept:.0%}"] if self.kept < 1 else []
        return " + ".join([*parts, *([] if parts and self.way == "plain" else [self.way])])

    def blocks(self, of: int) -> int:
        return max(1, round(self.kept * of))


ROWS = (
    *map(Row, WAYS),
    *(Row(way, kept) for way, kept in (("plain", 0.5), ("plain", 0.4), ("int4 torchao", 0.5), ("int4 AWQ", 0.5))),
)


@dataclass(frozen=True)
class Sizes:
    """Parameters of a shape."""

    depth: int
    block: int
    """in the linear layers of one block"""
    rest: int
    """in embeddings, head and norms"""

    def stored(self, row: Row) -> float:
        """Bytes of a row's weights, estimated."""
        return 2 * self.rest + row.blocks(self.depth) * self.block * WAYS[row.way].bits / 8

    def building(self, row: Row) -> float:
        """Bytes while it is made: the plain model comes first."""
        return 2 * (self.rest + row.blocks(self.depth) * self.block)


def sizes(shape: Path) -> Sizes:
    """Counted on a model without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape))
    inside = sum(linear.weight.numel() for _, _, linear in linears(model))
    whole = sum(parameter.numel() for parameter in model.parameters())
    depth = model.config.num_hidden_layers
    return Sizes(depth, inside // depth, whole - inside)


def groups(rows: Sequence[Row], size: Sizes, free: float) -> tuple[list[list[Row]], dict[Row, str]]:
    """Rows that fit into memory together, the first row (to which ratios are) in every group; and why others do not."""
    first, *others = rows

    def needed(group: Sequence[Row]) -> float:
        extra = max(size.building(row) - size.stored(row) for row in group)
        return sum(size.stored(row) + PROCESS for row in group) + max(extra, 0)

    made, refused = [[first]], {}
    if needed([first]) > free:
        line = f"needs {needed([first]) / 1e9:.1f} GB, {free / 1e9:.1f} are free"
        return [], dict.fromkeys(rows, line)
    for row in others:
        if needed([first, row]) > free:
            refused[row] = f"needs {needed([first, row]) / 1e9:.1f} GB with the plain model, {free / 1e9:.1f} are free"
            continue
        place = next((group for group in made if needed([*group, row]) <= free), None)
        if place is None:
            made.append([first, row])
        else:
            place.append(row)
    return made, refused


def free_memory(device: torch.device) -> float:
    """Bytes that models may take, less a tenth."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return 0.9 * free


def failure(way: str, shape: Path, command: dict[str, Any], folder: Path) -> str | None:
    """Why a way does not work on this machine, tried on one block in a process of its own; None: it does."""
    device = torch.device(command["device"])
    if line := WAYS[way].missing(device):
        return line
    config = BenchConfig(models=(f"config:{cut_shape(shape, 1, folder / 'one.json')}",), **command)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            pool.submit(benching.load, config.models[0], config, WAYS[way].change).result()
            pool.submit(benching.prepare, config, benching.Lengths(8, 2), 1).result()
            pool.submit(benching.run).result()
        except Exception as error:
            return f"fails here: {one_line(error)[:160]}"
    return None


def measure(
    rows: Sequence[Row], shape: Path, depth: int, command: dict[str, Any], limit: float, folder: Path
) -> list[dict[str, Any]]:
    """One group of rows, in turn; ratios to the first."""
    files = [cut_shape(shape, row.blocks(depth), folder / f"{row.blocks(depth)}.json") for row in rows]
    config = BenchConfig(models=tuple(f"config:{file}" for file in files), **command)
    manner = benching.Manner([WAYS[row.way].change for row in rows], once=True, limit=limit)
    with Console().progress("throughput") as show:
        found = tables.record(config, *benching.measure(config, show, manner))
    made = []
    for row, known, seen in zip(rows, found["models"], found["rows"], strict=True):
        made.append(
            entry(
                row.name,
                known["layers"],
                seen["decode_rounds"],
                found["rows"][0]["decode_rounds"],
                ideal=seen["ratio"]["ideal"],
                read=sum(seen["read_bytes_per_step"].values()),
                stored=known["stored_bytes"],
                peak=seen["peak_bytes"],
            )
        )
    return made


def entry(
    name: str,
    blocks: int,
    rounds: list[float],
    plain: list[float],
    *,
    ideal: float,
    read: int,
    stored: int,
    peak: int | None,
) -> dict[str, Any]:
    """A measured row: tokens/s per round, the ratio to the plain model of the same rounds, bytes."""
    ratio = ratios(rounds, plain)
    return {
        "row": name,
        "blocks": blocks,
        "tokens_per_second": statistics.median(rounds),
        "rounds": rounds,
        **ratio,
        "ideal": ideal,
        "share_of_ideal": ratio["ratio"] / ideal,
        "read_bytes_per_token": read,
        "stored_bytes": stored,
        "peak_bytes": peak,
    }


def llamacpp(shape: Path, python: Path, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The shape as files of llama.cpp, whole and with every other block, in turn; ratios to the whole f16."""
    model = shapes.random_model(shape, dtype=torch.bfloat16, device=torch.device("cpu"))
    config, files = model.config, {}
    for name in ("whole", "half"):
        if name == "half":
            model = trimllm.drop_layers(model, list(range(1, config.num_hidden_layers, 2)))
        blocks = model.config.num_hidden_layers
        for kind, file in zip(TYPES, speed_files(model, name, folder, TYPES), strict=True):
            trimmed = "" if name == "whole" else f"trimmed to {blocks / options.depth:.0%} + "
            files[f"llama.cpp {trimmed}{kind}"] = (blocks, file)
        shutil.rmtree(folder / name)
    del model
    head = config.hidden_size // config.num_attention_heads
    with ExitStack() as stack:
        engines = {name: stack.enter_context(Engine(python)) for name in files}
        for name, engine in engines.items():
            engine.ask(
                "load", path=str(files[name][1]), context=options.sequence, threads=options.threads or os.cpu_count()
            )
            engine.ask("prompt", tokens=options.sequence - options.new)

        def speed(engine: Engine) -> float:
            seconds = engine.ask("decode", new=options.new, limit=options.limit)
            return len(seconds) / sum(seconds)

        sides = {name: (lambda engine=engine: speed(engine)) for name, engine in engines.items()}
        rounds = alternate(sides, options.repeats)
        peaks = {name: engine.ask("peak") for name, engine in engines.items()}
    reads = {
        # Keys and values of the row, in float16.
        name: bytes_per_token(file) + 4 * blocks * config.num_key_value_heads * head * options.sequence
        for name, (blocks, file) in files.items()
    }
    first = next(iter(files))
    return [
        entry(
            name,
            blocks,
            rounds[name],
            rounds[first],
            ideal=reads[first] / reads[name],
            read=reads[name],
            stored=file.stat().st_size,
            peak=peaks[name],
        )
        for name, (blocks, file) in files.items()
    ]


def llamacpp_missing(size: Sizes, python: Path, device: torch.device) -> str | None:
    """Why llama.cpp's rows cannot be measured; None: they can."""
    if device.type == "cuda":
        return "compared on CPU only: the build that the Makefile makes has no CUDA"
    if not python.exists():
        return "needs llama-cpp-python in an environment of its own: make .venv-llamacpp/.installed, or --llamacpp"
    both = sum(size.building(Row("plain", kept)) for kept in (1, 0.5))
    if (free := free_memory(device)) < 2 * both:
        return f"needs {2 * both / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
    if (disk := shutil.disk_usage(tempfile.gettempdir()).free) < 3 * both:
        return f"needs {3 * both / 1e9:.1f} GB of disk for its files, {disk / 1e9:.1f} are free"
    return None


def show(found: Sequence[dict[str, Any]]) -> str:
    """The table, and below it the rows that were not measured."""
    header = ["", "blocks", "tokens/s", "of plain", "ideal", "reached", "MB read a token", "MB stored", "peak MB"]
    lines = [
        [
            row["row"],
            row["blocks"],
            f"{row['tokens_per_second']:.2f} ({min(row['rounds']):.2f}-{max(row['rounds']):.2f})",
            f"{row['ratio']:.2f}x ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})",
            f"{row['ideal']:.2f}x",
            f"{row['share_of_ideal']:.0%}",
            *(
                "-" if row[key] is None else f"{row[key] / 1e6:.0f}"
                for key in ("read_bytes_per_token", "stored_bytes", "peak_bytes")
            ),
        ]
        for row in found
        if "why_not" not in row
    ]
    return "\n".join([table(header, lines), *(f"{row['row']}: {row['why_not']}" for row in found if "why_not" in row)])


def paper() -> str:
    """The paper's own figures, with the ratios that follow from them."""
    rows = [
        [gpu, *(f"{speed} ({speed / speeds[0]:.2f}x)" for speed in speeds)]
        for gpu, speeds in PAPER.items()
        if gpu not in ("source", "columns")
    ]
    return f"{table(['', *PAPER['columns']], rows)}\n{PAPER['source']}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    shape = SHAPES / ("llama-7b.json" if cuda else "llama-1.1b.json")
    parser.add_argument("--shape", type=Path, default=shape, help=f"config of the model (default: {shape.name})")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: a GPU if there is one")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a row at its end (default: 512)")
    parser.add_argument("--new", type=int, default=64 if cuda else 16, help="tokens decoded at its end")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--limit", type=float, default=3.0, help="seconds of decoding per round and row (default: 3)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    parser.add_argument("--only", nargs="+", choices=WAYS, help="ways to measure beside plain (default: all)")
    parser.add_argument("--llamacpp", type=Path, default=PYTHON, help="python that has llama-cpp-python")
    options = parser.parse_args(arguments)
    if not options.shape.exists():
        parser.error(f"--shape {options.shape}: there is no such file")
    options.changed = changed(parser, options, "llamacpp", threads=None if cuda else 1)
    return options


def main() -> int:
    options = parse()
    device, size = device_of(options.device), sizes(options.shape)
    options.depth = size.depth
    command = {
        "dtype": "float16" if device.type == "cuda" else "bfloat16",
        "device": str(device),
        "sequence": options.sequence,
        "new_tokens": options.new,
        "repeats": options.repeats,
        "threads": options.threads,
    }
    asked = [row for row in ROWS if not options.only or row.way in ("plain", *options.only)]
    with tempfile.TemporaryDirectory(prefix="throughput.") as name:
        folder = Path(name)
        tried = {way: failure(way, options.shape, command, folder) for way in dict.fromkeys(row.way for row in asked)}
        why_not = {row: line for row in asked if (line := tried[row.way])}
        if line := tried["plain"]:
            raise InputError(f"{options.shape.name}: the plain model {line}: give another --shape or --device")
        made, refused = groups([row for row in asked if row not in why_not], size, free_memory(device))
        why_not |= refused
        if not made:
            raise InputError(f"{options.shape.name}: {next(iter(refused.values()))}: give a smaller --shape")
        measured: dict[str, dict[str, Any]] = {}
        beside: dict[str, list[float]] = {}  # rounds of the plain model in the row's own group
        for group in made:
            rows = measure(group, options.shape, size.depth, command, options.limit, folder)
            for row in rows:
                measured.setdefault(row["row"], row)
                beside.setdefault(row["row"], rows[0]["rounds"])
        found = [measured.get(row.name) or {"row": row.name, "why_not": why_not[row]} for row in asked]
        if line := llamacpp_missing(size, options.llamacpp, device):
            found.append({"row": "llama.cpp", "why_not": line})
        else:
            try:
                found += llamacpp(options.shape, options.llamacpp, options, folder)
            except (InputError, TrimError) as error:
                found.append({"row": "llama.cpp", "why_not": f"fails here: {one_line(error)[-160:]}"})
    print(f"{show(found)}\n{options.shape.stem}, {device}, {len(made)} group(s)\n\n{paper()}\n", flush=True)
    name = Row("plain", 0.5).name
    half = measured.get(name, {"rounds": [], "ideal": None})
    finish(
        "throughput",
        half["rounds"],
        beside.get(name, []),
        "tokens/s",
        changed=options.changed,
        ideal=half["ideal"],
        shape=options.shape.stem,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=options.threads,
        sequence=options.sequence,
        new_tokens=options.new,
        groups=[[row.name for row in group] for group in made],
        rows=found,
        paper=PAPER,
    )
    return 0


if __name__ == "__main__":
    run(main)
