"""Which unit goes next: pure decisions on importance, no models."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from trimllm.blocks.layout import Layout, Unit, halves
from trimllm.errors import InputError
from trimllm.importance import scores
from trimllm.importance.scores import Array, Evidence
from trimllm.tasks.spec import is_accuracy

BREAKS_TIES = {"norm": "largest norm", "loss": "least loss", "probability": "surest"}
"""What goes of tied candidates, by the score that breaks ties."""


@dataclass(frozen=True)
class Choice:
    """The unit to drop, where it stands among the candidates, and why."""

    unit: Unit
    index: int
    importance: float
    tied: tuple[int, ...]
    """Candidates that the deciding score could not tell apart (the chosen one included)."""
    why: str


def one_question(metric: str, n: int) -> float:
    """Accuracy points that one question of `n` is worth; nothing for likelihoods."""
    return 100.0 / n if is_accuracy(metric) else 0.0


def choose(
    candidates: Sequence[Unit],
    evidence: Evidence,
    strategy: str,
    *,
    tolerance: float = 0.0,
    allowed: Collection[int] | None = None,
) -> Choice:
    """The least important candidate; of those within `tolerance` accuracy points, with scan+norm the largest norm goes,
    with scan+loss the least loss, with scan+probability the surest.

    `allowed` are indices into `candidates` (default: all). Further ties go to the deeper unit.

    Raises:
        InputError: if no candidate is allowed.
    """
    open_ = sorted(range(len(candidates)) if allowed is None else set(allowed))
    if not open_:
        raise InputError("every remaining layer is protected: protect fewer, or ask for a smaller drop")
    breaker = scores.breaking(strategy)
    values = scores.importance(scores.deciding(strategy), evidence)
    if np.isnan(values[open_]).all():
        raise InputError(f"--strategy {strategy}: none of the {len(open_)} candidates has a score that is a number")
    values = np.where(np.isnan(values), np.inf, values)
    tied = _tied(values, evidence, open_, tolerance if breaker else 0.0)
    ranks = scores.importance(breaker, evidence) if breaker else np.zeros(len(candidates))
    index = min(tied, key=lambda i: (ranks[i], -evidence.position[i]))
    others = len(tied) - 1
    rule = f"by the scan, {BREAKS_TIES[breaker]}" if breaker else "in importance, deepest"
    why = f"tied with {others} other{'s' if others > 1 else ''} {rule}" if others else "least important"
    return Choice(candidates[index], index, float(values[index]), tuple(tied), why)


def _tied(values: Array, evidence: Evidence, open_: Sequence[int], tolerance: float) -> list[int]:
    if tolerance > 0 and evidence.accuracy is not None:
        best = max(evidence.accuracy[i] for i in open_)
        return [i for i in open_ if evidence.accuracy[i] >= best - tolerance - 1e-9]
    least = min(values[i] for i in open_)
    return [i for i in open_ if values[i] == least]


def protected(protect: Sequence[int], depth: int) -> frozenset[int]:
    """Original indices that must stay; negative ones count from the end.

    Raises:
        InputError: if one does not exist.
    """
    for index in protect:
        if not -depth <= index < depth:
            raise InputError(f"--protect {index}: the model has layers 0 to {depth - 1} (or -{depth} to -1)")
    return frozenset(index % depth for index in protect)


def droppable(candidates: Sequence[Unit], layout: Layout, kept: Collection[int]) -> list[int]:
    """Indices of the candidates that touch no protected original block; `layout` gives the original indices."""
    return [number for number, unit in enumerate(candidates) if not (touches(unit, layout) & set(kept))]


def touches(unit: Unit, layout: Layout) -> set[int]:
    """Original blocks whose attention or MLP the unit contains."""
    return {getattr(layout[place], half) for half, place in halves(unit)} - {None}
