"""What a run led to: all that is said of it at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimllm.blocks.layout import Layout, load_layout
from trimllm.checkpoints.origin import Origin
from trimllm.checkpoints.verification import Report
from trimllm.config import TrimConfig
from trimllm.run.targets import End
from trimllm.tasks import TaskData

Row = dict[str, Any]
"""A journaled event; those of a depth hold its accuracies, its size and its speed."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run, and how it came to be."""

    config: TrimConfig
    data: TaskData
    warned: tuple[str, ...]
    """What the user was warned of before the first stage."""
    origin: Origin
    """The base, with its SHA-256."""
    base: Row
    stages: list[Row]
    drops: list[Row]
    good: Row
    """The stage whose model is the result: the last one that no floor refuses."""
    saved: Row
    """That model, measured as it was saved."""
    above: dict[str, float] | None
    """By how many points it is above all layers, question by question (see `Recorder.above_full`)."""
    speedup: dict[str, float] | None
    """How many times the base's speed decoding has: median, min and max of the rounds; None where that could not be
    measured."""
    verified: Report
    """What was compared when it was saved."""

    @property
    def layout(self) -> Layout:
        return load_layout(self.good["layout"])

    @property
    def base_depth(self) -> int:
        depth: int = self.base["depth"]
        return depth

    @property
    def history(self) -> list[Row]:
        """Rows of the base, the warmed-up model, every depth on the way, and the result as it was saved."""
        return [self.base, *self.stages, self.saved]

    @property
    def ended(self) -> End | None:
        """What ended the drops; None where a floor did, or nothing was dropped."""
        return End.of(self.drops[-1]) if self.drops and self.stages[-1]["depth"] == self.saved["depth"] else None
