"""`trimllm tasks`: the built-in tasks, listed without waiting for torch."""

from __future__ import annotations

from trimllm import config, tasks
from trimllm.console import table


def run(command: config.TasksConfig) -> None:
    """Print the built-in tasks."""
    rows = [list(row) for row in tasks.list_tasks()]
    print(table(["task", "kind", "metric", "about"], rows))
    print("or your own rows: --task FILE_OR_DIR (JSONL, CSV, Parquet), --task FILE.yaml")
