"""What a method of the comparison is given, what it gives back, and the two things most of them do: tune, and trim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trimllm import memory
from trimllm.baselines import METHODS, Cell
from trimllm.blocks import decoder
from trimllm.blocks.layout import Layout, whole
from trimllm.checkpoints import export, loading, mixed, models, room, verification
from trimllm.checkpoints.dtypes import name_of
from trimllm.checkpoints.origin import Origin
from trimllm.config import CompareConfig, TrimConfig, plain_settings, without_idle
from trimllm.console import Console
from trimllm.errors import InputError
from trimllm.evaluation import encoding, inputs
from trimllm.evaluation.evaluate import Scorer
from trimllm.run import licences, placing, progressive, rundir
from trimllm.run.journal import Journal
from trimllm.run.targets import wanted_depth
from trimllm.training import sparse, train, training_rows, underway
from trimllm.training.packing import Example
from trimllm.training.step import Means
from trimllm.training.underway import Underway

SHARED = (CompareConfig.model_fields.keys() & TrimConfig.model_fields.keys()) - {"output", "resume", "keep", "strategy"}
"""Settings that the comparison and its runs of `trimllm trim` have in common."""


@dataclass(frozen=True)
class Product:
    """A checkpoint, and what it cost beyond that of the methods it started from."""

    checkpoint: str | Path
    train_seconds: float = 0.0
    compress_seconds: float = 0.0
    """Scans, pruning, quantization."""
    tokens: int = 0
    """Tokens trained on, without padding."""
    note: str = ""
    """One line that the reader of the table must know."""


class Job:
    """One method at one depth: the settings of the comparison, and a folder of its own."""

    def __init__(self, command: CompareConfig, cell: Cell, root: Path) -> None:
        self.command, self.cell, self.root = command, cell, root
        self.folder = cell.file(root).parent
        self.console = Console()

    def row_of(self, name: str) -> dict[str, Any]:
        """The row of another method, at this share if it has shares; empty if there is none."""
        return Cell(METHODS[name], self.cell.keep).row(self.root)

    def earlier(self, name: str) -> Path:
        """The checkpoint that another method made, at this depth if it has depths."""
        return self.root / self.row_of(name)["checkpoint"]

    def check_earlier(self, name: str) -> None:
        """Raises InputError if the method that this one starts from has no checkpoint."""
        row = self.row_of(name)
        if row.get("status") != "done":
            raise InputError(f"it starts from {METHODS[name].title}, which is not there: {row.get('why', 'not run')}")

    @property
    def full(self) -> Path:
        """The fully fine-tuned model in float32 (or the dtype it was trained in)."""
        return self.earlier("full").parent / "trained"

    def trim_settings(self, **changes: Any) -> TrimConfig:
        """A run of `trimllm trim` with the comparison's settings and `changes`, less those that mean nothing to it."""
        shared = {name: getattr(self.command, name) for name in sorted(SHARED)}
        fixed = {"output": str(self.folder / "run"), "resume": True, "report_depths": False}
        return plain_settings.make(TrimConfig, without_idle(TrimConfig, {**shared, **fixed, **changes}))

    @cached_property
    def depth(self) -> int:
        """Blocks of the base, by its config."""
        command = self.command
        config = models.config_of(loading.path_of(command.model), trust_remote_code=command.trust_remote_code)
        return int(config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def drops(self) -> int:
        """Blocks that go at this share."""
        assert self.cell.keep is not None
        wanted = wanted_depth(self.trim_settings(keep=self.cell.keep), self.depth)
        assert wanted is not None
        return self.depth - wanted

    @property
    def epochs(self) -> float:
        """Epochs after the warm-up that the progressive run takes, which every method that trains is given."""
        return self.command.epochs_per_drop * self.drops + self.command.final_epochs

    @property
    def every_depth_at_once(self) -> bool:
        """Whether one run of TrimLLM gives all depths, since no training waits for the last drop."""
        return self.command.schedule == "epoch" and not self.command.final_epochs

    @cached_property
    def accelerator(self) -> Any:
        """Device and mixed precision of training, as in a run of `trimllm trim`."""
        return models.accelerator(self.command)

    def load(self, path: str | Path | None = None, *, training: bool = True, evaluating: bool = False) -> models.Loaded:
        """The base, or the checkpoint in `path`; to train in the dtype for it (see `models.load`).

        Raises:
            InputError: see `models.load`; also if there is no room for the weights.
        """
        settings = self.command if path is None else self.command.model_copy(update={"model": str(path)})
        return models.load(settings, training=training, evaluating=evaluating)

    def examples(self, loaded: models.Loaded, text_length: int) -> tuple[list[Example], list[Example]]:
        """The rows of the task, and those of the domain text, which have `text_length` tokens or the context's.

        Raises:
            InputError: if no training rows are left, or one does not fit the context.
        """
        items = inputs.task_data(self.command, loaded.tokenizer).train
        return training_rows.examples(self.command, loaded.tokenizer, loaded.model.config, items, text_length)

    def plan(self, loaded: models.Loaded, epochs: float, seed: int) -> list[list[Example]]:
        """The optimizer steps of so many epochs over the task, with domain text between. Raises as `examples` does."""
        return training_rows.steps(*self.examples(loaded, self.command.batch_size), self.command, epochs, seed)

    def calibration(self, loaded: models.Loaded) -> tuple[Scorer, str]:
        """The calibration rows, ready for the model, which is moved to the device, and the task's metric."""
        loaded.model.to(self.accelerator.device)
        data = inputs.task_data(self.command, loaded.tokenizer)
        autocast = mixed.measuring(self.accelerator)
        found = inputs.scorer(self.command, loaded.model, loaded.tokenizer, data.calibration, autocast)
        return found, data.metric

    def tune(
        self,
        loaded: models.Loaded,
        epochs: float,
        *,
        stage: int,
        parameters: Sequence[torch.nn.Parameter] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        lr: float | None = None,
        underway: Underway | None = None,
    ) -> train.StageReport:
        """Fine-tune in place on the task and the domain text, as a stage of `trimllm trim` does; all parameters
        unless named, at --lr unless another rate is given. With `underway` one that was cut goes on.

        Raises:
            InputError: if all parameters are to train, and there is no room for that.
        """
        command, model = self.command.model_copy(update={"lr": lr} if lr else {}), loaded.model
        model.to(self.accelerator.device)
        seed = command.seed * 1000 + stage
        plan = self.plan(loaded, epochs, seed)
        if parameters is None:
            parameters = sparse.freeze(model, whole(decoder.depth(model)), None)
            if plan:
                memory.release()  # what scans left with the device's allocator counts as taken
                remedy = "give a device with more; --dtype bfloat16 takes half, and rounds small steps away"
                room.check_training(sum(one.nbytes for one in parameters), self.accelerator.device, remedy)
        pad = encoding.pad_id(loaded.tokenizer, model)
        with self.console.progress(self.cell.name) as show:

            def step(done: int, total: int, loss: float, speed: float) -> None:
                show(done, total, f"loss {loss:.3f}  {speed:.0f} tokens/s")
                if on_step:
                    on_step(done, total)

            return train.train_stage(
                model,
                parameters,
                plan,
                command,
                self.accelerator,
                Means(pad_id=pad, attention=command.attention, folder=self.folder, say=self.console.say),
                seed=seed,
                on_step=step,
                underway=underway,
            )

    def underway(self, model: Any) -> Underway:
        """Where the only stage of a method is saved on the way; it leaves room for the model, as it trained and as it
        is saved."""
        path, minutes = self.folder / placing.STAGE, self.command.checkpoint_minutes
        underway.remove_partial(path)
        return Underway(path, minutes, reserve=2 * verification.weight_bytes(model), say=self.console.say)

    def save(self, loaded: models.Loaded, layout: Layout | None = None) -> Path:
        """Write the model as a verified checkpoint in the dtype that the base was saved in."""
        models.cast(loaded.model, self.saved_dtype())
        target, origin = self.folder / "model", Origin.of(self.command.model)
        export.save_trimmed(
            loaded.model,
            target,
            tokenizer=loaded.tokenizer,
            layout=layout or whole(decoder.depth(loaded.model)),
            base=origin.record(),
            companions=licences.terms(origin),
            overwrite=True,
        )
        return target

    def saved_dtype(self) -> torch.dtype:
        """The dtype that the base was saved in."""
        found = models.saved_dtype(
            loading.path_of(self.command.model), trust_remote_code=self.command.trust_remote_code
        )
        return found or torch.float32

    def trim(self, start: str | Path, folder: Path | None = None, **changes: Any) -> Product:
        """A run of `trimllm trim` from a checkpoint, or gone on with; its result, and what that took."""
        dtype = name_of(self.saved_dtype())
        output = folder or self.folder / "run"
        fixed = {"model": str(start), "keep": self.cell.keep, "save_dtype": dtype, "output": str(output)}
        config = self.trim_settings(**{**fixed, **changes})
        progressive.trim(config, console=self.console)
        return cost(rundir.RunDir(output).model, rundir.RunDir(output))


def cost(checkpoint: Path, run: rundir.RunDir, depth: int = 0) -> Product:
    """A checkpoint of a run as a product: what its stages and scans took, down to `depth`."""
    journal = Journal.read(run.journal)
    stages = [stage for stage in journal.of("stage") if stage["depth"] >= depth]
    last = max((stage["stage"] for stage in stages), default=-1)
    drops = [drop for drop in journal.of("drop") if drop["stage"] <= last]
    return Product(
        checkpoint,
        train_seconds=sum(stage["train"]["seconds"] for stage in stages),
        compress_seconds=sum(drop["seconds"] for drop in drops),
        tokens=sum(stage["train"]["tokens"] for stage in stages),
    )
