"""Settings that several commands have: which model, which task, how units are scored, how training goes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from trimllm.errors import did_you_mean

T = TypeVar("T")
if TYPE_CHECKING:
    Several = tuple[T, ...]
else:  # of a `tuple` pydantic-settings before 2.16, the last for Python 3.10, does not split the `1,2` of an option
    Several = Annotated[Sequence[T], AfterValidator(tuple)]


def _no_range(value: Any) -> Any:
    """pydantic reads `0-3` as -3."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*-\s*\d+\s*", value):
        raise ValueError("a range is not read: write every number, as 0,1,2,3")
    return value


Number = Annotated[int, BeforeValidator(_no_range)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
SEEDS = 2**63 // 1000 - 1
"""Largest seed for which what is derived from it (a thousand times it, and the number of a stage) fits 64 bits."""
Seed = Annotated[Number, Field(ge=-SEEDS, le=SEEDS)]
Threads = Annotated[int, Field(gt=0, le=4096)]
Location = Annotated[str, AfterValidator(os.path.expanduser)]
"""A file or folder, or in some settings a name. A shell expands a tilde at the beginning of a word only, and nothing
does in YAML. (Of models, `loading.path_of` expands it: their names are stored as they were given.)"""

STRATEGIES = (
    *("probability", "scan+norm", "scan+probability", "scan+loss", "scan", "norm", "bi", "angular", "loss"),
    *("perplexity", "taylor", "magnitude", "random", "first", "last", "alternate", "symmetric"),
)
"""What `--strategy` takes. With a plus the first score decides and the second breaks ties; scan+norm is the paper's.
See `scores.SCORES`."""
STRATEGY = "probability"
"""The default: see docs/choices.md, "Sure or right"."""
CONFIDENCE = 0.999
"""Confidence of a race: tried on recorded scans, see docs/lab.md."""
RESOLUTION, TEXT_RATIO, TRAIN_RATIO = 0.5, 1.0, 0.25
COARSEST = 50.0
"""Most accuracy points that one calibration question may be worth: there are two of them at least."""
ANALYSIS_ITEMS = 64
"""Questions of causal tracing."""
EMBEDDED = "demo"
"""The model that comes with us; a folder of that name is `./demo`."""


class Settings(BaseModel):
    """Base of all settings: unknown names and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def idle(self) -> dict[str, str]:
        """Settings that were given and would have no effect beside the others: by name, why, with the remedy."""
        return {}

    def _given(self, names: Sequence[str], why: str) -> dict[str, str]:
        """Those of the settings that are not at their defaults, each with its option and `why`, as `idle` has them."""
        values = {name: getattr(self, name) for name in names}
        return {
            name: f"{option_of(name, value)} {why}"
            for name, value in values.items()
            if value != type(self).model_fields[name].default
        }

    @field_validator("*", mode="before")
    @classmethod
    def _no_setting_is_blank(cls, value: Any) -> Any:
        """An empty path is the current folder to most of Python; usually it is a shell variable that is not set."""
        each_path(value, _not_blank)
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _a_bare_off_is_a_word(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads it as false, and `no`, too."""
        words = get_args(cls.model_fields[str(info.field_name)].annotation)
        return next((word for word in ("off", "no") if word in words), value) if value is False else value

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Settings:
        for why in self.idle().values():
            raise ValueError(why)
        return self


def each_path(value: Any, change: Callable[[str], str]) -> Any:
    """The strings in the value of a setting, changed."""
    if isinstance(value, dict):
        return {part: each_path(one, change) for part, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(each_path(one, change) for one in value)
    return change(value) if isinstance(value, str) else value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("empty: give a value, or leave it out")
    return value


def option(name: str) -> str:
    """The option of a setting: `--train-ratio`."""
    return "--" + name.replace("_", "-")


def option_of(name: str, value: Any) -> str:
    """A setting as the command line has it: `--train-ratio 0.5`, `--no-train-embeddings`."""
    if value is None:
        return f"no {option(name)}"
    if isinstance(value, bool):
        return option(name if value else f"no_{name}")
    return f"{option(name)} {value}"


def without_idle(kind: type[Settings], values: dict[str, Any]) -> dict[str, Any]:
    """The values less those that have no effect, of settings that several methods share."""
    while idle := kind.model_construct(**values).idle().keys() & values.keys():  # without one, others may be, too
        values = {name: value for name, value in values.items() if name not in idle}
    return values


class ModelName(Settings):
    model: str
    """Model to work on: a directory or a Hugging Face Hub id; `demo` is the embedded one."""


class LoadSettings(Settings):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in memory; auto: float32 to train (in bf16 mixed precision on a GPU that has bf16), else as
    saved (float32 to scan and evaluate where a CPU emulates 16 bits and memory has room)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps ...; auto takes a GPU if there is one (to train: CUDA only)."""
    attention: str = "auto"
    """What computes attention: eager, sdpa, flex_attention, flash_attention_2 ... where model and device can; auto: as
    transformers chooses for the model (short rows train with eager on a CPU in bf16 mixed precision)."""
    threads: Threads | None = None
    """CPU threads for torch (default: torch's own choice)."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off: such a model is refused."""
    allow_pickle: bool = False
    """Read weights from pickle files too, which can run code. Off: safetensors only."""


class ModelSettings(LoadSettings, ModelName):
    """Which model, and how it is loaded."""


class TaskSettings(ModelSettings):
    """A model on a task: which, and how its rows are read."""

    task: Location
    """A built-in task (`trimllm tasks` lists them), a task YAML, or a file or directory with your rows."""
    task_files: dict[str, Location] | None = None
    """Local files for a built-in task, per split: train=FILE,test=FILE."""
    metric: Literal["acc", "acc_norm", "likelihood"] | None = None
    """What is reported, and by which floors and scans decide, as accuracy or as the probability that goes with it
    (default: the task's own)."""
    max_length: Positive | None = None
    """Longest row in tokens (default: the model's context)."""
    truncate: bool = False
    """Cut rows that exceed the context: first the end of a written answer, as far as the prompt would have less than
    half of it; then the beginning of the prompt. Choices stay whole. Without it such rows are an error."""
    seed: Seed = 0
    """Seed of splits, order and every random choice."""


class ReportSettings(TaskSettings):
    """A task whose reported split is asked."""

    max_test: Positive | None = None
    """Report on at most so many test rows (seeded sample)."""


class CalibrationSettings(TaskSettings):
    """A task of which rows for decisions are held out."""

    calibration_size: Positive | None = None
    """Rows held out of train on which every decision is taken (default: from --resolution)."""
    resolution: Annotated[float, Field(gt=0, le=COARSEST)] = RESOLUTION
    """Accuracy points one calibration question should be worth; 0.5 asks for 200 rows (at most a fifth of train)."""

    def idle(self) -> dict[str, str]:
        found = super().idle()
        if self.calibration_size is not None:
            says = f"--calibration-size {self.calibration_size} says it: leave one of them out"
            found |= self._given(("resolution",), f"finds out how many calibration rows are held out, and {says}")
        return found


class DataSettings(ReportSettings, CalibrationSettings):
    """A task that is trained on, decided on and reported."""

    max_train: Positive | None = None
    """Use at most so many training rows (seeded sample)."""


def unknown_strategy(name: str) -> str:
    """One line for a strategy that there is not, with the nearest that there is."""
    hint = did_you_mean(name, STRATEGIES) or f": use one of {', '.join(STRATEGIES)}"
    return f"unknown strategy {name!r}{hint}"


class StrategySettings(Settings):
    strategy: str = STRATEGY
    """Which unit goes, by what trial deletion leaves: probability (of the right choice, in the mean; of texts, their
    likelihood), scan+norm (the paper's: accuracy, ties by activation norm), scan+probability, scan+loss (ties by the
    loss of right answers), scan, loss (the quick one where a question has dozens of choices), perplexity; or norm, bi,
    angular, taylor, magnitude, random, first, last, alternate, symmetric."""

    @field_validator("strategy")
    @classmethod
    def _strategy_is_known(cls, strategy: str) -> str:
        if strategy not in STRATEGIES:
            raise ValueError(unknown_strategy(strategy))
        return strategy


class ScoreSettings(StrategySettings):
    unit: Literal["block", "pair"] = "block"
    """What is dropped at a time: a block, or also an MLP with the next attention (what is left re-packs to blocks)."""
    scan: Literal["exact", "racing"] = "exact"
    """exact: every candidate on all calibration rows; racing (with --strategy scan+norm or scan): candidates that
    cannot win any more stop early, with foreseen accuracies, by which the blocks to train are ranked."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = CONFIDENCE
    """With --scan racing: nominal probability of finding the winner of the exact scan (found on recorded scans with
    ties within one question: 99.0 % of the time at 0.999, 97.7 % at 0.99)."""
    tie_tolerance: Annotated[float, Field(ge=0)] | None = None
    """With a strategy of two scores (scan+norm): accuracy points within which candidates are tied (default: 0, equal
    ones alone). With `trimllm trim --schedule recover` also how many a set may cost (default: one calibration question,
    or the standard error)."""
    keep_pattern: bool = False
    """Drop adjacent layers, as many at a time as a period of the model's layer types has (Gemma 3: six), for engines
    that take the pattern from the family and not from the checkpoint."""
    protect: Several[Number] = ()
    """Layers that must stay, 0-based, negative from the end: 0,-1."""
    eval_batch_size: Positive | None = None
    """Most tokens per batch in scans and evaluations (default: 4096; less where memory runs out)."""

    @property
    def has_ties(self) -> bool:
        """Whether anything is tied: a second score decides then."""
        return "+" in self.strategy

    def idle(self) -> dict[str, str]:
        found = super().idle()
        if not self.has_ties:
            nothing = (
                f"--strategy {self.strategy} has nothing that breaks ties: add --strategy scan+norm, or leave it out"
            )
            found |= self._given(("tie_tolerance",), f"is for two scores, and {nothing}")
        if self.scan == "exact":
            found |= self._given(("confidence",), "is for --scan racing: leave it out, or add --scan racing")
        return found

    @model_validator(mode="after")
    def _races_are_for_accuracy(self) -> ScoreSettings:
        if self.scan == "racing" and self.strategy not in ("scan+norm", "scan"):
            raise ValueError(
                f"--scan racing compares accuracies, and norms where they tie, --strategy {self.strategy} something "
                "else: add --strategy scan+norm, or leave --scan racing out"
            )
        return self


class TrainSettings(Settings):
    text: Location | None = None
    """Domain text to mix into training: file or directory (plain text, JSONL `text`, Parquet), or demo_medicine etc."""
    text_ratio: Annotated[float, Field(ge=0)] = TEXT_RATIO
    """Tokens of domain text per token of the task."""
    lr: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW; linear warm-up and decay within every stage."""
    batch_size: Positive = 4096
    """Tokens per optimizer step (over all processes)."""
    micro_batch_size: Positive | None = None
    """Tokens per forward and backward of one process (default: the whole batch); halved where memory runs out."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient norm above which gradients are scaled down."""
    train_ratio: Fraction = TRAIN_RATIO
    """Share of the blocks that train after the warm-up: those most likely to stay."""
    sparse_update: Literal["filled", "static", "dynamic", "off"] = "filled"
    """Which blocks train. filled: those that the first scan chose, and for each that was dropped the most important
    other one; static: without that, as long as one of them is left (as published); dynamic: chosen by every scan; off:
    all train."""
    train_embeddings: bool = True
    """Embeddings, final norm and output head train too (as published)."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Training, scans and accuracies on the way compute in bf16 on float32 weights; auto: on a CUDA GPU that has it
    (CPUs with AVX512-BF16 or AMX gain too). The result is measured as it is saved."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 15.0
    """Within a stage of training, save how far it is every so many minutes, for --resume, which may have another number
    (three times the size of what trains; more seldom where it would take a twentieth of the time); Ctrl-C and SIGTERM
    save it, too; 0: never."""
    cache_frozen_prefix: Literal["off", "memory", "disk"] = "off"
    """Keep what the blocks below the lowest that trains give for each row, for stages of several epochs; needs
    --no-train-embeddings."""

    def idle(self) -> dict[str, str]:
        found = super().idle()
        if not self.text_ratio:
            found |= self._given(("text",), "is not trained on with --text-ratio 0: leave one of them out")
        elif self.text is None:
            found |= self._given(("text_ratio",), "is for --text: leave it out, or add --text")
        if self.sparse_update == "off":
            every = "with --sparse-update off all of them train: leave one of them out"
            found |= self._given(("train_ratio",), f"is for some of the blocks, and {every}")
        return found


class TrainedModel(TrainSettings, ModelSettings):
    """A model that trains: which weights can."""

    @model_validator(mode="after")
    def _weights_can_train(self) -> TrainedModel:
        if self.dtype == "float16":
            raise ValueError(
                "--dtype float16 cannot train: AdamW's second moments underflow in it, and steps become far too large: "
                "give float32 with --mixed-precision bf16, or --dtype bfloat16"
            )
        if self.mixed_precision == "bf16" and self.dtype == "bfloat16":
            raise ValueError("--mixed-precision bf16 is for float32 weights: leave out --dtype bfloat16")
        return self
