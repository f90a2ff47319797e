"""How good a model is on a task: log-likelihood of continuations, accuracy, acc_norm, perplexity.

Scoring agrees with lm-evaluation-harness: the choice with the highest summed log-likelihood wins (`acc`), or the
highest per character (`acc_norm`). Only the log-probabilities of target tokens are computed at the head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from trimllm.blocks import decoder, families
from trimllm.checkpoints import mixed
from trimllm.checkpoints.dtypes import name_of
from trimllm.checkpoints.mixed import Autocast
from trimllm.errors import InputError, TrimError
from trimllm.evaluation import encoding
from trimllm.evaluation.batches import Batch, Batches, NoRoomError, make_rows
from trimllm.evaluation.encoding import Encoded
from trimllm.evaluation.paired import standard_error
from trimllm.parallel import ALONE, Share
from trimllm.tasks.items import Item

TOKEN_BUDGET = 4096
"""Tokens of one evaluation batch, padding included."""

LOGITS = 2**22
"""Logits of a chunk, where not all are held at once: 16 MiB in float32."""
LEAST_PLACES = 256
"""Positions of a chunk, however large the vocabulary: fewer would read the head's weights too often."""

MIXED = "mixed bfloat16"
"""Products in bfloat16, by float32 weights."""

INEXACT = "shared prompts are not exact for"

UNFIT = (TrimError, LookupError, TypeError, ValueError, RuntimeError)
"""What a forward pass raises in a model that cannot take a short cut that is tried on it."""


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


def chunk(vocabulary: int) -> int:
    """Positions of which a chunk holds the logits."""
    return max(LEAST_PLACES, LOGITS // vocabulary)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within, the model is in evaluation mode; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def head_only_at(model: Any, where: torch.Tensor) -> Iterator[list[bool]]:
    """Within, the output head sees only hidden states at the flat positions `where`: logits are (1, k, vocabulary)."""
    used: list[bool] = []

    def select(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        used.append(True)
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, where).unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield used
    finally:
        if handle is not None:
            handle.remove()


def target_logprobs(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (k,) of every target token of the batch in float32, and whether it is the most likely one (k,).

    Gradients flow unless the caller turns them off.
    """
    with head_only_at(model, batch.where) as used:
        logits = model(**batch.inputs, use_cache=False).logits
    logits = logits.flatten(0, 1)
    if not used:
        logits = logits.index_select(0, batch.where)
    found = list[torch.Tensor]()
    places = chunk(logits.shape[-1])  # what is computed from logits takes as much memory again, or twice that
    for some, targets in zip(logits.split(places), batch.targets.split(places), strict=True):
        exact = some.float()
        found.append(exact.gather(1, targets[:, None])[:, 0] - exact.logsumexp(1))
    return torch.cat(found), logits.argmax(1) == batch.targets


class NotFiniteError(TrimError):
    """A model gives log-probabilities that are no numbers."""


Pieces = dict[tuple[int, int], tuple[float, int, bool]]
"""(item, choice) -> summed log-likelihood, tokens, greedy: the outcome of one batch."""


@torch.no_grad()
def batch_pieces(model: Any, batch: Batch) -> Pieces:
    """Scores of one batch. The model's device decides where it is computed.

    Raises:
        NotFiniteError: if the model gives a log-probability that is not a number.
    """
    logprobs, greedy = target_logprobs(model, batch)
    count = len(batch.owners)
    logprobs, greedy, segment = logprobs.cpu(), greedy.cpu(), batch.segment.cpu()  # not every device adds in float64
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, segment, logprobs.double())
    misses = torch.zeros(count, dtype=torch.long).index_add_(0, segment, (~greedy).long())
    lengths = torch.bincount(segment, minlength=count)
    if len(bad := (~torch.isfinite(total)).nonzero()):
        raise NotFiniteError(
            f"the model's log-likelihoods are not finite numbers, for {len(bad)} of {count} continuations in a batch "
            f"(the first: item {batch.owners[int(bad[0])][0] + 1} of its set): try --dtype float32; if that does not "
            "help, the weights are damaged, or were trained at far too high an --lr"
        )
    columns = zip(total.tolist(), lengths.tolist(), (misses == 0).tolist(), strict=True)
    return dict(zip(batch.owners, columns, strict=True))


def add_up(pieces: Iterable[Pieces]) -> Pieces:
    """Outcomes of batches as if they had been one: windows of the same document are added up."""
    total: Pieces = {}
    for outcome in pieces:
        for owner, (loglik, tokens, greedy) in outcome.items():
            before = total.get(owner, (0.0, 0, True))
            total[owner] = (before[0] + loglik, before[1] + tokens, before[2] and greedy)
    return total


def gather(pieces: Iterable[Pieces], encoded: Sequence[Encoded]) -> Scores:
    """Put the outcomes of batches together, windows of one document added up; items in ascending order.

    Raises:
        ValueError: if they are not those of `encoded`, every row once.
    """
    due: dict[int, list[int]] = {}
    for one in encoded:
        before = due.get(one.item, [0] * len(one.continuations))
        due[one.item] = [count + len(ids) for count, ids in zip(before, one.continuations, strict=True)]
    total = add_up(pieces)
    table: list[list[Any]] = []
    for item in sorted(due):
        row = [total.pop((item, choice), (0.0, 0, True)) for choice in range(len(due[item]))]
        if (found := [tokens for _, tokens, _ in row]) != due[item]:
            raise ValueError(f"item {item}: outcomes of {found} tokens per continuation, but there are {due[item]}")
        table.append(row)
    if total:
        item, choice = next(iter(total))
        raise ValueError(f"item {item}: an outcome of continuation {choice}, which is not among those that were asked")
    columns = [tuple(tuple(cell[i] for cell in row) for row in table) for i in range(3)]
    return Scores(*columns)


class Scorer:
    """Items made ready for one model: encoded, in batches on its device. Branches share prompts where that is exact.

    Whether it is exact is known for the family and checked on the first rows of the data; where it is not, one row per
    continuation is computed and `note` says so. With `autocast` the model computes in mixed precision.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        items: Sequence[Item],
        *,
        token_budget: int = TOKEN_BUDGET,
        max_length: int | None = None,
        truncate: bool = False,
        branches: bool | None = None,
        autocast: Autocast | None = None,
    ) -> None:
        if not items:
            raise InputError(
                "there is nothing to evaluate: `items` has no rows: give those of a set, such as load_task(...).test"
            )
        self.items = list(items)
        limit = encoding.context_length(model.config, max_length)
        self.encoded = encoding.encode(tokenizer, self.items, limit, truncate=truncate)
        self.note: str | None = None
        self.token_budget = token_budget
        encoding.check_vocabulary(tokenizer, encoding.rows_of(self.encoded), encoding.vocabulary(model))
        self.pad_id = encoding.pad_id(tokenizer, model)
        self.autocast: Autocast | None = None  # whether prompts may be shared shows in the weights' own dtype
        self.branches = self._decide(model) if branches is None else branches
        self.autocast = autocast
        self.batches = self._batches(model, self.encoded, self.branches)

    def _batches(self, model: Any, encoded: Sequence[Encoded], branches: bool) -> Batches:
        made = make_rows(encoded, branches=branches)
        return Batches(made, self.token_budget, pad_id=self.pad_id, dtype=model.dtype, device=model.device)

    def batches_of(self, model: Any, items: Sequence[int]) -> Batches:
        """Batches of some of the items."""
        wanted = set(items)
        return self._batches(model, [one for one in self.encoded if one.item in wanted], self.branches)

    def plain(self) -> Scorer:
        """One that computes in the dtype of the weights."""
        found = copy.copy(self)
        found.autocast = None
        return found

    def right_only(self, model: Any) -> Scorer:
        """A scorer of the right continuations alone: all that a loss takes. This one, if there are no wrong ones."""
        if all(len(item.continuations) == 1 for item in self.items):
            return self
        right = copy.copy(self)
        right.items = [item.right_only() for item in self.items]
        right.encoded = [one.right_only() for one in self.encoded]
        right.note, right.branches = None, True  # nothing branches off a prompt that has one continuation
        right.batches = right._batches(model, right.encoded, branches=True)
        return right

    def _decide(self, model: Any) -> bool:
        many = [one for one in self.encoded if sum(len(ids) > 1 for ids in one.continuations) > 1]
        if not many:
            return True
        if not decoder.takes_masks(model):
            self.note = "choices are scored one by one: FlashAttention takes no mask that keeps them apart in one row"
            return False
        window = encoding.attention_window(model.config)
        if window and max(map(_reach, self.encoded)) > window:  # a batch has one mask for all of its rows
            self.note = f"choices are scored one by one: rows are longer than the attention window of {window} tokens"
            return False
        largest = max(many, key=lambda one: sum(map(len, one.continuations)))
        sample = [*many[:2], *sorted(many, key=_reach)[-2:], largest]
        exact = families.branching(decoder.text_config(model))
        why = self._branching_fails(model, sample) if exact else INEXACT
        if why:
            self.note = f"choices are scored one by one: {why} {model.config.model_type}"
        return why is None

    def _branching_fails(self, model: Any, sample: list[Encoded]) -> str | None:
        """Why shared prompts and single rows do not give the same scores, up to the rounding of the dtype."""
        tolerance = 2e-4 if model.dtype == torch.float32 else 0.3
        try:
            shared, single = (self._scores(model, self._batches(model, sample, way), sample) for way in (True, False))
        except UNFIT as error:
            tight = isinstance(error, NoRoomError)
            return "memory has no room for shared prompts of" if tight else INEXACT
        pairs = zip(np.concatenate(shared.loglik), np.concatenate(single.loglik), strict=True)
        close = all(abs(a - b) <= tolerance * max(1.0, abs(b) / 20) for a, b in pairs)
        return None if close else INEXACT

    def score(self, model: Any, share: Share = ALONE) -> Scores:
        """Scores of all items; the model must be the one it was made for, or a trimmed one of it, in any dtype."""
        same = model.dtype == self.batches.dtype
        batches = self.batches if same else self._batches(model, self.encoded, self.branches)
        return self._scores(model, batches, self.encoded, share)

    @contextmanager
    def computing(self, model: Any) -> Iterator[None]:
        """Within, forward passes of the model are as they are to be measured; afterwards as they were."""
        with evaluating(model), mixed.casting(model, self.autocast):
            yield

    def _scores(self, model: Any, batches: Batches, encoded: Sequence[Encoded], share: Share = ALONE) -> Scores:
        work = partial(batch_pieces, model)
        with self.computing(model):
            numbers = range(share.rank, len(batches), share.world)
            mine = [pieces for number in numbers for pieces in batches.compute(number, work)]
            return gather(share.gather(mine), encoded)

    def evaluate(self, model: Any, metric: str, share: Share = ALONE) -> Evaluation:
        """Score and judge all items."""
        dtype = MIXED if self.autocast else name_of(model.dtype)
        return replace(judge(self.items, self.score(model, share), metric), dtype=dtype)


def _reach(one: Encoded) -> int:
    """Positions that scoring an item's longest continuation takes."""
    return len(one.prompt) + max(map(len, one.continuations)) - 1


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
    if metric not in ("acc", "acc_norm"):
        raise InputError(f"unknown metric {metric!r}: use acc, acc_norm or likelihood")
    if any(len(item.continuations) < 2 for item in items):
        raise InputError(f"metric {metric} needs choices, and this task has none: use likelihood")
    hits = {name: outcomes(items, scores, name)[0] for name in ("acc", "acc_norm")}
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


def evaluate(model: Any, tokenizer: Any, items: Sequence[Item], metric: str, **settings: Any) -> Evaluation:
    """Score items and judge them by `metric`: acc, acc_norm (choices) or likelihood.

        data = trimllm.load_task("cases.jsonl", tokenizer=tokenizer)
        print(trimllm.evaluate(model, tokenizer, data.test, data.metric))

    Args:
        settings: those of `Scorer`: `token_budget` (tokens of a batch), `max_length` and `truncate`.

    Raises:
        InputError: if there are no items, a row exceeds the context, or the metric does not fit them.
    """
    return Scorer(model, tokenizer, items, **settings).evaluate(model, metric)
