"""What a run remembers: an append-only journal of events, JSON lines; each is on disk before the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimllm.files import append_line, read_lines


class Journal:
    """Events of a run, in order. `writes=False` (processes other than the first) only remembers."""

    @classmethod
    def read(cls, path: Path) -> Journal:
        """What the file holds by now; nothing is written."""
        return cls(path, read_lines(path, mend=False), writes=False)

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
