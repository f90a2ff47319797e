"""What goes next: from the scan of the present model to the units that are dropped and the blocks that train."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trimllm.blocks import decoder, legality
from trimllm.blocks.layout import Layout, describe, remove, whole
from trimllm.config import TrimConfig
from trimllm.console import Console
from trimllm.errors import InputError
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import activations, at_once, joint, scan, scores
from trimllm.importance.joint import Joint
from trimllm.importance.rules import Rules, Scanned
from trimllm.importance.scan import ScanResult
from trimllm.importance.scores import Evidence
from trimllm.importance.select import Choice
from trimllm.parallel import Share
from trimllm.run import targets
from trimllm.run.scan_file import ScanFile
from trimllm.run.set_search import SetSearch
from trimllm.run.targets import End


@dataclass(frozen=True)
class Decision:
    """What a scan led to."""

    choices: list[Choice]
    """The units to drop: one, or several at once (--one-shot, --schedule recover)."""
    order: list[int]
    """Original indices of the blocks that were scanned, those most likely to stay first (sparse update)."""
    result: ScanResult
    evidence: Evidence
    joint: list[Joint]
    """Sets that were tried as a whole (--schedule recover)."""
    seconds: float
    """How long the decision took, before an interruption, too: the scan, scores from weights and gradients, sets that
    were tried."""


class Decider:
    """Decides on a run's calibration set, by its settings."""

    def __init__(
        self, config: TrimConfig, model: Any, calibration: Scorer, metric: str, save_dtype: torch.dtype
    ) -> None:
        self.config, self.calibration = config, calibration
        every_choice = calibration, metric  # --schedule recover asks what several drops together do to the accuracy
        alone = config.schedule != "recover"
        self.asked = scan.asked(model, *every_choice, config.strategy) if alone else every_choice
        self.rules = Rules(config, model, config.seed, least=config.min_depth)
        self.base_depth, self.length = self.rules.base_depth, self.rules.length
        self.wanted = targets.wanted_depth(config, self.base_depth)
        self.sets = SetSearch(config, self.rules, calibration, metric, save_dtype)

    def check(self, model: Any) -> None:
        """Refuse what cannot succeed, before anything is computed.

        Raises:
            InputError: if the protected layers leave too little, or nothing can be removed from this model exactly.
        """
        kept = len(self.rules.protected)
        if self.wanted is not None and kept > self.wanted:
            raise InputError(
                f"--protect keeps {kept} layers, and the run is to end with {self.wanted}: "
                "protect fewer, or ask for a smaller drop"
            )
        if self.wanted is not None and (self.base_depth - self.wanted) % self.length:
            below = self.base_depth - (self.base_depth - self.wanted) // self.length * self.length
            raise InputError(
                f"--keep-pattern drops {self.length} of {self.base_depth} layers at a time, and the run is to end with "
                f"{self.wanted}: ask for --depth {below if below < self.base_depth else self.base_depth - self.length}"
            )
        candidates = self.rules.candidates(self.base_depth)
        refusals = [legality.refusal(model, remove(whole(self.base_depth), unit)) for unit in candidates]
        if all(refusals):
            raise InputError(f"this model cannot be trimmed by {self.config.unit}s: {refusals[0]}")
        shifted = [r for r, unit in zip(refusals, candidates, strict=True) if unit.kind == "pair"]
        if shifted and all(shifted):
            raise InputError(f"--unit pair: {shifted[0]}")
        if self.rules.too_few(self.base_depth):
            raise InputError(
                f"--min-depth {self.config.min_depth}: nothing can be dropped: layers of the {self.base_depth} go "
                f"{self.length} at a time: allow {self.base_depth - self.length}"
            )
        free, _ = self.rules.free(model, whole(self.base_depth))
        if not free:
            raise InputError(f"--protect {','.join(map(str, self.config.protect))}: nothing is left to drop")
        if self.config.one_shot and self.wanted is not None:
            count = (self.base_depth - self.wanted) // self.length
            at_once.check(model, candidates, self.config.strategy, count, free)
        elif why := self._no_run(self.base_depth, free):
            raise InputError(f"--strategy {self.config.strategy}: {why}: protect fewer, or ask for a smaller drop")

    def stuck(self, model: Any, layout: Layout) -> End | None:
        """What ends the drops because nothing more may go; None where something may."""
        depth = len(layout)
        if self.rules.too_few(depth):
            return End.least(self.config, depth)
        free, _ = self.rules.free(model, layout)
        if not free:
            return targets.STUCK
        why = self._no_run(depth, free)
        return End("stuck", why) if why else None

    def _no_run(self, depth: int, free: Collection[int]) -> str | None:
        """Why angular, which goes by runs that begin with a unit, has a score for none of the `free` ones."""
        if scores.deciding(self.config.strategy) != "angular":
            return None
        run, candidates = self._run(depth), self.rules.candidates(depth)
        if any(activations.ends(candidates[i])[0] + run <= depth for i in free):
            return None
        return f"no run of {run} layers begins with one that may go"

    def decide(self, model: Any, layout: Layout, parts: Path, share: Share, console: Console) -> Decision:
        """Scan the present model (`layout`: its original halves) and choose.

        Finished batches are kept in the file `parts`; those that stand there already are not computed again.
        """
        file = ScanFile(parts, share, mixed=self.calibration.autocast is not None)
        result = replace(self._scan(model, layout, file, console), seconds=file.seconds)
        evidence = share.from_first(lambda: self.rules.evidence(model, layout, self.calibration, result))
        scanned = self.rules.scanned(model, layout, result, evidence)
        choices, tried = self._choose(scanned), list[Joint]()
        if self.config.schedule == "recover":
            choices, tried = self.sets.grow(scanned, choices[0], file)
        return Decision(choices, self._order(scanned), result, evidence, tried, file.seconds)

    def _scan(self, model: Any, layout: Layout, file: ScanFile, console: Console) -> ScanResult:
        depth, (scorer, metric) = decoder.depth(model), self.asked
        with console.progress(f"scan of {depth} layers") as show:
            return scan.scan(
                model,
                scorer,
                metric,
                self.config.unit,
                length=self.length,
                trials=bool(scores.needs(self.config.strategy) & scores.OF_TRIALS),
                run=self._run(depth),
                race=self.rules.race(model, layout),
                finished=file.batches(metric),
                on_part=lambda number, part: file.keep_batch(number, part, metric),
                progress=show,
                share=file.share,
            )

    def _choose(self, scanned: Scanned) -> list[Choice]:
        """One unit, or with --one-shot all at once (whole blocks, by the same evidence)."""
        if not self.config.one_shot or self.wanted is None:
            first, why = self.rules.first(scanned)
            if first is None:
                raise InputError(f"nothing can be dropped: {why}")
            return [first]
        found = (scanned.model, scanned.result.candidates, scanned.evidence, self.config.strategy)
        count = (len(scanned.layout) - self.wanted) // self.length
        if scores.deciding(self.config.strategy) == "angular":
            return at_once.nearest_run(*found, count, allowed=set(scanned.free))
        allowed = scanned.result.eligible(scanned.free, self.config.strategy)
        return at_once.apart(*found, count, tolerance=self.rules.tolerance, allowed=allowed)

    def _order(self, scanned: Scanned) -> list[int]:
        """Original indices of the present blocks' attentions, those most likely to stay first.

        Blocks that may not go come before all others. Of the rest, one that goes with several runs is as likely to stay
        as the least important of them. Ties go by the score that breaks them, by the norm where the strategy has none.
        """
        layout, result, evidence = scanned.layout, scanned.result, scanned.evidence
        open_ = {place for i in scanned.free for place in result.candidates[i].blocks}
        by = scores.deciding(self.config.strategy)
        values = scores.importance(by, evidence)
        breaks = scores.importance(scores.breaking(self.config.strategy) or "norm", evidence)
        together = max(self.length, self._run(len(layout)) if by == "angular" else 1)
        blocks = {i: unit.index for i, unit in enumerate(result.candidates) if unit.kind == "block"}
        rank = {}
        for place in range(len(layout)):
            runs = [(values[i], breaks[i]) for i, begin in blocks.items() if begin <= place < begin + together]
            if runs or place not in open_:
                rank[place] = (place not in open_, *min(runs, default=(0.0, 0.0)))
        order = sorted(rank, key=lambda place: ([-value for value in rank[place]], place))
        return [source for place in order if (source := layout[place].attention) is not None]

    def _run(self, depth: int) -> int:
        """Blocks in the runs that angular compares: as many as are still to go."""
        return max(1, depth - self.wanted) if self.wanted else 1

    def record(self, decision: Decision, layout: Layout) -> dict[str, Any]:
        """What the journal keeps of a decision; `layout` is the one that was scanned."""
        choices, trials = decision.choices, decision.result.trials
        found = joint.accepted(choices, decision.joint)
        return {
            "units": [describe(choice.unit, layout) for choice in choices],
            "metric": decision.result.intact.metric,
            "value": [trials[choice.index].value if trials else None for choice in choices],
            "importance": [choice.importance for choice in choices],
            "joint": None if found is None else found.record() | {"tried": len(decision.joint)},
            "why": [choice.why for choice in choices],
            "seconds": decision.seconds,
        }

    def table(self, decision: Decision, layout: Layout) -> dict[str, Any]:
        """The scan as JSON, with what was dropped; `layout` is the one that was scanned."""
        result = decision.result
        names = [describe(unit, layout) for unit in result.candidates]
        table = scan.table(result, decision.evidence, self.config.strategy, names)
        dropped = [choice.index for choice in decision.choices]
        together = [found.record() for found in decision.joint]
        more = {"joint": together} if self.config.schedule == "recover" else {}
        return {**table, "dropped": dropped, "tied": list(decision.choices[0].tied), **more}
