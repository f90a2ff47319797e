"""Settings turned into what a command works on: the task's items, and scorers that hold them ready for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from trimllm import tasks
from trimllm.config import TaskSettings
from trimllm.evaluate import Scorer
from trimllm.tasks import Item, TaskData


class Evaluating(Protocol):
    """The settings that a scorer reads."""

    @property
    def eval_batch_size(self) -> int: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def truncate(self) -> bool: ...


def task_data(settings: TaskSettings, tokenizer: Any) -> TaskData:
    """The task that the settings name, loaded and split.

    Raises:
        InputError: see `tasks.load_task`.
    """
    return tasks.load_task(
        settings.task,
        tokenizer=tokenizer,
        calibration_size=settings.calibration_size,
        resolution=settings.resolution,
        max_train=settings.max_train,
        max_test=settings.max_test,
        files=settings.task_files,
        metric=settings.metric,
        seed=settings.seed,
    )


def scorer(settings: Evaluating, model: Any, tokenizer: Any, items: Sequence[Item]) -> Scorer:
    """Items encoded and in batches for `model`.

    Raises:
        InputError: if prompts do not fit; see `encoding.encode`.
    """
    return Scorer(
        model,
        tokenizer,
        items,
        token_budget=settings.eval_batch_size,
        max_length=settings.max_length,
        truncate=settings.truncate,
    )
