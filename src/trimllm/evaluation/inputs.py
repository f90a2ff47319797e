"""Settings turned into what a command works on: the task's items, and scorers that hold them ready for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from trimllm import tasks
from trimllm.checkpoints.mixed import Autocast
from trimllm.config import TaskSettings
from trimllm.errors import InputError
from trimllm.evaluation import encoding
from trimllm.evaluation.evaluate import TOKEN_BUDGET, Scorer
from trimllm.tasks import Item, TaskData


class Evaluating(Protocol):
    """The settings that a scorer reads."""

    @property
    def eval_batch_size(self) -> int | None: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def truncate(self) -> bool: ...


def task_data(settings: TaskSettings, tokenizer: Any, *, reported_only: bool = False) -> TaskData:
    """The task that the settings name, loaded and split; with `reported_only` into its test rows alone, if it has some.

    Raises:
        InputError: see `tasks.load_task`.
    """
    sizes = settings.model_dump(include={"calibration_size", "resolution", "max_train", "max_test"})
    return tasks.load_task(
        settings.task,
        tokenizer=tokenizer,
        files=settings.task_files,
        metric=settings.metric,
        seed=settings.seed,
        reported_only=reported_only,
        **sizes,
    )


def check_task(settings: TaskSettings) -> None:
    """Refuse what names no task, before a model is loaded (see `tasks.find_spec`)."""
    tasks.find_spec(settings.task, files=settings.task_files, metric=settings.metric)


def scorer(
    settings: Evaluating, model: Any, tokenizer: Any, items: Sequence[Item], autocast: Autocast | None = None
) -> Scorer:
    """Items encoded and in batches for `model`, which computes them in mixed precision with `autocast`.

    Raises:
        InputError: if rows do not fit (see `encoding.encode`), or a row exceeds the tokens of a batch.
    """
    budget = settings.eval_batch_size
    made = Scorer(
        model,
        tokenizer,
        items,
        token_budget=budget or TOKEN_BUDGET,
        max_length=settings.max_length,
        truncate=settings.truncate,
        autocast=autocast,
    )
    if budget is not None and made.batches.length > budget:
        longest = made.batches.length
        raise InputError(f"--eval-batch-size {budget}: the longest row has {longest} tokens: give at least so many")
    if settings.max_length is not None and settings.max_length > (context := encoding.context_length(model.config)):
        asked = f"--max-length {settings.max_length}: rows have at most the {context} tokens of the model's context"
        made.note = "; ".join(filter(None, [asked, made.note]))
    return made
