"""From log-likelihoods to the metric: accuracy, acc_norm, likelihood and perplexity, each with its standard error.

They agree with lm-evaluation-harness: the choice with the highest summed log-likelihood wins (`acc`), or the highest
per character (`acc_norm`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimllm.errors import InputError
from trimllm.evaluation.paired import standard_error
from trimllm.tasks.items import Item
from trimllm.tasks.spec import METRICS, is_accuracy


@dataclass(frozen=True)
class Scores:
    """What a model gives to the continuations of some items: per item, one number per continuation."""

    loglik: tuple[tuple[float, ...], ...]
    """Summed log-likelihood in nats."""
    tokens: tuple[tuple[int, ...], ...]
    """Length in tokens."""
    greedy: tuple[tuple[bool, ...], ...]
    """Whether greedy decoding would have produced the continuation."""


@dataclass(frozen=True)
class Evaluation:
    """The result on one set. `value` is what the task's metric says, in percent, with its standard error in points."""

    metric: str
    value: float
    stderr: float
    n: int
    loss: float
    """Mean negative log-likelihood per token of the right continuation, in nats; its exponential is the perplexity."""
    acc: float | None = None
    acc_norm: float | None = None
    probability: float | None = None
    """choices: percent, the mean probability of the right one among them (see `probabilities`)."""
    greedy: float | None = None
    """generation: percent of targets that greedy decoding reproduces."""
    correct: tuple[bool, ...] = ()
    """Per item; empty for generation and text."""
    per_item: tuple[float, ...] = ()
    """What `value` is the mean of: 100 or 0 for a choice; for a likelihood, `value` and what the item moves it by, to
    first order. See `paired.difference`."""
    dtype: str | None = None
    """Dtype of the weights when they computed it (a CPU that emulates the 16 bits of a checkpoint takes float32), or
    `MIXED`."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def __str__(self) -> str:
        shown = f"{self.value:.1f} +- {self.stderr:.1f} (n={self.n})"
        return shown if self.correct else f"{shown}, perplexity {self.perplexity:.3f}"

    def summary(self) -> dict[str, Any]:
        """What goes into result files: everything but the per-item outcomes."""
        kept = {k: value for k, value in vars(self).items() if k not in ("correct", "per_item") and value is not None}
        return kept | {"perplexity": self.perplexity}


def judge(items: Sequence[Item], scores: Scores, metric: str) -> Evaluation:
    """From scores to the metric: `acc` and `acc_norm` of choices, `likelihood` of generation and text, all in percent.

    `likelihood` is 100 * exp(-loss), the geometric mean probability of a target token: like accuracy it lies in 0-100
    and grows with quality. Its standard error is the delta method's, over items.

    Raises:
        InputError: if the metric does not fit the items.
    """
    answers = np.array([item.answer for item in items])
    right = np.array([row[a] for row, a in zip(scores.loglik, answers, strict=True)])
    tokens = np.array([row[a] for row, a in zip(scores.tokens, answers, strict=True)])
    loss = float(-right.sum() / tokens.sum())
    n = len(items)
    if metric == "likelihood":
        moved = (right + loss * tokens) / tokens.sum()
        value = 100 * math.exp(-loss)
        exact = 100 * float(np.mean([row[a] for row, a in zip(scores.greedy, answers, strict=True)]))
        per_item = value * (1 + n * moved)
        error = standard_error(per_item, [item.group for item in items])
        return Evaluation(metric, value, error, n, loss, greedy=exact, per_item=tuple(per_item.tolist()))
    if not is_accuracy(metric):
        raise InputError(f"unknown metric {metric!r}: use acc, acc_norm or likelihood")
    if any(len(item.continuations) < 2 for item in items):
        raise InputError(f"metric {metric} needs choices, and this task has none: use likelihood")
    hits = {name: outcomes(items, scores, name)[0] for name in METRICS["choice"]}
    error = 100 * standard_error(hits[metric], [item.group for item in items])
    percent = {name: 100 * float(hit.mean()) for name, hit in hits.items()}
    correct, per_item = tuple(map(bool, hits[metric])), tuple((100.0 * hits[metric]).tolist())
    known = percent["acc"], percent["acc_norm"], 100 * float(probabilities(items, scores, metric).mean())
    return Evaluation(metric, percent[metric], error, n, loss, *known, correct=correct, per_item=per_item)


def outcomes(items: Sequence[Item], scores: Scores, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Per item (items,): whether the right choice scores highest, and by how much (less than 0: another one does).

    `metric` "acc" scores by log-likelihood, "acc_norm" by log-likelihood per character.
    """
    hits, margins = [], []
    for item, row in zip(items, scores.loglik, strict=True):
        values = np.array(row)
        if metric == "acc_norm":
            values = values / _lengths(item)
        hits.append(int(np.argmax(values)) == item.answer)
        margins.append(values[item.answer] - np.delete(values, item.answer).max())
    return np.array(hits), np.array(margins)


def probabilities(items: Sequence[Item], scores: Scores, metric: str) -> np.ndarray:
    """Per item (items,): the probability of the right choice if one of them must be said: the softmax over the choices'
    log-likelihoods ("acc"), or over those per character, at the choices' mean length ("acc_norm").

    It says of every question what a hit says of those that are near the edge, so its mean over few questions is known
    better than accuracy, whose order it has.
    """
    found = []
    for item, row in zip(items, scores.loglik, strict=True):
        values = np.array(row)
        if metric == "acc_norm":
            values = values / _lengths(item) * _lengths(item).mean()
        weights = np.exp(values - values.max())
        found.append(weights[item.answer] / weights.sum())
    return np.array(found)


def _lengths(item: Item) -> np.ndarray:
    """Characters of each choice."""
    return np.maximum(item.lengths or [len(text.strip()) for text in item.continuations], 1)


def estimate(share: float, seen: int, metric: str) -> Evaluation:
    """An evaluation that was broken off after `seen` items: the share of hits that is expected over all."""
    error = 100 * math.sqrt(share * (1 - share) / max(seen - 1, 1))
    return Evaluation(metric, 100 * float(share), error, seen, math.nan)
