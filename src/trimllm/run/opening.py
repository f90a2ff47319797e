"""What a user is told when a run begins or goes on, and after its warm-up: what is there, and what is ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimllm.checkpoints.models import Loaded
from trimllm.config import TrimConfig
from trimllm.console import clock
from trimllm.importance import scan, scores
from trimllm.importance.select import BREAKS_TIES
from trimllm.run import sizes, targets
from trimllm.run.preparing import Prepared
from trimllm.training.packing import Example

KINDS = {"choice": "choices", "generation": "written answers", "text": "text"}
"""What is asked in a task of each kind."""


def lines(config: TrimConfig, loaded: Loaded, ready: Prepared, accelerator: Any, *, begun: bool) -> list[str]:
    """Model, data, device, training, and how drops are decided. What could be asked for otherwise is only said before
    a run has `begun`."""
    data, decider = ready.data, ready.decider
    parameters = sizes.size(loaded.model, ready.save_dtype).parameters
    least = "at least " if targets.drops_end_sooner(config) else ""
    end = "" if decider.wanted is None else f"; {least}{decider.wanted} layers are to stay"
    said = [f"{config.model}: {ready.base_depth} layers, {parameters:,} parameters{end}"]
    said += [f"  {note}" for note in loaded.notes]
    said.append(
        f"{data.name}: {len(data.train):,} training rows, {len(data.calibration):,} for calibration, "
        f"{len(data.test):,} reported; {KINDS[data.kind]}, metric {data.metric}"
    )
    said += [f"  {note}" for note in (*data.notes, *scorer_notes(ready))]
    said.append(device_line(config, accelerator))
    if ready.text_rows:
        said.append(text_line(config, ready.text_rows, ready.task_rows, ready.ahead))
    said.append(training_ahead(config, ready.ahead, ready.tokens_per_epoch))
    may_change = config.scan == "exact" and config.schedule != "recover" and not begun
    if may_change and (slow := scan.many_choices_note(ready.calibration, config.strategy)):
        said.append(f"  {slow}")
    breaker = scores.breaking(config.strategy)
    if breaker and decider.rules.tolerance:
        said.append(f"candidates within {decider.rules.tolerance:.2f} points are tied: the {BREAKS_TIES[breaker]} goes")
    return said


def scorer_notes(ready: Prepared) -> set[str]:
    """How questions are asked, where that is not as fast, or as long, as it could be."""
    return {note for note in (ready.calibration.note, ready.test.note) if note}


def device_line(config: TrimConfig, accelerator: Any) -> str:
    """Where the run computes, and in what: `auto` may be what the user did not expect."""
    mixed = accelerator.mixed_precision
    weights = "float32" if config.dtype == "auto" else config.dtype
    several = f" in each of {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    doing = "training" if config.trains else "scanning"
    return f"{doing} on {accelerator.device}{several}, {weights}{f' with {mixed} products' if mixed != 'no' else ''}"


def text_line(
    config: TrimConfig, text: Sequence[Example], task: Sequence[Example], stages: Sequence[tuple[int, float]]
) -> str:
    """How much domain text there is, and how often it will be trained on; `stages` as in `training_ahead`."""
    there = sum(len(row.ids) for row in text)
    times, while_ = config.text_ratio * sum(len(row.ids) for row in task) / there, " an epoch"
    if stages:
        times, while_ = times * (config.warmup_epochs + sum(epochs for _, epochs in stages)), ""
    most = "at most" if stages and targets.ends_sooner(config) else "about"
    often = f", each {most} {times:.0f} times{while_}" if times >= 1.5 else ""
    return f"{config.text}: {there:,} tokens of domain text{often}"


def training_ahead(config: TrimConfig, stages: Sequence[tuple[int, float]], tokens: int) -> str:
    """How much will be trained, for the user: `stages` are those of `targets.stages_ahead`, `tokens` an epoch's."""
    warm = f"training: {_epochs(config.warmup_epochs)} of all layers, " if config.warmup_epochs else "training: "
    if not stages:
        return f"{warm}{_per_drop(config)}; {tokens:,} tokens an epoch"
    after = sum(epochs for _, epochs in stages)
    most = "at most " if targets.ends_sooner(config) else ""
    total = round((config.warmup_epochs + after) * tokens)
    return f"{warm}{most}{_epochs(after)} after drops; {tokens:,} tokens an epoch, {most}{total:,} in all"


def _per_drop(config: TrimConfig) -> str:
    """The training after drops of which nobody knows how many there will be."""
    several = config.drops_per_stage
    each = "every drop" if several == 1 else f"every {several} drops"
    now = targets.stage_epochs(config, several, 1, last=False)
    most, after = ("at most ", "every dropped unit") if config.schedule == "recover" else ("", each)
    later = (
        [] if now == config.epochs_per_drop else [f"{_epochs(config.epochs_per_drop - now)} for each after the last"]
    )
    more = [f"{_epochs(config.final_epochs)} after the last one"] if config.final_epochs else []
    return ", ".join([f"{most}{_epochs(now)} after {after}", *later, *more])


def _epochs(count: float) -> str:
    number = f"{count:.3g}"
    return f"{number} epoch{'' if number == '1' else 's'}"


def time_ahead(
    config: TrimConfig, stages: Sequence[tuple[int, float]], tokens: int, warm: dict[str, Any]
) -> str | None:
    """About how long the stages take, by what the warm-up took (its journaled row) and the blocks that are left; None
    where that, or they, train nothing, and with a teacher, who takes time of its own."""
    train = warm["train"]
    if config.distill or not any(epochs for _, epochs in stages) or not train["tokens"]:
        return None
    seconds = train["seconds"] / train["tokens"] * tokens * sum(left * epochs for left, epochs in stages)
    most = "at most " if targets.ends_sooner(config) else ""
    return f"training after drops: {most}about {clock(seconds / warm['depth'])}, and the scans"
