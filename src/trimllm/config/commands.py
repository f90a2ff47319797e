"""Settings of the other commands."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliPositionalArg

from trimllm.config.shared import (
    ANALYSIS_ITEMS,
    STRATEGY,
    CalibrationSettings,
    DataSettings,
    LoadSettings,
    Location,
    ModelSettings,
    Number,
    Positive,
    ReportSettings,
    ScoreSettings,
    Seed,
    Settings,
    Several,
    StrategySettings,
    Threads,
    TrainedModel,
)

NEW_TOKENS = 128
"""Longest generated answer, in tokens."""


class ScanSettings(ScoreSettings):
    """What is scanned, and by which score."""

    unit: Literal["block", "pair", "sublayer"] = "block"  # type: ignore[assignment]
    """What is deleted on trial: blocks, pairs, or attention and MLP separately."""
    run: Positive | None = None
    """Blocks in the contiguous runs that --strategy angular compares (default: half of the depth)."""

    def idle(self) -> dict[str, str]:
        found = super().idle()
        if "angular" not in self.strategy:
            found |= self._given(("run",), "is for --strategy angular: leave it out")
        return found


class ScanConfig(ScanSettings, CalibrationSettings):
    """Measure how important every layer is, without changing the model: a table, scan.json and scan.png.

    Example:
      trimllm scan --model demo --task demo_law --unit sublayer --output runs/scan
      trimllm scan --model runs/medicine/model --task demo_medicine --analysis --output runs/why
    """

    analysis: bool = False
    """Also measure what may explain the scan (causal tracing, what MLPs promote, block influence, logit lens) and how
    its ranks agree: analysis.json, analysis.png."""
    analysis_items: Positive = ANALYSIS_ITEMS
    """With --analysis: most questions that are traced; its cost grows with them and with the layers."""
    output: Location
    """Directory for scan.json and scan.png; a scan that was cut goes on there, if the same is asked for again."""

    def idle(self) -> dict[str, str]:
        found = super().idle()
        if not self.analysis:
            found |= self._given(("analysis_items",), "is for --analysis: leave it out, or add --analysis")
        return found

    @model_validator(mode="after")
    def _an_analysis_compares_all_layers(self) -> ScanConfig:
        if not self.analysis:
            return self
        if self.unit == "pair":
            raise ValueError("--analysis is of blocks or sublayers: leave out --unit pair")
        if self.scan == "racing":
            raise ValueError("--analysis compares all candidates, and --scan racing finds one: leave one of them out")
        if self.keep_pattern:
            raise ValueError("--analysis is of single layers: leave out --keep-pattern")
        return self


class DropConfig(ModelSettings):
    """Remove the named layers and save the rest, verified: surgery only, no data needed.

    Example:
      trimllm drop --model DIR_OR_HUB_ID --layers 3,7 --output trimmed
      trimllm drop --model DIR --layers 3,7 --output trimmed --streaming
    """

    layers: Several[Number]
    """Layers to remove, 0-based, negative from the end: 3,7."""
    output: Location
    """Directory of the new checkpoint."""
    streaming: bool = False
    """Cut on disk, tensor by tensor, without loading the model: for a --model directory larger than memory."""
    max_shard_size: str | None = None
    """With --streaming: largest weight file (default: 5GB)."""

    def idle(self) -> dict[str, str]:
        if not self.streaming:
            return self._given(("max_shard_size",), "is for --streaming: leave it out, or add --streaming")
        loading = ("dtype", "device", "attention", "threads", "allow_pickle")
        return self._given(loading, "is not for --streaming, which never loads the model: leave one of them out")


class EvalConfig(ReportSettings):
    """Evaluate a model on a task's reported split: the metric with its standard error, loss, perplexity.

    Example:
      trimllm eval --model runs/medicine/model --task demo_medicine
      trimllm eval --model runs/medicine/model --task demo_medicine --against demo
    """

    against: str | None = None
    """Another model (a directory, a Hub id or `demo`) that is asked the same: by how many points of the metric the
    first is above it, with the standard error over paired answers."""
    output: Location | None = None
    """JSON file for the result."""
    eval_batch_size: Positive | None = None
    """Most tokens per batch (default: 4096, with --generate 16 rows; less where memory runs out)."""
    generate: bool = False
    """Generation tasks: also generate, and report exact match, ROUGE-L and repetition."""
    max_new_tokens: Positive = NEW_TOKENS
    """With --generate: longest generated answer."""

    def idle(self) -> dict[str, str]:
        found = super().idle()
        if not self.generate:
            found |= self._given(("max_new_tokens",), "is for --generate: leave it out, or add --generate")
        return found


class SpeedSettings(Settings):
    """How speed is measured."""

    sequence: Annotated[int, Field(gt=1)] | None = None
    """Of the speed: length of a row in tokens when its last token is decoded; the prompt is what --new-tokens leave of
    it (default: 512, or the shortest context)."""
    new_tokens: Positive | None = None
    """Of the speed: tokens decoded one by one at the end of the row (default: 64, at most half of it)."""
    repeats: Positive = 5
    """Of the speed: rounds, in each of which every model has its turn. One more before them warms up."""

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> SpeedSettings:
        if self.sequence and self.new_tokens and self.new_tokens >= self.sequence:
            raise ValueError(
                f"--new-tokens {self.new_tokens} leave no prompt in --sequence {self.sequence}: ask for less"
            )
        return self


class BenchConfig(SpeedSettings, LoadSettings):
    """Measure models in turn: prefill and decode speed, latency, memory, cache, size, and what the bytes allow at best.

    Example:
      trimllm bench demo runs/medicine/model --batch-size 1,8 --output runs/bench
      trimllm bench config:benchmarks/shapes/llama-7b.json config:benchmarks/shapes/llama-7b-half.json --dtype float16
    """

    models: CliPositionalArg[Several[str]]
    """Directories, Hub ids or `demo`; config:FILE.json is a model of that shape with random weights. Ratios are to the
    first."""
    batch_size: Several[Positive] = (1,)
    """Sequences at a time: 1,8 measures both."""
    cache: Literal["dynamic", "static"] = "dynamic"
    """Key-value cache: growing with every token, or allocated for the whole row."""
    compile: bool = False
    """Decode with torch.compile (needs --cache static: its shapes never change)."""
    output: Location | None = None
    """Directory for bench.json and bench.png."""

    @field_validator("models")
    @classmethod
    def _names_a_model(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        if not models:
            raise ValueError("name at least one model: trimllm bench demo")
        return models

    @model_validator(mode="after")
    def _a_compiled_cache_has_one_shape(self) -> BenchConfig:
        if self.compile and self.cache != "static":
            raise ValueError("--compile needs --cache static: a growing cache has other shapes at every token")
        return self


class CompareConfig(SpeedSettings, TrainedModel, StrategySettings, DataSettings):
    """Compare ways to make a model smaller or faster, on your model and data: one table, compare.json, compare.png.

    Example:
      trimllm compare --model demo --task demo_law --text demo_law --lr 2e-3 --output runs/compare
      trimllm compare --model demo --task demo_law --methods trim,shortgpt,llm-int8 --keep 0.5,0.25 --output runs/few
    """

    output: Location
    """Directory of the comparison: a folder per method, compare.json, compare.png."""
    resume: bool = False
    """Go on with the comparison in --output: finished methods are kept, those that could not run are tried again."""
    methods: Several[str] = ()
    """Methods by name, with those they start from (default: all; an unknown name lists them)."""
    keep: Several[Annotated[float, Field(gt=0, lt=1)]] = (0.5,)
    """Shares of the blocks to keep: 0.5,0.25 gives two rows for every method that removes blocks."""
    also: Several[Location] = ()
    """More tasks to evaluate every model on, without training for them: what specialization costs."""
    strategy: str = STRATEGY
    """Score by which the rows of TrimLLM (trim, trim-pair, one-shot) choose, as in `trimllm trim`."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Epochs of the full fine-tuning that most methods start from."""
    schedule: Literal["late", "epoch"] = "late"
    """How TrimLLM spreads its training, as in `trimllm trim`; epoch: one run of it gives every --keep
    (without --final-epochs)."""
    epochs_per_drop: Annotated[float, Field(ge=0)] = 1.0
    """Epochs per dropped block; methods that cut at once train as long as all of them together."""
    final_epochs: Annotated[float, Field(ge=0)] = 0.0
    """More epochs after the last drop."""
    optimizer_state: Literal["carried", "fresh"] = "carried"
    """What AdamW begins a stage of TrimLLM after a later drop with, as in `trimllm trim`."""
    train_embeddings: bool = True
    """In a comparison they always train, since most methods train everything."""
    cache_frozen_prefix: Literal["off", "memory", "disk"] = "off"
    """Not in a comparison, since most methods train everything."""
    eval_batch_size: Positive | None = None
    """Most tokens per batch in scans and evaluations (default: 4096; less where memory runs out)."""
    baselines_python: Location | None = None
    """Python of another environment, with trimllm[baselines] in it, for methods whose libraries are missing here."""

    @field_validator("keep")
    @classmethod
    def _as_rows_are_named(cls, keep: tuple[float, ...]) -> tuple[float, ...]:
        named = tuple(dict.fromkeys(float(f"{share:g}") for share in keep))
        if 1.0 in named:
            raise ValueError("must be less than 1, in six digits")
        return named

    @model_validator(mode="after")
    def _methods_train_everything(self) -> CompareConfig:
        if self.cache_frozen_prefix != "off":
            raise ValueError("--cache-frozen-prefix is for frozen blocks, and most methods train all: leave it out")
        if not self.train_embeddings:
            raise ValueError(
                "--no-train-embeddings is for frozen blocks, and most methods train all: leave it out (a comparison "
                "that was begun with it cannot go on: give another --output)"
            )
        return self

    @model_validator(mode="after")
    def _names_something(self) -> CompareConfig:
        if not self.keep:
            raise ValueError("--keep names no share: give at least one, such as --keep 0.5")
        return self


class ExportConfig(Settings):
    """Hand a model over: a depth that a run kept as a checkpoint of its own, or a checkpoint in another format.

    Example:
      trimllm export runs/medicine --depth 10
      trimllm export runs/medicine --to gguf --quant q8_0
    """

    source: CliPositionalArg[Location]
    """Directory of a `trimllm trim` run, or of a checkpoint."""
    depth: Positive | None = None
    """Of a run: which depth; kept are the last two, and all with --keep-checkpoints (default: the run's result)."""
    to: Literal["checkpoint", "gguf", "onnx", "openvino", "int8", "int4"] = "checkpoint"
    """checkpoint: a depth of a run; gguf: for llama.cpp; onnx, openvino: graphs; int8, int4: quantized weights."""
    quant: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None = None
    """With --to gguf: type of the matrices (default: f16)."""
    task: Location | None = None
    """With --to int8 or int4: also evaluate the quantized model on this task (as `trimllm eval` does; rows are drawn by
    the seed of the run that made it)."""
    truncate: bool = False
    """With --task: cut rows that exceed the context, as `trimllm eval` does. Without it such rows are an error."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off: such a model is refused."""
    output: Location | None = None
    """What to write (default: beside the source, named by depth and format)."""

    def idle(self) -> dict[str, str]:
        found = dict[str, str]()
        if self.to != "gguf":
            found |= self._given(("quant",), "is for --to gguf: leave it out, or add --to gguf")
        if self.to not in ("int8", "int4"):
            found |= self._given(("task",), "is for --to int8 and int4: leave it out, or add one of them")
        if self.task is None:
            found |= self._given(("truncate",), "is for the rows of --task: leave it out, or add --task")
        return found

    @model_validator(mode="after")
    def _names_something(self) -> ExportConfig:
        if self.to == "checkpoint" and self.depth is None:
            raise ValueError("name what the run kept with --depth N, or another format with --to")
        return self


class PushConfig(Settings):
    """Put a finished checkpoint on the Hugging Face Hub, with its model card.

    Example:
      trimllm push runs/medicine YOUR_NAME/medicine-8-layers --private
    """

    directory: CliPositionalArg[Location]
    """Directory of a `trimllm trim` run (its result is taken), or of a checkpoint that trimllm wrote."""
    repo_id: CliPositionalArg[str]
    """Repository on the Hub: YOUR_NAME/REPOSITORY; made if it is not there."""
    private: bool = False
    """Make the repository private; one that exists stays what it is."""


class TasksConfig(Settings):
    """List the built-in tasks.

    Example:
      trimllm tasks
    """


class DemoConfig(Settings):
    """Run the whole job on the embedded model, which knows three invented domains.

    Example:
      trimllm demo --domain law
    """

    domain: Literal["medicine", "law", "finance"] = "medicine"
    """The domain to specialize in."""
    output: Location = "runs/demo"
    """Directory of the runs and of the trimmed checkpoint."""
    seed: Seed = 0
    """Seed of the run."""
    unit: Literal["block", "pair"] = "block"
    """What is dropped at a time."""
    threads: Threads | None = None
    """CPU threads for torch."""
