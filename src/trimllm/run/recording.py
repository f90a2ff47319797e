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
from trimllm.blocks.layout import Layout, dump_layout, plan_record
from trimllm.checkpoints import arithmetic, loading, models
from trimllm.config import TrimConfig
from trimllm.console import Console
from trimllm.evaluation import fluency, paired
from trimllm.parallel import Share
from trimllm.run import account
from trimllm.run.journal import Journal
from trimllm.run.preparing import Prepared
from trimllm.run.rundir import RunDir
from trimllm.run.sizes import size
from trimllm.run.targets import Size


@dataclass
class Recorder:
    """Measures the models of one run. Every process must call `record` and `size`, which share work between them; the
    other methods are for the first process alone."""

    config: TrimConfig
    ready: Prepared
    console: Console
    share: Share
    journal: Journal
    device: torch.device

    def record(self, event: str, model: Any, layout: Layout, **more: Any) -> dict[str, Any]:
        """Evaluate a depth and journal it, with a line for the user; of base and result also how fluently they write.
        The saved model computes in the dtype that it was saved in, others as in training. Returns what is journaled."""
        folder, ready = RunDir(self.config.output), self.ready
        first_or_last, as_it_stands = event != "stage", event == "saved"
        sets = [one.plain() if as_it_stands else one for one in (ready.calibration, ready.test)]
        with self._fast(model):
            if first_or_last:
                more["fluency"] = fluency.measure(model, ready.tokenizer, ready.calibration.items)
            calibration = sets[0].evaluate(model, ready.metric, self.share)
            report = self.config.report_depths or first_or_last
            test = sets[1].evaluate(model, ready.metric, self.share) if report else None
        now = size(model, ready.save_dtype)
        speed = timing.decode_speed({"now": model}, repeats=3)["now"] if self.share.first else [0.0]
        if self.share.first and event != "saved":  # before the journal's line: what that says is done is not redone
            plan = plan_record(layout, ready.origin.record())
            files.write_json(folder.plans / f"depth-{now.depth}.json", plan)
        if self.share.first and test:
            kept = paired.answers(test.per_item, ready.test.items)
            files.write_json(folder.answers_of(event, now.depth), kept)
        row = self.journal.add(
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
        return row

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

    def above_full(self) -> dict[str, float] | None:
        """By how many points the saved model is above the one with all layers from which the drops began, question by
        question. None if nothing was dropped, or one of the two was not asked."""
        base, stage, saved = self.journal.of("base")[0], self.journal.of("stage")[0], self.journal.of("saved")[-1]
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
        return size(model, self.ready.save_dtype, speedup)

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
