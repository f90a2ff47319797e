"""Train, calibration and reported items that have nothing in common: no item, no group, no text.

The calibration set decides what is dropped, so it is held out of train; the reported set is never used for a decision.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from trimllm.config import COARSEST, RESOLUTION
from trimllm.errors import InputError
from trimllm.tasks.items import Item

CALIBRATION_SHARE = 0.2
"""The default calibration set is at most this part of train."""
FEWEST = 5
"""Training rows, at the least, from which a calibration set is held out."""
TEST_SHARE = 0.2
"""A test set that has to be held out is this part of the rows ..."""
TEST_ROWS = 1000
"""... and at most this many."""
MOSTLY = 0.6
"""An answer to more than this part of the rows is worth saying."""
_MARKS = re.compile(r"""[.,;:?…]+[-–—]*|["'“”‘’«»„_]|(?<![\d)])!|(?<=[^\W\d])[-–—]""")
"""Signs that make no text another one; not a minus, nor the sign of a factorial."""
INSTRUCTION_ROWS = 10
"""A prompt that stands in more rows than this is an instruction, not a question: the target tells its rows apart."""


class NoTrainingRowsError(InputError):
    """There is nothing to train on; what is to be reported may be there."""


class Split(NamedTuple):
    """The disjoint parts, the places of what was left out of train, and what the user should know."""

    train: tuple[Item, ...]
    calibration: tuple[Item, ...]
    test: tuple[Item, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    drawn: bool = False
    """Whether the test items were drawn from those for training."""


def split(
    train: Sequence[Item],
    test: Sequence[Item],
    *,
    calibration_size: int | None = None,
    resolution: float = RESOLUTION,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
    reported_only: bool = False,
) -> Split:
    """Holds the calibration set out of train, after everything that also stands in `test` has left it.

    An empty `test` is held out of train first. What is held out has no question twice; a given `test` is left as it is.
    `resolution` is what one calibration question may weigh, in percentage
    points; it sets the size when `calibration_size` is not given. With `reported_only` the training rows are asked
    for nothing but a test set, where there is none.

    Raises:
        InputError: if there are too few rows, or a size is not positive.
    """
    _check(calibration_size, resolution, max_train, max_test)
    notes: list[str] = []
    notes += _contradictions(train, test)
    if reported_only and test:
        reported = _limit(test, max_test, seed, "reported", notes)
        notes += [*_repeats(reported), *_one_sided(reported, "reported")]
        return Split((), (), tuple(reported), (), tuple(notes))
    if not train:
        kind = "" if reported_only else "training "
        raise NoTrainingRowsError(f"there are no {kind}rows (`where` keeps none of them): give other rows")
    if drawn := not test:
        train, test = hold_out_test(train, seed)
        total = len(train) + len(test)
        if not train:
            raise InputError(
                f"all {total:,} rows would be held out for the report, because they are of one group: give a test file "
                "(test=FILE), or a `group` with more values in the task YAML"
            )
        notes.append(f"no test split: {len(test):,} of {total:,} rows held out for the report (seed {seed})")
        if reported_only:
            done = split((), test, max_test=max_test, seed=seed, reported_only=True)
            return done._replace(drawn=True, notes=(*notes, *done.notes))
    train, leaked = _without(train, test, "reported", notes)
    held = len(test) if drawn else 0
    size = _calibration_size(train, len(leaked), held, calibration_size, resolution)
    rest, calibration = hold_out(train, size, f"{seed}:calibration")
    if not rest:
        raise InputError(f"all {len(train)} training rows would go into the calibration set: give more rows or groups")
    notes.append(_calibration_note(calibration, len(train), size))
    rest, doubles = _without(rest, calibration, "calibration", notes)
    kept = _limit(rest, max_train, seed, "training", notes)
    reported = _limit(test, max_test, seed, "reported", notes)
    notes += _repeats(reported)
    notes += _one_sided(reported, "reported") or _one_sided(calibration, "calibration")
    return Split(
        train=tuple(kept),
        calibration=tuple(calibration),
        test=tuple(reported),
        left_out=(*leaked, *doubles),
        notes=tuple(notes),
        drawn=drawn,
    )


def hold_out_test(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """(what remains, test): a seeded fifth of the questions, 1,000 at most."""
    available = distinct(items)
    if available < 3:
        rows = _counted(items, available, "rows")
        raise InputError(f"{rows} are too few to hold out a test and a calibration part: give at least 3")
    return hold_out(items, max(1, min(TEST_ROWS, round(TEST_SHARE * available))), f"{seed}:test")


def hold_out(items: Sequence[Item], size: int, seed: str) -> tuple[list[Item], list[Item]]:
    """(rest, held out): whole groups in a seeded order until `size` items are out, a question once; both keep the order
    of `items`."""
    groups: dict[str, list[int]] = defaultdict(list)
    for position, item in enumerate(items):
        groups[f"item {position}" if item.group is None else f"group {item.group}"].append(position)
    order = list(groups)
    random.Random(seed).shuffle(order)
    out: dict[Any, int] = {}
    for group in order:
        if len(out) >= size:
            break
        for position in groups[group]:
            out.setdefault(_question(items[position]), position)
    held_out = set(out.values())
    rest = [item for position, item in enumerate(items) if position not in held_out]
    return rest, [items[position] for position in sorted(held_out)]


def distinct(items: Iterable[Item]) -> int:
    """How many different questions items are."""
    return len({_question(item) for item in items})


def without_overlap(items: Sequence[Item], held_out: Sequence[Item]) -> tuple[list[Item], list[str]]:
    """(items that share no text and no group with `held_out`, places of the others)."""
    common = _instructions([*items, *held_out])
    texts = {_text(item, common) for item in held_out}
    groups = {item.group for item in held_out} - {None}
    kept, places = [], []
    for item in items:
        if item.group in groups or _text(item, common) in texts:
            places.append(item.place)
        else:
            kept.append(item)
    return kept, places


def _without(
    items: Sequence[Item], held_out: Sequence[Item], what: str, notes: list[str]
) -> tuple[list[Item], list[str]]:
    """`without_overlap`, with a note; something must remain."""
    kept, places = without_overlap(items, held_out)
    if places:
        rows = f"{len(places):,} of {len(items):,} training rows"
        notes.append(f"left out {rows} that share text or group with the {what} set (first: {places[0]})")
    if not kept:
        raise InputError(f"every training row also stands in the {what} set (first: {items[0].place}): give other rows")
    return kept, places


def normalize(text: str) -> str:
    """Case, white space, punctuation and the hyphens of compounds do not make a text a different one. Other signs do:
    `5 + 3` is not `5 - 3`, and `C++` not `C#`. (A text without any letter stays as it is.)"""
    return spaced(_MARKS.sub(" ", text)) or text


def _text(item: Item, common: set[str]) -> str:
    """What identifies an item: its question; with the target where the prompt serves many rows or is empty."""
    prompt = normalize(item.prompt)
    return prompt if item.prompt and prompt not in common else f"{prompt}\n{normalize(item.target)}"


def _question(item: Item) -> tuple[str, Any]:
    """What makes items copies of one another, save for case and white space: the prompt, and the choices in any order,
    or the target. (Signs count: `5 + 3` is no copy of `5 - 3`.)"""
    choices = item.continuations
    return spaced(item.prompt), _in_any_order(choices) if len(choices) > 1 else spaced(item.target)


def spaced(text: str) -> str:
    """Case and white space do not make a question another one."""
    return " ".join(text.casefold().split())


@lru_cache(maxsize=64)
def _in_any_order(choices: tuple[str, ...]) -> frozenset[str]:
    """The choices as a set; rows with the same choices (all labels) share one."""
    return frozenset(choices)


def _repeats(items: Sequence[Item]) -> list[str]:
    """A note on reported rows that are copies of one another, if any are."""
    questions = [_question(item) for item in items]
    counts = Counter(questions)
    places = [item.place for item, question in zip(items, questions, strict=True) if counts[question] > 1]
    if not places:
        return []
    return [
        f"{len(places):,} of {len(items):,} reported rows stand there more than once (first: {places[0]}): the "
        "standard error counts each of them"
    ]


def _contradictions(*sets: Sequence[Item]) -> list[str]:
    """A note on questions with one right choice here and another there, if there are any."""
    items = [item for each in sets for item in each if len(item.continuations) > 1]
    questions = [_question(item) for item in items]
    targets = defaultdict(set)
    for item, question in zip(items, questions, strict=True):
        targets[question].add(item.target)
    places = [item.place for item, question in zip(items, questions, strict=True) if len(targets[question]) > 1]
    if not places:
        return []
    return [
        f"{len(places):,} of {len(items):,} rows ask what another row asks and answer it otherwise (first: {places[0]})"
    ]


def majority(items: Sequence[Item]) -> tuple[str, float] | None:
    """The most frequent right choice, and its share of the rows; None where rows have different choices, or none."""
    choices = items[0].continuations
    if len(choices) < 2 or any(item.continuations != choices for item in items):
        return None
    target, count = Counter(item.target for item in items).most_common(1)[0]
    return target.strip(), count / len(items)


def _one_sided(items: Sequence[Item], what: str) -> list[str]:
    """A note on an answer that most rows have, where all have the same choices."""
    most = majority(items)
    if most is None or most[1] <= MOSTLY:
        return []
    return [f"{most[0]!r} is {100 * most[1]:.0f} % of the {what} rows: always saying it scores {100 * most[1]:.1f}"]


def _instructions(items: Iterable[Item]) -> set[str]:
    counts = Counter(normalize(item.prompt) for item in items)
    return {prompt for prompt, count in counts.items() if count > INSTRUCTION_ROWS}


def _calibration_size(items: Sequence[Item], leaked: int, held: int, wanted: int | None, resolution: float) -> int:
    """How many to hold out of the training rows; `leaked` more could not be used, and `held` were held out for the
    report."""
    available = distinct(items)
    more = f" ({leaked} more are left out: they stand in the reported set)" if leaked else ""
    rows = _counted(items, available, "training rows") + more
    if wanted is not None:
        if wanted >= available:
            raise InputError(f"calibration_size {wanted} needs more than the {rows}: give more or ask less")
        return wanted
    if available < FEWEST:
        least = f"{FEWEST + held} rows in all ({held} held out for the report)" if held else FEWEST
        raise InputError(f"{rows} are too few to hold out a calibration set: give at least {least}")
    return max(1, min(round(100 / resolution), int(CALIBRATION_SHARE * available)))


def _counted(items: Sequence[Item], available: int, what: str) -> str:
    """How many there are, of which so many differ, and where they begin."""
    different = "different " if available < len(items) else ""
    return f"{available} {different}{what} (from {items[0].place} on)"


def _calibration_note(calibration: Sequence[Item], available: int, asked: int) -> str:
    count = len(calibration)
    more = f" (whole groups; {asked:,} asked for)" if count > asked else ""
    note = f"calibration: {count:,} of {available:,} training rows{more}"
    if len(calibration[0].continuations) == 1:
        return note
    return f"{note}, one question = {100 / count:.2f} points"


def _limit(items: Sequence[Item], limit: int | None, seed: int, what: str, notes: list[str]) -> Sequence[Item]:
    """A seeded subsample of `limit` items, in their order."""
    if limit is None or limit >= len(items):
        return items
    notes.append(f"{limit:,} of {len(items):,} {what} rows used (seed {seed})")
    chosen = sorted(random.Random(f"{seed}:{what}").sample(range(len(items)), limit))
    return [items[position] for position in chosen]


def _check(calibration_size: int | None, resolution: float, max_train: int | None, max_test: int | None) -> None:
    sizes = {"calibration_size": calibration_size, "max_train": max_train, "max_test": max_test}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: give at least 1")
    if not 0 < resolution <= COARSEST:
        raise InputError(f"resolution is {resolution}: give percentage points above 0, {COARSEST:g} at most")
