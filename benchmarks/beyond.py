"""What the models of a study are worth beyond their own question: other domains, free text, generated answers.

    python benchmarks/beyond.py runs/study                             # after benchmarks/study.py --output runs/study
    python benchmarks/beyond.py runs/study --data DATA                 # with parts of the lab

Every finished run's saved model, and the fully fine-tuned one that it started from, answers the questions of the
other domains of its world; models of a generation part write answers (exact match, ROUGE-L, repeated 4-grams). How
freely a trimmed model writes on (repetition, silence: `trimllm.evaluation.fluency`) is read from its run. What was
measured is kept beside each model and not measured again: delete the study's runs to make them anew. The last line is
one JSON object, and beyond.json in the folder holds every figure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from _arms import ARMS, PARTS, Settings
from _sides import machine, run
from study import START, folder

from trimllm import commands, config
from trimllm.console import table
from trimllm.files import write_json
from trimllm.run.rundir import RunDir

WORLDS = (("medicine", "law", "finance"), ("medquad", "cuad", "banking77"))


class Trained(NamedTuple):
    """A model of the study."""

    part: str
    seed: int
    arm: str
    depth: int
    model: Path
    row: Settings
    """What its run recorded of it last."""


def trained(root: Path) -> Iterator[Trained]:
    """The fully fine-tuned model of every part and seed (arm "full"), then what every finished run saved."""
    for place in sorted(root.glob("*-*")):
        part, _, number = place.name.rpartition("-")
        if part not in PARTS or not number.isdigit():
            continue
        seed = int(number)
        reference = RunDir(folder(root, part, seed, START))
        if not reference.result.exists():
            continue
        full = next(row for row in history(reference) if row["event"] == "stage")
        yield Trained(part, seed, "full", full["depth"], reference.checkpoint(full["depth"]), full)
        for arm in ARMS:
            at = folder(root, part, seed, arm)
            for found in (at, *sorted(path for path in at.glob("*") if path.name.isdigit())):
                if (done := RunDir(found)).result.exists():
                    saved = history(done)[-1]
                    yield Trained(part, seed, arm, saved["depth"], done.model, saved)


def history(place: RunDir) -> list[Settings]:
    rows: list[Settings] = json.loads(place.result.read_text(encoding="utf-8"))["history"]
    return rows


def questions(part: str, options: argparse.Namespace) -> dict[str, Settings]:
    """What the models of a part are asked beyond its own choices: settings of `trimllm eval` by name."""
    if PARTS[part].generation:
        return {part: {"task": task_of(part, options), "max_test": options.answers, "truncate": True, "generate": True}}
    world = next(names for names in WORLDS if part in names)
    return {
        name: {"task": task_of(name, options), "max_test": options.questions, "truncate": True}
        for name in world
        if name != part
    }


def task_of(part: str, options: argparse.Namespace) -> str:
    files = PARTS[part].files
    if files is None:
        return str(PARTS[part].settings["task"])
    if options.data is None:
        raise SystemExit(f"{part}: its questions need --data: see benchmarks/study.py")
    return str((options.data / files).resolve())


def measured(one: Trained, name: str, asked: Settings, threads: int | None) -> Settings:
    """The evaluation, from beside the model if it was asked so before."""
    settings = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    kept = one.model.parent / f"beyond-{one.model.name}-{name}-{settings[:16]}.json"
    if not kept.exists():
        commands.carry_out("eval", config.EvalConfig(model=str(one.model), output=str(kept), threads=threads, **asked))
    found: Settings = json.loads(kept.read_text(encoding="utf-8"))
    return found


def figures(one: Trained, options: argparse.Namespace) -> dict[str, float]:
    """Percent: accuracy on other domains, or of generated answers; repetition and silence of free text."""
    out: dict[str, float] = {}
    for name, asked in questions(one.part, options).items():
        found = measured(one, name, asked, options.threads)
        if "generation" in found:
            out |= {key.replace("_", " "): value for key, value in found["generation"].items()}
        else:
            out[name] = found["value"]
    free = one.row.get("fluency") or {}
    return out | {f"free text, {key}": value for key, value in free.items()}


def report(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, a line per part, arm and depth."""
    blocks = []
    for part in dict.fromkeys(row["part"] for row in rows):
        here = [row for row in rows if row["part"] == part]
        columns = list(dict.fromkeys(name for row in here for name in row["figures"]))
        lines = []
        for arm, depth in dict.fromkeys((row["arm"], row["depth"]) for row in here):
            alike = [row for row in here if (row["arm"], row["depth"]) == (arm, depth)]
            values = [[row["figures"][name] for row in alike if name in row["figures"]] for name in columns]
            own = statistics.mean(row["own"] for row in alike)
            cells = [f"{statistics.mean(each):.1f}" if each else "-" for each in values]
            lines.append([arm, f"{depth}", f"{len(alike)}", f"{own:.1f}", *cells])
        blocks.append(f"{part}\n" + table(["", "layers", "seeds", "own task", *columns], lines))
    return "\n\n".join(blocks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="--output of benchmarks/study.py")
    parser.add_argument("--data", type=Path, help="folder with the lab's tasks")
    parser.add_argument("--questions", type=int, default=500, help="questions of every other domain")
    parser.add_argument("--answers", type=int, default=100, help="answers generated by every model")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch (default: its own choice)")
    options = parser.parse_args()
    rows = []
    for one in trained(options.study):
        made = {"figures": figures(one, options), "own": one.row["test"]["value"]}
        rows.append({"part": one.part, "seed": one.seed, "arm": one.arm, "depth": one.depth, **made})
    if not rows:
        raise SystemExit(f"{options.study} holds no finished run of benchmarks/study.py: name its --output")
    print(report(rows))
    record = {"name": "beyond", "unit": "percent", "machine": machine(), "rows": rows}
    write_json(options.study / "beyond.json", record)
    print(json.dumps({key: value for key, value in record.items() if key != "rows"}))
    return 0


if __name__ == "__main__":
    run(main)
