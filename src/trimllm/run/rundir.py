"""The directory of a run: what lies where, whose it is, and how a run is found again.

config.yaml      the resolved settings            plan.json, plans/     which original layers each depth holds
journal.jsonl    what happened, in order          scans/                one table per scan
checkpoints/     weights at the end of stages     model/, result.json   the product
stage.pt         the stage that is under way      used_rows.json        what it was trained and decided on
answers/         what the reported split was answered
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimllm.config import CompareConfig, Settings, TrimConfig
from trimllm.config.plain_settings import make
from trimllm.config.shared import option, option_of
from trimllm.errors import InputError, TrimError
from trimllm.files import read_lines, write_atomic
from trimllm.run import placing
from trimllm.run.journal import Journal
from trimllm.training import optimizer_state, underway

COMPUTING = (
    *("resume", "output", "threads", "device", "attention", "micro_batch_size", "eval_batch_size"),
    *("gradient_checkpointing", "checkpoint_minutes"),
)
"""Settings of where and how a run computes, and not of what."""
WHERE = (*COMPUTING, "model")
"""Settings that may differ when a run is resumed: how it computes, and where the base lies (that its weights are the
same is checked by their SHA-256)."""
DATA = ("task", "task_files", "text")
"""Settings that may differ where the journal holds the SHA-256 of what they name."""
REMEDIES = ("lr", "max_grad_norm", "min_accuracy", "max_drop")
"""Settings that may differ while it is not finished: for what can end it."""


SHARED_WITHIN = 60.0
"""Seconds within which all processes must see a file of the first one."""


class RunDir:
    """Paths of one run."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / placing.CONFIG
        self.journal = self.root / placing.JOURNAL
        self.checkpoints = self.root / "checkpoints"
        self.scans = self.root / "scans"
        self.plans = self.root / "plans"
        self.answers = self.root / "answers"
        self.plan = self.root / "plan.json"
        self.result = self.root / "result.json"
        self.model = self.root / "model"
        self.underway = self.root / placing.STAGE

    def checkpoint(self, depth: int) -> Path:
        return self.checkpoints / f"depth-{depth}"

    def answers_of(self, event: str, depth: int) -> Path:
        """What a journaled model answered to each item of the reported split (see `paired.answers`)."""
        return self.answers / f"{f'depth-{depth}' if event == 'stage' else event}.json"

    def batches_of_scan(self, number: int) -> Path:
        """Finished batches of the scan that leads, or led, to the drop of this number."""
        return self.scans / f"scan-{number:03d}.jsonl"

    def kept_depths(self) -> list[int]:
        """Depths whose weights are there, deepest first."""
        names = (re.fullmatch(r"depth-(\d+)", path.name) for path in self.checkpoints.glob("depth-*"))
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def clean(self, weights: Collection[int], *, state: Collection[int] = ()) -> None:
        """Delete the checkpoints of all depths but these, and what the optimizer knew at all depths but those of
        `state`."""
        for depth in self.kept_depths():
            if depth not in weights:
                shutil.rmtree(self.checkpoint(depth))
            elif depth not in state:
                optimizer_state.delete(self.checkpoint(depth))

    def forget(self, measured: Collection[int]) -> None:
        """After a finished run: delete what the optimizer knew, depths that were trained and never `measured` (a floor
        was raised then), and what a kill left of the last stage."""
        self.underway.unlink(missing_ok=True)
        self.clean(measured)


def check(config: TrimConfig) -> None:
    """Whether what stands in the directory is nothing, or this run; nothing is written.

    Raises:
        InputError: if it holds another run, one with other settings, or foreign files.
    """
    if placing.may_go_on(config.output, TrimConfig, resume=config.resume):
        earlier = Journal.read(RunDir(config.output).journal)
        free = [*WHERE, *(() if earlier.last("done") else REMEDIES), *(DATA if data_of(earlier) else ())]
        same_settings(config, config.output, free)


def claim(config: TrimConfig) -> list[dict[str, Any]]:
    """Make the directory, which `check` let through, this run's own, and return the events of its journal so far."""
    run = RunDir(config.output)
    events = read_lines(run.journal)
    if not any(one["event"] == "done" for one in events):
        write_atomic(run.config, placing.to_store(config.model_copy(update={"resume": False}), run.root))
    for left_by_a_kill in (*run.root.glob(".model.*"), *run.checkpoints.glob(".depth-*")):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    underway.remove_partial(run.underway)
    return events


def wait_until_seen(run: RunDir, rank: int) -> None:
    """Wait until process `rank` sees what the first one has written there: all read its checkpoints.

    Raises:
        TrimError: if it does not, in `SHARED_WITHIN` seconds.
    """
    ends = time.monotonic() + SHARED_WITHIN
    while not run.config.exists():
        if time.monotonic() > ends:
            raise TrimError(
                f"--output {run.root}: process {rank} on {platform.node()} does not see what the first process wrote "
                "there: give a folder that all of them share"
            )
        for folder in (run.root.parent, run.root):
            with suppress(OSError):
                os.listdir(folder)  # network file systems remember for a while that nothing is there
        time.sleep(0.1)


def data_of(journal: Journal) -> dict[str, str]:
    """SHA-256 of what the run began with, by option; empty where it has not begun."""
    start = journal.last("start")
    return {} if start is None else start["data"]


def same_data(before: dict[str, str], now: dict[str, str], config: TrimConfig | CompareConfig, whose: str) -> None:
    """Raises InputError if --task, --text, a task of --also or the weights of --model are not what the run or
    comparison `whose` began with.

    `before` and `now` are SHA-256 by option (`--task`, `--also NAME`); what one of them lacks is not compared.
    """
    named_by = {option(name): option_of(name, getattr(config, name)) for name in ("model", "task", "text")}
    for data in sorted(before.keys() & now.keys()):
        if before[data] != now[data]:
            named = named_by.get(data, data)
            what = "weights" if data == "--model" else "rows"
            raise InputError(
                f"{named}: its {what} are not those that {whose} began with: give those, or another --output"
            )


def same_settings(config: Settings, output: str | Path, free: Collection[str]) -> None:
    """Raises InputError if a setting that is not `free` differs from what `output` was begun with."""
    before = make(type(config), placing.stored_settings(output, type(config))).model_dump(mode="json")
    kind = "comparison" if isinstance(config, CompareConfig) else "run"
    for name, value in config.model_dump(mode="json").items():
        if name not in free and not placing.same(name, before[name], value):
            raise InputError(
                f"{option_of(name, value)}: the {kind} in {output} has {before[name]}: give that or leave it out, "
                f"or start another {kind}"
            )
