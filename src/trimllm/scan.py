"""Exact trial deletion: how good the model would be without each candidate, one candidate at a time.

A candidate changes nothing below the block it begins in. So each batch goes once through the whole model, the residual
stream before every block is kept, and every candidate computes only what lies behind its own place. The choices of a
question share its prompt (see `encoding`). Source of the method: TrimLLM (arXiv 2412.11242), calibration scanning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trimllm import decoder, evaluate, families
from trimllm.encoding import Batch
from trimllm.errors import InputError
from trimllm.evaluate import Evaluation, Pieces, Scorer
from trimllm.layout import Unit, remove, shared_prefix, units, whole
from trimllm.parallel import ALONE, Share
from trimllm.scores import Array, Evidence, importance, s_norm
from trimllm.scores import parts as parts_of
from trimllm.trial import trial


@dataclass
class Part:
    """What one batch contributed: plain numbers, so that a journal can keep it and a resumed scan need not redo it."""

    base: Pieces
    trials: list[Pieces]
    """Per candidate; empty if the scan only measured activations."""
    tokens: int
    sums: dict[str, list[float]]
    """Sums over unpadded tokens, one number per candidate: `norm`, `cosine`, `run_cosine`."""

    def dump(self) -> dict[str, Any]:
        def flat(pieces: Pieces) -> list[list[Any]]:
            return [[*owner, *values] for owner, values in pieces.items()]

        return {
            "base": flat(self.base),
            "trials": [flat(t) for t in self.trials],
            "tokens": self.tokens,
            "sums": self.sums,
        }

    @classmethod
    def load(cls, record: Mapping[str, Any]) -> Part:
        def pieces(rows: Sequence[Sequence[Any]]) -> Pieces:
            return {(row[0], row[1]): (row[2], row[3], row[4]) for row in rows}

        return cls(
            pieces(record["base"]), [pieces(t) for t in record["trials"]], record["tokens"], dict(record["sums"])
        )


@dataclass(frozen=True)
class ScanResult:
    """Per candidate, in order of depth: its evaluation when deleted (none if only activations were asked for)."""

    candidates: list[Unit]
    base: Evaluation
    """The intact model on the same items."""
    trials: list[Evaluation]
    norm: Array
    cosine: Array
    run_cosine: Array
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def evidence(self, position: Array, depth: int, seed: int = 0, **extra: Array) -> Evidence:
        """What the scores need; `position` (n,) are the candidates' places in the original model of `depth` blocks."""
        tried = bool(self.trials)
        return Evidence(
            depth=depth,
            position=position,
            accuracy=np.array([trial.value for trial in self.trials]) if tried else None,
            loss=np.array([trial.loss for trial in self.trials]) if tried else None,
            norm=self.norm,
            cosine=self.cosine,
            run_cosine=self.run_cosine,
            seed=seed,
            **extra,
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
    finished: Mapping[int, Part] | None = None,
    on_part: Callable[[int, Part], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    share: Share = ALONE,
) -> ScanResult:
    """Measure every candidate of kind `unit` (runs of `length` blocks) on the scorer's items.

    `trials=False` measures activations only. `run` is the number of blocks of the runs that `angular` compares.
    `finished` holds parts of an earlier, interrupted scan; `on_part` receives each new one, on every process of
    `share`. Units without which the family's layers could not stand are no candidates; the notes name them.
    """
    started = time.perf_counter()
    candidates, notes = _candidates(model, units(unit, whole(decoder.depth(model)), length))
    parts: dict[int, Part] = dict(finished or {})
    todo = [number for number in range(len(scorer.batches)) if number not in parts]
    notes += [scorer.note] if scorer.note else []
    with evaluate.evaluating(model):
        resume = trials and _resumes_exactly(model, scorer.batches[0])
        if trials and not resume:
            kind = model.config.model_type
            notes.append(f"every candidate computes the whole model: {kind} cannot be resumed midway")
        for begin in range(0, len(todo), share.world):
            mine = todo[begin : begin + share.world][share.rank : share.rank + 1]
            made = [
                (number, _part(model, scorer.batches[number], candidates, trials=trials, run=run, resume=resume))
                for number in mine
            ]
            for number, part in share.gather(made):
                parts[number] = part
                if on_part:
                    on_part(number, part)
            if progress:
                progress(len(parts), len(scorer.batches))
    return _collect(parts, scorer, metric, candidates, trials, time.perf_counter() - started, tuple(notes))


def _candidates(model: Any, every: Sequence[Unit]) -> tuple[list[Unit], list[str]]:
    """Those of `every` unit that may go, and notes on those that may not.

    Raises:
        InputError: if none may go; says why.
    """
    intact = whole(decoder.depth(model))
    refused = {u: families.illegal(decoder.text_config(model), remove(intact, u)) for u in every}
    candidates = [u for u, reason in refused.items() if reason is None]
    if not candidates:
        raise InputError(next(reason for reason in refused.values() if reason))
    return candidates, [f"{u} must stay: {reason}" for u, reason in refused.items() if reason]


def _collect(
    parts: Mapping[int, Part],
    scorer: Scorer,
    metric: str,
    candidates: list[Unit],
    trials: bool,
    seconds: float,
    notes: tuple[str, ...],
) -> ScanResult:
    ordered = [parts[number] for number in sorted(parts)]

    def judged(pieces: list[Pieces]) -> Evaluation:
        return evaluate.judge(scorer.items, evaluate.gather(pieces, scorer.encoded), metric)

    tokens = sum(part.tokens for part in ordered)
    means = {
        name: np.sum([part.sums[name] for part in ordered], axis=0) / tokens
        for name in ("norm", "cosine", "run_cosine")
    }
    tried = [judged([part.trials[i] for part in ordered]) for i in range(len(candidates))] if trials else []
    return ScanResult(candidates, judged([part.base for part in ordered]), tried, **means, seconds=seconds, notes=notes)


@torch.no_grad()
def _part(model: Any, batch: Batch, candidates: list[Unit], *, trials: bool, run: int, resume: bool) -> Part:
    base, stream = _forward_keeping_stream(model, batch, mids=any(unit.kind != "block" for unit in candidates))
    part = Part(base, [], int(batch.real.sum()), _activations(stream, batch, candidates, run))
    if trials:
        part.trials = [_trial(model, batch, unit, stream, resume) for unit in candidates]
    return part


def _trial(model: Any, batch: Batch, unit: Unit, stream: dict[float, torch.Tensor], resume: bool) -> Pieces:
    before = whole(decoder.depth(model))
    after = remove(before, unit)
    start = shared_prefix(before, after) if resume else 0
    with trial(model, after, resume_from=start) as injection:
        if start:
            injection.hidden = stream[start]
        return evaluate.batch_pieces(model, batch)


def _forward_keeping_stream(model: Any, batch: Batch, *, mids: bool) -> tuple[Pieces, dict[float, torch.Tensor]]:
    """Scores of the intact model, and the residual stream: key i before block i, i + 0.5 amid it, n at the end."""
    stream: dict[float, torch.Tensor] = {}

    def keep(key: float) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream[key] = args[0] if args else kwargs["hidden_states"]

        return hook

    def keep_output(_module: Any, _args: Any, output: Any) -> None:
        stream[depth] = output[0] if isinstance(output, tuple) else output

    depth = decoder.depth(model)
    with ExitStack() as hooks:
        for i, block in enumerate(decoder.blocks(model)):
            hooks.callback(block.register_forward_pre_hook(keep(i), with_kwargs=True).remove)
            middle = decoder.mid_block(model, i) if mids else None
            if middle is not None:
                hooks.callback(middle.register_forward_pre_hook(keep(i + 0.5), with_kwargs=True).remove)
        hooks.callback(decoder.blocks(model)[-1].register_forward_hook(keep_output).remove)
        return evaluate.batch_pieces(model, batch), stream


def ends(unit: Unit) -> tuple[float, float]:
    """Where the unit begins and ends in the residual stream (see `_forward_keeping_stream`)."""
    begin = {"block": 0.0, "attention": 0.0, "mlp": 0.5, "pair": 0.5}[unit.kind]
    length = {"block": float(unit.length), "pair": 1.0, "attention": 0.5, "mlp": 0.5}[unit.kind]
    return unit.index + begin, unit.index + begin + length


def _activations(
    stream: dict[float, torch.Tensor], batch: Batch, candidates: Sequence[Unit], run: int
) -> dict[str, list[float]]:
    """Sums over unpadded tokens: norm of the stream behind each unit, cosine over the unit, cosine over a run."""
    depth = max(stream)

    def tokens(key: float) -> torch.Tensor | None:
        hidden = stream.get(key)
        if hidden is None:
            return None
        hidden = hidden[0] if hidden.dim() == 4 else hidden  # AltUp carries several streams, the first is the main one
        return hidden.reshape(-1, hidden.shape[-1])[batch.real.flatten()].float()

    def cosine(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
        if a is None or b is None:
            return float("nan")
        return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).sum())

    sums: dict[str, list[float]] = {"norm": [], "cosine": [], "run_cosine": []}
    for unit in candidates:
        begin, end = ends(unit)
        before, behind = tokens(begin), tokens(end)
        sums["norm"].append(float("nan") if behind is None else float(behind.norm(dim=-1).sum()))
        sums["cosine"].append(cosine(before, behind))
        sums["run_cosine"].append(cosine(before, tokens(begin + run)) if begin + run <= depth else float("nan"))
    return sums


@torch.no_grad()
def _resumes_exactly(model: Any, batch: Batch) -> bool:
    """Whether a forward resumed in the middle gives the scores of the whole one: known for the family, and checked."""
    depth = decoder.depth(model)
    if not families.family(decoder.text_config(model)).resumable or depth < 2:
        return False
    base, stream = _forward_keeping_stream(model, batch, mids=False)
    try:
        with trial(model, whole(depth), resume_from=depth // 2) as injection:
            injection.hidden = stream[depth // 2]
            again = evaluate.batch_pieces(model, batch)
    except evaluate.UNFIT:
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    return all(abs(base[owner][0] - again[owner][0]) <= tolerance * max(1.0, abs(base[owner][0])) for owner in base)


def positions(candidates: Sequence[Unit], original: Sequence[int]) -> Array:
    """(n,) place of each candidate in the original model, in blocks; `original` has each present block's index."""
    shift = {"pair": 0.5, "mlp": 0.25}
    middle = [np.mean([original[i] for i in unit.blocks[: unit.length]]) for unit in candidates]
    return np.array([place + shift.get(unit.kind, 0.0) for place, unit in zip(middle, candidates, strict=True)])


def table(result: ScanResult, evidence: Evidence, strategy: str, names: Sequence[str]) -> dict[str, Any]:
    """What a scan found, for scan.json: the intact model, and one row per candidate in order of depth."""
    decider = importance(parts_of(strategy)[0], evidence)
    norms = s_norm(evidence.norm) if evidence.norm is not None else None
    rows = []
    for i, name in enumerate(names):
        row: dict[str, Any] = {"unit": name, "importance": float(decider[i]) if np.isfinite(decider[i]) else None}
        if result.trials:
            trial = result.trials[i]
            row |= {"value": trial.value, "stderr": trial.stderr, "loss": trial.loss}
        if norms is not None:
            row |= {"norm": float(result.norm[i]), "s_norm": float(norms[i])}
        rows.append(row | {"cosine": float(result.cosine[i])})
    return {
        "strategy": strategy,
        "intact": result.base.summary(),
        "units": rows,
        "seconds": result.seconds,
        "notes": list(result.notes),
    }
