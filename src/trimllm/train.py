"""One stage of training: cross-entropy on the target tokens, domain text mixed in, AdamW with a fresh state.

A stage is a fixed list of optimizer steps made from a seed, so that a stage that is started again gives the same
weights. Each stage begins with a fresh optimizer and its own warm-up and decay: the optimizer never holds parameters of
removed blocks, and the weights alone are the state that a run must keep.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimllm import encoding, evaluate
from trimllm.config import TrainSettings
from trimllm.errors import InputError, TrimError
from trimllm.tasks.items import Item

IGNORED = -100
WARMUP_SHARE = 0.06
"""Share of a stage's steps over which the learning rate rises."""


@dataclass(frozen=True)
class Example:
    """One training row: the ids, of which those from `start` on are targets."""

    ids: tuple[int, ...]
    start: int

    @property
    def targets(self) -> int:
        return len(self.ids) - self.start


@dataclass(frozen=True)
class StageReport:
    """What a stage did. `loss` is the mean over its last tenth, in nats per target token; tokens count padding."""

    steps: int
    tokens: int
    loss: float | None
    seconds: float


def task_examples(tokenizer: Any, items: Sequence[Item], max_length: int, *, truncate: bool = False) -> list[Example]:
    """Prompt + target + EOS of every item, tokenized as evaluation does; only target and EOS are learnt.

    Raises:
        InputError: if a prompt does not fit the context (see `encoding.encode`).
    """
    eos = tokenizer.eos_token_id
    ending = () if eos is None else (eos,)
    targets_only = [Item(item.place, item.prompt, (item.target,), lengths=(0,), group=item.group) for item in items]
    made = []
    for one in encoding.encode(tokenizer, targets_only, max_length, truncate=truncate, room=len(ending)):
        tail = ending if items[one.item].prompt else ()
        made.append(Example((*one.prompt, *one.target, *tail), len(one.prompt)))
    return made


def text_examples(tokenizer: Any, texts: Sequence[str], length: int) -> list[Example]:
    """Documents, each closed by EOS, packed one behind the other into rows of `length` tokens; all are learnt."""
    eos = tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if eos is not None:
            stream.append(eos)
    rows = [tuple(stream[begin : begin + length]) for begin in range(0, len(stream), length)]
    return [Example(row, 1) for row in rows if len(row) > 1]


def steps(
    task: Sequence[Example], text: Sequence[Example], settings: TrainSettings, epochs: float, seed: int
) -> list[list[Example]]:
    """The optimizer steps of a stage: batches of task rows and of text rows in random order, never both in one.

    Text rows take `text_ratio` times the tokens of the task rows; each is used again only when all were used.
    """
    rng = random.Random(f"stage:{seed}")
    text_rows = _endless(text, rng)
    out: list[list[Example]] = []
    whole = [1.0] * int(epochs) + ([epochs % 1] if epochs % 1 > 1e-9 else [])
    for share in whole:
        rows = rng.sample(list(task), max(1, round(share * len(task))))
        wanted = settings.text_ratio * sum(len(row.ids) for row in rows) if text else 0
        drawn: list[Example] = []
        while wanted > 0:
            drawn.append(next(text_rows))
            wanted -= len(drawn[-1].ids)
        batches = [*_batches(rows, settings.batch_size, rng), *_batches(drawn, settings.batch_size, rng)]
        rng.shuffle(batches)
        out += batches
    return out


def _endless(rows: Sequence[Example], rng: random.Random) -> Iterator[Example]:
    while rows:
        yield from rng.sample(list(rows), len(rows))


def _batches(rows: Sequence[Example], budget: int, rng: random.Random) -> list[list[Example]]:
    """Rows of similar length together (sorted within random pools of about 16 batches), padding counted."""
    pools, out = [], []
    average = max(1, sum(len(row.ids) for row in rows) // max(1, len(rows)))
    size = max(1, 16 * budget // average)
    order = rng.sample(list(rows), len(rows))
    pools = [sorted(order[begin : begin + size], key=lambda row: -len(row.ids)) for begin in range(0, len(order), size)]
    for pool in pools:
        while pool:
            rows_here = max(1, budget // len(pool[0].ids))
            out.append(pool[:rows_here])
            pool = pool[rows_here:]
    return out


def train_stage(
    model: Any,
    parameters: Sequence[torch.nn.Parameter],
    plan: Sequence[Sequence[Example]],
    settings: TrainSettings,
    accelerator: Any,
    *,
    seed: int = 0,
    pad_id: int = 0,
    on_step: Callable[[int, int, float, float], None] | None = None,
) -> StageReport:
    """Train `parameters` of the model in place over the steps of `plan`; nothing else of it changes.

    `on_step(step, steps, loss, tokens per second)` is called after every optimizer step.

    Raises:
        TrimError: if the loss is not a finite number; names the step. Weights saved before the stage are still good.
    """
    started = time.perf_counter()
    if not plan or not parameters:
        return StageReport(0, 0, None, 0.0)
    torch.manual_seed(seed)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    fused = accelerator.device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    losses, tokens = [], 0
    try:
        for number, rows in enumerate(plan):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _schedule(number, len(plan))
            loss = _step(wrapped, model, rows, settings, accelerator, pad_id)
            if not math.isfinite(loss):
                raise TrimError(
                    f"the loss became {loss} at step {number + 1} of {len(plan)}: lower --lr and start again with "
                    "--resume; the weights from before this stage are kept"
                )
            accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            tokens += len(rows) * max(len(row.ids) for row in rows)
            if on_step:
                on_step(number + 1, len(plan), loss, tokens / (time.perf_counter() - started))
    finally:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        accelerator.free_memory()
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        for parameter in parameters:
            parameter.grad = None
        model.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return StageReport(len(plan), tokens, sum(tail) / len(tail), time.perf_counter() - started)


def _schedule(step: int, total: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    warm = max(1, round(WARMUP_SHARE * total))
    return min((step + 1) / warm, (total - step) / max(1, total - warm + 1))


def _step(
    wrapped: Any, model: Any, rows: Sequence[Example], settings: TrainSettings, accelerator: Any, pad_id: int
) -> float:
    """Backward over one optimizer step, in micro-batches; returns the mean loss per target token over all processes.

    Each process takes its share of the rows; dividing by the targets of all and multiplying by the number of processes
    makes the averaged gradient the one that a single process computes. All processes compute equally many
    micro-batches, the last of them perhaps of a row without targets: sharded weights are gathered together.
    """
    world = accelerator.num_processes
    scale = world / sum(row.targets for row in rows)
    budget = settings.micro_batch_size or settings.batch_size
    total = torch.zeros((), device=accelerator.device)
    shares = [_micro_batches(rows[rank::world], budget) for rank in range(world)]
    parts = shares[accelerator.process_index]
    parts += [[Example(rows[0].ids[:2], 2)]] * (max(map(len, shares)) - len(parts))
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
            loss = _summed_loss(wrapped, model, part, pad_id, accelerator.device) * scale
            accelerator.backward(loss)
        total += loss.detach()
    return float(accelerator.reduce(total, reduction="mean"))


def _micro_batches(rows: Sequence[Example], budget: int) -> list[Sequence[Example]]:
    count = max(1, budget // max((len(row.ids) for row in rows), default=1))
    return [rows[begin : begin + count] for begin in range(0, len(rows), count)]


def _summed_loss(wrapped: Any, model: Any, rows: Sequence[Example], pad_id: int, device: torch.device) -> torch.Tensor:
    """Sum of the cross-entropy over target tokens; logits are computed at those places only.

    As in evaluation, a row's last id is only predicted, never an input.
    """
    length = max(len(row.ids) for row in rows) - 1
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    where: list[int] = []
    targets: list[int] = []
    for number, row in enumerate(rows):
        ids[number, : len(row.ids) - 1] = torch.tensor(row.ids[:-1])
        mask[number, : len(row.ids) - 1] = 1
        where += range(number * length + row.start - 1, number * length + len(row.ids) - 1)
        targets += row.ids[row.start :]
    if not where:
        where, targets = [0], [IGNORED]
    places = torch.tensor(where, device=device)
    with evaluate.head_only_at(model, places) as used:
        logits = wrapped(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits.flatten(0, 1)
    if not used:
        logits = logits.index_select(0, places)
    wanted = torch.tensor(targets, device=device)
    return torch.nn.functional.cross_entropy(logits.float(), wanted, ignore_index=IGNORED, reduction="sum")


def longest(model: Any, limit: int | None) -> int:
    """The longest training row in tokens."""
    return encoding.context_length(model.config, limit)


def check(task: Sequence[Example]) -> None:
    """Raises InputError if there is nothing to train on."""
    if not task:
        raise InputError("there are no training rows left after the calibration set was held out: give more rows")
