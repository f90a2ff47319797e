"""One stage of training: cross-entropy on the target tokens of a list of steps, AdamW, a schedule of its own.

A stage is a fixed list of optimizer steps made from a seed, so that a stage that is started again gives the same
weights, from its beginning or from where it was saved. Each stage begins with its own warm-up and decay, and with an
optimizer that knows nothing, or what AdamW knew before of the parameters that train now: it never holds parameters of
removed blocks.
"""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from trimllm.checkpoints import mixed
from trimllm.config import TrainSettings, TrimConfig
from trimllm.errors import InputError, TrimError
from trimllm.startup import Terminated
from trimllm.training import optimizer_state
from trimllm.training.optimizer_state import Moments
from trimllm.training.packing import Example
from trimllm.training.step import PLAIN, Means, stepper
from trimllm.training.underway import Progress, Training, Underway

WARMUP_SHARE = 0.06
"""Share of a stage's steps over which the learning rate rises."""

ROUNDED_AWAY = 256
"""In bfloat16 (8 significant bits) a step is lost on weights more than about so many times as large."""


BETAS, BETAS_BFLOAT16 = (0.9, 0.999), (0.9, 0.95)
"""Of AdamW. In bfloat16 a second moment that is to shrink by a thousandth stays as it is, so that one large gradient
would make all later steps small."""


def rounding_note(settings: TrimConfig, *, emulated: bool = False) -> str | None:
    """A line for the user where weights train in bfloat16: which of them a step at the peak rate does not move.

    `emulated`: the device has no bfloat16 of its own, so that mixed precision is no remedy.
    """
    if settings.dtype != "bfloat16":
        return None
    mixed = "" if emulated else " with --mixed-precision bf16"
    return (
        f"--dtype bfloat16: steps of --lr {settings.lr:g} are rounded away in weights above about "
        f"{ROUNDED_AWAY * settings.lr:.2g}: leave it out (float32 weights{mixed}) where memory "
        "allows, or give a larger --lr"
    )


@dataclass(frozen=True)
class StageReport:
    """What a stage did. `loss` is the mean over its last tenth, in nats per target token (with a teacher, of both)."""

    steps: int
    tokens: int
    """Ids of the rows, without padding, over all processes."""
    loss: float | None
    seconds: float
    padding: float = 0.0
    """Share of the positions computed by this process that were padding."""
    cached: float = 0.0
    """Share of its tokens that were read back after the frozen blocks (--cache-frozen-prefix)."""
    micro_batch_size: int = 0
    """Tokens per forward and backward at the end: less than asked for where memory ran out."""


class Watch(Protocol):
    """What may end a stage before its plan does: asked every `cycle` steps, about."""

    cycle: int
    losses: list[float]
    """What it saw each time."""

    def __call__(self) -> bool: ...


def train_stage(
    model: Any,
    parameters: Sequence[torch.nn.Parameter],
    plan: Sequence[Sequence[Example]],
    settings: TrainSettings,
    accelerator: Any,
    means: Means = PLAIN,
    *,
    seed: int = 0,
    on_step: Callable[[int, int, float, float], None] | None = None,
    watch: Watch | None = None,
    moments: Moments | None = None,
    carried: Moments | None = None,
    underway: Underway | None = None,
) -> StageReport:
    """Train `parameters` of the model in place over the steps of `plan`; nothing else of it changes.

    The learning rate rises and decays once; with a `watch` anew in every cycle.

    Args:
        seed: of whatever is random within the model (dropout), together with the number of the step.
        on_step: called after every optimizer step with its number, their count, the loss, tokens per second.
        watch: may end the stage where the learning rate is down.
        moments: what AdamW goes on from; empty afterwards, unless nothing trains.
        carried: filled with what AdamW knows at the end of the parameters that trained, in main memory.
        underway: where the stage is saved on the way, and gone on with.

    Raises:
        TrimError: if the loss or a gradient is not a finite number, or not even one row fits into memory; names the
            step or the row. Weights saved before the stage are still good.
        InputError: if the processes share the weights between them (FSDP, DeepSpeed); see also `check`.
    """
    started = time.perf_counter()
    if not plan or not parameters:
        if carried is not None and moments:
            carried.update(moments)
        return StageReport(0, 0, None, 0.0)
    check(model, settings)
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise InputError(f"processes of type {kind} share the weights: launch plain ones, with a whole model each")
    steps = stepper(model, plan, settings, accelerator, means)
    if settings.gradient_checkpointing:
        _checkpointing(model, on=True)
    model.train()
    optimizer = adamw(parameters, settings, accelerator.device)
    training = Training(model, parameters, optimizer, len(plan))
    found = underway.find(training, accelerator) if underway else None
    if found is not None:
        if moments:
            moments.clear()  # what it knew at the beginning
        found.restore(training)
        steps.progress = found.progress
        if watch:
            watch.losses[:] = found.progress.watched
    elif moments:
        optimizer_state.restore(optimizer, moments)
    progress = steps.progress
    before = replace(progress)

    def now() -> Progress:
        seconds = before.seconds + time.perf_counter() - started
        return replace(progress, seconds=seconds, watched=watch.losses if watch else [])

    between = True
    """Whether a stage that is saved now would go on as this one does: after a whole step, and the look after it."""
    try:
        for number in range(before.steps, len(plan)):
            rows = plan[number]
            place, length = _in_cycle(number, len(plan), watch.cycle if watch else None)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * schedule(place, length)
            torch.manual_seed(zlib.crc32(f"{seed} {number}".encode()))
            with contextlib.ExitStack() as within:
                for each in (model, means.teacher.model) if means.teacher else (model,):
                    within.enter_context(mixed.casting(each, mixed.training(accelerator)))
                loss = steps.gradients(parameters, rows)
            if not math.isfinite(loss):
                raise _diverged(f"the loss became {loss}", number, len(plan))
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
            if not math.isfinite(norm):
                raise _diverged(f"the norm of the gradients became {norm}", number, len(plan))
            between = False
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.losses.append(loss)
            progress.tokens += sum(len(row.ids) for row in rows)
            progress.steps += 1
            looks = watch is not None and place + 1 == length
            between = not looks
            if on_step:
                speed = (progress.tokens - before.tokens) / (time.perf_counter() - started)
                on_step(number + 1, len(plan), loss, speed)
            if watch and looks:
                ended = watch()
                between = True
                if ended:
                    break
            if underway and number + 1 < len(plan) and underway.due():
                underway.write(training, now())
    except (KeyboardInterrupt, Terminated):
        if underway and between:
            underway.end(training, now())
        raise
    finally:
        if settings.gradient_checkpointing:
            _checkpointing(model, on=False)
        for parameter in parameters:
            parameter.grad = None
        model.eval()
    if carried is not None:
        known = optimizer.state.items()
        carried.update({one: {name: value.cpu() for name, value in state.items()} for one, state in known})
    tail = progress.losses[-max(1, progress.steps // 10) :]
    return StageReport(
        steps=progress.steps,
        tokens=progress.tokens,
        loss=sum(tail) / len(tail),
        seconds=before.seconds + time.perf_counter() - started,
        padding=1 - progress.computed / max(1, progress.cells),
        cached=steps.prefix.read / max(1, progress.computed - before.computed) if steps.prefix else 0.0,
        micro_batch_size=steps.size,
    )


def adamw(
    parameters: Sequence[torch.nn.Parameter], settings: TrainSettings, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of a stage."""
    narrow = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=BETAS_BFLOAT16 if narrow else BETAS,
        weight_decay=settings.weight_decay,
        fused=device.type in ("cuda", "cpu"),
    )


def _diverged(what: str, number: int, steps: int) -> TrimError:
    return TrimError(
        f"{what} at step {number + 1} of {steps}: lower --lr; a run goes on from before this stage with --resume, a "
        "comparison wants another --output"
    )


def check(model: Any, settings: TrainSettings) -> None:
    """Refuse settings that the model cannot be trained with.

    Raises:
        InputError: if its activations are to be computed again, and its class cannot.
    """
    if settings.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise InputError(
            f"--gradient-checkpointing: models of type {model.config.model_type} do not support it: leave it out (a "
            "smaller --micro-batch-size takes less memory, too)"
        )


def _checkpointing(model: Any, *, on: bool) -> None:
    """Let activations be computed again in the backward pass, or no more; older releases have another name for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def _in_cycle(step: int, total: int, cycle: int | None) -> tuple[int, int]:
    """Where a step lies in its cycle, and how long that is: about `cycle` steps, all cycles alike but for one step."""
    count = max(1, round(total / cycle)) if cycle else 1
    number = ((step + 1) * count - 1) // total
    begin, end = number * total // count, (number + 1) * total // count
    return step - begin, end - begin


def schedule(step: int, total: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    warm = max(1, round(WARMUP_SHARE * total))
    return min((step + 1) / warm, (total - step) / max(1, total - warm + 1))
