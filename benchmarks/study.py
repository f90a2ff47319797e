"""The study: accuracy at every depth, TrimLLM against one-shot peers, and one change at a time, over domains and seeds.

    python benchmarks/study.py --parts law                                # the demo world's law, seeds 0 1 2, all arms
    python benchmarks/study.py --parts cuad --base BASE --data DATA       # the lab base on real text
    python benchmarks/study.py --arms trimllm one-shot --seeds 0          # a part of it

Parts: medicine, law, finance are the demo world and need nothing; the others need the lab base
(`benchmarks/base/pretrain.py`) and the folder of data it was made from. medquad, cuad, banking77 are choices;
answers to medquad_gen, tatqa_gen, gsm8k are written (`benchmarks/beyond.py` has the trimmed models write them).

Every run is one of `trimllm trim` and starts from the same fully fine-tuned model (per part and seed), unless its arm
says otherwise; at a given depth all arms have trained for the same number of epochs, that full fine-tuning included
("twice as long" excepted).
Progressive arms give every depth on the way in one run; those that cut at once, or train longest at the end, need a
run per depth. Runs are kept in --output: what is finished is not repeated, what was interrupted goes on. The last
line is one JSON object; study.json in --output holds every accuracy of this and earlier calls. Standard errors are over
parts and seeds: seeds of one part share their reported questions.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _arms import ARMS, PARTS, Settings
from _sides import machine, run

from trimllm.checkpoints import loading
from trimllm.config import TrimConfig, plain_settings, without_idle
from trimllm.console import Console, table
from trimllm.errors import InputError
from trimllm.files import write_json
from trimllm.run import rundir
from trimllm.run.progressive import trim
from trimllm.run.rundir import RunDir
from trimllm.run.targets import wanted_depth

START = "full"
"""Folder of the full fine-tuning that the arms of a part and seed start from."""


def folder(root: Path, part: str, seed: int, arm: str) -> Path:
    return root / f"{part}-{seed}" / re.sub(r"\W+", "-", arm)


def settings(part: str, seed: int, options: argparse.Namespace) -> Settings:
    """The recipe of a part, with its model and data."""
    found = PARTS[part]
    given: Settings = {**found.settings, "seed": seed, "threads": options.threads}
    given["mixed_precision"] = options.mixed_precision
    if found.files is not None:
        if options.base is None or options.data is None:
            raise InputError(f"--parts {part} needs --base and --data: see benchmarks/base/pretrain.py")
        given |= {"model": str(options.base), "task": str(options.data / found.files)}
        if found.as_text:
            given |= {"text": str(options.data / found.files / "train.jsonl"), "text_ratio": 0.5}
    return given


def one_run(output: Path, given: Settings, before: Settings | None = None) -> list[Settings]:
    """The stages of a run, which is made, or gone on with, if it is not finished; `before` is the stage that it starts
    from, of another run."""
    asked = plain_settings.make(TrimConfig, {**given, "output": str(output), "resume": True})
    if not RunDir(output).result.exists():
        print(f"--- {output}", flush=True)
    return with_costs((row for row in result_of(asked)["history"] if row["event"] == "stage"), before)


def with_costs(stages: Iterable[Settings], before: Settings | None) -> list[Settings]:
    """The stages of a run, with what is left and what it took beside their accuracies: the blocks of the base
    (attention and MLP, of a pair from two), tokens and seconds of training and seconds of scans, from the base on."""
    start = {"tokens": 0, "train_seconds": 0.0, "scan_seconds": 0.0} if before is None else before["test"]
    found, tokens, seconds, scans = list[Settings](), *(start[x] for x in ("tokens", "train_seconds", "scan_seconds"))
    for stage in stages:
        train = stage.get("train") or {"tokens": 0, "seconds": 0.0}
        tokens, seconds = tokens + train["tokens"], seconds + train["seconds"]
        scans += sum(drop["seconds"] for drop in stage["dropped"])
        blocks = [(one["attention"], one["mlp"]) for one in stage["layout"]]
        costs = {
            "blocks": [a if a == b else [a, b] for a, b in blocks],
            "tokens": tokens,
            "train_seconds": round(seconds, 1),
            "scan_seconds": round(scans, 1),
        }
        found.append({**stage, "test": {**stage["test"], **costs}})
    return found


def result_of(asked: TrimConfig) -> Settings:
    """The result.json of a run, which is made, or gone on with, if it is not finished.

    Raises:
        InputError: if it was made with other settings.
    """
    result = RunDir(asked.output).result
    if result.exists():
        rundir.same_settings(asked, asked.output, rundir.COMPUTING)
    else:
        trim(asked, console=Console())
    found: Settings = json.loads(result.read_text(encoding="utf-8"))
    return found


def depths(part: str, options: argparse.Namespace, given: Settings) -> dict[float, int]:
    """Blocks at every share that is asked for."""
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(loading.path_of(given["model"])).num_hidden_layers
    asked = {keep: TrimConfig(**{**given, "output": "-", "keep": keep}) for keep in options.keep}
    found = {keep: wanted_depth(settings, whole) for keep, settings in asked.items()}
    return {1.0: whole} | {keep: depth for keep, depth in found.items() if depth is not None}


def finished_depths(output: Path) -> list[int]:
    """Depths that a finished run went through; none of one that is not."""
    result = RunDir(output).result
    if not result.exists():
        return []
    rows: list[Settings] = json.loads(result.read_text(encoding="utf-8"))["history"]
    return [row["depth"] for row in rows if row["event"] == "stage"]


def fully_fine_tuned(part: str, seed: int, options: argparse.Namespace, given: Settings) -> tuple[Path, Settings]:
    """The model that the arms start from, and the stage that trained it. (Its run drops the last block at the end,
    without training, as every run must drop one.)"""
    place = folder(options.output, part, seed, START)
    last = {
        "depth": depths(part, options, given)[1.0] - 1,
        "strategy": "last",
        "one_shot": True,
        "epochs_per_drop": 0.0,
    }
    asked = without_idle(TrimConfig, {**given, **last, "keep_checkpoints": True, "report_depths": True})
    stage, *_ = one_run(place, asked)
    return RunDir(place).checkpoint(stage["depth"]), stage


def accuracies(part: str, seed: int, name: str, options: argparse.Namespace) -> dict[float, Settings]:
    """Reported accuracy by share of the blocks, for one arm."""
    given, arm = settings(part, seed, options), ARMS[name]
    wanted, place = depths(part, options, given), folder(options.output, part, seed, name)
    common, before, first = given, None, None
    if not arm.own_start:
        tuned, first = fully_fine_tuned(part, seed, options, given)
        if not arm.from_base:
            common, before = {**given, "model": str(tuned)}, first

    def made(output: Path, depth: int) -> list[Settings]:
        changed = arm.settings(common, wanted[1.0] - depth)
        if arm.whole:
            only, *_ = one_run(output, {**changed, "depth": wanted[1.0] - 1, "report_depths": True}, before)
            return [{**only, "depth": depth}]
        return one_run(output, {**changed, "depth": depth, "report_depths": True}, before)

    if arm.per_depth:
        shares = sorted({depth for keep, depth in wanted.items() if keep < 1})
        runs = [made(place / f"{depth}", depth) for depth in shares]
        first = first or runs[0][0]
        stages = [run[-1] for run in runs]
    else:
        stages = made(place, min([*wanted.values(), *finished_depths(place)]))[1:]
    by_depth = {stage["depth"]: stage["test"] for stage in (first, *stages)}
    return {keep: by_depth[depth] for keep, depth in wanted.items() if depth in by_depth}


Mean = tuple[float, float | None, int]
"""Mean points, their standard error (None of a single one), and their number."""


def means(records: list[Settings], against: str | None = None) -> dict[str, dict[str, Mean]]:
    """Per arm and share: mean difference over parts and seeds, its standard error, and their number.

    The difference is to the accuracy of full fine-tuning, or of the arm `against` at the same share, part and seed.
    """
    by = {(one["part"], one["seed"], one["arm"]): one["accuracy"] for one in records}
    points: dict[str, dict[str, list[float]]] = {}
    for (part, seed, arm), found in by.items():
        for keep in found.keys() - {"1"}:
            other = found.get("1") if against is None else by.get((part, seed, against), {}).get(keep)
            if other is not None and arm != against:
                points.setdefault(arm, {}).setdefault(keep, []).append(found[keep]["value"] - other["value"])
    return {arm: {keep: mean_of(values) for keep, values in found.items()} for arm, found in points.items()}


def mean_of(values: list[float]) -> Mean:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), error, len(values)


def report(summary: dict[str, dict[str, Mean]]) -> str:
    keeps = sorted({keep for by in summary.values() for keep in by}, key=float, reverse=True)
    rows = []
    for name, by in summary.items():
        cells = [by.get(keep) for keep in keeps]
        rows.append([name, *(_cell(*cell) if cell else "-" for cell in cells)])
    return table(["", *(f"{float(keep):.0%}" for keep in keeps)], rows)


def _cell(mean: float, error: float | None, count: int) -> str:
    return f"{mean:+.1f} (1)" if error is None else f"{mean:+.1f} +- {error:.1f} ({count})"


def merged(path: Path, new: list[Settings]) -> list[Settings]:
    """The accuracies that earlier calls wrote to `path`, and the new ones in their place or beside them."""
    old = json.loads(path.read_text(encoding="utf-8"))["raw"] if path.exists() else []
    found: dict[tuple[Any, ...], Settings] = {}
    for one in [*old, *new]:
        key = one["part"], one["seed"], one["arm"]
        found[key] = {**one, "accuracy": {**found.get(key, one)["accuracy"], **one["accuracy"]}}
    return [found[key] for key in sorted(found, key=lambda key: (list(PARTS).index(key[0]), key[1], _place(key[2])))]


def _place(arm: str) -> int:
    return list(ARMS).index(arm) if arm in ARMS else len(ARMS)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Arms:\n" + textwrap.fill("; ".join(f'"{arm}"' for arm in ARMS), 110, break_on_hyphens=False),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts", nargs="+", default=["medicine", "law", "finance"], choices=list(PARTS), metavar="PART"
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.4, 0.33, 0.25], help="shares of blocks")
    parser.add_argument(
        "--against", choices=list(ARMS), metavar="ARM", help="another table: accuracy less that of this arm, in pairs"
    )
    parser.add_argument("--base", type=Path, help="the lab base")
    parser.add_argument("--data", type=Path, help="folder with the lab's tasks")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--mixed-precision", default="auto", help="of training and scans: auto, no or bf16")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of all runs")
    options = parser.parse_args()
    path, raw = options.output / "study.json", []
    for seed in options.seeds:
        for part in options.parts:
            for name in options.arms:
                idle = "text" in ARMS[name].changes and "text" not in PARTS[part].settings
                if idle or (ARMS[name].own_start and PARTS[part].files is not None):
                    continue
                by = accuracies(part, seed, name, options)
                raw.append({"part": part, "seed": seed, "arm": name, "accuracy": {f"{k:g}": v for k, v in by.items()}})
                write_json(path, {"raw": merged(path, raw)})
                shown = ", ".join(f"{keep:.0%} {value['value']:.1f}" for keep, value in by.items())
                print(f"{part} {seed} {name}: {shown}", flush=True)
    records = [
        one
        for one in merged(path, raw)
        if one["part"] in options.parts
        and one["seed"] in options.seeds
        and one["arm"] in (*options.arms, options.against)
    ]
    summary = means(records)
    print("points of accuracy over full fine-tuning, mean +- standard error over parts and seeds (their number)")
    print(report(summary))
    record = {"name": "study", "unit": "points", "parts": options.parts, "seeds": options.seeds, "summary": summary}
    if options.against:
        record |= {"against": options.against, "differences": (pairs := means(records, options.against))}
        print(f"points over {options.against!r} with the same part and seed, mean +- standard error (pairs)")
        print(report(pairs))
    record["machine"] = machine()
    write_json(path, record | {"raw": merged(path, raw)})
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    run(main)
