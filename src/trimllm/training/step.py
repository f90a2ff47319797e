"""One optimizer step: gradients of its rows, in micro-batches that memory has room for, over all processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimllm import memory
from trimllm.checkpoints import backends
from trimllm.config import TrainSettings
from trimllm.errors import TrimError
from trimllm.training import losses, packing, prefix
from trimllm.training.distill import Teacher
from trimllm.training.packing import Example, Way
from trimllm.training.prefix import Prefix
from trimllm.training.underway import Progress


@dataclass(frozen=True)
class Means:
    """What steps are computed with, beside the model and the settings."""

    pad_id: int = 0
    attention: str = backends.AUTO
    """With auto, short rows may be computed by another backend than the model's (see `backends.EAGER_LENGTH`)."""
    teacher: Teacher | None = None
    """A model of the same family and vocabulary, to learn from beside the targets."""
    fitted: int | None = None
    """Tokens that a micro-batch had at the end of the stage before, where memory may have run out."""
    folder: str | Path | None = None
    """Where `cache_frozen_prefix="disk"` puts its file."""
    say: Callable[[str], None] = lambda line: None
    """Called with a line that the user should see."""


PLAIN = Means()


@dataclass
class Stepper:
    """Computes the gradients of a stage's steps, in a way that is decided at its start (see `stepper`). Where memory
    runs out, `eager` becomes 0, then `size` halves."""

    model: Any
    accelerator: Any
    packing: Way
    size: int
    """Tokens of a micro-batch, padding counted."""
    places: int
    """Most target positions whose logits are in memory at once."""
    pad_id: int = 0
    eager: int = 0
    """Rows of up to so many tokens are computed with eager attention, while memory lasts."""
    prefix: Prefix | None = None
    teacher: Teacher | None = None
    progress: Progress = field(default_factory=Progress)
    say: Callable[[str], None] = lambda line: None

    def gradients(self, parameters: Sequence[torch.nn.Parameter], rows: Sequence[Example]) -> float:
        """Add the gradients of the rows to the parameters; returns the mean loss per target token over all processes.

        Each process takes its share of the rows. No process waits for another before all its gradients are there:
        where memory runs out in one, all begin the step again with micro-batches of half the size.

        Raises:
            torch.OutOfMemoryError: if not even one row fits.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        scale = 1 / sum(row.targets for row in rows)
        while True:
            shares = [_micro_batches(rows[each::world], self.size) for each in range(world)]
            if self.prefix:
                self.prefix.begin()
            found = self._passes(shares[rank], scale)
            failed = torch.tensor(float(found is None), device=self.accelerator.device)
            if not self.accelerator.reduce(failed, reduction="sum") and found is not None:
                break
            if self.prefix:
                self.prefix.take_back()
            for parameter in parameters:
                parameter.grad = None
            self._take_less(shares)
            memory.release()
        loss, tokens, cells = found
        self.progress.computed += tokens
        self.progress.cells += cells
        _add_up(parameters, self.accelerator)
        return float(self.accelerator.reduce(loss, reduction="sum"))

    def _passes(self, parts: Sequence[Sequence[Example]], scale: float) -> tuple[torch.Tensor, int, int] | None:
        """Forward and backward over this process's micro-batches: their loss, tokens and positions; None if memory runs
        out."""
        total = torch.zeros((), device=self.accelerator.device)
        tokens = cells = 0
        try:
            for part in parts:
                packed = packing.pack(part, self.packing, self.pad_id, self.accelerator.device)
                short = packed.inputs["input_ids"].shape[1] <= self.eager
                loss_of: losses.Loss = losses.cross_entropy
                if self.teacher:
                    with backends.eager(self.teacher.model, short):
                        loss_of = self.teacher.lesson(packed, self.places)
                resumed = self.prefix.resumed(packed) if self.prefix else contextlib.nullcontext()
                with resumed, backends.eager(self.model, short):
                    total += losses.backward(self.model, packed, scale, self.places, loss_of)
                tokens, cells = tokens + packed.tokens, cells + packed.cells
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            return None
        return total, tokens, cells

    def _take_less(self, shares: Sequence[Sequence[Sequence[Example]]]) -> None:
        """What takes less memory than the micro-batches of all processes did."""
        if self.eager:
            self.eager = 0
            self.say("  out of memory: short rows are computed with SDPA, too, from here on")
        else:
            self.size = _half(shares, self.size)
            self.say(f"  out of memory: micro-batches of at most {self.size} tokens from here on")


def stepper(
    model: Any, plan: Sequence[Sequence[Example]], settings: TrainSettings, accelerator: Any, means: Means
) -> Stepper:
    """How this model computes the steps of `plan`; what a teacher cannot do is done for neither."""
    models = [model, means.teacher.model] if means.teacher else [model]
    way, reason = _packing(models, plan, means.pad_id)
    if reason:
        means.say(f"  rows are batched by length, not packed: {reason}")
    size = settings.micro_batch_size or settings.batch_size
    return Stepper(
        model,
        accelerator,
        way,
        min(size, means.fitted or size),
        _places(models, plan, accelerator, means.pad_id),
        means.pad_id,
        _eager_length(models, plan, way, accelerator, means),
        _prefix(model, plan, settings, accelerator, means),
        means.teacher,
        say=means.say,
    )


def _packing(models: Sequence[Any], plan: Sequence[Sequence[Example]], pad_id: int) -> tuple[Way, str | None]:
    """See `packing.find_way`; how all of the models do it, or why not."""
    rows = [row for step in plan for row in step]
    found, reasons = zip(*(packing.find_way(model, rows, pad_id) for model in models), strict=True)
    if len(set(found)) > 1:
        return packing.ALONE, next(filter(None, reasons), "the model and its teacher do it in different ways")
    return found[0], reasons[0]


def _places(models: Sequence[Any], plan: Sequence[Sequence[Example]], accelerator: Any, pad_id: int) -> int:
    """See `losses.places_at_once`, tried on a row. All of its logits are held at once, which is what chunks are to
    spare: a row of few targets, but more than one."""
    rows = [row for step in plan[:4] for row in step if row.targets]
    if not rows:
        return 1
    sample = min(rows, key=lambda row: (row.targets < 2, row.targets))
    packed = packing.pack([sample], packing.ALONE, pad_id, accelerator.device)
    return max(losses.places_at_once(model, packed) for model in models)


def _prefix(
    model: Any,
    plan: Sequence[Sequence[Example]],
    settings: TrainSettings,
    accelerator: Any,
    means: Means,
) -> Prefix | None:
    """Where outputs of the frozen blocks are kept (--cache-frozen-prefix), if that is asked for and can be done."""
    if settings.cache_frozen_prefix == "off" or all(one.requires_grad for one in model.parameters()):
        return None
    mine = [row for rows in plan for row in rows[accelerator.process_index :: accelerator.num_processes]]
    place = Path(means.folder or ".") if settings.cache_frozen_prefix == "disk" else None
    why = prefix.refusal(model) or prefix.no_room(model, mine, place, copies=accelerator.num_processes)
    if why is None:
        return Prefix(model, mine, folder=place)
    means.say(f"  the frozen blocks are computed again in every epoch: {why}")
    return None


def _eager_length(
    models: Sequence[Any], plan: Sequence[Sequence[Example]], way: Way, accelerator: Any, means: Means
) -> int:
    """See `backends.eager_length`; 0 where rows would need another packing mode for it."""
    length = min(backends.eager_length(model, means.attention, accelerator) for model in models)
    if length:
        with contextlib.ExitStack() as within:
            for model in models:
                within.enter_context(backends.eager(model))
            if _packing(models, plan, means.pad_id)[0] != way:
                return 0
    return length


def _micro_batches(rows: Sequence[Example], size: int) -> list[Sequence[Example]]:
    count = max(1, size // max((len(row.ids) for row in rows), default=1))
    return [rows[begin : begin + count] for begin in range(0, len(rows), count)]


def _half(shares: Sequence[Sequence[Sequence[Example]]], size: int) -> int:
    """A size that cuts the largest micro-batch of all processes in two.

    Raises:
        TrimError: if they are single rows already.
    """
    largest = max((part for parts in shares for part in parts), key=lambda part: len(part) * _longest(part))
    if all(len(part) == 1 for parts in shares for part in parts):
        raise TrimError(
            f"out of memory: the training of one row of {_longest(largest)} tokens does not fit the device: go on with "
            "--resume --gradient-checkpointing or on a device with more memory, or begin anew with shorter rows "
            "(--max-length, --truncate; of domain text --batch-size)"
        )
    return min(size, len(largest) * _longest(largest)) // 2


def _longest(rows: Sequence[Example]) -> int:
    return max(len(row.ids) for row in rows)


def _add_up(parameters: Sequence[torch.nn.Parameter], accelerator: Any) -> None:
    """Every parameter's gradient becomes the sum over the processes; it stays None where all of them have none."""
    if accelerator.num_processes == 1:
        return
    there = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=accelerator.device)
    there = accelerator.reduce(there, reduction="sum")
    for parameter, count in zip(parameters, there.tolist(), strict=True):
        if count:
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(mine, reduction="sum")
