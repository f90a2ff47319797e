"""What several commands do."""

from __future__ import annotations

from pathlib import Path

from trimllm import config
from trimllm.checkpoints import folders, models
from trimllm.checkpoints.verification import Report
from trimllm.console import Console
from trimllm.errors import InputError


def load(command: config.ModelSettings, *, evaluating: bool = False) -> models.Loaded:
    """The model of a command, with what the user should know of it."""
    loaded = models.load(command, evaluating=evaluating)
    for note in loaded.notes:
        Console().say(f"  {note}")
    return loaded


def fresh(output: Path, product: str) -> None:
    """Refuse a directory that already holds what a command would write there."""
    folders.check_directory(output)
    if (output / product).exists():
        raise InputError(f"--output {output}: it already holds {product}: choose another directory")


def differences(report: Report | None) -> str:
    """What was compared after a checkpoint was saved and loaded again, and how far apart it was."""
    assert report is not None  # no command saves without verifying
    shown = {"plain": report.plain, "cached": report.cached, "static cache": report.static}
    return "largest logit differences: " + ", ".join(
        f"{name} {'not supported' if value is None else f'{value:.2g}'}" for name, value in shown.items()
    )
