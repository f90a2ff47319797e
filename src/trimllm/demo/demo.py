"""`trimllm demo`: the main job on the embedded model, beside full fine-tuning and one-shot removal.

The base knows three invented domains. One is chosen, and its biographies are mixed into training, so that its facts can
be learnt again; the table shows what the trimmed model answers in each domain, how fast it is and how large. Fully
fine-tuned is the same run before its first drop (the warm-up stage); one-shot starts from that model too, drops as many
blocks at once, and trains as long as all the stages of the trimmed one together.
"""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimllm import config, files
from trimllm.bench import timing
from trimllm.blocks import decoder
from trimllm.checkpoints import folders, loading, models
from trimllm.config import plain_settings
from trimllm.console import Console, clock, table
from trimllm.evaluation import paired
from trimllm.evaluation.evaluate import Scorer
from trimllm.evaluation.judging import Evaluation
from trimllm.run.progressive import trim
from trimllm.run.rundir import RunDir
from trimllm.tasks import load_task, world

RECIPE = Path(__file__).with_name("recipe.yaml")
FULL = "fully fine-tuned"


@dataclass(frozen=True)
class Line:
    """One model of the table."""

    name: str
    depth: int
    parameters: int
    bytes: int
    """Weights on disk in bfloat16."""
    accuracy: dict[str, Evaluation]
    """Per domain, on entities whose questions nobody was trained on."""


def settings(command: config.DemoConfig, output: Path, **changes: Any) -> config.TrimConfig:
    """The demo's run, with `changes`."""
    domain = f"demo_{command.domain}"
    fixed = {"model": "demo", "task": domain, "text": domain, "unit": command.unit, "seed": command.seed}
    return config.TrimConfig(
        **{**plain_settings.read_yaml(RECIPE), **fixed, "threads": command.threads, "output": str(output), **changes}
    )


def demo(command: config.DemoConfig) -> list[Line]:
    """Run, print the table, and return its lines; the runs of an earlier demo in the same directory are replaced."""
    root = Path(command.output) / command.domain
    with folders.held(root):
        return _demo(command, root)


def _demo(command: config.DemoConfig, root: Path) -> list[Line]:
    started, console = time.perf_counter(), Console()
    runs = {name: root / name for name in ("trimmed", "one-shot")}
    for name, run in runs.items():
        earlier, left = RunDir(run), root / f".{name}.earlier"
        shutil.rmtree(left, ignore_errors=True)  # of a kill
        if any(path.exists() for path in (earlier.config, earlier.journal, earlier.checkpoints)):
            run.rename(left)  # whole: what a kill left in its place would be no run, and refused
            shutil.rmtree(left)
    console.say(f"A small model that knows three invented domains becomes a specialist in {command.domain}.")
    trimmed = settings(command, runs["trimmed"])
    trim(trimmed, console=console)
    tuned = RunDir(runs["trimmed"]).checkpoint(decoder.depth(models.load(trimmed).model))
    console.say("\nFor comparison: as many blocks removed at once, with the same training")
    trim(one_shot(command, runs["one-shot"], tuned), console=console)
    found = {
        "base": loading.DEMO,
        FULL: tuned,
        "trimmed": runs["trimmed"] / "model",
        "one-shot": runs["one-shot"] / "model",
    }
    loaded: dict[str, Any] = {
        name: models.cast(loading.load_model(path), torch.bfloat16) for name, path in found.items()
    }
    for model in loaded.values():
        models.cast(model, torch.float32)
    lines = [_line(name, model) for name, model in loaded.items()]
    speeds = timing.decode_speed(loaded, repeats=7)
    print(report(command.domain, lines, speeds))
    files.write_json(root / "demo.json", record(command, lines, speeds))
    print(f"trimmed checkpoint: {found['trimmed']}  ({clock(time.perf_counter() - started)} in all)")
    return lines


def one_shot(command: config.DemoConfig, output: Path, tuned: Path) -> config.TrimConfig:
    """The baseline: from the fine-tuned model, all drops by one scan, then the same number of epochs."""
    return settings(command, output, model=str(tuned), warmup_epochs=0, one_shot=True, keep_checkpoints=False)


def _line(name: str, model: Any) -> Line:
    tokenizer = loading.load_tokenizer(loading.DEMO)
    accuracy = {}
    for domain in world.DOMAINS:
        items = load_task(f"demo_{domain}").test
        accuracy[domain] = Scorer(model, tokenizer, items).evaluate(model, "acc")
    count = sum(parameter.numel() for parameter in model.parameters())
    return Line(name, decoder.depth(model), count, 2 * count, accuracy)


def above_full(domain: str, lines: list[Line]) -> dict[str, dict[str, float]]:
    """By how many points the cut models are above the fully fine-tuned one in a domain, question by question."""
    items = load_task(f"demo_{domain}").test
    answers = {line.name: paired.answers(line.accuracy[domain].per_item, items) for line in lines}
    cut = [line.name for line in lines if line.depth < lines[0].depth]
    return {name: paired.apart(answers[name], answers[FULL]) for name in cut}


def report(domain: str, lines: list[Line], speeds: dict[str, list[float]]) -> str:
    """The table: the chosen domain first, speed against the base measured in turn."""
    domains = [domain, *(other for other in world.DOMAINS if other != domain)]
    rows = []
    for line in lines:
        ratio, least, largest = timing.ratio(speeds, line.name, "base")
        rows.append(
            [
                line.name,
                line.depth,
                f"{line.parameters / 1e6:.2f} M",
                *(f"{line.accuracy[d].value:.1f} +- {line.accuracy[d].stderr:.1f}" for d in domains),
                f"{statistics.median(speeds[line.name]):.0f}",
                f"{ratio:.2f}x ({least:.2f}-{largest:.2f})",
                f"{line.bytes / 1e6:.1f} MB",
            ]
        )
    header = ["", "depth", "parameters", *domains, "tokens/s", "of the base's", "on disk"]
    above = ", ".join(f"{name} {paired.shown(found)}" for name, found in above_full(domain, lines).items())
    return (
        "\n"
        + table(header, rows)
        + "\naccuracy in percent on 500 questions a domain about held-out entities; chance 25"
        + f"\npoints against {FULL} in {domain}, over paired answers: {above}"
    )


def record(command: config.DemoConfig, lines: list[Line], speeds: dict[str, list[float]]) -> dict[str, Any]:
    """The table as JSON."""
    above = above_full(command.domain, lines)
    return {
        "domain": command.domain,
        "seed": command.seed,
        "unit": command.unit,
        "models": [
            {
                "name": line.name,
                "depth": line.depth,
                "parameters": line.parameters,
                "bytes": line.bytes,
                "accuracy": {d: e.summary() for d, e in line.accuracy.items()},
                "above_full": above.get(line.name),
                "tokens_per_second": speeds[line.name],
                "speed_ratio": timing.ratio(speeds, line.name, "base"),
            }
            for line in lines
        ],
    }
