"""What goes next: from the scan of the present model to the units that are dropped and the blocks that train."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimllm import files
from trimllm.blocks import decoder, legality
from trimllm.blocks.layout import Layout, Unit, describe, halves, remove, remove_all, whole
from trimllm.blocks.trial import trial
from trimllm.config import TrimConfig
from trimllm.console import Console
from trimllm.errors import InputError
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import at_once, joint, scan, scores, select
from trimllm.importance.deletion import Part
from trimllm.importance.joint import Joint
from trimllm.importance.rules import Rules
from trimllm.importance.scan import ScanResult
from trimllm.importance.scores import Evidence
from trimllm.importance.select import Choice
from trimllm.parallel import Share
from trimllm.run import sizes, targets


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
    """How long the decision took: the scan, scores from weights and gradients, sets that were tried."""


class Decider:
    """Decides on a run's calibration set, by its settings."""

    def __init__(
        self, config: TrimConfig, model: Any, calibration: Scorer, metric: str, save_dtype: torch.dtype
    ) -> None:
        self.config, self.calibration, self.metric, self.save_dtype = config, calibration, metric, save_dtype
        every_choice = calibration, metric  # --schedule recover asks what several drops together do to the accuracy
        alone = config.schedule != "recover"
        self.asked = scan.asked(model, *every_choice, config.strategy) if alone else every_choice
        self.rules = Rules(config, model, config.seed, least=config.min_depth)
        self.base_depth, self.length = self.rules.base_depth, self.rules.length
        self.wanted = targets.wanted_depth(config, self.base_depth)

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
        free = self.droppable(model, whole(self.base_depth))
        if self.rules.too_few(self.base_depth):
            raise InputError(
                f"--min-depth {self.config.min_depth}: nothing can be dropped: layers of the {self.base_depth} go "
                f"{self.length} at a time: allow {self.base_depth - self.length}"
            )
        if not free:
            raise InputError(f"--protect {','.join(map(str, self.config.protect))}: nothing is left to drop")
        if self.config.one_shot and self.wanted is not None:
            count = (self.base_depth - self.wanted) // self.length
            at_once.check(model, candidates, self.config.strategy, count, free)

    def droppable(self, model: Any, layout: Layout, candidates: list[Unit] | None = None) -> set[int]:
        """Which candidates may go (see `Rules.free`)."""
        return set(self.rules.free(model, layout, candidates)[0])

    def decide(self, model: Any, layout: Layout, parts: Path, share: Share, console: Console) -> Decision:
        """Scan the present model (`layout`: its original halves) and choose.

        Finished batches are kept in the file `parts`; those that stand there already are not computed again.
        """
        started = time.perf_counter()
        result = self._scan(model, layout, parts, share, console)
        evidence = share.from_first(lambda: self.rules.evidence(model, layout, self.calibration, result))
        choices = self._choose(model, layout, result, evidence)
        tried: list[Joint] = []
        if self.config.schedule == "recover":
            choices, tried = self._together(model, layout, result, evidence, choices[0], parts, share)
        order = self._order(model, layout, result, evidence)
        return Decision(choices, order, result, evidence, tried, time.perf_counter() - started)

    def _scan(self, model: Any, layout: Layout, parts: Path, share: Share, console: Console) -> ScanResult:
        depth, (scorer, metric) = decoder.depth(model), self.asked
        same = [one for one in self._kept(parts, share) if "batch" in one and one["metric"] == metric]
        finished = {record["batch"]: Part.load(record) for record in same}

        def keep(batch: int, part: Part) -> None:
            self._keep(parts, share, {"batch": batch, "metric": metric, **part.dump()})

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
                finished=finished,
                on_part=keep,
                progress=show,
                share=share,
            )

    def _kept(self, parts: Path, share: Share) -> list[dict[str, Any]]:
        """What the file holds of this decision, measured in the same precision: a run may go on on another device."""
        records = share.from_first(lambda: files.read_lines(parts))
        return [record for record in records if record["mixed"] == self._mixed]

    def _keep(self, parts: Path, share: Share, record: dict[str, Any]) -> None:
        if share.first:
            files.append_line(parts, {"mixed": self._mixed, **record})

    @property
    def _mixed(self) -> bool:
        return self.calibration.autocast is not None

    def _choose(self, model: Any, layout: Layout, result: ScanResult, evidence: Evidence) -> list[Choice]:
        """One unit, or with --one-shot all at once (whole blocks, by the same evidence)."""
        if not self.config.one_shot or self.wanted is None:
            first, why = self.rules.first(model, layout, result, evidence)
            if first is None:
                raise InputError(f"nothing can be dropped: {why}")
            return [first]
        droppable = self.droppable(model, layout, result.candidates)
        allowed = result.eligible(droppable, self.config.strategy)
        found = (result.candidates, evidence, self.config.strategy)
        count = (len(layout) - self.wanted) // self.length
        if "angular" in scores.parts(self.config.strategy):
            return at_once.nearest_run(model, *found, count, allowed=droppable)
        return at_once.apart(model, *found, count, tolerance=self.rules.tolerance, allowed=allowed)

    def _together(
        self,
        model: Any,
        layout: Layout,
        result: ScanResult,
        evidence: Evidence,
        first: Choice,
        parts: Path,
        share: Share,
    ) -> tuple[list[Choice], list[Joint]]:
        """`first` and what can go with it; every set that is tried is kept in the file `parts`, as the scan's batches.

        What is not harmless alone is not tried, and after `max_joint` failures nothing more is. No set goes beyond a
        target: as soon as the trial of one is small enough, nothing is added to it.
        """
        config, candidates, intact = self.config, result.candidates, whole(len(layout))
        least = targets.least_depth(config, self.base_depth)
        alone = {i for i in self.droppable(model, layout, candidates) if self._harmless_alone(result, i)}
        known = [Joint.load(record["joint"]) for record in self._kept(parts, share) if "joint" in record]
        choices = {first.index: first}

        def without(chosen: tuple[int, ...]) -> Layout:
            return remove_all(intact, [candidates[i] for i in chosen])

        def following(chosen: tuple[int, ...], refused: frozenset[int]) -> int | None:
            with trial(model, without(chosen)):
                if targets.reached(config, self.base_depth, sizes.size(model, self.save_dtype)):
                    return None
            gone = set().union(*(halves(candidates[i]) for i in chosen))
            free = {i for i in alone - refused if gone.isdisjoint(halves(candidates[i]))}
            if not free or len(refused) == config.max_joint or len(layout) - (len(chosen) + 1) * self.length < least:
                return None
            choice = select.choose(candidates, evidence, config.strategy, tolerance=self.rules.tolerance, allowed=free)
            choices[choice.index] = choice
            return choice.index

        def attempt(chosen: tuple[int, ...]) -> Joint | None:
            for found in known:
                if found.units == chosen:
                    return found
            if legality.refusal(model, without(chosen)) is not None:
                return None
            with trial(model, without(chosen)):
                value = self.calibration.evaluate(model, self.metric, share)
            found = Joint(chosen, value.value, value.loss)
            self._keep(parts, share, {"joint": found.record()})
            return found

        chosen, tried = joint.grow(
            first.index, following, attempt, lambda found: self._harmless(result, found), config.max_joint
        )
        return [choices[i] for i in chosen], tried

    @property
    def _harmless_points(self) -> float:
        """Accuracy points that a set of several units may cost: those of a tie as asked for, else of one question."""
        question = select.one_question(self.metric, len(self.calibration.items))
        return question if self.config.tie_tolerance is None else self.rules.tolerance

    def _harmless(self, result: ScanResult, found: Joint) -> bool:
        return joint.harmless(found, result.intact, self.config.joint_tolerance, self._harmless_points)

    def _harmless_alone(self, result: ScanResult, index: int) -> bool:
        if not result.trials:
            return True
        trial_ = result.trials[index]
        return self._harmless(result, Joint((index,), trial_.value, trial_.loss))

    def _order(self, model: Any, layout: Layout, result: ScanResult, evidence: Evidence) -> list[int]:
        """Original indices of the present blocks' attentions, those most likely to stay first.

        Blocks that may not go come before all others. Of the rest, one that goes with several runs is as likely to stay
        as the least important of them. Ties go by the score that breaks them, by the norm where the strategy has none.
        """
        free = self.droppable(model, layout, result.candidates)
        open_ = {place for i in free for place in result.candidates[i].blocks}
        decides, *breaks = scores.parts(self.config.strategy)
        decider = scores.importance(decides, evidence)
        breaker = scores.importance(breaks[0] if breaks else "norm", evidence)
        together = max(self.length, self._run(len(layout)) if decides == "angular" else 1)
        blocks = {i: unit.index for i, unit in enumerate(result.candidates) if unit.kind == "block"}
        rank = {}
        for place in range(len(layout)):
            runs = [(decider[i], breaker[i]) for i, begin in blocks.items() if begin <= place < begin + together]
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
