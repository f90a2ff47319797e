"""Several units at once: as many as cost next to nothing *together*, by the trial deletion of all of them.

Two blocks that are harmless one by one need not be harmless together: neighbours often do the same work. So every set
is tried as a whole, the least important units first; one that does not pass loses the unit that was added last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimllm.evaluation.judging import Evaluation
from trimllm.importance.select import Choice


@dataclass(frozen=True)
class Joint:
    """The trial deletion of some candidates (by their numbers in the scan) at once: metric in percent, loss in nats."""

    units: tuple[int, ...]
    value: float
    loss: float

    def record(self) -> dict[str, Any]:
        """As a journal keeps it."""
        return asdict(self) | {"units": list(self.units)}

    @classmethod
    def load(cls, record: dict[str, Any]) -> Joint:
        return cls(tuple(record["units"]), record["value"], record["loss"])


def accepted(choices: Sequence[Choice], tried: Sequence[Joint]) -> Joint | None:
    """The trial of what was chosen, if it was tried as a whole."""
    return next((found for found in tried if found.units == tuple(choice.index for choice in choices)), None)


def harmless(found: Joint, intact: Evaluation, tolerance: float, points: float) -> bool:
    """Whether the loss is at most `tolerance` nats above the intact model's and, where there are choices, the accuracy
    no further below its own than its standard error, or than `points` if those are more."""
    allowed = max(points, intact.stderr) if intact.correct else float("inf")
    return found.loss <= intact.loss + tolerance + 1e-9 and found.value >= intact.value - allowed - 1e-9


def grow(
    first: int,
    following: Callable[[tuple[int, ...], frozenset[int]], int | None],
    attempt: Callable[[tuple[int, ...]], Joint | None],
    accept: Callable[[Joint], bool],
    most: int,
) -> tuple[tuple[int, ...], list[Joint]]:
    """The candidates that go at once, `first` among them, and every set that was tried.

    `following(chosen, refused)` names the next one to add, if any; `attempt(set)` tries a set, or gives None for one
    that no stock model could be left by.
    """
    chosen: tuple[int, ...] = (first,)
    refused: frozenset[int] = frozenset()
    tried: list[Joint] = []
    while len(chosen) < most and (more := following(chosen, refused)) is not None:
        found = attempt((*chosen, more))
        tried += [found] if found else []
        if found and accept(found):
            chosen = found.units
        else:
            refused |= {more}
    return chosen, tried
