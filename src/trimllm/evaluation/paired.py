"""Standard errors: of a mean over items, and of the difference of two models that were asked the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trimllm.errors import InputError
from trimllm.tasks.items import Item


def answers(per_item: Sequence[float], items: Sequence[Item]) -> dict[str, Any]:
    """What a file keeps of an evaluation, to compare it with others of the same items: groups, which may be persons, as
    numbers (in quotes: see `standard_error`)."""
    numbers: dict[str | None, str | None] = {None: None}
    return {"values": list(per_item), "groups": [numbers.setdefault(item.group, str(len(numbers))) for item in items]}


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """`difference` of two such records, as result files hold it."""
    value, error = difference(one["values"], other["values"], one["groups"])
    return {"difference": value, "stderr": error}


def shown(found: dict[str, float]) -> str:
    """Such a difference as people read it: `-0.3 +- 0.8`; with more digits, to the first that is none of zero, where
    its error needs them (an error of "0.0" would say that it is certain)."""
    error = found["stderr"]
    digits = max(1, math.ceil(-math.log10(2 * error))) if error else 1
    return f"{round(found['difference'], digits) + 0.0:+.{digits}f} +- {error:.{digits}f}"


def unanimous(found: dict[str, float]) -> bool:
    """Whether both score the same at every item (answers may differ, where both are wrong): how sure a difference of 0
    is, is then unknown; its error of 0 says nothing."""
    return not found["difference"] and not found["stderr"]


def difference(
    one: Sequence[float], other: Sequence[float], groups: Sequence[str | None] | None = None
) -> tuple[float, float]:
    """By how many points the first evaluation is above the second, and the standard error of that.

    Args:
        one, other: `Evaluation.per_item` of two models that were asked the same items.
        groups: `Item.group` of each item (none: items are independent).

    Raises:
        InputError: if there are none, or not as many of each.

    Both models find the same items hard, so the error is mostly smaller than that of two independent evaluations.
    """
    if len(one) != len(other) or not len(one):
        raise InputError(f"{len(one)} and {len(other)} answers: give those of two models to the same items")
    apart = np.array(one, float) - np.array(other, float)
    return float(apart.mean()), standard_error(apart, groups or [None] * len(apart))


def standard_error(values: np.ndarray, groups: Sequence[str | None]) -> float:
    """Standard error of the mean of values, one per item (of a share of hits: the binomial one).

    Items of one group (an entity, an article) are not independent; where there are groups, theirs is taken if it is
    larger (the cluster-robust variance of a mean, an item without a group being one by itself).
    """
    n, offsets = len(values), values - values.mean()
    independent = math.sqrt(float(np.square(offsets).sum()) / max(n - 1, 1) / n)
    sums: dict[str | int, float] = {}
    for place, (offset, group) in enumerate(zip(offsets, groups, strict=True)):
        own = place if group is None else group  # a number or a text: never the same
        sums[own] = sums.get(own, 0.0) + float(offset)
    if len(sums) < 2:
        return independent
    clustered = math.sqrt(sum(s * s for s in sums.values()) * len(sums) / (len(sums) - 1)) / n
    return max(independent, clustered)
