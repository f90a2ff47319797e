"""What a run works with: data, scorers, training rows, decisions to come; found before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from trimllm.blocks import decoder
from trimllm.checkpoints.dtypes import DTYPES
from trimllm.checkpoints.mixed import Autocast
from trimllm.checkpoints.models import Loaded
from trimllm.checkpoints.origin import Origin
from trimllm.config import TrimConfig
from trimllm.errors import InputError
from trimllm.evaluation import encoding, inputs
from trimllm.evaluation.evaluate import Scorer
from trimllm.run import account, checks, sizes, targets, used_rows
from trimllm.run.deciding import Decider
from trimllm.run.journal import Journal
from trimllm.tasks import TaskData
from trimllm.training import train, training_rows
from trimllm.training.packing import Example


@dataclass(frozen=True)
class Prepared:
    """What stays the same from the first stage to the last."""

    data: TaskData
    warnings: tuple[str, ...]
    """What may make the result worth less, known from the rows alone."""
    tokenizer: Any
    save_dtype: torch.dtype
    """That of the result."""
    base_depth: int
    origin: Origin
    """What plans and cards name as the base."""
    calibration: Scorer
    test: Scorer
    """The reported split."""
    task_rows: list[Example]
    text_rows: list[Example]
    decider: Decider
    ahead: list[tuple[int, float]]
    """Blocks and epochs of the stages to come (see `targets.stages_ahead`)."""

    @property
    def metric(self) -> str:
        return self.data.metric

    @property
    def tokens_per_epoch(self) -> int:
        """Those of the task and of the domain text between."""
        mixed = 1 + self.decider.config.text_ratio if self.text_rows else 1
        return round(mixed * sum(len(row.ids) for row in self.task_rows))

    def digests(self) -> dict[str, str]:
        """SHA-256 of what is trained and decided on, by option."""
        config, found = self.decider.config, {"--task": self.data.digest()}
        if config.text_ratio and config.trains:
            found["--text"] = training_rows.digest(self.text_rows)
        return found


def prepare(config: TrimConfig, loaded: Loaded, earlier: Journal, autocast: Autocast | None = None) -> Prepared:
    """Read the data, and find everything that can be wrong with it and the model before anything is computed.

    `earlier` is what the run journaled before. With `autocast` accuracies are measured in mixed precision.

    Raises:
        InputError: in that case.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    begun = earlier.last("start") or {}
    save_dtype = DTYPES.get(begun.get("save_dtype", config.save_dtype), loaded.saved)
    depth = decoder.depth(model)
    targets.wanted_depth(config, depth)
    if (already := targets.reached(config, depth, sizes.size(model, save_dtype))) is not None:
        raise InputError(f"nothing to drop: the model already meets the target, {already.words}")
    if not begun:
        targets.check_possible(config, depth, sizes.least_size(model, save_dtype))
    data = inputs.task_data(config, tokenizer)
    checks.floor(config, data.metric)
    calibration = inputs.scorer(config, model, tokenizer, data.calibration, autocast)
    test = inputs.scorer(config, model, tokenizer, data.test, autocast)
    task_rows, text_rows = training_rows.examples(config, tokenizer, model.config, data.train, config.batch_size)
    cut = encoding.row_notes(training=task_rows, calibration=calibration.encoded, reported=test.encoded)
    decider = Decider(config, model, calibration, data.metric, save_dtype)
    decider.check(model)
    train.check(model, config)
    few = account.few_rows(data.calibration)
    seen = used_rows.warnings(config.model, data, config.seed)
    return Prepared(
        data=replace(data, notes=(*data.notes, *cut)),
        warnings=(*seen, *filter(None, [few])),
        tokenizer=tokenizer,
        save_dtype=save_dtype,
        base_depth=depth,
        origin=Origin.of(config.model),
        calibration=calibration,
        test=test,
        task_rows=task_rows,
        text_rows=text_rows,
        decider=decider,
        ahead=targets.stages_ahead(config, depth, decider.length),
    )
