"""Standard errors: of a mean over items, and of the difference of two models that were asked the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def difference(
    one: Sequence[float], other: Sequence[float], groups: Sequence[str | None] | None = None
) -> tuple[float, float]:
    """By how many points the first evaluation is above the second, and the standard error of that.

    Args:
        one, other: `Evaluation.per_item` of two models that were asked the same items.
        groups: `Item.group` of each item (none: items are independent).

    Both models find the same items hard, so the error is smaller than that of two independent evaluations.
    """
    apart = np.array(one, float) - np.array(other, float)
    return float(apart.mean()), standard_error(apart, groups or [None] * len(apart))


def standard_error(values: np.ndarray, groups: Sequence[str | None]) -> float:
    """Standard error of the mean (of a share of hits: the binomial one); questions of one group (an entity, an article)
    are not independent, so where there are groups theirs is taken if it is larger (the cluster-robust variance of a
    mean)."""
    n, mean = len(values), values.mean()
    independent = math.sqrt(float(np.square(values - mean).sum()) / max(n - 1, 1) / n)
    sums: dict[str | None, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + float(value - mean)
    if None in sums or len(sums) < 2:
        return independent
    clustered = math.sqrt(sum(s * s for s in sums.values()) * len(sums) / (len(sums) - 1)) / n
    return max(independent, clustered)
