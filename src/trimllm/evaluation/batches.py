"""From encoded items to what a model is fed: rows, and batches of them.

One question is one row. Its choices are branches after the shared prompt: each branch sees the prompt and itself (4-D
mask), and its positions start where the prompt ends, so that every continuation scores as if it stood alone. Where a
model cannot do that exactly, `branches=False` gives one row per continuation.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, overload

import torch

from trimllm import memory
from trimllm.errors import TrimError
from trimllm.evaluation.encoding import Encoded

T = TypeVar("T")


@dataclass(frozen=True)
class Branch:
    """Where in a row the continuation number `choice` of item number `item` is predicted, and by which ids."""

    item: int
    choice: int
    targets: tuple[int, ...]
    right: bool = True


@dataclass(frozen=True)
class Row:
    """One row of input ids; `branches` are laid out after the first `prompt_length` ids, in order."""

    ids: tuple[int, ...]
    prompt_length: int
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward. `where` (k,) are flat indices into (rows * length); `targets` (k,) what follows there;
    `owners` lists (item, choice), each once, and `segment` (k,) says which of them a target belongs to (windows of one
    document may share a batch); `last` are the flat indices of each right continuation's last input id; `real`
    (rows, length) marks what is not padding, and `right` (rows, length) what activations are averaged over: of every
    question its prompt, once, and its right continuation."""

    inputs: dict[str, torch.Tensor]
    real: torch.Tensor
    right: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor
    segment: torch.Tensor
    last: torch.Tensor
    owners: tuple[tuple[int, int], ...]

    def to(self, device: torch.device | str) -> Batch:
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        tensors = (self.real, self.right, self.where, self.targets, self.segment, self.last)
        real, right, where, targets, segment, last = (tensor.to(device) for tensor in tensors)
        return Batch(inputs, real, right, where, targets, segment, last, self.owners)


WIDE, PROMPTS = 512, 4
"""So many tokens of choices share a row, or so many lengths of their prompt if that is more; the next ones get a row of
their own, with the prompt once more, since attention costs the square of a row."""


def make_rows(encoded: Sequence[Encoded], *, branches: bool = True) -> list[Row]:
    """Input rows. A continuation's last id is only predicted, never an input."""
    out = []
    for one in encoded:
        owned = [Branch(one.item, choice, ids, choice == one.answer) for choice, ids in enumerate(one.continuations)]
        for group in _groups(owned, max(WIDE, PROMPTS * len(one.prompt)) if branches else 0):
            ids = list(one.prompt)
            for branch in group:
                ids += branch.targets[:-1]
            out.append(Row(tuple(ids), len(one.prompt), tuple(group)))
    return out


def _groups(owned: Sequence[Branch], room: int) -> list[list[Branch]]:
    """The branches in order, of at most `room` tokens together; a longer one alone."""
    groups: list[list[Branch]] = []
    for branch in owned:
        taken = sum(len(each.targets) for each in groups[-1]) if groups else room
        if groups and taken + len(branch.targets) <= room:
            groups[-1].append(branch)
        else:
            groups.append([branch])
    return groups


class NoRoomError(TrimError):
    """One row alone does not fit into memory."""


ENOUGH = {"cpu": 256}
"""Tokens with which a batch keeps a kind of device busy; above that, rows are only put together if they are alike."""
ALIKE = 0.9
"""Length of a batch's shortest row over that of its longest."""


class Batches(Sequence[Batch]):
    """Rows of similar length together, at most `token_budget` tokens with padding (at least one row each).

    Each batch is built when it is asked for: the masks of branched rows, (length, length) each, are too much to keep.
    They are of `dtype`, which must be the model's.
    """

    def __init__(
        self,
        all_rows: Sequence[Row],
        token_budget: int,
        *,
        pad_id: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._pad_id, self.dtype, self._device = pad_id, dtype, device
        self._groups: list[list[Row]] = []
        self._fits = sys.maxsize
        enough = ENOUGH.get(torch.device(device).type, token_budget)
        for row in sorted(all_rows, key=lambda row: -len(row.ids)):
            group = self._groups[-1] if self._groups else []
            longest = len(group[0].ids) if group else 0
            alike = len(row.ids) >= ALIKE * longest or longest * len(group) < enough
            if group and alike and longest * (len(group) + 1) <= token_budget:
                group.append(row)
            else:
                self._groups.append([row])

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, number: int) -> Batch: ...
    @overload
    def __getitem__(self, number: slice) -> list[Batch]: ...
    def __getitem__(self, number: int | slice) -> Batch | list[Batch]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        return self._made(self._groups[number])

    def digest(self, number: int) -> str:
        """SHA-256 of the rows that a batch holds, in their order."""
        return hashlib.sha256(repr(self._groups[number]).encode()).hexdigest()

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return len(self._groups[0][0].ids)

    def longest(self) -> Batch:
        """A batch of the longest row alone."""
        return self._made(self._groups[0][:1])

    def _made(self, group: Sequence[Row]) -> Batch:
        return _batch(group, self._pad_id, self.dtype).to(self._device)

    def compute(self, number: int, work: Callable[[Batch], T]) -> list[T]:
        """What `work` gives for a batch; where memory runs out, for two halves of it, and so on down to single rows.

        From then on batches are cut to the size that fitted; single rows are tried all the same, as memory also depends
        on how many targets a batch has.

        Raises:
            NoRoomError: if not even one row fits.
        """
        found: list[T] = []
        waiting = [self._groups[number]]
        while waiting:
            group = waiting.pop(0)
            size = len(group) * len(group[0].ids)
            tried = size <= self._fits or len(group) == 1
            value = memory.attempt(partial(lambda rows: work(self._made(rows)), group)) if tried else None
            if value is not None:
                found.append(value)
                continue
            if len(group) == 1:
                raise NoRoomError(
                    f"out of memory: one row of {len(group[0].ids)} tokens does not fit the device: cut rows with "
                    "--max-length and --truncate, or use a device with more memory"
                )
            self._fits = min(self._fits, size - 1)
            waiting[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]
        return found


def _batch(group: Sequence[Row], pad_id: int, dtype: torch.dtype) -> Batch:
    length = max(len(row.ids) for row in group)
    ids = torch.full((len(group), length), pad_id)
    real, right = (torch.zeros((len(group), length), dtype=torch.bool) for _ in range(2))
    where: list[int] = []
    targets: list[int] = []
    segment: list[int] = []
    last: list[int] = []
    owners: dict[tuple[int, int], int] = {}
    for number, row in enumerate(group):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        real[number, : len(row.ids)] = True
        begin = row.prompt_length
        for branch in row.branches:
            inner = range(begin, begin + len(branch.targets) - 1)
            where += [number * length + place for place in (row.prompt_length - 1, *inner)]
            targets += branch.targets
            segment += [owners.setdefault((branch.item, branch.choice), len(owners))] * len(branch.targets)
            if branch.right:
                last += where[-1:]
                right[number, : row.prompt_length] = True
                right[number, inner.start : inner.stop] = True
            begin = inner.stop
    inputs = {"input_ids": ids, "attention_mask": real.long()}
    if any(sum(len(branch.targets) > 1 for branch in row.branches) > 1 for row in group):
        inputs |= _branched(group, length, real, dtype)
    numbers = [torch.tensor(each, dtype=torch.long) for each in (where, targets, segment, last)]
    return Batch(inputs, real, right, numbers[0], numbers[1], numbers[2], numbers[3], tuple(owners))


def _branched(group: Sequence[Row], length: int, real: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Additive mask (rows, 1, length, length) and position ids (rows, length) that keep branches apart."""
    part = torch.zeros((len(group), length), dtype=torch.long)
    positions = torch.arange(length).repeat(len(group), 1)
    for number, row in enumerate(group):
        begin = row.prompt_length
        for name, branch in enumerate(row.branches, start=1):
            end = begin + len(branch.targets) - 1
            part[number, begin:end] = name
            positions[number, begin:end] = torch.arange(row.prompt_length, row.prompt_length + end - begin)
            begin = end
    same = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    seen = torch.ones(length, length, dtype=torch.bool).tril() & same & real[:, None, :]
    seen |= torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None], "position_ids": positions}
