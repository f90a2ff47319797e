"""When a stage may end before its budget: as soon as the calibration loss is back where it was (--schedule recover).

A stage that may end at any time has no last step over which the learning rate could decay. So the rate rises and decays
in short cycles, and the loss is looked at where it is down: a model at the peak rate says little about what was learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimllm.evaluation.batches import make_rows
from trimllm.evaluation.evaluate import Scorer
from trimllm.parallel import Share
from trimllm.training.packing import Example

CYCLES = 3
"""Cycles of the learning rate per epoch, at most; each ends with a look at the calibration loss."""
SHARE = 0.15
"""Largest share of a stage's computing that these looks take."""


def cycle(steps: int, epochs: float, train_tokens: int, calibration_tokens: int) -> int:
    """Optimizer steps of a cycle. A look is a forward pass: per token, a third of what a step costs."""
    by_cost = calibration_tokens / 3 / SHARE * steps / max(train_tokens, 1)
    return max(1, round(max(steps / max(epochs, 1e-9) / CYCLES, by_cost)))


@dataclass
class Recovery:
    """Follows a stage, as the `watch` of `train.train_stage`: true once the loss is at most `limit` nats per token."""

    measure: Callable[[], float]
    """The calibration loss of the model as it is now; computed by every process."""
    limit: float
    cycle: int
    losses: list[float] = field(default_factory=list)

    def __call__(self) -> bool:
        self.losses.append(self.measure())
        return self.recovered

    @property
    def recovered(self) -> bool:
        return bool(self.losses) and self.losses[-1] <= self.limit

    def record(self) -> dict[str, Any]:
        """As a journal keeps it."""
        return {"limit": self.limit, "cycle": self.cycle, "losses": self.losses, "recovered": self.recovered}


def follow(
    model: Any,
    calibration: Scorer,
    share: Share,
    plan: Sequence[Sequence[Example]],
    epochs: float,
    limit: float,
) -> Recovery:
    """The recovery of a stage that has the steps of `plan`, `epochs` long, as its budget."""
    asked = calibration.right_only(model)
    seen = sum(len(row.ids) for row in make_rows(asked.encoded, branches=asked.branches))
    steps = cycle(len(plan), epochs, sum(len(row.ids) for step in plan for row in step), seen)
    return Recovery(lambda: asked.evaluate(model, "likelihood", share).loss, limit, steps)


def limit(stages: Sequence[dict[str, Any]], tolerance: float) -> float:
    """The calibration loss to come back to: `tolerance` nats above that of the fine-tuned model before the first drop.

    Not the loss before the latest drop, or small losses would add up; nor the best so far, which training goes on to
    lower at every depth, and which a smaller model may never reach again.
    """
    return float(stages[0]["calibration"]["loss"]) + tolerance
