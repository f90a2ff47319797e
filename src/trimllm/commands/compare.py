"""`trimllm compare`: the methods of the field, on the same model and data."""

from __future__ import annotations

from trimllm import config
from trimllm.compare import compare
from trimllm.console import Console


def run(command: config.CompareConfig) -> None:
    """Methods one after the other, each in a process of its own; a table, compare.json, compare.png."""
    compare(command, Console())
