"""By which rules a scan leads to a drop: what may go, what is tied, from what seed. `trimllm scan` and a run have the
same, so that the one names what the other would drop first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from trimllm.blocks import decoder, legality
from trimllm.blocks.layout import Layout, Unit, remove, remove_all, units, whole
from trimllm.config import ScoreSettings
from trimllm.errors import InputError
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import scan, scores, select, weights
from trimllm.importance.scan import Race, ScanResult
from trimllm.importance.scores import Evidence
from trimllm.importance.select import Choice


@dataclass(frozen=True)
class Scanned:
    """The present model, and what a scan says of its units."""

    model: Any
    layout: Layout
    """Its original halves."""
    result: ScanResult
    evidence: Evidence
    free: list[int]
    """The candidates that may go."""
    reason: str
    """Why none may."""

    def without(self, chosen: Sequence[int]) -> Layout:
        """What is left of the present blocks without these candidates."""
        return remove_all(whole(len(self.layout)), [self.result.candidates[i] for i in chosen])


class Rules:
    """The rules of some settings, for a base. `layout` is always that of the present model: its original halves."""

    def __init__(self, settings: ScoreSettings, model: Any, seed: int, *, least: int = 1) -> None:
        """`least`: layers that must be left.

        Raises:
            InputError: if a protected layer does not exist, layers cannot go in the runs that are asked for, or the
                strategy goes by weights that are packed.
        """
        if scores.OF_WEIGHTS & scores.needs(settings.strategy) and getattr(model, "is_quantized", False):
            raise InputError(
                f"--strategy {settings.strategy}: the weights of a quantized model are codes, with no size and no "
                "gradient: choose another one, or score the model as it was before"
            )
        self.settings, self.seed, self.least = settings, seed, least
        self.base_depth = decoder.depth(model)
        self.protected = select.protected(settings.protect, self.base_depth)
        self.length = legality.run_length(model, settings.unit, keep_pattern=settings.keep_pattern)
        """Blocks that go together (--keep-pattern)."""
        self.tolerance = settings.tie_tolerance or 0.0

    def candidates(self, depth: int) -> list[Unit]:
        """All that a scan of so many layers tries."""
        return units(self.settings.unit, whole(depth), self.length)

    def too_few(self, depth: int) -> bool:
        """Whether so many layers are too few for any to go (--min-depth)."""
        return depth - self.length < self.least

    def free(self, model: Any, layout: Layout, candidates: list[Unit] | None = None) -> tuple[list[int], str]:
        """Which of the candidates (default: all) may go, and why none may. Those may that are not protected, and
        without which a stock model is left; for sub-layers, which never go alone, only protection counts."""
        intact = whole(len(layout))
        candidates = self.candidates(len(layout)) if candidates is None else candidates
        free = select.droppable(candidates, layout, self.protected)
        if not free or candidates[free[0]].bypassed:
            return free, "every layer is protected"
        if self.too_few(len(layout)):
            few = "only one layer" if len(layout) == 1 else f"{len(layout)} layers, of which {self.length} go together"
            return [], f"the model has {few}"
        refusals = [legality.refusal(model, remove(intact, candidates[i])) for i in free]
        return [i for i, why in zip(free, refusals, strict=True) if why is None], refusals[0] or ""

    def race(self, model: Any, layout: Layout) -> Race | None:
        """The race that `--scan racing` asks for, among the units that may go."""
        if self.settings.scan == "exact":
            return None
        every, by_norm = self.candidates(len(layout)), scores.breaking(self.settings.strategy) == "norm"
        allowed = frozenset(every[i] for i in self.free(model, layout, every)[0])
        tolerance = self.tolerance if by_norm else 0.0
        return Race(self.settings.confidence, tolerance, by_norm, allowed, self._seed(layout))

    def evidence(self, model: Any, layout: Layout, scorer: Scorer, result: ScanResult) -> Evidence:
        """What the strategy goes by: of the scan, and of weights and gradients."""
        extra = weights.evidence(self.settings.strategy, model, scorer, result.candidates)
        original = [block.attention if block.attention is not None else 0 for block in layout]
        position = scan.positions(result.candidates, original)
        return result.evidence(position, self.base_depth, self._seed(layout), **extra)

    def scanned(self, model: Any, layout: Layout, result: ScanResult, evidence: Evidence) -> Scanned:
        """What a scan found, with what may go."""
        return Scanned(model, layout, result, evidence, *self.free(model, layout, result.candidates))

    def first(self, scanned: Scanned) -> tuple[Choice | None, str]:
        """What goes first, or None and why nothing may go."""
        allowed = scanned.result.eligible(scanned.free, self.settings.strategy)
        if allowed:
            return self.choose(scanned, allowed), ""
        no_run = "no run fits after a layer that may go: ask for a shorter --run"
        return None, no_run if scanned.free else scanned.reason

    def choose(self, scanned: Scanned, allowed: Collection[int]) -> Choice:
        """The least important of the candidates that are allowed."""
        strategy, candidates = self.settings.strategy, scanned.result.candidates
        return select.choose(candidates, scanned.evidence, strategy, tolerance=self.tolerance, allowed=allowed)

    def _seed(self, layout: Layout) -> int:
        return self.seed + len(layout)
