"""What each command does, in a module of its name: call the packages, print a table, write JSON."""

from __future__ import annotations

from importlib import import_module

from trimllm import config, startup


def carry_out(name: str, command: config.Settings) -> None:
    """Do one command, and import only what it needs."""
    with startup.uncollected():
        module = import_module(f"trimllm.commands.{name}")
    module.run(command)
