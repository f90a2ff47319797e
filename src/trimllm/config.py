"""Every setting of every command: frozen pydantic models, read from the command line and from YAML.

The field's description is the option's help; the same names stand in `--config FILE.yaml` and in `config.yaml`, which
a run writes beside its results.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]

CONFIDENCE = 0.999
"""Of a race: tried on recorded scans, see docs/lab.md."""
ANALYSIS_ITEMS = 64
"""Questions of causal tracing."""


class Settings(BaseModel):
    """Base of all settings: unknown names and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=Settings)


class ModelName(Settings):
    model: str
    """Model to work on: a directory or a Hugging Face Hub id; `demo` is the embedded one."""


class LoadSettings(Settings):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in memory; auto: float32 to train (bf16 mixed precision on a GPU), else as saved."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps ...; auto takes a GPU if there is one (to train: CUDA only)."""
    attention: str = "auto"
    """What computes attention: eager, sdpa, flex_attention, flash_attention_2 ... where model and device can; auto: as
    transformers chooses for the model (short rows train with eager on a CPU in bf16 mixed precision)."""
    threads: Positive | None = None
    """CPU threads for torch (default: torch's own choice)."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off: such a model is refused."""
    allow_pickle: bool = False
    """Read weights from pickle files too, which can run code. Off: safetensors only."""


class ModelSettings(LoadSettings, ModelName):
    """Which model, and how it is loaded."""


class TaskSettings(Settings):
    task: str
    """A built-in task (`trimllm tasks` lists them), a task YAML, or a file or directory with your rows."""
    task_files: dict[str, str] | None = None
    """Local files for a built-in task, per split: train=FILE,test=FILE."""
    metric: Literal["acc", "acc_norm", "likelihood"] | None = None
    """What is reported and decided on (default: the task's own)."""
    calibration_size: Positive | None = None
    """Rows held out of train on which every decision is taken (default: from --resolution)."""
    resolution: Annotated[float, Field(gt=0, le=50)] = 0.5
    """Accuracy points one calibration question should be worth; 0.5 asks for 200 rows (at most a fifth of train)."""
    max_train: Positive | None = None
    """Use at most so many training rows (seeded sample)."""
    max_test: Positive | None = None
    """Report on at most so many test rows (seeded sample)."""
    max_length: Positive | None = None
    """Longest row in tokens (default: the model's context)."""
    truncate: bool = False
    """Cut prompts that exceed the context from the left; without it they are an error."""
    seed: int = 0
    """Seed of splits, order and every random choice."""


class ScoreSettings(Settings):
    unit: Literal["block", "pair"] = "block"
    """What is dropped at a time: a block, or also an MLP with the next attention (what is left re-packs to blocks)."""
    strategy: str = "scan+norm"
    """Which unit goes: scan+norm (accuracy after trial deletion, ties by activation norm), scan, norm, bi, angular,
    loss, perplexity, taylor, magnitude, random, first, last, alternate, symmetric."""
    scan: Literal["exact", "racing"] = "exact"
    """exact: every candidate on all calibration rows; racing: candidates that cannot win any more stop early, with
    foreseen accuracies, by which the blocks to train are ranked."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = CONFIDENCE
    """With --scan racing: probability of finding the winner of the exact scan."""
    tie_tolerance: Annotated[float, Field(ge=0)] | None = None
    """Accuracy points within which candidates are tied (default: one calibration question; none for likelihoods)."""
    keep_pattern: bool = False
    """Drop adjacent layers, as many at a time as a period of the model's layer types has (Gemma 3: six), for engines
    that take the pattern from the family and not from the checkpoint."""
    protect: tuple[int, ...] = ()
    """Layers that must stay, 0-based, negative from the end: 0,-1."""
    eval_batch_size: Positive | None = None
    """Most tokens per batch in scans and evaluations (default: 4096; less where memory ends)."""

    @model_validator(mode="after")
    def _races_are_for_accuracy(self) -> ScoreSettings:
        if self.scan == "racing" and not self.strategy.startswith("scan"):
            raise ValueError(
                f"--scan racing compares accuracies, and --strategy {self.strategy} does not: leave it out"
            )
        if self.scan == "exact" and "confidence" in self.model_fields_set and self.confidence != CONFIDENCE:
            raise ValueError("--confidence is for --scan racing: leave it out, or add --scan racing")
        return self


class TrainSettings(Settings):
    text: str | None = None
    """Domain text to mix into training: file or directory (plain text, JSONL `text`, Parquet), or demo_medicine etc."""
    text_ratio: Annotated[float, Field(ge=0)] = 1.0
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
    train_ratio: Fraction = 0.25
    """Share of the blocks that train after the warm-up: those most likely to stay."""
    sparse_update: Literal["static", "dynamic", "off"] = "static"
    """static: chosen once by the first scan; dynamic: by every scan; off: everything trains."""
    train_embeddings: bool = True
    """Embeddings, final norm and output head train too (as published)."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Training computes in bf16 on float32 weights; auto: on a CUDA GPU (CPUs with AVX512-BF16 or AMX gain too)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cache_frozen_prefix: Literal["off", "memory", "disk"] = "off"
    """Keep what the blocks below the lowest that trains give for each row, for stages of several epochs; needs
    --no-train-embeddings."""


class TrimConfig(TrainSettings, ScoreSettings, TaskSettings, ModelSettings):
    """Trim a model: fine-tune on a task, drop the least important layer, go on until the target.

    Example:
      trimllm trim --model demo --task demo_medicine --text demo_medicine --keep 0.5 --lr 3e-4 --output runs/medicine
      trimllm trim --output runs/medicine --resume
    """

    output: str
    """Directory of the run: journal, plans, result.json and the trimmed checkpoint in `model/`."""
    resume: bool = False
    """Go on with the run in --output where it was interrupted."""
    keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of the blocks to keep (default when no other target is given: 0.5)."""
    depth: Positive | None = None
    """Number of blocks to keep."""
    max_params: Positive | None = None
    """Stop when the model has at most so many parameters."""
    max_memory: Annotated[float, Field(gt=0)] | None = None
    """Stop when the weights take at most so many GiB in the saved dtype."""
    target_speedup: Annotated[float, Field(gt=1)] | None = None
    """Stop when decoding at batch 1 is so many times as fast as the base (measured)."""
    min_accuracy: Annotated[float, Field(ge=0, le=100)] | None = None
    """Floor in percent on the calibration set: the first depth below it ends the run, the one before is the result."""
    max_drop: Annotated[float, Field(ge=0)] | None = None
    """Floor in points below the best calibration accuracy so far."""
    min_depth: Positive = 1
    """Never go below so many blocks."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Epochs of full fine-tuning before the first scan; 0 scans the base as it is."""
    schedule: Literal["auto", "late", "epoch", "recover"] = "auto"
    """How training is spread. epoch: --epochs-per-drop after every drop (as published); late: as many in all, a third
    of them after every drop and the rest after the last; recover: as many units at once as cost little together, then
    only until the calibration loss is back. auto: late, or epoch if a floor may end the run."""
    epochs_per_drop: Annotated[float, Field(ge=0)] = 1.0
    """Epochs of training per drop; 0 drops without training. With --schedule recover: at most so many per unit."""
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
    """Share of the loss after the warm-up that is the KL divergence from the fully fine-tuned model, a teacher that is
    kept in memory beside the model that trains; 0: cross-entropy only."""
    optimizer_state: Literal["fresh", "carried"] = "fresh"
    """What AdamW begins a stage with: fresh: nothing; carried: what it knew of the parameters that go on training (kept
    in the last checkpoint, up to twice its weights)."""
    drops_per_stage: Positive = 1
    """Units dropped one after the other, each by a scan of its own, before training goes on."""
    one_shot: bool = False
    """Drop everything at once by the first scan, then train as long as all stages together: the usual baseline."""
    report_depths: bool = True
    """Evaluate the reported split at every depth, not only at the end (it is never used for a decision)."""
    keep_checkpoints: bool = False
    """Keep the weights of every depth on the way, for `trimllm export`."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the trimmed checkpoint; auto: as the base was saved."""

    @model_validator(mode="after")
    def _mixed_precision_is_of_float32(self) -> TrimConfig:
        if self.mixed_precision == "bf16" and self.dtype in ("bfloat16", "float16"):
            raise ValueError(f"--mixed-precision bf16 is for float32 weights: leave out --dtype {self.dtype}")
        return self

    @model_validator(mode="after")
    def _prefixes_are_frozen(self) -> TrimConfig:
        if self.cache_frozen_prefix != "off" and (self.train_embeddings or self.sparse_update == "off"):
            raise ValueError("--cache-frozen-prefix is for frozen embeddings and blocks: add --no-train-embeddings")
        return self

    @model_validator(mode="after")
    def _one_depth_target(self) -> TrimConfig:
        if self.keep is not None and self.depth is not None:
            raise ValueError("give --keep or --depth, not both")
        return self

    @model_validator(mode="after")
    def _every_schedule_has_its_options(self) -> TrimConfig:
        if self.schedule == "recover":
            if self.one_shot or self.drops_per_stage != 1:
                option = "--one-shot" if self.one_shot else f"--drops-per-stage {self.drops_per_stage}"
                raise ValueError(f"{option} is not for --schedule recover, which finds out how many go at once")
            if self.scan == "racing":
                raise ValueError("--schedule recover ranks all candidates, --scan racing finds one: leave one out")
            return self
        for name in ("recover_tolerance", "joint_tolerance", "max_joint"):
            if getattr(self, name) != type(self).model_fields[name].default:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} is for --schedule recover: leave it out, or add --schedule recover")
        return self

    @property
    def late(self) -> bool:
        """Whether most of the training waits for the last drop."""
        return self.schedule == "late" or (self.schedule == "auto" and not self.has_floor)

    @property
    def has_floor(self) -> bool:
        """Whether an accuracy may end the run."""
        return self.min_accuracy is not None or self.max_drop is not None

    @model_validator(mode="after")
    def _what_comes_last_has_an_end(self) -> TrimConfig:
        sizes = (self.keep, self.depth, self.max_params, self.max_memory, self.target_speedup)
        option = "--schedule late" if self.late else "--final-epochs" if self.final_epochs else None
        if option and self.has_floor and all(size is None for size in sizes) and self.min_depth == 1:
            raise ValueError(f"{option} needs a target besides the floor: which drop is the last is known too late")
        return self

    @model_validator(mode="after")
    def _one_shot_knows_how_many(self) -> TrimConfig:
        others = (self.max_params, self.max_memory, self.target_speedup, self.min_accuracy, self.max_drop)
        if self.one_shot and self.unit != "block":
            raise ValueError("--one-shot drops blocks only: leave out --unit pair")
        if self.one_shot and self.scan == "racing":
            raise ValueError("--one-shot ranks all candidates, and --scan racing finds one: leave one of them out")
        if self.one_shot and self.keep is None and self.depth is None and any(o is not None for o in others):
            raise ValueError("--one-shot must know how many layers go: give --keep or --depth")
        return self


class ScanConfig(ScoreSettings, TaskSettings, ModelSettings):
    """Measure how important every layer is, without changing the model: a table, scan.json and scan.png.

    Example:
      trimllm scan --model demo --task demo_law --unit sublayer --output runs/scan
      trimllm scan --model runs/medicine/model --task demo_medicine --analysis --output runs/why
    """

    unit: Literal["block", "pair", "sublayer"] = "block"  # type: ignore[assignment]
    """What is deleted on trial: blocks, pairs, or attention and MLP separately."""
    run: Positive | None = None
    """Blocks in the contiguous runs that --strategy angular compares (default: half of the depth)."""
    analysis: bool = False
    """Also measure what may explain the scan (causal tracing, what MLPs promote, block influence, logit lens) and how
    its ranks agree: analysis.json, analysis.png."""
    analysis_items: Positive = ANALYSIS_ITEMS
    """With --analysis: most questions that are traced; its cost grows with them and with the layers."""
    output: str
    """Directory for scan.json and scan.png."""

    @model_validator(mode="after")
    def _an_analysis_compares_all_layers(self) -> ScanConfig:
        if not self.analysis:
            if self.analysis_items != ANALYSIS_ITEMS:
                raise ValueError("--analysis-items is for --analysis: leave it out, or add --analysis")
            return self
        if self.unit == "pair":
            raise ValueError("--analysis is of blocks or sublayers: leave out --unit pair")
        if self.scan == "racing":
            raise ValueError("--analysis compares all candidates, and --scan racing finds one: leave one of them out")
        if self.keep_pattern:
            raise ValueError("--analysis is of single layers: leave out --keep-pattern")
        return self

    @model_validator(mode="after")
    def _runs_are_for_angular(self) -> ScanConfig:
        if self.run is not None and "angular" not in self.strategy:
            raise ValueError("--run is for --strategy angular: leave it out")
        return self


class DropConfig(ModelSettings):
    """Remove the named layers and save the rest, verified: surgery only, no data needed.

    Example:
      trimllm drop --model DIR_OR_HUB_ID --layers 3,7 --output trimmed
      trimllm drop --model DIR --layers 3,7 --output trimmed --streaming
    """

    layers: tuple[int, ...]
    """Layers to remove, 0-based, negative from the end: 3,7."""
    output: str
    """Directory of the new checkpoint."""
    streaming: bool = False
    """Cut on disk, tensor by tensor, without loading the model: for a --model directory larger than memory."""
    max_shard_size: str | None = None
    """With --streaming: largest weight file (default: 5GB)."""

    @model_validator(mode="after")
    def _every_option_is_used(self) -> DropConfig:
        if not self.streaming and self.max_shard_size is not None:
            raise ValueError("--max-shard-size is for --streaming: leave it out, or add --streaming")
        others = ("dtype", "device", "attention", "threads", "allow_pickle")
        unused = [name for name in others if getattr(self, name) not in ("auto", None, False)]
        if self.streaming and unused:
            option = "--" + unused[0].replace("_", "-")
            raise ValueError(f"{option} is not for --streaming, which never loads the model: leave one of them out")
        return self


class EvalConfig(TaskSettings, ModelSettings):
    """Evaluate a model on a task's reported split: the metric with its standard error, loss, perplexity.

    Example:
      trimllm eval --model runs/medicine/model --task demo_medicine
    """

    output: str | None = None
    """JSON file for the result."""
    eval_batch_size: Positive | None = None
    """Most tokens per batch (default: 4096; less where memory ends)."""
    generate: bool = False
    """Generation tasks: also generate, and report exact match, ROUGE-L and repetition."""
    max_new_tokens: Positive = 128
    """Longest generated answer."""


class BenchConfig(LoadSettings):
    """Measure models in turn: prefill and decode speed, latency, memory, cache, size, and what the bytes allow at best.

    Example:
      trimllm bench demo runs/medicine/model --batch-size 1,8 --output runs/bench
      trimllm bench config:benchmarks/shapes/llama-7b.json config:benchmarks/shapes/llama-7b-half.json --dtype float16
    """

    models: tuple[str, ...]
    """Directories, Hub ids or `demo`; config:FILE.json is a model of that shape with random weights. Ratios are to the
    first."""
    batch_size: tuple[Positive, ...] = (1,)
    """Sequences at a time: 1,8 measures both."""
    sequence: Annotated[int, Field(gt=1)] = 512
    """Length of a row in tokens when its last token is decoded; the prompt is what --new-tokens leave of it."""
    new_tokens: Positive = 64
    """Tokens decoded one by one at the end of the row."""
    repeats: Positive = 5
    """Rounds; in each, every model has its turn. One more before them warms up."""
    cache: Literal["dynamic", "static"] = "dynamic"
    """Key-value cache: growing with every token, or allocated for the whole row."""
    compile: bool = False
    """Decode with torch.compile (needs --cache static: its shapes never change)."""
    output: str | None = None
    """Directory for bench.json and bench.png."""

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> BenchConfig:
        if not self.models:
            raise ValueError("name at least one model: trimllm bench demo")
        if self.new_tokens >= self.sequence:
            raise ValueError(
                f"--new-tokens {self.new_tokens} leave no prompt in --sequence {self.sequence}: ask for less"
            )
        if self.compile and self.cache != "static":
            raise ValueError("--compile needs --cache static: a growing cache has other shapes at every token")
        return self


class CompareConfig(TrainSettings, TaskSettings, ModelSettings):
    """Compare ways to make a model smaller or faster, on your model and data: one table, compare.json, compare.png.

    Example:
      trimllm compare --model demo --task demo_law --text demo_law --lr 2e-3 --output runs/compare
      trimllm compare --model demo --task demo_law --methods trim,shortgpt,llm-int8 --keep 0.5,0.25 --output runs/few
    """

    output: str
    """Directory of the comparison: a folder per method, compare.json, compare.png."""
    resume: bool = False
    """Go on with the comparison in --output: finished methods are kept, those that could not run are tried again."""
    methods: tuple[str, ...] = ()
    """Methods by name, with those they start from (default: all; an unknown name lists them)."""
    keep: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5,)
    """Shares of the blocks to keep: 0.5,0.25 gives two rows for every method that removes blocks."""
    also: tuple[str, ...] = ()
    """More tasks to evaluate every model on, without training for them: what specialization costs."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Epochs of the full fine-tuning that most methods start from."""
    schedule: Literal["late", "epoch"] = "late"
    """How TrimLLM spreads its training, as in `trimllm trim`; epoch: one run of it gives every --keep."""
    epochs_per_drop: Annotated[float, Field(ge=0)] = 1.0
    """Epochs per dropped block; methods that cut at once train as long as all of them together."""
    final_epochs: Annotated[float, Field(ge=0)] = 0.0
    """More epochs after the last drop."""
    eval_batch_size: Positive | None = None
    """Most tokens per batch in scans and evaluations (default: 4096; less where memory ends)."""
    sequence: Annotated[int, Field(gt=1)] | None = None
    """Length of a row in tokens when its last token is decoded (default: 512, or the model's context)."""
    new_tokens: Positive = 64
    """Tokens decoded one by one at the end of the row, for the speed."""
    repeats: Positive = 5
    """Rounds of the speed; in each, the base and the method's model have their turn."""
    baselines_python: str | None = None
    """Python of another environment, with trimllm[baselines] in it, for methods whose libraries are missing here."""

    @model_validator(mode="after")
    def _methods_train_everything(self) -> CompareConfig:
        if self.cache_frozen_prefix != "off":
            raise ValueError("--cache-frozen-prefix is for frozen blocks, and most methods train all: leave it out")
        if self.mixed_precision == "bf16" and self.dtype in ("bfloat16", "float16"):
            raise ValueError(f"--mixed-precision bf16 is for float32 weights: leave out --dtype {self.dtype}")
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

    source: str
    """Directory of a `trimllm trim` run, or of a checkpoint."""
    depth: Positive | None = None
    """Of a run: which depth; kept are the last one, and all with --keep-checkpoints (default: the run's result)."""
    to: Literal["checkpoint", "gguf", "onnx", "openvino", "int8", "int4"] = "checkpoint"
    """checkpoint: a depth of a run; gguf: for llama.cpp; onnx, openvino: graphs; int8, int4: quantized weights."""
    quant: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None = None
    """With --to gguf: type of the matrices (default: f16)."""
    task: str | None = None
    """With --to int8 or int4: also evaluate the quantized model on this task (as `trimllm eval` does)."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off: such a model is refused."""
    output: str | None = None
    """What to write (default: beside the source, named by depth and format)."""

    @model_validator(mode="after")
    def _every_option_is_used(self) -> ExportConfig:
        if self.to == "checkpoint" and self.depth is None:
            raise ValueError("name what the run kept with --depth N, or another format with --to")
        if self.quant is not None and self.to != "gguf":
            raise ValueError("--quant is for --to gguf: leave it out")
        if self.task is not None and self.to not in ("int8", "int4"):
            raise ValueError("--task is for --to int8 and int4: leave it out")
        return self


class PushConfig(Settings):
    """Put a finished checkpoint on the Hugging Face Hub, with its model card.

    Example:
      trimllm push runs/medicine YOUR_NAME/medicine-8-layers --private
    """

    directory: str
    """Directory of a `trimllm trim` run (its result is taken), or of a checkpoint that trimllm wrote."""
    repo_id: str
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
    output: str = "runs/demo"
    """Directory of the runs and of the trimmed checkpoint."""
    seed: int = 0
    """Seed of the run."""
    unit: Literal["block", "pair"] = "block"
    """What is dropped at a time."""
    threads: Positive | None = None
    """CPU threads for torch."""
