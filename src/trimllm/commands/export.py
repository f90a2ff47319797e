"""`trimllm export`: a kept depth as a checkpoint, or a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path

from trimllm import config, handover
from trimllm.checkpoints import folders
from trimllm.commands import shared
from trimllm.errors import InputError
from trimllm.handover import source
from trimllm.run import placing, rundir


def run(command: config.ExportConfig) -> None:
    """A kept depth of a run as a checkpoint, or a checkpoint in another format."""
    target = Path(command.output or _default_target(command))
    if command.to == "checkpoint":
        assert command.depth is not None  # the settings see to it
        folders.check_target(target, source=rundir.RunDir(command.source).checkpoint(command.depth))
        report = source.save_depth(command, target)
        print(f"{target}: {command.depth} layers, reloaded and compared ({shared.differences(report)})")
        return
    if command.to == "gguf" and target.exists():
        raise InputError(f"--output {target}: it exists: name another file")
    if command.to != "gguf":
        folders.check_target(target)
    with source.checkpoint(command) as folder:
        print(f"{target}: {handover.write(folder, target, command)}")


def _default_target(command: config.ExportConfig) -> Path:
    """Beside what is handed over, named by what it becomes."""
    given = Path(command.source)
    given = given if given.name not in ("", "..") else given.resolve()
    is_run = placing.kind_of(given) == "run"
    stem = "model" if is_run else given.resolve().name
    stem += f"-depth-{command.depth}" if command.depth else ""
    what = {"checkpoint": "", "gguf": f"-{command.quant or 'f16'}.gguf"}.get(command.to, f"-{command.to}")
    return (given if is_run else given.parent) / (stem + what)
