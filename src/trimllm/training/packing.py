"""From training rows to rectangles of ids with hardly a pad: several short rows after each other in one packed row.

Rows that share a packed row do not see each other: the positions start again at 0 with each of them, and from such
position ids (without a 2-D mask) transformers builds block-diagonal masks, sliding windows included. Families that
cannot do that get rows of similar length side by side; padding stands at the right, where no causal model sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimllm import memory
from trimllm.blocks import decoder, families
from trimllm.evaluation import encoding, forward

MOST_PER_PACKED_ROW = 8
"""How many rows, on average, may share a packed row."""
WIDTH_COST = 1024
"""Tokens of width at which attention under a block-diagonal mask costs as much as the rest of a block."""
TOLERANCE = 2e-4
"""What packed and single rows may differ by in a float32 log-probability, in nats: the rounding of the same sums."""


@dataclass(frozen=True)
class Example:
    """One training row: the ids, of which those from `start` on are targets."""

    ids: tuple[int, ...]
    start: int
    prompt_cut: bool = False
    """The beginning of its prompt did not fit."""
    answer_cut: bool = False
    """The end of its target did not fit, or the EOS after it."""

    @property
    def targets(self) -> int:
        return len(self.ids) - self.start

    @property
    def inputs(self) -> int:
        """A row's last id is only predicted, never an input."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Way:
    """Packing mode: how a model takes packed rows. `limit` is their greatest length, 0 where rows cannot share one."""

    limit: int
    mask: torch.dtype | None = None
    """The dtype of the mask to give where the model does not make one from the position ids."""


ALONE = Way(0)


@dataclass(frozen=True)
class Packed:
    """One micro-batch. `where` (k,) are flat indices into (rows * length) from which `targets` (k,) are predicted;
    `spans` says where each example lies: (example, packed row, its first position there)."""

    inputs: dict[str, torch.Tensor]
    where: torch.Tensor
    targets: torch.Tensor
    spans: tuple[tuple[Example, int, int], ...]

    @property
    def cells(self) -> int:
        """Positions that are computed, padding included."""
        return self.inputs["input_ids"].numel()

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return sum(example.inputs for example, _, _ in self.spans)


def deal(examples: Sequence[Example], count: int) -> list[list[Example]]:
    """`examples` in `count` packed rows of about equal length: the longest first, each to the shortest row so far."""
    bins: list[list[Example]] = [[] for _ in range(count)]
    loads = [0] * count
    for example in sorted(examples, key=lambda one: -one.inputs):
        place = loads.index(min(loads))
        bins[place].append(example)
        loads[place] += example.inputs
    return [packed for packed in bins if packed]


def arrange(examples: Sequence[Example], limit: int) -> list[list[Example]]:
    """The packed rows, of at most `limit` tokens, that cost least: padding against attention over longer rows.

    A `limit` of 0 leaves every row alone.
    """
    best = [[example] for example in examples]
    longest = max(example.inputs for example in examples)
    least = len(best) * longest * _cost(longest / 2)
    for each in range(2, MOST_PER_PACKED_ROW + 1):
        bins = deal(examples, -(-len(examples) // each))
        width = max(sum(example.inputs for example in packed) for packed in bins)
        if width <= limit and (cost := len(bins) * width * _cost(width)) < least:
            best, least = bins, cost
    return best


def _cost(width: float) -> float:
    """Cost of one position, relative to a position of a very short row; a plain causal mask skips half of the width."""
    return 1 + width / WIDTH_COST


def pack(examples: Sequence[Example], way: Way, pad_id: int, device: torch.device | str = "cpu") -> Packed:
    """The tensors of a micro-batch; rows share packed rows where that costs least."""
    return lay_out(arrange(examples, way.limit), pad_id, device, way.mask)


def lay_out(
    bins: Sequence[Sequence[Example]], pad_id: int, device: torch.device | str, mask: torch.dtype | None = None
) -> Packed:
    """Tensors for these packed rows: `input_ids` (rows, length); where some are shared, `position_ids` too, and with
    `mask` an additive mask (rows, 1, length, length) of that dtype."""
    length = max(sum(example.inputs for example in packed) for packed in bins)
    ids = torch.full((len(bins), length), pad_id)
    positions = torch.arange(length).repeat(len(bins), 1)
    where: list[int] = []
    targets: list[int] = []
    spans: list[tuple[Example, int, int]] = []
    for number, packed in enumerate(bins):
        begin = 0
        for example in packed:
            end = begin + example.inputs
            ids[number, begin:end] = torch.tensor(example.ids[:-1])
            positions[number, begin:end] = torch.arange(example.inputs)
            where += range(number * length + begin + example.start - 1, number * length + end)
            targets += example.ids[example.start :]
            spans.append((example, number, begin))
            begin = end
        positions[number, begin:] = torch.arange(length - begin)
    inputs = {"input_ids": ids.to(device)}
    if len(bins) < len(spans):
        inputs["position_ids"] = positions.to(device)
        if mask is not None:
            part = (positions == 0).cumsum(1).to(device)
            seen = (part[:, :, None] == part[:, None, :]).tril()[:, None]
            inputs["attention_mask"] = torch.zeros(seen.shape, dtype=mask, device=device).masked_fill_(
                ~seen, torch.finfo(mask).min
            )
    return Packed(inputs, torch.tensor(where, device=device), torch.tensor(targets, device=device), tuple(spans))


def find_way(model: Any, examples: Sequence[Example], pad_id: int) -> tuple[Way, str | None]:
    """The packing mode in which this model is exact, or `ALONE` and why rows cannot share one.

    Known for the family, and checked: a short, a long and a short row of `examples`, together against one by one. They
    are in two packed rows side by side, since FlashAttention goes by positions in a single packed row alone.
    """
    kind = decoder.text_config(model)
    if not families.branching(kind):
        return ALONE, f"model type {kind.model_type} does not keep rows apart by their positions"
    limit = encoding.context_length(model.config)
    by_length = sorted((one for one in examples if one.targets), key=lambda one: one.inputs)
    if len(by_length) < 3:
        return ALONE, None
    short, second = by_length[:2]
    fitting = [one for one in by_length[2:] if one.inputs + short.inputs + second.inputs <= limit]
    if not fitting:
        return ALONE, f"no two rows fit the context of {limit} tokens together"
    sample = [short, fitting[-1], second]
    tolerance = TOLERANCE if model.dtype == torch.float32 else 0.3
    with torch.no_grad(), forward.evaluating(model):
        alone = torch.cat([_logprobs(model, lay_out([[one]], pad_id, model.device)) for one in sample])
        for way in (Way(limit), *([Way(limit, model.dtype)] if decoder.takes_masks(model) else [])):
            try:
                together = _logprobs(model, lay_out([sample, sample], pad_id, model.device, way.mask))
            except forward.UNFIT as error:
                if memory.is_out_of_memory(error):
                    return ALONE, "memory ran out when packed rows were tried"
                continue
            if float((together - alone.repeat(2)).abs().max()) <= tolerance:
                return way, None
    where = f"on model type {kind.model_type}" if decoder.takes_masks(model) else "with FlashAttention"
    return ALONE, f"packed rows are not exact {where}"


def _logprobs(model: Any, packed: Packed) -> torch.Tensor:
    logits = target_logits(model, packed).float()
    return -torch.nn.functional.cross_entropy(logits, packed.targets, reduction="none")


def target_logits(model: Any, packed: Packed) -> torch.Tensor:
    """Logits (k, vocabulary) at the positions of the targets; the output head computes no others."""
    with forward.head_only_at(model, packed.where) as used:
        logits = model(**packed.inputs, use_cache=False).logits.flatten(0, 1)
    return logits if used else logits.index_select(0, packed.where)
