"""`trimllm demo`: the main job on the embedded model."""

from __future__ import annotations

from trimllm import config
from trimllm.demo.demo import demo


def run(command: config.DemoConfig) -> None:
    """The main job on the embedded model."""
    demo(command)
