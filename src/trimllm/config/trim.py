"""Settings of `trimllm trim`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trimllm.config.shared import (
    DataSettings,
    Location,
    Positive,
    ScoreSettings,
    TrainedModel,
    option,
)

DEPTHS = ("keep", "depth")
MEASURED = ("max_params", "max_memory", "target_speedup")
"""Targets whose depth is only known when it is reached."""
SIZES = (*DEPTHS, *MEASURED)
FLOORS = ("min_accuracy", "max_drop")
TRAINING = (
    *("text", "lr", "batch_size", "micro_batch_size", "weight_decay", "max_grad_norm"),
    *("gradient_checkpointing", "checkpoint_minutes"),
)
"""Settings of all training."""
AFTER_DROPS = ("train_ratio", "sparse_update", "train_embeddings", "cache_frozen_prefix", "optimizer_state", "distill")
"""Settings of the training after drops."""
RECOVERING = ("recover_tolerance", "joint_tolerance", "max_joint")
"""Settings of --schedule recover."""


class TrimConfig(TrainedModel, ScoreSettings, DataSettings):
    """Trim a model: fine-tune on a task, drop the least important layer, go on until the target.

    Example:
      trimllm trim --model demo --task demo_medicine --text demo_medicine --keep 0.5 --lr 2e-3 --output runs/medicine
      trimllm trim --output runs/medicine --resume
    """

    output: Location
    """Directory of the run: journal, plans, result.json and the trimmed checkpoint in `model/`."""
    resume: bool = False
    """Go on with the run in --output where it was interrupted."""
    keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of the blocks to keep, to the nearest block (a half: the even number). Default, when no other target is
    given: 0.5."""
    depth: Positive | None = None
    """Number of blocks to keep."""
    max_params: Positive | None = None
    """Stop when the model has at most so many parameters."""
    max_memory: Annotated[float, Field(gt=0)] | None = None
    """Stop when the weights take at most so many GiB in the saved dtype."""
    target_speedup: Annotated[float, Field(gt=1)] | None = None
    """Stop when decoding at batch 1 is so many times as fast as the base (measured)."""
    min_accuracy: Annotated[float, Field(ge=0, le=100)] | None = None
    """Floor in percent on the calibration set: the first depth below it ends the run, the last one not below is the
    result."""
    max_drop: Annotated[float, Field(ge=0)] | None = None
    """Floor in points below the best calibration accuracy so far."""
    min_depth: Positive = 1
    """Never go below so many blocks."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Epochs of full fine-tuning before the first scan; 0 scans the base as it is."""
    schedule: Literal["late", "epoch", "recover"] = "late"
    """How training is spread. epoch: --epochs-per-drop after every drop (as published); late: as many in all, a third
    of them after every drop and the rest after the last; recover: as many units at once as cost little together, then
    only until the calibration loss is back. Default: late, or epoch if an accuracy floor may end the run."""
    epochs_per_drop: Annotated[float, Field(ge=0)] = 1.0
    """Epochs of training per drop (or per --drops-per-stage of them); 0 drops without training. With --schedule
    recover: at most so many per unit."""
    recover_tolerance: Annotated[float, Field(ge=0)] = 0.5
    """With --schedule recover: nats per token above the fine-tuned model's calibration loss at which the next drop
    follows."""
    joint_tolerance: Annotated[float, Field(ge=0)] = 0.75
    """With --schedule recover: nats per token that deleting several units at once may add to the calibration loss."""
    max_joint: Positive = 4
    """With --schedule recover: the most units that go at once."""
    final_epochs: Annotated[float, Field(ge=0)] = 0.0
    """More epochs after the last drop of a run that a size or speed ends (one that a floor ends is known too late).
    With --schedule recover the last stage takes these, or --epochs-per-drop if that is more, and is not cut short."""
    distill: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the loss after the warm-up that is the KL divergence from the fully fine-tuned model (with
    --warmup-epochs 0: the model as given), a teacher that is kept in memory beside the model that trains; 0:
    cross-entropy only."""
    optimizer_state: Literal["carried", "fresh"] = "carried"
    """What AdamW begins a stage after a later drop with. carried: what it knew of the parameters that go on training
    (kept in the last checkpoint: twice the size of what trains); fresh: nothing."""
    drops_per_stage: Positive = 1
    """Units dropped one after the other, each by a scan of its own, before training goes on."""
    one_shot: bool = False
    """Drop everything at once by the first scan, then train as long as all stages together: the usual baseline."""
    report_depths: bool = True
    """Evaluate the reported split at every depth, not only at the end (it is never used for a decision)."""
    keep_checkpoints: bool = False
    """Keep the weights of every depth on the way, for `trimllm export`; with --schedule late they had a third of their
    training."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the trimmed checkpoint; auto: as the base was saved."""

    @property
    def trains_after_drops(self) -> bool:
        return bool(self.epochs_per_drop or self.final_epochs)

    @property
    def trains(self) -> bool:
        """Whether anything is trained at all."""
        return bool(self.warmup_epochs) or self.trains_after_drops

    @property
    def carries_state(self) -> bool:
        """Whether AdamW's state goes from one stage after drops to the next, if there are several."""
        return self.optimizer_state == "carried" and self.epochs_per_drop > 0

    @property
    def has_ties(self) -> bool:
        sets = self.schedule == "recover" and self.max_joint > 1  # they are judged within the tolerance
        return super().has_ties or sets

    def idle(self) -> dict[str, str]:
        found = super().idle()
        if self.schedule != "recover":
            found |= self._given(RECOVERING, "is for --schedule recover: leave it out, or add --schedule recover")
        else:
            if self.max_joint == 1:
                one = "is for sets of units, and with --max-joint 1 none is tried: leave it out"
                found |= self._given(("joint_tolerance",), one)
            if not self.epochs_per_drop:
                never = "is for stages that may end early, and with --epochs-per-drop 0 none does: leave it out"
                found |= self._given(("recover_tolerance",), never)
        if not self.trains:
            found |= self._given(TRAINING, "is for training, and nothing trains: leave it out, or train")
        if not self.trains_after_drops:
            found |= self._given(AFTER_DROPS, "is about the training after drops, and there is none: leave it out")
        elif not self.epochs_per_drop:
            one = "with --epochs-per-drop 0 there is one: leave it out"
            found |= self._given(("optimizer_state",), f"is for several stages after drops, and {one}")
        if self.schedule == "epoch" and all(getattr(self, name) is None for name in FLOORS):  # those ask for it
            if not self.epochs_per_drop:
                never = "is about training after every drop, and with --epochs-per-drop 0 there is none: leave it out"
                found |= self._given(("schedule",), never)
            elif self.one_shot:
                once = "is about several stages, and --one-shot has one: leave one of them out"
                found |= self._given(("schedule",), once)
        if not self.one_shot:
            return found
        once = "--one-shot drops everything at once: leave one of them out"
        found |= self._given(("drops_per_stage",), f"is for several stages, and {once}")
        if self.sparse_update == "dynamic":
            found |= self._given(
                ("sparse_update",), "is for several scans, and --one-shot makes one: leave one of them out"
            )
        found |= self._given(("optimizer_state",), "is for several stages, and --one-shot has one: leave it out")
        if depth := next((f"--{name} {value}" for name in DEPTHS if (value := getattr(self, name)) is not None), None):
            why = f"cannot end --one-shot, which drops everything at once, to {depth}: leave it out"
            found |= self._given(MEASURED, why)
        return found

    @model_validator(mode="before")
    @classmethod
    def _half_of_the_blocks_without_a_target(cls, values: Any) -> Any:
        none = isinstance(values, dict) and all(values.get(name) is None for name in (*SIZES, *FLOORS))
        return {**values, "keep": 0.5} if none else values

    @model_validator(mode="before")
    @classmethod
    def _a_floor_needs_trained_depths(cls, values: Any) -> Any:
        floor = isinstance(values, dict) and any(values.get(name) is not None for name in FLOORS)
        return {"schedule": "epoch", **values} if floor else values

    @model_validator(mode="after")
    def _prefixes_are_frozen(self) -> TrimConfig:
        if self.cache_frozen_prefix != "off" and (self.train_embeddings or self.sparse_update == "off"):
            raise ValueError("--cache-frozen-prefix is for frozen embeddings and blocks: add --no-train-embeddings")
        return self

    @model_validator(mode="after")
    def _one_depth_target(self) -> TrimConfig:
        if self.keep is not None and self.depth is not None:
            raise ValueError(
                f"give --keep or --depth, not both: --keep {self.keep}, --depth {self.depth} (a run that goes on keeps "
                "the one it began with)"
            )
        return self

    @model_validator(mode="after")
    def _recovering_finds_out_what_goes_together(self) -> TrimConfig:
        if self.schedule == "recover":
            if self.one_shot or self.drops_per_stage != 1:
                given = "--one-shot" if self.one_shot else f"--drops-per-stage {self.drops_per_stage}"
                raise ValueError(f"{given} is not for --schedule recover, which finds out how many go at once")
            if self.scan == "racing":
                raise ValueError("--schedule recover ranks all candidates, --scan racing finds one: leave one out")
        return self

    @model_validator(mode="after")
    def _what_comes_last_has_an_end(self) -> TrimConfig:
        floor = next((option(name) for name in FLOORS if getattr(self, name) is not None), None)
        sizes = [getattr(self, name) for name in SIZES]
        if floor and self.schedule == "late":
            raise ValueError(
                f"{floor} judges depths when they are trained, and --schedule late trains the last one only: leave one "
                "of them out"
            )
        if floor and self.final_epochs and all(size is None for size in sizes) and self.min_depth == 1:
            raise ValueError(
                "--final-epochs needs a target besides the floor: which drop is the last is known too late"
            )
        return self

    @model_validator(mode="after")
    def _one_shot_knows_how_many(self) -> TrimConfig:
        others = [getattr(self, name) for name in (*MEASURED, *FLOORS)]
        if self.one_shot and self.unit != "block":
            raise ValueError("--one-shot drops blocks only: leave out --unit pair")
        if self.one_shot and self.scan == "racing":
            raise ValueError("--one-shot ranks all candidates, and --scan racing finds one: leave one of them out")
        if self.one_shot and self.keep is None and self.depth is None and any(o is not None for o in others):
            raise ValueError("--one-shot must know how many layers go: give --keep or --depth")
        return self
