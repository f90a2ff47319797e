"""What is handed over: the result of a run, a depth that it kept, or any checkpoint directory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimllm import config
from trimllm.blocks.layout import load_layout
from trimllm.checkpoints import export, loading, models
from trimllm.checkpoints.origin import Origin
from trimllm.checkpoints.verification import Report
from trimllm.config import plain_settings
from trimllm.errors import InputError
from trimllm.run import licences, model_card, placing
from trimllm.run.journal import Journal
from trimllm.run.rundir import RunDir


@contextmanager
def checkpoint(command: config.ExportConfig) -> Iterator[Path]:
    """A directory with the stock checkpoint that `command` names; a kept depth is cast and saved for as long as that.

    Raises:
        InputError: if there is none.
    """
    run, holds_run = RunDir(command.source), placing.holds_run(command.source)
    if command.depth is not None:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=run.root if run.root.is_dir() else None) as scratch:
            folder = Path(scratch) / "checkpoint"
            save_depth(command, folder)
            yield folder
    elif holds_run:
        if not run.model.exists():
            kept = ", ".join(map(str, run.kept_depths())) or "none"
            what = f"its result, {run.model}, is not there" if run.result.exists() else "the run is not finished"
            raise InputError(f"{run.root}: {what}: name a depth it kept with --depth (kept: {kept})")
        yield run.model
    else:
        folder = Path(loading.path_of(command.source))
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            merge = f"save_trimmed(load_model('{folder}'), 'merged', tokenizer=load_tokenizer('{folder}'))"
            raise InputError(
                f"{command.source} is an adapter: make a checkpoint of it first, with python -c "
                f'"from trimllm import *; {merge}"'
            )
        if not (folder / "config.json").exists():
            raise InputError(f"{command.source}: there is neither a run nor a checkpoint: give one of the two")
        yield folder


def save_depth(command: config.ExportConfig, target: Path) -> Report | None:
    """A kept depth of a run, as a verified checkpoint in the dtype of the run's result.

    Raises:
        InputError: if there is no such run, or it did not keep that depth.
    """
    run = RunDir(command.source)
    if not placing.holds_run(command.source):
        raise InputError(f"{command.source} holds no run: give the --output of a trimllm trim")
    assert command.depth is not None
    folder = run.checkpoint(command.depth)
    if not folder.exists():
        kept = ", ".join(map(str, run.kept_depths())) or "none"
        raise InputError(
            f"--depth {command.depth}: its weights were not kept (kept: {kept}): --keep-checkpoints keeps those of all"
        )
    journal = Journal.read(run.journal)  # only read: the run may still be going on
    plan_file = run.plans / f"depth-{command.depth}.json"
    stages = [stage for stage in journal.of("stage") if stage["depth"] >= command.depth]
    if not plan_file.exists() or command.depth not in [stage["depth"] for stage in stages]:
        raise InputError(
            f"--depth {command.depth}: it is trained, and not measured yet: go on with trimllm trim --output "
            f"{command.source} --resume"
        )
    stored = plain_settings.make(config.TrimConfig, placing.stored_settings(command.source))
    named = plain_settings.make(config.TrimConfig, plain_settings.stored(run.config))
    begun = journal.last("start")
    assert begun is not None, "a stage is journaled"
    own_code = stored.trust_remote_code or command.trust_remote_code
    tokenizer = loading.load_tokenizer(folder, trust_remote_code=own_code)
    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    model: Any = loading.load_model(folder, trust_remote_code=own_code)
    models.cast(model, getattr(torch, begun["save_dtype"]))
    layout = load_layout(plan["blocks"])
    origin = Origin.load(plan["base"])
    origin = replace(origin, place=placing.place(origin.name, command.source))
    return export.save_trimmed(
        model,
        target,
        tokenizer=tokenizer,
        layout=layout,
        base=plan["base"],
        card=model_card.depth_of_run(named, origin, layout, stages),
        companions=licences.terms(origin),
    )
