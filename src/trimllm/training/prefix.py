"""The blocks below the lowest one that trains: computed once per row of a stage, and read back whenever it comes again.

Exact where the embeddings are frozen too and no dropout is at work: the residual stream that enters the lowest block
that trains is then the same in every epoch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimllm.blocks import decoder, families
from trimllm.blocks.trial import Injection
from trimllm.checkpoints import room
from trimllm.training.packing import Example, Packed

NOISE = ("dropout", "layerdrop", "jitter")
"""Attributes of modules that compute something else every time in training."""


def frozen_blocks(model: Any) -> int:
    """How many blocks, from the first on, the backward pass never reaches: nothing in or before them trains."""
    inside = {id(parameter) for block in decoder.blocks(model) for parameter in block.parameters()}
    if any(parameter.requires_grad and id(parameter) not in inside for parameter in model.parameters()):
        return 0
    for number, block in enumerate(decoder.blocks(model)):
        if any(parameter.requires_grad for parameter in block.parameters()):
            return number
    return 0


def refusal(model: Any) -> str | None:
    """Why the first blocks of this model cannot be computed once for all epochs, or None."""
    kind = decoder.text_config(model)
    if not families.family(kind).resumable:
        return f"the forward pass of model type {kind.model_type} cannot be resumed"
    depth = frozen_blocks(model)
    if not depth:
        return "the first block or something outside the blocks trains"
    for module in model.modules():
        noise = [value for name, value in vars(module).items() if any(word in name for word in NOISE)]
        if (isinstance(module, nn.Dropout) and module.p) or any(isinstance(v, float) and v > 0 for v in noise):
            return "the model trains with dropout or noise"
    return None


class Prefix:
    """The residual stream after the first `depth` blocks: computed, kept for the rows that come again, read back.

    Args:
        uses: the rows in the order in which they will come; one that comes again is kept.
        folder: where the file with the kept rows goes; None keeps them in memory.
    """

    def __init__(self, model: Any, uses: Iterable[Example], *, folder: Path | None = None) -> None:
        self.model, self.depth = model, frozen_blocks(model)
        self.left = Counter(uses)
        self.place: dict[Example, int] = {}
        """Where a kept row begins in the store."""
        self.read = 0
        """Tokens that were read back and not computed."""
        self._since: tuple[int, list[Example]] = (0, [])
        """What was read when the step began, and the rows that it has used since."""
        blocks = decoder.blocks(model)
        returns_tuple = families.family(decoder.text_config(model)).block_returns_tuple
        self._injections = [Injection(returns_tuple) for _ in range(self.depth)]
        for injection, block in zip(self._injections, blocks[: self.depth], strict=True):
            injection.stand_for(block)
        self._owner, self._name = decoder.container(model)
        self._all = blocks
        self._rest = nn.ModuleList([*self._injections, *blocks[self.depth :]])
        self._folder, self._used = folder, 0
        self._rows = sum(row.inputs for row, count in self.left.items() if count > 1)
        self._store: torch.Tensor | None = None

    def begin(self) -> None:
        """A step begins, which may be taken back."""
        self._since = (self.read, [])

    def take_back(self) -> None:
        """Undo the counts of the step; rows that it stored stay."""
        self.read, rows = self._since
        self.left.update(rows)
        self.begin()

    @contextmanager
    def resumed(self, packed: Packed) -> Iterator[None]:
        """Within, the model's forward over `packed` begins after the first blocks."""
        if all(row in self.place for row, *_ in packed.spans):
            hidden = self._gather(packed)
            self.read += packed.tokens
        else:
            hidden = self._compute(packed)
            self._keep(packed, hidden)
        for row, *_ in packed.spans:
            self.left[row] -= 1
            self._since[1].append(row)
        for injection in self._injections:
            injection.hidden = hidden
        self._owner._modules[self._name] = self._rest
        try:
            yield
        finally:
            self._owner._modules[self._name] = self._all
            for injection in self._injections:
                injection.hidden = None

    @torch.no_grad()
    def _compute(self, packed: Packed) -> torch.Tensor:
        """(rows, length, hidden) after the first blocks; the forward pass is left there."""
        found: list[torch.Tensor] = []

        def leave(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(decoder.hidden_argument(args, named))
            raise decoder.LeftError

        handle = self._all[self.depth].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            self.model(**packed.inputs, use_cache=False)
        except decoder.LeftError:
            pass
        finally:
            handle.remove()
        return found[0]

    def _keep(self, packed: Packed, hidden: torch.Tensor) -> None:
        if self._store is None:
            self._store = self._open(hidden)
        for row, number, begin in packed.spans:
            if self.left[row] > 1 and row not in self.place:
                self.place[row] = self._used
                self._used += row.inputs
                self._store[self.place[row] : self._used].copy_(hidden[number, begin : begin + row.inputs])

    def _open(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = (self._rows, hidden.shape[-1])
        if self._folder is None or not self._rows:
            return torch.empty(shape, dtype=hidden.dtype)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".prefix.") as file:  # gone when nobody maps it
            size = shape[0] * shape[1]
            return torch.from_file(file.name, shared=True, size=size, dtype=hidden.dtype).view(shape)

    def _gather(self, packed: Packed) -> torch.Tensor:
        assert self._store is not None
        rows, length = packed.inputs["input_ids"].shape
        hidden = torch.zeros((rows, length, self._store.shape[1]), dtype=self._store.dtype)
        for row, number, begin in packed.spans:
            place = self.place[row]
            hidden[number, begin : begin + row.inputs] = self._store[place : place + row.inputs]
        return hidden.to(packed.where.device)


def no_room(model: Any, uses: Sequence[Example], folder: Path | None, *, copies: int = 1) -> str | None:
    """Why the disk, or main memory where `folder` is None, cannot hold what would be kept by so many processes alike;
    None if it can."""
    rows = sum(row.inputs for row, count in Counter(uses).items() if count > 1)
    needed = copies * rows * decoder.text_config(model).hidden_size * 4
    free = room.free_bytes(torch.device("cpu"), swap=False) if folder is None else shutil.disk_usage(folder).free
    if free is None or needed < free:
        return None
    place = "main memory" if folder is None else folder
    return f"{needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free in {place}"
