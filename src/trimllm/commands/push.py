"""`trimllm push`: a result to the Hub."""

from __future__ import annotations

from trimllm import config
from trimllm.handover.hub import push_to_hub


def run(command: config.PushConfig) -> None:
    """A finished export, to the Hub."""
    print(f"pushed: {push_to_hub(command.directory, command.repo_id, private=command.private)}")
