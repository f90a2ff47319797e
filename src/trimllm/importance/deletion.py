"""What one batch says of every candidate: the intact model goes over it once, every candidate from where it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trimllm import memory
from trimllm.blocks import decoder, families
from trimllm.blocks.layout import Unit, remove, shared_prefix, whole
from trimllm.blocks.trial import trial
from trimllm.evaluation import forward
from trimllm.evaluation.batches import Batch
from trimllm.evaluation.forward import NotFiniteError, Pieces
from trimllm.importance import activations


@dataclass
class Part:
    """What one batch contributed: plain numbers, so that a journal can keep it and a resumed scan need not redo it."""

    rows: str
    """Digest of the batch's rows: under the same number, another device or attention may have others."""
    intact: Pieces
    """Outcome of the intact model; its key in files is `base`."""
    trials: list[Pieces]
    """Per candidate, {} for one that is not in the race any more; empty if only activations were measured."""
    right: int
    """Tokens of prompts and right continuations, over which activations are summed."""
    sequences: int
    """Right continuations; of a document, its windows."""
    sums: dict[str, list[float]]
    """See `activations.sums`; one number per candidate."""

    def dump(self) -> dict[str, Any]:
        def flat(pieces: Pieces) -> list[list[Any]]:
            return [[*owner, *values] for owner, values in pieces.items()]

        return {
            "rows": self.rows,
            "base": flat(self.intact),
            "trials": [flat(t) for t in self.trials],
            "right": self.right,
            "sequences": self.sequences,
            "sums": self.sums,
        }

    @classmethod
    def load(cls, record: Mapping[str, Any]) -> Part:
        def pieces(rows: Sequence[Sequence[Any]]) -> Pieces:
            return {(row[0], row[1]): (row[2], row[3], row[4]) for row in rows}

        counts = record["right"], record["sequences"]
        trials = [pieces(each) for each in record["trials"]]
        return cls(record["rows"], pieces(record["base"]), trials, *counts, dict(record["sums"]))

    def covers(self, rows: str, tried: Sequence[int], candidates: int) -> bool:
        """Whether it is of these rows and so many candidates, and these were tried: what an interrupted scan left."""
        if self.rows != rows or any(len(sums) != candidates for sums in self.sums.values()):
            return False
        return not tried or (len(self.trials) == candidates and all(self.trials[i] for i in tried))


@torch.no_grad()
def measure(model: Any, batch: Batch, candidates: list[Unit], *, tried: Sequence[int], run: int, resume: bool) -> Part:
    """What a batch says of the candidates: activations of all, trials of those `tried`; `resume`: forwards may begin in
    the middle. `run` is the number of blocks of the runs that `angular` compares."""
    intact, stream = activations.keeping_stream(model, batch, mids=any(unit.kind != "block" for unit in candidates))
    measured = activations.sums(stream, batch, candidates, run)
    part = Part("", intact, [], int(batch.right.sum()), len(batch.last), measured)
    if tried:
        part.trials = [
            _trial(model, batch, unit, stream, resume) if i in tried else {} for i, unit in enumerate(candidates)
        ]
    return part


def together(rows: str, parts: Sequence[Part]) -> Part:
    """The part of a batch, with the digest of its rows, that was computed in pieces."""
    if len(parts) == 1:
        return replace(parts[0], rows=rows)
    trials = [forward.add_up(part.trials[i] for part in parts) for i in range(len(parts[0].trials))]
    sums = {name: np.sum([part.sums[name] for part in parts], axis=0).tolist() for name in parts[0].sums}
    tokens, sequences = sum(part.right for part in parts), sum(part.sequences for part in parts)
    return Part(rows, forward.add_up(part.intact for part in parts), trials, tokens, sequences, sums)


def _trial(model: Any, batch: Batch, unit: Unit, stream: dict[float, torch.Tensor], resume: bool) -> Pieces:
    before = whole(decoder.depth(model))
    after = remove(before, unit)
    start = shared_prefix(before, after) if resume else 0
    with trial(model, after, resume_from=start) as injection:
        if start:
            injection.hidden = stream[start]
        try:
            return forward.batch_pieces(model, batch)
        except NotFiniteError as error:
            raise NotFiniteError(f"without {unit} of the {len(before)} that there are, {error}") from None


@torch.no_grad()
def resumes_exactly(model: Any, batch: Batch) -> bool:
    """Whether a forward resumed in the middle gives the scores of the whole one: known for the family, and checked.

    Where memory runs out it is not checked: the scan itself will say so.
    """
    depth = decoder.depth(model)
    if not families.family(decoder.text_config(model)).resumable or depth < 2:
        return False
    try:
        base, stream = activations.keeping_stream(model, batch, mids=False)
        with trial(model, whole(depth), resume_from=depth // 2) as injection:
            injection.hidden = stream[depth // 2]
            again = forward.batch_pieces(model, batch)
    except forward.UNFIT as error:
        return memory.is_out_of_memory(error)
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    return all(abs(base[owner][0] - again[owner][0]) <= tolerance * max(1.0, abs(base[owner][0])) for owner in base)


def runs(model: Any, batch: Batch, unit: Unit) -> bool:
    """Whether the trial deletion of a unit can be computed; where memory runs out, the scan itself says so."""
    try:
        with forward.evaluating(model), torch.no_grad():
            _trial(model, batch, unit, {}, resume=False)
    except forward.UNFIT as error:
        return memory.is_out_of_memory(error)
    return True
