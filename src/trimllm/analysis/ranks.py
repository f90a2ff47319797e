"""Rank correlation, and how often chance alone gives as much."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ROUNDS = 9999
"""Permutations of a test: p is known to 0.01 or better."""


def ranks(values: Array) -> Array:
    """(n,) ranks from 1 in ascending order; equal values share the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[where]


def spearman(a: Array, b: Array) -> float:
    """Spearman's rank correlation of two (n,) arrays, -1 to 1: the correlation of their ranks, which is right with ties
    too. NaN for fewer than three values, where one of them is not a number, or where all values of one are equal."""
    x, y = _centred(a), _centred(b)
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / scale if len(x) > 2 and scale > 0 else math.nan


def permutation_p(a: Array, b: Array, seed: int) -> float:
    """Share of random orders of `b` whose rank correlation with `a` is at least as far from 0 (two-sided p-value).

    The order given counts as one of them, so that no p is 0 (Phipson and Smyth, arXiv 1603.05766). NaN where there is
    no correlation (see `spearman`).
    """
    if math.isnan(spearman(a, b)):
        return math.nan
    x, y = _centred(a), _centred(b)
    shuffled = np.random.default_rng(seed % 2**32).permuted(np.tile(y, (ROUNDS, 1)), axis=1)
    least = abs(x @ y) * (1 - 1e-12)
    return float(1 + (np.abs(shuffled @ x) >= least).sum()) / (1 + ROUNDS)


def _centred(values: Array) -> Array:
    """Ranks less their mean; all 0 if a value is not a number."""
    if not np.isfinite(values).all():
        return np.zeros(len(values))
    placed = ranks(values)
    return placed - placed.mean()
