"""Which candidates can still win a scan, after a part of the calibration set.

The intact model goes over all items first. Where it is sure of its answer, the model without one block nearly always
says the same; so the items it is least sure of come first, and what the rest would say is predicted: a logistic
regression of "differs from the intact model" on how sure that one was, an intercept and a slope per candidate. Drawing
the rest many times from it gives each candidate's chance to win by the rule of `select` (the best within a tolerance,
of these the largest norm). Candidates that together have less than the risk of a round are stopped. The idea of
successive elimination: Maron and Moore (1994), Hoeffding Races.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trimllm.importance.scores import Array

SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
"""Shares of the items after which candidates are stopped."""
SMALLEST = 10
"""Items below which nothing is decided."""
DRAWS = 4000
SPREAD, SLOPES, WIDE = 1.0, 0.3, 5.0
"""Standard deviations of the prior: of the candidates' intercepts and slopes around their means, and of those means."""
STRAY = 0.3
"""Outcomes expected to differ, among as many items as were seen, for no reason the regression knows (a gamma prior)."""


@dataclass(frozen=True)
class Rule:
    """Who wins: of the candidates within `tolerance` hits of the best the one with the largest `breaker`, and of those
    the deepest (`position`). Candidates that may not go (`allowed`) never win. All arrays are (candidates,)."""

    tolerance: float
    breaker: Array
    position: Array
    allowed: np.ndarray

    def of(self, rows: Sequence[int]) -> Rule:
        """The rule for some of the candidates."""
        return Rule(self.tolerance, *(column[list(rows)] for column in (self.breaker, self.position, self.allowed)))

    def winners(self, hits: Array) -> Array:
        """(draws,) the row that wins in each column of `hits` (candidates, draws)."""
        hits = np.where(self.allowed[:, None], hits, -1)
        order = np.lexsort((self.position, self.breaker))
        tied = hits[order] >= hits.max(axis=0) - self.tolerance - 1e-9
        return order[len(order) - 1 - np.argmax(tied[::-1], axis=0)]


@dataclass(frozen=True)
class Standing:
    """How a race ended."""

    running: tuple[int, ...]
    """Candidates that were not stopped; each of them saw all items."""
    seen: tuple[int, ...]
    """Items that each candidate saw."""
    expected: Array
    """(candidates,) hits over all items: counted, or for those that were stopped foreseen."""

    @property
    def computed(self) -> int:
        """Trials that were computed, candidates times items."""
        return sum(self.seen)


def race(
    compute: Callable[[list[int], list[int]], Array],
    intact: Array,
    margins: Array,
    rule: Rule,
    confidence: float,
    seed: int = 0,
) -> Standing:
    """Run all candidates over growing shares of the items, and stop those that cannot win.

    Args:
        compute: gives (candidates, items) bool, whether each of these candidates hits each of these items.
        intact: (items,) bool, the intact model's hits.
        margins: (items,) its score of the right choice less that of the best other one.
        rule: who wins.
        confidence: nominal probability with which the winner over all items is not stopped.
        seed: of the draws.
    """
    rounds = hardest_first(margins)
    risk = (1 - confidence) / max(1, len(rounds) - 1)
    count = len(rule.position)
    outcomes = np.zeros((count, 0), dtype=bool)
    running, items = list(range(count)), list[int]()
    expected, seen = np.zeros(count), np.zeros(count, dtype=int)
    for new in rounds:
        outcomes = np.concatenate([outcomes, compute(running, new)], axis=1)
        items += new
        seen[running] = len(items)
        expected[running] = outcomes.sum(axis=1)
        if len(items) == len(margins) or len(running) == 1:
            continue
        chances, expected[running] = foresee(outcomes ^ intact[items], intact, margins, items, rule.of(running), seed)
        out = stopped(chances, risk)
        outcomes = np.delete(outcomes, out, axis=0)
        running = [candidate for row, candidate in enumerate(running) if row not in out]
    return Standing(tuple(running), tuple(int(n) for n in seen), expected)


def hardest_first(margins: Array) -> list[list[int]]:
    """Items in rounds, those of which the intact model is least sure first.

    Args:
        margins: (items,) its score of the right choice less that of the best other one.
    """
    count = len(margins)
    order = np.argsort(np.abs(margins), kind="stable").tolist()
    ends = sorted({round(share * count) for share in SHARES if share * count >= SMALLEST} | {count})
    return [order[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def stopped(chances: Array, risk: float) -> list[int]:
    """Rows whose chances to win add up to at most `risk`, the least first; never the likeliest winner."""
    order = np.argsort(chances, kind="stable")[:-1]
    return sorted(int(row) for row in order[np.cumsum(chances[order]) <= risk])


def foresee(
    differs: Array, intact: Array, margins: Array, seen: Sequence[int], rule: Rule, seed: int = 0
) -> tuple[Array, Array]:
    """Each candidate's chance to win over all items, and the hits it is expected to end with, both (candidates,).

    Args:
        differs: (candidates, seen) bool: a candidate's hit or miss on a seen item is not the intact model's.
        intact: (items,) bool: the intact model hits.
        margins: (items,) the intact model's.
        seen: which items were seen, in the order of `differs`.
        rule: who wins.
        seed: of the draws.
    """
    rest = np.setdiff1d(np.arange(len(margins)), seen)
    now = np.logical_xor(differs, intact[list(seen)]).sum(axis=1)
    sure = np.log1p(np.abs(margins))
    generator = np.random.default_rng(seed % 2**32)
    lost, won = _differing(differs, sure[list(seen)], sure[rest], intact[rest], generator)
    draws = now + intact[rest].sum() - lost + won
    wins = np.bincount(rule.winners(draws.T), minlength=len(differs))
    return wins / len(draws), draws.mean(axis=0)


def _differing(
    differs: Array, seen: Array, rest: Array, intact: Array, generator: np.random.Generator
) -> tuple[Array, Array]:
    """(draws, candidates) how many of the rest's hits become misses, and how many misses hits.

    Coefficients are drawn from their posterior (Laplace's approximation), counts from Poisson's distribution, whose
    variance is a little larger than that of the sum of unequal chances.
    """
    mean, covariance = _regression(differs, seen - seen.mean())
    rows = len(differs)
    drawn = generator.multivariate_normal(mean, covariance, size=DRAWS)
    counts = []
    for kind in (intact, np.logical_not(intact)):
        expected = kind.sum() * generator.gamma(STRAY, 1 / len(seen), size=(DRAWS, rows))
        for value in (rest - seen.mean())[kind]:
            expected += 1 / (1 + np.exp(-(drawn[:, :rows] + drawn[:, rows:] * value)))
        counts.append(np.minimum(generator.poisson(expected), kind.sum()))
    return counts[0], counts[1]


def _regression(differs: Array, sure: Array) -> tuple[Array, Array]:
    """Intercepts and slopes of the candidates: mean (2 * candidates,) and covariance of their posterior.

    Newton's method; both have a normal prior around a common mean, whose own prior is wide.
    """
    rows, count = differs.shape
    ones = np.repeat(np.eye(rows), count, axis=0)
    x = np.concatenate([ones, ones * np.tile(sure, rows)[:, None]], axis=1)
    y = differs.astype(float).ravel()
    prior = np.zeros((2 * rows, 2 * rows))
    for begin, spread in ((0, SPREAD), (rows, SLOPES)):
        part = slice(begin, begin + rows)
        prior[part, part] = (np.eye(rows) - 1 / rows) / spread**2 + 1 / (rows * WIDE) ** 2
    weights = np.zeros(2 * rows)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ weights))
        curvature = (x * (p * (1 - p))[:, None]).T @ x + prior
        step = np.linalg.solve(curvature, x.T @ (y - p) - prior @ weights)
        weights += np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-6:
            break
    return weights, np.linalg.inv(curvature)
