"""Importance of units: pure functions of arrays, higher = keep, lower = drop first.

Each takes what was measured for the n candidates (see `Evidence`) and returns (n,) floats. `importance` picks one by
name; `select.choose` decides which unit goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimllm.config import STRATEGIES, unknown_strategy
from trimllm.errors import InputError

Array = NDArray[np.float64]

DELTA = 0.01
"""The small constant of s_scan."""


@dataclass(frozen=True)
class Evidence:
    """What is known of the n candidates for removal; fields that a score does not need may stay None."""

    depth: int
    """Blocks of the original model."""
    position: Array
    """(n,) position of each unit in the original model, in blocks (a shifted pair stands at i + 0.5)."""
    accuracy: Array | None = None
    """(n,) percent on the calibration set when the unit is deleted."""
    probability: Array | None = None
    """(n,) percent: mean probability of the right choice when the unit is deleted; of texts, the accuracy."""
    loss: Array | None = None
    """(n,) nats per target token when the unit is deleted."""
    norm: Array | None = None
    """(n,) L2 norm of the stream after the unit, averaged over tokens."""
    cosine: Array | None = None
    """(n,) mean cosine between the residual stream before and after the unit."""
    run_angle: Array | None = None
    """(n,) angle at the last token over the run of as many blocks as are still to drop that starts at the unit, in half
    turns; NaN where none fits."""
    taylor: Array | None = None
    """(n,) sum of |weight * gradient| over the unit's parameters."""
    magnitude: Array | None = None
    """(n,) L1 norm of the unit's parameters."""
    seed: int = 0


OF_TRIALS = {"accuracy", "probability", "loss"}
"""Fields of the evidence that a scan has from trial deletions: without need of them it measures activations alone."""
OF_WEIGHTS = {"taylor", "magnitude"}
"""Those that come from a layer's weights and their gradients."""


def s_scan(accuracy: Array, delta: float = DELTA) -> Array:
    """Sensitivity: (100 - a) / ((1 + d^2) + (1 + d) a), for the accuracy a (percent) after deleting the unit.

    Strictly decreasing in a, from 100 / (1 + d^2) to 0. Source: TrimLLM (arXiv 2412.11242), calibration scanning.
    """
    return (100.0 - accuracy) / ((1.0 + delta**2) + (1.0 + delta) * accuracy)


def uncertainty(probability: Array) -> Array:
    """100 - p, for the mean probability p (percent) of the right choice after deleting the unit: how unsure the model
    becomes. s_scan is of accuracy, which a few questions near the edge decide; in this all questions count."""
    return 100.0 - probability


def s_norm(norm: Array) -> Array:
    """Activation norm: 100 * min_j ||x_j|| / ||x_i||, in (0, 100]; the largest norm scores lowest.

    `norm` is per token, averaged over prompts and right answers. Source: TrimLLM (arXiv 2412.11242), which has the
    Frobenius norm: the root of the summed squares, in which the few tokens of huge activations that most models have
    (the first one) would outweigh all others.
    """
    return 100.0 * norm.min() / norm


def block_influence(cosine: Array) -> Array:
    """1 - cos(stream before, stream after), averaged over the tokens of prompts and right answers.

    Source: ShortGPT (arXiv 2403.03853), eq. 1.
    """
    return 1.0 - cosine


def angular(run_angle: Array) -> Array:
    """arccos(cos) / pi between the input of block l and the output of block l + n - 1, at the last token of a sequence,
    averaged over sequences; n are the blocks still to drop.

    Source: The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887), eq. 7. The method removes one
    contiguous run, so a start whose run does not fit never goes first.
    """
    return np.where(np.isnan(run_angle), np.inf, run_angle)


def loss_ablation(loss: Array) -> Array:
    """Loss of the right answers after deleting the unit; the papers have that of general text.

    Sources: Shortened LLaMA (arXiv 2402.02834), PPL; SLEB (arXiv 2402.09025).
    """
    return loss


def perplexity_ablation(loss: Array) -> Array:
    """exp of the loss after deleting the unit: the same order, on the scale that papers print. Sources: as for loss."""
    return np.exp(np.minimum(loss, 700.0))


def taylor(first_order: Array) -> Array:
    """Sum of |w * dL/dw| over the unit. Source: Shortened LLaMA (arXiv 2402.02834); LLM-Pruner (arXiv 2305.11627)."""
    return first_order


def magnitude(norm_of_weights: Array) -> Array:
    """L1 norm of the unit's weights. Source: Shortened LLaMA (arXiv 2402.02834), Mag; Li et al. (arXiv 1608.08710)."""
    return norm_of_weights


def random(n: int, seed: int) -> Array:
    """A seeded random order: the control that every score must beat."""
    return np.random.default_rng(seed % 2**32).permutation(n).astype(np.float64)


def first(position: Array) -> Array:
    """Bottom blocks go first. Source: Sajjad et al. (arXiv 2004.03844), bottom-layer dropping."""
    return position


def last(position: Array) -> Array:
    """Top blocks go first. Source: Sajjad et al. (arXiv 2004.03844), top-layer dropping."""
    return -position


def alternate(position: Array, depth: int) -> Array:
    """Every second block goes from the top, then the rest from the top. Source: Sajjad et al. (arXiv 2004.03844)."""
    kept_longer = (np.floor(depth - 1 - position) % 2 == 0) * float(depth)
    return kept_longer - position


def symmetric(position: Array, depth: int) -> Array:
    """The middle goes first, both ends stay. Source: Sajjad et al. (arXiv 2004.03844), symmetric dropping."""
    return np.abs(position - (depth - 1) / 2)


@dataclass(frozen=True)
class Score:
    """A named score: what it must be given, and how it is computed."""

    needs: tuple[str, ...]
    compute: Callable[[Evidence], Array]


def _of(field: str, function: Callable[[Array], Array]) -> Score:
    """The score that is a function of one field of the evidence."""
    return Score((field,), lambda evidence: function(getattr(evidence, field)))


SCORES: dict[str, Score] = {
    "scan": _of("accuracy", s_scan),
    "probability": _of("probability", uncertainty),
    "norm": _of("norm", s_norm),
    "bi": _of("cosine", block_influence),
    "angular": _of("run_angle", angular),
    "loss": _of("loss", loss_ablation),
    "perplexity": _of("loss", perplexity_ablation),
    "taylor": _of("taylor", taylor),
    "magnitude": _of("magnitude", magnitude),
    "random": Score((), lambda e: random(len(e.position), e.seed)),
    "first": Score((), lambda e: first(e.position)),
    "last": Score((), lambda e: last(e.position)),
    "alternate": Score((), lambda e: alternate(e.position, e.depth)),
    "symmetric": Score((), lambda e: symmetric(e.position, e.depth)),
}


def needs(strategy: str) -> frozenset[str]:
    """Names of the `Evidence` fields that a strategy reads.

    Raises:
        InputError: for an unknown strategy, with the nearest name.
    """
    return frozenset(field for name in _parts(strategy) for field in SCORES[name].needs)


def deciding(strategy: str) -> str:
    """The score that a strategy decides by."""
    return _parts(strategy)[0]


def breaking(strategy: str) -> str | None:
    """The score that breaks its ties, if there is one."""
    return next(iter(_parts(strategy)[1:]), None)


def _parts(strategy: str) -> tuple[str, ...]:
    names = tuple(strategy.split("+"))
    if strategy not in STRATEGIES:
        raise InputError(unknown_strategy(strategy))
    return names


def importance(name: str, evidence: Evidence) -> Array:
    """(n,) importance of the candidates by the score `name`; higher = keep.

    Raises:
        InputError: if the score needs something that was not measured.
    """
    score = SCORES[deciding(name)]
    missing = [field for field in score.needs if getattr(evidence, field) is None]
    if missing:
        raise InputError(f"score {name!r} needs {', '.join(missing)}, which was not measured")
    return score.compute(evidence)
