"""--one-shot: all units that go at once, chosen by the evidence of one scan.

A unit is only chosen if a legal model is left without it and those chosen before, and if enough units that overlap none
of them remain to make up the number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from trimllm.blocks import decoder, legality
from trimllm.blocks.layout import Unit, remove_all, whole
from trimllm.errors import InputError
from trimllm.importance import scores, select
from trimllm.importance.scores import Evidence
from trimllm.importance.select import Choice


def most_apart(units: Iterable[Unit]) -> int:
    """How many of the units can go together at most, since no two of them may share a block (runs overlap)."""
    count, end = 0, -1
    for unit in sorted(units, key=lambda one: one.blocks[-1]):
        if unit.blocks[0] > end:
            count, end = count + 1, unit.blocks[-1]
    return count


def check(model: Any, candidates: Sequence[Unit], strategy: str, count: int, allowed: Collection[int]) -> None:
    """Refuse before the scan what no scan can change: so many units that may go together are not there.

    `allowed` are indices into `candidates`, of units that may go one by one.

    Raises:
        InputError: in that case.
    """
    if scores.deciding(strategy) == "angular":
        runs(model, candidates, strategy, count, allowed)
    elif most_apart(candidates[i] for i in allowed) < count:
        raise _too_few(count * candidates[0].length)


def apart(
    model: Any,
    candidates: Sequence[Unit],
    evidence: Evidence,
    strategy: str,
    count: int,
    *,
    tolerance: float,
    allowed: Collection[int],
) -> list[Choice]:
    """`count` units, chosen one after the other. One is passed over if those that are still to come would not fit
    beside it, or if no stock model would be left. `allowed` are indices into `candidates`.

    Raises:
        InputError: if there are not so many.
    """
    choices: list[Choice] = []
    while len(choices) < count:
        rest = {i: _others(candidates, allowed, i) for i in allowed}
        needed = count - len(choices) - 1
        open_ = [i for i in allowed if most_apart(candidates[k] for k in rest[i]) >= needed]
        if not open_:
            raise _too_few(count * candidates[0].length)
        choice = select.choose(candidates, evidence, strategy, tolerance=tolerance, allowed=open_)
        if _legal(model, [made.unit for made in (*choices, choice)]):
            choices.append(choice)
            allowed = rest[choice.index]
        else:
            allowed = set(allowed) - {choice.index}
    return choices


def runs(
    model: Any, candidates: Sequence[Unit], strategy: str, count: int, allowed: Collection[int]
) -> dict[int, list[int]]:
    """The runs of so many adjacent units that may go as a whole: their first unit -> all of them, as in `allowed`.

    Raises:
        InputError: if there is none.
    """
    length = candidates[0].length
    at = {candidates[i].index: i for i in allowed}
    steps = [k * length for k in range(count)]
    found = {i: [at[begin + k] for k in steps] for begin, i in at.items() if all(begin + k in at for k in steps)}
    legal = {i: run for i, run in found.items() if _legal(model, [candidates[k] for k in run])}
    if not legal:
        raise InputError(
            f"--strategy {strategy}: no {count * length} adjacent layers may all go: protect fewer, or ask for a "
            "smaller drop"
        )
    return legal


def nearest_run(
    model: Any,
    candidates: Sequence[Unit],
    evidence: Evidence,
    strategy: str,
    count: int,
    *,
    allowed: Collection[int],
) -> list[Choice]:
    """So many adjacent units: the least important of the `runs`, by what the evidence says of their first unit.

    Raises:
        InputError: see `runs`.
    """
    every = runs(model, candidates, strategy, count, allowed)
    first = select.choose(candidates, evidence, strategy, allowed=every)
    return [replace(first, unit=candidates[i], index=i) for i in every[first.index]]


def _others(candidates: Sequence[Unit], allowed: Collection[int], index: int) -> set[int]:
    """Those of the allowed candidates that have no block in common with one of them."""
    blocks = set(candidates[index].blocks)
    return {i for i in allowed if blocks.isdisjoint(candidates[i].blocks)}


def _legal(model: Any, gone: Sequence[Unit]) -> bool:
    """Whether a stock model is left without all of them: units that may go one by one need not go together."""
    return legality.refusal(model, remove_all(whole(decoder.depth(model)), gone)) is None


def _too_few(layers: int) -> InputError:
    return InputError(f"--one-shot: no {layers} layers may all go at once: protect fewer, or ask for a smaller drop")
