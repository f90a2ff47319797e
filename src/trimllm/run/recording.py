"""What is known of a depth: its accuracies, its size and its speed, measured once and journaled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trimllm import files, memory
from trimllm.bench import timing
from trimllm.blocks import decoder, families
from trimllm.blocks.layout import Layout, dump_layout, load_layout, plan_record
from trimllm.checkpoints import arithmetic, loading, models
from trimllm.config import TrimConfig
from trimllm.console import Console
from trimllm.evaluation import fluency, paired
from trimllm.evaluation.evaluate import Scorer
from trimllm.parallel import Share
from trimllm.run import account, model_card
from trimllm.run.journal import Journal
from trimllm.run.rundir import RunDir
from trimllm.run.targets import Size
from trimllm.tasks import TaskData


@dataclass
class Recorder:
    """Measures the models of one run. Every process must call `record` and `size`, which share work between them; the
    other methods are for the first process alone."""

    config: TrimConfig
    console: Console
    share: Share
    journal: Journal
    device: torch.device
    save_dtype: torch.dtype
    tokenizer: Any
    calibration: Scorer
    test: Scorer
    metric: str

    def record(self, event: str, model: Any, layout: Layout, **more: Any) -> None:
        """Evaluate a depth and journal it, with a row for the user; of base and result also how fluently they write.
        The saved model computes in the dtype that it was saved in, others as in training."""
        folder = RunDir(self.config.output)
        first_or_last, as_it_stands = event != "stage", event == "saved"
        sets = [one.plain() if as_it_stands else one for one in (self.calibration, self.test)]
        with self._fast(model):
            if first_or_last:
                more["fluency"] = fluency.measure(model, self.tokenizer, self.calibration.items)
            calibration = sets[0].evaluate(model, self.metric, self.share)
            report = self.config.report_depths or first_or_last
            test = sets[1].evaluate(model, self.metric, self.share) if report else None
        now = size(model, self.save_dtype)
        speed = timing.decode_speed({"now": model}, repeats=3)["now"] if self.share.first else [0.0]
        if self.share.first and event != "saved":  # before the journal's line: what that says is done is not redone
            plan = plan_record(layout, models.origin(self.config.model))
            files.write_json(folder.plans / f"depth-{now.depth}.json", plan)
        if self.share.first and test:
            kept = paired.answers(test.per_item, self.test.items)
            files.write_json(folder.answers_of(event, now.depth), kept)
        self.journal.add(
            event,
            depth=now.depth,
            layout=dump_layout(layout),
            calibration=calibration.summary(),
            test=test.summary() if test else None,
            parameters=now.parameters,
            bytes=now.bytes,
            tokens_per_second=float(np.median(speed)),
            **more,
        )
        self.console.say(account.depth_row(event, now, calibration, test, float(np.median(speed)), more))

    @contextmanager
    def _fast(self, model: Any) -> Iterator[None]:
        """Within, a model in 16 bits that the CPU emulates, and nobody asked for, computes in float32: in all processes
        or in none."""
        asked, world = self.config.dtype, self.share.world
        reason = self.share.from_first(lambda: arithmetic.reason_for_float32(model, asked, copies=world))
        if reason is None:
            yield
            return
        self.console.say(f"the saved model is {reason}")
        with models.widened(model):
            yield

    def write_result(
        self,
        data: TaskData,
        stage: dict[str, Any],
        history: list[dict[str, Any]],
        base: dict[str, str],
        above: dict[str, float] | None,
        verified: Any,
        saved: Any,
    ) -> dict[str, float] | None:
        """The model card of the depth that `stage` ended with, and result.json. `history` ends with the row of the
        saved model, and `above` is what `above_full` says of it; `base` names the base. Returns how many times the
        base's speed decoding has, where that could be measured."""
        folder, drops = RunDir(self.config.output), self.journal.of("drop")
        speedup = self.final_speedup(saved)
        text = model_card.trimmed(self.config, data, load_layout(stage["layout"]), history, base, above, speedup)
        files.write_atomic(folder.model / "README.md", text)
        result = account.result(self.config, data, stage, history, drops, base, above, verified, speedup)
        files.write_json(folder.result, result)
        return speedup

    def above_full(self, history: list[dict[str, Any]]) -> dict[str, float] | None:
        """By how many points the saved model is above the one with all layers from which the drops began, question by
        question. None if nothing was dropped, or one of the two was not asked; `history` is as in `write_result`."""
        base, stage, *_, saved = history
        full = stage if stage["train"]["steps"] else base
        one, other = self._answers(saved), self._answers(full)
        return paired.apart(one, other) if one and other and saved["depth"] < full["depth"] else None

    def _answers(self, row: dict[str, Any]) -> dict[str, Any]:
        """What a journaled model answered; empty where that is not known. A kill may leave the answers of another."""
        found = files.read_json(RunDir(self.config.output).answers_of(row["event"], row["depth"]))
        if row["test"] is None or not found:
            return {}
        return found if math.isclose(float(np.mean(found["values"])), row["test"]["value"], abs_tol=1e-6) else {}

    def size(self, model: Any) -> Size:
        """The size of a model, with its decode speed against the base if a target asks for it."""
        speedup = None
        if self.config.target_speedup is not None:
            speedup = self.share.from_first(lambda: timing.ratio(self.against_base(model, "now"), "now", "base")[0])
        return size(model, self.save_dtype, speedup)

    def against_base(self, model: Any, name: str) -> dict[str, list[float]]:
        """Decode speeds of the base and of `model`, measured in turn; the base is loaded for it, in that dtype."""
        base = loading.load_model(
            loading.path_of(self.config.model),
            dtype=model.dtype,
            device=self.device,
            trust_remote_code=self.config.trust_remote_code,
            allow_pickle=self.config.allow_pickle,
            attention=self.config.attention,
        )
        return timing.decode_speed({"base": base, name: model}, repeats=5)

    def final_speedup(self, saved: Any) -> dict[str, float] | None:
        """How many times the base's speed the result has: median, min and max of the rounds; None if the device cannot
        hold both: the result is saved all the same."""
        memory.release()
        try:
            ratios = timing.ratio(self.against_base(saved, "trimmed"), "trimmed", "base")
            return dict(zip(("median", "min", "max"), ratios, strict=True))
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            self.console.say("the decode speed was not compared: base and result together exceed the device's memory")
            return None


def least_size(model: Any, dtype: torch.dtype) -> Size:
    """The size with the smallest block alone, at the least: blocks may share parameters, and of tables that have a part
    for each of them one part stays."""

    def parameters(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    counts = [parameters(block) for block in decoder.blocks(model)]
    tables = decoder.text_decoder(model)._modules
    names = families.family(decoder.text_config(model)).per_layer_weights
    by_layer = sum(parameters(table) for name in names if (table := tables.get(name)) is not None)
    shrinks = by_layer - by_layer // len(counts)
    count = size(model, dtype).parameters - sum(counts) + min(counts) - shrinks
    return Size(1, count, count * dtype.itemsize)


def size(model: Any, dtype: torch.dtype, speedup: float | None = None) -> Size:
    """Depth, parameters, and bytes as they will be saved in `dtype`."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return Size(decoder.depth(model), count, count * dtype.itemsize, speedup)
