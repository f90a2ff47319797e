"""How good a model is on a task: items encoded, scored in batches on the model's device, and judged."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from trimllm.blocks import decoder, families
from trimllm.checkpoints import mixed
from trimllm.checkpoints.dtypes import name_of
from trimllm.checkpoints.mixed import Autocast
from trimllm.errors import InputError
from trimllm.evaluation import encoding, forward
from trimllm.evaluation.batches import Batches, NoRoomError, make_rows
from trimllm.evaluation.encoding import Encoded
from trimllm.evaluation.forward import Pieces
from trimllm.evaluation.judging import Evaluation, Scores, judge
from trimllm.parallel import ALONE, Share
from trimllm.tasks.items import Item

TOKEN_BUDGET = 4096
"""Tokens of one evaluation batch, padding included."""

MIXED = "mixed bfloat16"
"""Products in bfloat16, by float32 weights."""

INEXACT = "shared prompts are not exact for"


def gather(pieces: Iterable[Pieces], encoded: Sequence[Encoded]) -> Scores:
    """Put the outcomes of batches together, windows of one document added up; items in ascending order.

    Raises:
        ValueError: if they are not those of `encoded`, every row once.
    """
    due: dict[int, list[int]] = {}
    for one in encoded:
        before = due.get(one.item, [0] * len(one.continuations))
        due[one.item] = [count + len(ids) for count, ids in zip(before, one.continuations, strict=True)]
    total = forward.add_up(pieces)
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
        except forward.UNFIT as error:
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
        with forward.evaluating(model), mixed.casting(model, self.autocast):
            yield

    def _scores(self, model: Any, batches: Batches, encoded: Sequence[Encoded], share: Share = ALONE) -> Scores:
        work = partial(forward.batch_pieces, model)
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
