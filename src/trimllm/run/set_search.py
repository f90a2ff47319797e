"""--schedule recover: what can go together with the unit that goes first, by trials of whole sets."""

from __future__ import annotations

from functools import partial

import torch

from trimllm.blocks import legality
from trimllm.blocks.layout import halves
from trimllm.blocks.trial import trial
from trimllm.config import TrimConfig
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import joint, select
from trimllm.importance.joint import Joint
from trimllm.importance.rules import Rules, Scanned
from trimllm.importance.scan import ScanResult
from trimllm.importance.select import Choice
from trimllm.run import sizes, targets
from trimllm.run.scan_file import ScanFile


class SetSearch:
    """Grows a set of units that go at once, on the present model after its scan.

    What is not harmless alone is not tried, and after `max_joint` failures nothing more is. No set goes beyond a
    target: as soon as the trial of one is small enough, nothing is added to it.
    """

    def __init__(
        self, config: TrimConfig, rules: Rules, calibration: Scorer, metric: str, save_dtype: torch.dtype
    ) -> None:
        self.config, self.rules, self.calibration, self.metric = config, rules, calibration, metric
        self.save_dtype = save_dtype

    @property
    def points(self) -> float:
        """Accuracy points that a set of several units may cost: those of a tie as asked for, else of one question."""
        question = select.one_question(self.metric, len(self.calibration.items))
        return question if self.config.tie_tolerance is None else self.rules.tolerance

    def grow(self, scanned: Scanned, first: Choice, file: ScanFile) -> tuple[list[Choice], list[Joint]]:
        """`first` and what can go with it, and every set that was tried, which the file keeps."""
        candidates = scanned.result.candidates
        eligible = scanned.result.eligible(scanned.free, self.config.strategy)
        alone = {i for i in eligible if self._harmless_alone(scanned.result, i)}
        choices = {first.index: first}

        def following(chosen: tuple[int, ...], refused: frozenset[int]) -> int | None:
            gone = set().union(*(halves(candidates[i]) for i in chosen))
            allowed = {i for i in alone - refused if gone.isdisjoint(halves(candidates[i]))}
            if not allowed or len(refused) == self.config.max_joint or not self._may_grow(scanned, chosen):
                return None
            choice = self.rules.choose(scanned, allowed)
            choices[choice.index] = choice
            return choice.index

        chosen, tried = joint.grow(
            first.index,
            following,
            partial(self._attempt, scanned, file),
            partial(self._harmless, scanned.result),
            self.config.max_joint,
        )
        return [choices[i] for i in chosen], tried

    def _may_grow(self, scanned: Scanned, chosen: tuple[int, ...]) -> bool:
        """Whether no target is met without these, nor passed without one more."""
        more = len(scanned.layout) - (len(chosen) + 1) * self.rules.length
        if more < targets.least_depth(self.config, self.rules.base_depth):
            return False
        with trial(scanned.model, scanned.without(chosen)):
            size = sizes.size(scanned.model, self.save_dtype)
        return targets.reached(self.config, self.rules.base_depth, size) is None

    def _attempt(self, scanned: Scanned, file: ScanFile, chosen: tuple[int, ...]) -> Joint | None:
        """The trial of a set, or that of an earlier process; None where no stock model would be left."""
        for found in file.sets():
            if found.units == chosen:
                return found
        after = scanned.without(chosen)
        if legality.refusal(scanned.model, after) is not None:
            return None
        with trial(scanned.model, after):
            value = self.calibration.evaluate(scanned.model, self.metric, file.share)
        found = Joint(chosen, value.value, value.loss)
        file.keep_set(found)
        return found

    def _harmless(self, result: ScanResult, found: Joint) -> bool:
        return joint.harmless(found, result.intact, self.config.joint_tolerance, self.points)

    def _harmless_alone(self, result: ScanResult, index: int) -> bool:
        if not result.trials:
            return True
        found = result.trials[index]
        return self._harmless(result, Joint((index,), found.value, found.loss))
