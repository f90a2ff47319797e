"""From items to token rows: what evaluation, the scan and training feed to the model.

One question is one row. Its choices are branches after the shared prompt: each branch sees the prompt and itself (4-D
mask), and its positions start where the prompt ends, so that every continuation scores as if it stood alone. Where a
model cannot do that exactly, `branches=False` gives one row per continuation.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, overload

import torch

from trimllm import memory
from trimllm.errors import InputError, TrimError
from trimllm.tasks.items import Item

T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one item: the shared prompt and each continuation. `item` is its index in the encoded list."""

    item: int
    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    answer: int = 0
    prompt_cut: bool = False
    """The beginning of its prompt did not fit."""
    answer_cut: bool = False
    """The end of its written answer did not fit, or the `room` after it."""

    @property
    def target(self) -> tuple[int, ...]:
        return self.continuations[self.answer]

    def right_only(self) -> Encoded:
        """The item without its wrong choices."""
        return replace(self, continuations=(self.target,), answer=0)


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


def context_length(model_config: Any, limit: int | None = None) -> int:
    """The longest row the model takes, as its config says, or `limit` if that is less."""
    text_config = model_config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len")
    longest = next((length for name in names if (length := getattr(text_config, name, None))), 2048)
    return min(longest, limit) if limit else longest


def attention_window(model_config: Any) -> int | None:
    """How far back the shortest-sighted layers see, in tokens; None where all see everything.

    A 4-D mask takes the place of a window: past its length, branches would see too much.
    """
    text_config = model_config.get_text_config(decoder=True)
    names = ("sliding_window", "attention_chunk_size", "window_size")
    windows = [window for name in names if (window := getattr(text_config, name, None))]
    return min(windows, default=None)


def _start_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InputError("the tokenizer has neither a BOS nor an EOS token: text without a prompt cannot be scored")


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text, verbose=False)["input_ids"]
    ends = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ends and not text.endswith(tokenizer.eos_token) else ids


def encode_pair(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and those that the continuation adds to it (the convention of lm-evaluation-harness).

    Spaces at the prompt's end move to the continuation; both are tokenized together, so that training sees the ids that
    evaluation scores. An empty prompt becomes the BOS (or EOS) token.
    """
    if not prompt:
        bare = tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]
        return [_start_token(tokenizer)], bare
    stripped = prompt.rstrip()
    if stripped:
        prompt, continuation = stripped, prompt[len(stripped) :] + continuation
    before, both = _ids(tokenizer, prompt), _ids(tokenizer, prompt + continuation)
    return before, both[len(before) :]


def vocabulary(model: Any) -> int:
    """Tokens that the model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def vocabulary_of(config: Any) -> int:
    """Tokens that the model of this config has embeddings for."""
    return int(config.get_text_config(decoder=True).vocab_size)


def pad_id(tokenizer: Any, model: Any, without: int = 0) -> int:
    """What fills rows: the tokenizer's own padding, if the model has an embedding for it."""
    own = tokenizer.pad_token_id
    return own if own is not None and own < vocabulary(model) else without


def rows_of(encoded: Iterable[Encoded]) -> Iterator[tuple[int, ...]]:
    """Their prompts and continuations."""
    return (ids for one in encoded for ids in (one.prompt, *one.continuations))


def check_vocabulary(tokenizer: Any, rows: Iterable[Sequence[int]], known: int) -> None:
    """Tokenizers may have tokens that their model has no embedding for (Gemma 3 1B's has one for images).

    Raises:
        InputError: if one of them is in a row.
    """
    if len(tokenizer) <= known:
        return
    for ids in rows:
        if (largest := max(ids, default=0)) >= known:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"a row holds {token!r}, token {largest}, and the model has embeddings for {known} tokens: "
                "take it out of the row, or mend the tokenizer"
            )


def encode(
    tokenizer: Any, items: Sequence[Item], max_length: int, *, truncate: bool = False, room: int = 0
) -> list[Encoded]:
    """Token ids of items, in order.

    Text longer than the context becomes several windows of it (all with the same `item`). A prompt that does not fit
    with its longest continuation and `room` more tokens is an error, or with `truncate` cut from the left, once a
    written answer that would leave it less than half of the context is cut at its end; choices never are. The last
    token takes no room, since it is never an input.

    Raises:
        InputError: naming how many rows are too long and the first of them; or a continuation without tokens.
    """
    encoded: list[Encoded] = []
    too_long: list[tuple[Item, int]] = []
    for number, item in enumerate(items):
        pairs = [encode_pair(tokenizer, item.prompt, text) for text in item.continuations]
        prompt, continuations = pairs[0][0], [tuple(ids) for _, ids in pairs]
        if not all(continuations):
            raise InputError(
                f"{item.place}: a choice or target has no tokens of its own after the prompt: check the row"
            )
        if not item.prompt and len(continuations) == 1:
            encoded.extend(_windows(number, prompt, continuations[0], max_length))
            continue
        needed = max(map(len, continuations)) + room
        if len(prompt) + needed <= max_length + 1:
            encoded.append(Encoded(number, tuple(prompt), tuple(continuations), item.answer))
            continue
        too_long.append((item, len(prompt) + needed))
        space = max_length + 1 - needed
        answer_cut = bool(item.references) and space < min(len(prompt), max_length // 2)
        if answer_cut:
            space = max(1, min(len(prompt), max_length // 2))
            continuations = [ids[: max_length + 1 - space] for ids in continuations]
        if space <= 0 and truncate:
            raise InputError(f"{item.place}: a choice alone fills the context of {max_length} tokens: drop the row")
        cuts = {"prompt_cut": len(prompt) > space, "answer_cut": answer_cut}
        encoded.append(Encoded(number, tuple(prompt[-max(space, 1) :]), tuple(continuations), item.answer, **cuts))
    if too_long and not truncate:
        first, length = too_long[0]
        raise InputError(
            f"{len(too_long)} of {len(items)} rows do not fit the context of {max_length} tokens (first: "
            f"{first.place}, {length} tokens): pass --truncate to cut prompts from the left and long written answers "
            "at their end, or drop the rows"
        )
    return encoded


class Cut(Protocol):
    """A row of which something may have been cut off; see `Encoded`, which is one."""

    @property
    def prompt_cut(self) -> bool: ...
    @property
    def answer_cut(self) -> bool: ...


def row_notes(**sets: Sequence[Cut]) -> list[str]:
    """Lines for the user on each set, by its name, of which `truncate` cut something off, or in which right choices
    cannot be told from others."""
    notes = []
    for name, made in sets.items():
        prompts, answers = sum(row.prompt_cut for row in made), sum(row.answer_cut for row in made)
        if prompts or answers:
            notes.append(
                f"--truncate, {len(made):,} {name} rows: prompts cut from the left: {prompts:,}, "
                f"answers cut at their end: {answers:,}"
            )
        if alike := sum(isinstance(row, Encoded) and row.continuations.count(row.target) > 1 for row in made):
            notes.append(
                f"in {alike:,} of {len(made):,} {name} rows another choice has the same tokens as the right one: which "
                "is likelier says nothing there"
            )
    return notes


def _windows(number: int, start: list[int], ids: tuple[int, ...], max_length: int) -> Iterator[Encoded]:
    """Disjoint windows over a document; each is predicted from the last token before it."""
    for begin in range(0, len(ids), max_length):
        window = ids[begin : begin + max_length]
        yield Encoded(number, tuple(start), (window,))
        start = [window[-1]]


def rows(encoded: Sequence[Encoded], *, branches: bool = True) -> list[Row]:
    """Input rows. A continuation's last id is only predicted, never an input."""
    out = []
    for one in encoded:
        owned = [Branch(one.item, choice, ids, choice == one.answer) for choice, ids in enumerate(one.continuations)]
        groups = [owned] if branches else [[branch] for branch in owned]
        for group in groups:
            ids = list(one.prompt)
            for branch in group:
                ids += branch.targets[:-1]
            out.append(Row(tuple(ids), len(one.prompt), tuple(group)))
    return out


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
