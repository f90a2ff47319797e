"""What a run remembers: an append-only journal of events, and files that are the old ones or the new ones.

The journal is JSON lines; every line is on disk before the run goes on. A line torn by a kill is cut off on reading.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from trimllm.checkpoints.folders import disk_errors
from trimllm.errors import TrimError


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, sees the old one or the new one."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON; infinite and undefined numbers, which JSON does not know, become null."""
    write_atomic(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """Events of a run, in order. `writes=False` (processes other than the first) only remembers."""

    def __init__(self, path: Path, events: list[dict[str, Any]], *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.events = events

    def add(self, event: str, **values: Any) -> dict[str, Any]:
        """Append one event; it is on disk when this returns."""
        record = {"event": event, **values}
        self.events.append(record)
        if self.writes:
            append_line(self.path, record)
        return record

    def of(self, event: str) -> list[dict[str, Any]]:
        """All events of that name."""
        return [record for record in self.events if record["event"] == event]

    def last(self, event: str) -> dict[str, Any] | None:
        """The newest event of that name."""
        found = self.of(event)
        return found[-1] if found else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; what a kill left of the last one is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with disk_errors(path), path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except json.JSONDecodeError:
        raise TrimError(f"{path} is damaged: move it away and start the run again") from None


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and wait until it is on disk."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
