"""Exact trial deletion: how good the model would be without each candidate, one candidate at a time.

A candidate changes nothing below the block it begins in. So each batch goes once through the whole model, the residual
stream before every block is kept, and every candidate computes only what comes after it. The choices of a
question share its prompt (see `batches`). Source of the method: TrimLLM (arXiv 2412.11242), calibration scanning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from trimllm.blocks import config_rules, decoder, legality
from trimllm.blocks.layout import Unit, remove, units, whole
from trimllm.errors import InputError
from trimllm.evaluation import evaluate, forward, judging
from trimllm.evaluation.batches import Batch, Batches
from trimllm.evaluation.evaluate import Scorer
from trimllm.evaluation.forward import Pieces
from trimllm.evaluation.judging import Evaluation
from trimllm.importance import deletion, racing
from trimllm.importance.deletion import Part
from trimllm.importance.scores import Array, Evidence, deciding, importance, needs, s_norm
from trimllm.parallel import ALONE, Share
from trimllm.tasks.spec import is_accuracy


@dataclass(frozen=True)
class Race:
    """A scan that stops candidates which cannot win."""

    confidence: float
    """Nominal probability of the winner that a scan of all items has."""
    tolerance: float = 0.0
    """Accuracy points within which candidates are tied."""
    by_norm: bool = True
    """Of tied candidates the one with the largest norm wins; else the deepest."""
    allowed: frozenset[Unit] | None = None
    """Units that may go (default: all); the others run in the first round only."""
    seed: int = 0


@dataclass(frozen=True)
class ScanResult:
    """Per candidate, in order of depth: its evaluation when deleted (none if only activations were asked for)."""

    candidates: list[Unit]
    intact: Evaluation
    """The intact model on the same items."""
    trials: list[Evaluation]
    norm: Array
    cosine: Array
    run_cosine: Array
    run_angle: Array
    seconds: float
    notes: tuple[str, ...] = ()
    running: tuple[int, ...] | None = None
    """After a race: the candidates that it did not stop, which saw all items. The others' values are foreseen."""

    def eligible(self, allowed: Collection[int], strategy: str) -> set[int]:
        """Those of the `allowed` candidates that may go first: no race stopped them; for angular, their run fits."""
        found = set(allowed) if self.running is None else set(allowed) & set(self.running)
        return {i for i in found if deciding(strategy) != "angular" or np.isfinite(self.run_angle[i])}

    def evidence(self, position: Array, depth: int, seed: int = 0, **extra: Array) -> Evidence:
        """What the scores need; `position` (n,) is that of each candidate in the original model of `depth` blocks."""
        tried = bool(self.trials)
        return Evidence(
            depth=depth,
            position=position,
            accuracy=np.array([trial.value for trial in self.trials]) if tried else None,
            probability=np.array([sureness(trial) for trial in self.trials]) if tried else None,
            loss=np.array([trial.loss for trial in self.trials]) if tried else None,
            norm=self.norm,
            cosine=self.cosine,
            run_angle=self.run_angle,
            seed=seed,
            **extra,
        )


def sureness(trial: Evaluation) -> float:
    """The mean probability of the right choice; where there are no choices, the metric's value, which is one too."""
    return trial.value if trial.probability is None else trial.probability


def asked(model: Any, scorer: Scorer, metric: str, strategy: str) -> tuple[Scorer, str]:
    """What the trials of a strategy are asked, and the metric of the answers.

    A loss is of right answers: a strategy that goes by it and not by accuracy leaves out the wrong ones, and the metric
    is then their likelihood. With dozens of choices a question that is most of the work.
    """
    if is_accuracy(metric) and needs(strategy) == {"loss"}:
        return scorer.right_only(model), "likelihood"
    return scorer, metric


MANY_CHOICES = 20
"""Choices a question, in the mean, from which on the user is told what asks fewer."""


def many_choices_note(scorer: Scorer, strategy: str) -> str | None:
    """A line for the user where a scan by accuracy spends most of its time on wrong choices."""
    choices = sum(len(item.continuations) for item in scorer.items) / len(scorer.items)
    if not needs(strategy) & {"accuracy", "probability"} or choices < MANY_CHOICES:
        return None
    return (
        f"a scan asks all {choices:.0f} choices a question; --strategy loss asks the right one only: much quicker, and "
        "in our runs as good at half the depth, worse at a quarter"
    )


def scan(
    model: Any,
    scorer: Scorer,
    metric: str,
    unit: str = "block",
    *,
    length: int = 1,
    trials: bool = True,
    run: int = 1,
    race: Race | None = None,
    finished: Mapping[int, Part] | None = None,
    on_part: Callable[[int, Part], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    share: Share = ALONE,
) -> ScanResult:
    """Measure every candidate of kind `unit` (runs of `length` blocks) on the scorer's items.

    `trials=False` measures activations only. `run` is the number of blocks of the runs that `angular` compares.
    With `race`, candidates that cannot win are stopped on the way (multiple choice only; see `racing`).
    `finished` holds parts of an earlier, interrupted scan, which are taken where their rows are still those of the
    batch; `on_part` receives each new one, on every process of `share`. Units without which the family's layers could
    not stand are no candidates; the notes name them.
    """
    started = time.perf_counter()
    longest = scorer.batches.longest()
    candidates, notes = _candidates(
        model, units(unit, whole(decoder.depth(model)), length), longest if trials else None
    )
    parts: dict[int, Part] = dict(finished or {})
    notes += [scorer.note] if scorer.note else []
    if race is not None and (not is_accuracy(metric) or len(scorer.items) < 2 * racing.SMALLEST):
        notes.append("no race: it needs choices, and items enough to tell candidates apart; every candidate saw all")
        race = None
    with forward.evaluating(model):  # whether it may be resumed shows in the weights' own dtype
        resume = trials and deletion.resumes_exactly(model, longest)
    with scorer.computing(model):
        if trials and not resume:
            kind = model.config.model_type
            notes.append(f"every candidate computes the whole model: {kind} cannot be resumed midway")

        def work(batches: Batches, first: int, tried: Sequence[int]) -> list[Part]:
            """The parts of `batches`, numbered from `first` on, with trials of these candidates."""
            numbers = range(first, first + len(batches))
            rows = {number: batches.digest(number - first) for number in numbers}
            todo = [n for n in numbers if n not in parts or not parts[n].covers(rows[n], tried, len(candidates))]
            for begin in range(0, len(todo), share.world):
                mine = todo[begin : begin + share.world][share.rank : share.rank + 1]
                measured = partial(deletion.measure, model, candidates=candidates, tried=tried, run=run, resume=resume)
                made = [(n, deletion.together(rows[n], batches.compute(n - first, measured))) for n in mine]
                for number, part in share.gather(made):
                    parts[number] = part
                    if on_part:
                        on_part(number, part)
                if progress:
                    progress(numbers.stop - max(0, len(todo) - begin - share.world), numbers.stop)
            return [parts[number] for number in numbers]

        everyone = range(len(candidates)) if trials and race is None else ()
        begun = work(scorer.batches, 0, everyone)
        result = _collect(begun, scorer, metric, candidates, bool(everyone))
        if trials and race is not None:
            result = _race(model, race, result, begun, scorer, work)
    return replace(result, seconds=time.perf_counter() - started, notes=(*notes, *result.notes))


def _race(
    model: Any,
    race: Race,
    untried: ScanResult,
    parts: Sequence[Part],
    scorer: Scorer,
    work: Callable[[Batches, int, Sequence[int]], list[Part]],
) -> ScanResult:
    """Trials in rounds of items, hardest first; candidates without a chance to win stop (see `racing`)."""
    count, metric = len(scorer.items), untried.intact.metric
    hits, margins = judging.outcomes(
        scorer.items, evaluate.gather([part.intact for part in parts], scorer.encoded), metric
    )
    position = positions(untried.candidates, range(decoder.depth(model)))
    breaker = untried.norm if race.by_norm else np.zeros(len(untried.candidates))
    allowed = np.array([race.allowed is None or unit in race.allowed for unit in untried.candidates])
    rule = racing.Rule(race.tolerance * count / 100, breaker, position, allowed)
    first, raced = len(parts), list[Part]()

    def compute(running: list[int], items: list[int]) -> Array:
        nonlocal first
        batches = scorer.batches_of(model, items)
        new = work(batches, first, running)
        raced.extend(new)
        first += len(batches)
        places, wanted = sorted(items), set(items)
        encoded = [one for one in scorer.encoded if one.item in wanted]
        order = np.argsort(np.argsort(items))
        rows = []
        for i in running:
            scores = evaluate.gather([part.trials[i] for part in new], encoded)
            rows.append(judging.outcomes([scorer.items[k] for k in places], scores, metric)[0][order])
        return np.stack(rows)

    end = racing.race(compute, hits, margins, rule, race.confidence, race.seed)

    def trial_of(i: int) -> Evaluation:
        if i in end.running:
            return judging.judge(
                scorer.items, evaluate.gather([part.trials[i] for part in raced], scorer.encoded), metric
            )
        return judging.estimate(end.expected[i] / count, end.seen[i], metric)

    trials = [trial_of(i) for i in range(len(end.seen))]
    share = end.computed / (count * len(trials))
    note = f"race: {len(end.running)} of {len(trials)} candidates to the end, {share:.0%} of the trials computed"
    return replace(untried, trials=trials, running=end.running, notes=(note,))


def _candidates(model: Any, every: Sequence[Unit], batch: Batch | None) -> tuple[list[Unit], list[str]]:
    """Those of `every` unit without which the family's layers can stand, and notes on the others.

    Cuts that no checkpoint could hold are measured nonetheless, since their importance ranks the blocks that train; on
    `batch`, if it is given, those are left out whose trial deletion does not run.

    Raises:
        InputError: if none is left, or pairs are asked for and none is; says why.
    """
    intact = whole(decoder.depth(model))
    layouts = {u: remove(intact, u) for u in every}
    refused = {u: config_rules.illegal(decoder.text_config(model), layout) for u, layout in layouts.items()}
    for unit, layout in layouts.items():
        inexact = None if batch is None or refused[unit] or unit.bypassed else legality.refusal(model, layout)
        if batch is not None and inexact and not deletion.runs(model, batch, unit):
            refused[unit] = inexact
    for units_ in (every, [u for u in every if u.kind == "pair"]):
        if units_ and all(refused[u] for u in units_):
            raise InputError(str(refused[units_[0]]))
    return [u for u in every if not refused[u]], [f"{u} must stay: {why}" for u, why in refused.items() if why]


def _collect(ordered: Sequence[Part], scorer: Scorer, metric: str, candidates: list[Unit], trials: bool) -> ScanResult:
    def judged(pieces: list[Pieces]) -> Evaluation:
        return judging.judge(scorer.items, evaluate.gather(pieces, scorer.encoded), metric)

    tokens, sequences = (sum(getattr(part, name) for part in ordered) for name in ("right", "sequences"))
    over = {"norm": tokens, "cosine": tokens, "run_cosine": tokens, "run_angle": sequences}
    means = {name: np.sum([part.sums[name] for part in ordered], axis=0) / count for name, count in over.items()}
    tried = [judged([part.trials[i] for part in ordered]) for i in range(len(candidates))] if trials else []
    return ScanResult(candidates, judged([part.intact for part in ordered]), tried, **means, seconds=0.0)


def positions(candidates: Sequence[Unit], original: Sequence[int]) -> Array:
    """(n,) position of each candidate in the original model, in blocks; `original` has each present block's index."""
    shift = {"pair": 0.5, "mlp": 0.25}
    middle = [np.mean([original[i] for i in unit.blocks[: unit.length]]) for unit in candidates]
    return np.array([place + shift.get(unit.kind, 0.0) for place, unit in zip(middle, candidates, strict=True)])


def table(result: ScanResult, evidence: Evidence, strategy: str, names: Sequence[str]) -> dict[str, Any]:
    """What a scan found, for scan.json: the intact model, and one row per candidate in order of depth."""
    values = importance(deciding(strategy), evidence)
    norms = s_norm(result.norm)
    rows = []
    for i, name in enumerate(names):
        row: dict[str, Any] = {"unit": name, "importance": float(values[i]) if np.isfinite(values[i]) else None}
        if result.trials:
            trial = result.trials[i]
            row |= {
                "value": trial.value,
                "stderr": trial.stderr,
                "probability": trial.probability,
                "loss": trial.loss if np.isfinite(trial.loss) else None,
            }
            if result.running is not None and i not in result.running:
                row |= {"stopped": True, "n": trial.n}
        rows.append(row | {"norm": float(result.norm[i]), "s_norm": float(norms[i]), "cosine": float(result.cosine[i])})
    return {
        "strategy": strategy,
        "intact": result.intact.summary(),
        "units": rows,
        "seconds": result.seconds,
        "notes": list(result.notes),
    }
