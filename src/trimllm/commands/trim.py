"""`trimllm trim`: the main job."""

from __future__ import annotations

from pathlib import Path

from trimllm import config, parallel
from trimllm.run import account
from trimllm.run.progressive import trim


def run(command: config.TrimConfig) -> None:
    """Trim, then print the table of depths."""
    _, history = trim(command)
    if parallel.is_first():
        print(account.depth_table(history))
        print(f"trimmed checkpoint: {Path(command.output) / 'model'}")
