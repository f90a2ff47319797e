"""What a run prints: notes, one live line per stage, one row per depth.

On a terminal the live line moves; in a log it is repeated now and then.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

LOG_EVERY = 30.0
"""Seconds between two progress lines where there is no terminal."""
CLEAR = "\r\x1b[K"
"""Takes the live line away."""


def to_stderr(text: str) -> None:
    """Write it in one piece: where Python is unbuffered, `print` writes the end of a line apart, and what another
    process of the run says comes between."""
    if sys.stderr is not None:  # as it is where standard error was closed
        sys.stderr.write(text)
        sys.stderr.flush()


class Console:
    """Prints on standard error; `quiet` prints nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr is not None and sys.stderr.isatty()

    @property
    def live(self) -> bool:
        return self.terminal and not self.quiet

    def say(self, text: str) -> None:
        """One line that stays."""
        if not self.quiet:
            to_stderr((CLEAR if self.live else "") + text + "\n")

    def warn(self, text: str) -> None:
        """What may make the result worth less."""
        self.say(f"warning: {text}")

    @contextmanager
    def progress(self, name: str) -> Iterator[Callable[..., None]]:
        """Yields `show(done, total, detail)`; the time left is worked out from what is done between the first call,
        which may come after much that an earlier process did, and this one."""
        last = time.perf_counter()
        first: tuple[float, int] | None = None

        def show(done: int, total: int, detail: str = "") -> None:
            nonlocal first, last
            now = time.perf_counter()
            started, before = first = first or (now, done)
            if self.quiet or now - last < (0.2 if self.live else LOG_EVERY):
                return
            last = now
            left = f"{clock((now - started) / (done - before) * (total - done))} left" if done > before else ""
            line = "  ".join(filter(None, [f"{name}  {done}/{total}", detail, left]))
            if self.live:  # a line that wraps could not be taken away
                line = CLEAR + line[: _columns() - 1]
            to_stderr(line if self.live else line + "\n")

        try:
            yield show
        finally:
            if self.live:
                to_stderr(CLEAR)


def _columns() -> int:
    """Columns of the terminal that the live line is on; standard output may be a file."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def clock(seconds: float) -> str:
    """Time as a person says it: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
