"""The main job: fine-tune, scan, drop the least important unit, train on, until the target; then save and verify.

    import trimllm
    model, history = trimllm.trim(model="demo", task="demo_law", text="demo_law", lr=3e-4, output="runs/law")

Every stage of training and every drop is journaled when it is done. A run that was killed goes on from the last one:
weights are those of the last checkpoint, the order of training rows comes from the seed and the stage's number.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from trimllm import (
    bench,
    card,
    decoder,
    export,
    inputs,
    journal,
    legality,
    loading,
    models,
    rundir,
    scan,
    scores,
    select,
    sparse,
    surgery,
    targets,
    train,
    weights,
)
from trimllm.config import TrimConfig, make
from trimllm.console import Console, clock
from trimllm.errors import InputError, TrimError
from trimllm.evaluate import Evaluation
from trimllm.journal import Journal
from trimllm.layout import Layout, Unit, compose, remove, units, whole
from trimllm.models import DTYPES, Loaded, load
from trimllm.parallel import Share
from trimllm.rundir import RunDir
from trimllm.select import Choice
from trimllm.targets import Size
from trimllm.tasks import TaskData, load_text

History = list[dict[str, Any]]


def trim(config: TrimConfig | None = None, *, console: Console | None = None, **settings: Any) -> tuple[Any, History]:
    """Trim a model; see `TrimConfig` for the settings (given as one object or by name).

    Returns:
        The trimmed model as it was saved in `output/model`, and one row per depth, the base first.

    Raises:
        InputError: if the settings, the model or the data cannot be used.
        TrimError: if training or saving fails; the journal is kept, and the run can be resumed.
    """
    if config is None and settings.get("resume") and "output" in settings:
        settings = rundir.stored_settings(settings["output"]) | settings
    return Run(config or make(TrimConfig, settings), console or Console()).go()


@dataclass
class State:
    """Where a run stands: what the model in memory is. All of it can be read back from the journal and a checkpoint."""

    model: Any
    layout: Layout
    """Original halves of the model's blocks."""
    stages: int = 0
    """Stages of training that are finished."""
    pending: list[dict[str, Any]] = field(default_factory=list)
    """Drops since the last stage."""
    chosen: list[int] | None = None
    """Original blocks that train (sparse update); None: all."""
    reached: str | None = None


class Run:
    """One run in one directory. `go` does everything that the journal does not say is done."""

    def __init__(self, config: TrimConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.dir = RunDir(config.output)
        self.accelerator = accelerator(config)
        self.share = Share(self.accelerator.process_index, self.accelerator.num_processes)
        self.main = self.accelerator.is_main_process
        transformers.utils.logging.disable_progress_bar()
        if not self.main:
            console.quiet = True

    # ---- preparation

    def go(self) -> tuple[Any, History]:
        scores.parts(self.config.strategy)
        if self.main:
            rundir.check(self.config)
        started = time.perf_counter()
        loaded = load(self.config, training=True, device=self.accelerator.device)
        data = self._prepare(loaded)
        self.journal = Journal(self.dir.journal, self._claim(), writes=self.main)
        if (done := self.journal.last("done")) is not None:
            self.console.say(f"{self.dir.root} is finished: {done['table']}")
            return self._load(self.dir.model), self.history()
        self._start(loaded, data)
        state = self._restore(loaded)
        self._loop(state)
        return self._finish(state, loaded, data, time.perf_counter() - started)

    def _prepare(self, loaded: Loaded) -> TaskData:
        """Everything that can be wrong with model and data is found here, before anything is computed or written."""
        config, model, tokenizer = self.config, loaded.model, loaded.tokenizer
        self.tokenizer = tokenizer
        self.save_dtype = DTYPES.get(config.save_dtype, loaded.saved)
        depth = decoder.depth(model)
        self.base_depth, self.protected = depth, select.protected(config.protect, depth)
        wanted = targets.wanted_depth(config, depth)
        if wanted is not None and len(self.protected) > wanted:
            raise InputError(
                f"--protect keeps {len(self.protected)} layers, and the run is to end with {wanted}: "
                "protect fewer, or ask for a smaller drop"
            )
        size = self._size(model)
        if (already := targets.reached(config, depth, size)) is not None:
            raise InputError(f"nothing to drop: the model already meets the target, {already}")
        self._cuttable(model)
        data = inputs.task_data(config, tokenizer)
        self.metric = data.metric
        self.calibration = inputs.scorer(config, model, tokenizer, data.calibration)
        self.test = inputs.scorer(config, model, tokenizer, data.test)
        longest = train.longest(model, config.max_length)
        self.task_rows = train.task_examples(tokenizer, data.train, longest, truncate=config.truncate)
        train.check(self.task_rows)
        texts = load_text(config.text) if config.text else []
        self.text_rows = train.text_examples(tokenizer, texts, min(longest, config.batch_size))
        self.tolerance = select.tolerance_points(self.metric, len(data.calibration), config.tie_tolerance)
        self.pad_id = self.calibration.pad_id
        rundir.check_space(config.output, sum(p.numel() * p.element_size() for p in model.parameters()))
        return data

    def _cuttable(self, model: Any) -> None:
        """Refuse a family of which no candidate can be removed; what is refused layer by layer is never a candidate."""
        candidates = units(self.config.unit, whole(self.base_depth))
        layouts = [remove(whole(self.base_depth), unit) for unit in candidates]
        refusals = [legality.refusal(model, layout) for layout in layouts]
        if all(refusals):
            raise InputError(f"this model cannot be trimmed by {self.config.unit}s: {refusals[0]}")
        shifted = [r for r, unit in zip(refusals, candidates, strict=True) if unit.kind == "pair"]
        if shifted and all(shifted):
            raise InputError(f"--unit pair: {shifted[0]}")
        if not self._droppable(model, whole(self.base_depth), candidates):
            raise InputError(f"--protect {','.join(map(str, self.config.protect))}: nothing is left to drop")

    def _claim(self) -> list[dict[str, Any]]:
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [None]
        if self.main:
            try:
                box = [rundir.claim(self.config)]
            except TrimError as error:
                box = [error]
        broadcast_object_list(box)
        if isinstance(box[0], TrimError):
            raise box[0]
        return box[0]

    def _start(self, loaded: Loaded, data: TaskData) -> None:
        config, say = self.config, self.console.say
        first = self.journal.last("start")
        if first is None:
            first = self.journal.add("start", base=loaded.fingerprint, depth=self.base_depth)
        elif first["base"] != loaded.fingerprint:
            raise InputError(f"--model {config.model}: its weights changed since the run in {config.output} began")
        say(f"{config.model}: {self.base_depth} layers, {self._size(loaded.model).parameters:,} parameters")
        say(
            f"{data.name}: {len(data.train):,} training rows, {len(data.calibration):,} for calibration, "
            f"{len(data.test):,} reported; metric {data.metric}"
        )
        for note in (*data.notes, *filter(None, {self.calibration.note, self.test.note})):
            say(f"  {note}")
        if data.left_out:
            say(f"  {len(data.left_out)} training rows left out: their text is also in the reported or calibration set")
        if self.text_rows:
            say(f"{config.text}: {sum(len(row.ids) for row in self.text_rows):,} tokens of domain text")
        if "+" in config.strategy:
            say(f"candidates within {self.tolerance:.2f} points are tied; the largest activation norm goes first")
        if not self.journal.of("base"):
            self._record("base", loaded.model, whole(self.base_depth))

    def _restore(self, loaded: Loaded) -> State:
        """The state that the journal describes, weights included."""
        stage = self.journal.last("stage")
        state = State(loaded.model, whole(self.base_depth))
        if stage is not None:
            self.console.say(f"going on after stage {stage['stage']}, at depth {len(stage['layout'])}")
            layout = rundir.load_layout(stage["layout"])
            state = State(self._load(self.dir.checkpoint(len(layout))), layout, stage["stage"] + 1)
        for drop in self.journal.of("drop"):
            state.chosen = drop["trains"]
            if drop["stage"] == state.stages:
                surgery.apply_layout(state.model, rundir.load_layout(drop["cut"]))
                state.layout = rundir.load_layout(drop["layout"])
                state.pending.append(drop)
                state.reached = drop["reached"]
        if stage is not None and not state.pending and (last := self.journal.last("drop")) is not None:
            state.reached = last["reached"]
        self._clean()
        return state

    def _load(self, folder: Path) -> Any:
        """A checkpoint that this run wrote."""
        return loading.load_model(
            folder, device=self.accelerator.device, trust_remote_code=self.config.trust_remote_code
        )

    # ---- the loop

    def _loop(self, state: State) -> None:
        config = self.config
        if not state.stages:
            self._stage(state, config.warmup_epochs, "warm-up")
        while self._above_floor():
            enough = len(state.pending) >= config.drops_per_stage or state.reached or config.one_shot
            if state.pending and enough:
                dropped = sum(len(drop["units"]) for drop in state.pending) if config.one_shot else 1
                epochs = config.epochs_per_drop * dropped + (config.final_epochs if state.reached else 0.0)
                self._stage(state, epochs, f"depth {len(state.layout)}")
            elif state.reached:
                self.console.say(f"end of the drops: {state.reached}")
                return
            else:
                self._drop(state)

    def _above_floor(self) -> bool:
        """Whether the last stage's calibration accuracy is acceptable; if not, the depth before it is the result."""
        values = [stage["calibration"]["value"] for stage in self.journal.of("stage")]
        limit = targets.floor(self.config, values)
        if values[-1] >= limit:
            return True
        if len(values) == 1:
            raise TrimError(
                f"the fine-tuned model itself reaches only {values[0]:.1f} on the calibration set, below the floor of "
                f"{limit:.1f}: lower --min-accuracy, or train longer (--warmup-epochs)"
            )
        self.console.say(f"stopped: {values[-1]:.1f} on the calibration set is below the floor of {limit:.1f}")
        return False

    def _stage(self, state: State, epochs: float, name: str) -> None:
        """Train, save, evaluate; on disk when it returns."""
        config = self.config
        warm = state.stages == 0
        chosen = None if warm or config.sparse_update == "off" else state.chosen
        parameters = sparse.freeze(state.model, state.layout, chosen, embeddings=warm or config.train_embeddings)
        seed = config.seed * 1000 + state.stages
        plan = train.steps(self.task_rows, self.text_rows, config, epochs, seed)
        with self.console.progress(name) as show:
            report = train.train_stage(
                state.model,
                parameters,
                plan,
                config,
                self.accelerator,
                seed=seed,
                pad_id=self.pad_id,
                on_step=lambda step, steps, loss, speed: show(step, steps, f"loss {loss:.3f}  {speed:.0f} tokens/s"),
            )
        self._checkpoint(state)
        self._record(
            "stage", state.model, state.layout, stage=state.stages, train=asdict(report), dropped=state.pending
        )
        state.stages += 1
        state.pending = []
        self._clean()

    def _checkpoint(self, state: State) -> None:
        if self.main:
            with journal.directory(self.dir.checkpoint(len(state.layout))) as folder:
                state.model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    def _clean(self) -> None:
        """Delete checkpoints that neither the user, nor a floor, nor a resumed run needs."""
        if self.config.keep_checkpoints or not self.main:
            return
        needed = {len(stage["layout"]) for stage in self.journal.of("stage")[-2:]}
        for depth in set(self.dir.kept_depths()) - needed:
            shutil.rmtree(self.dir.checkpoint(depth))

    def _drop(self, state: State) -> None:
        """Scan, choose, cut. The scan's finished batches survive a kill."""
        number = len(self.journal.of("drop"))
        result = self._scan(state, number)
        original = [block.attention if block.attention is not None else 0 for block in state.layout]
        evidence = self._shared(lambda: self._evidence(state, result, original))
        choices = self._choose(state, result.candidates, evidence)
        going = set().union(*(select.touches(choice.unit, state.layout) for choice in choices))
        staying = {source for block in state.layout for source in block} - going
        if self.config.sparse_update == "dynamic" or not staying.intersection(state.chosen or ()):
            state.chosen = self._trainable(state, result.candidates, evidence, choices)
        cut = _cut(len(state.layout), [choice.unit for choice in choices])
        surgery.apply_layout(state.model, cut)
        before, state.layout = state.layout, compose(state.layout, cut)
        state.reached = targets.reached(self.config, self.base_depth, self._size(state.model, measured=True))
        if state.reached is None and not self._droppable(state.model, state.layout):
            state.reached = "every layer that remains is protected or cannot be removed"
        self._keep_table(number, before, result, evidence, choices)
        state.pending.append(
            self.journal.add(
                "drop",
                stage=state.stages,
                units=[describe(choice.unit, before) for choice in choices],
                accuracy=[None if not result.trials else result.trials[choice.index].value for choice in choices],
                importance=[choice.importance for choice in choices],
                why=choices[0].why,
                cut=rundir.dump_layout(cut),
                layout=rundir.dump_layout(state.layout),
                trains=state.chosen,
                reached=state.reached,
                seconds=result.seconds,
            )
        )
        self.console.say(f"  {drop_line(choices, before, result)}")

    def _scan(self, state: State, number: int) -> scan.ScanResult:
        path, budget = self.dir.scans / f"scan-{number:03d}.jsonl", self.config.eval_batch_size
        records = self._shared(lambda: journal.read_lines(path))
        finished = {record["batch"]: scan.Part.load(record) for record in records if record.get("budget") == budget}

        def keep(batch: int, part: scan.Part) -> None:
            if self.main:
                journal.append_line(path, {"batch": batch, "budget": budget, **part.dump()})

        wanted = targets.wanted_depth(self.config, self.base_depth)
        needed = scores.needs(self.config.strategy)
        with self.console.progress(f"scan of {len(state.layout)} layers") as show:
            return scan.scan(
                state.model,
                self.calibration,
                self.metric,
                self.config.unit,
                trials=bool(needed & {"accuracy", "loss"}),
                run=max(1, len(state.layout) - wanted) if wanted else 1,
                finished=finished,
                on_part=keep,
                progress=show,
                share=self.share,
            )

    def _shared(self, read: Any) -> Any:
        from accelerate.utils import broadcast_object_list

        box = [read() if self.main else None]
        broadcast_object_list(box)
        return box[0]

    def _evidence(self, state: State, result: scan.ScanResult, original: list[int]) -> scores.Evidence:
        needed = scores.needs(self.config.strategy)
        extra = {}
        if "taylor" in needed:
            extra["taylor"] = weights.taylor(state.model, self.calibration, result.candidates)
        if "magnitude" in needed:
            extra["magnitude"] = weights.magnitude(state.model, result.candidates)
        position = scan.positions(result.candidates, original)
        return result.evidence(position, self.base_depth, self.config.seed + len(state.layout), **extra)

    def _choose(self, state: State, candidates: list[Unit], evidence: scores.Evidence) -> list[Choice]:
        """One unit, or with --one-shot all at once (whole blocks, by the same evidence)."""
        allowed = self._droppable(state.model, state.layout, candidates)
        wanted = targets.wanted_depth(self.config, self.base_depth)
        count = len(state.layout) - wanted if self.config.one_shot and wanted is not None else 1
        choices: list[Choice] = []
        for _ in range(count):
            open_ = allowed - {choice.index for choice in choices}
            choices.append(
                select.choose(candidates, evidence, self.config.strategy, tolerance=self.tolerance, allowed=open_)
            )
        return choices

    def _droppable(self, model: Any, layout: Layout, candidates: list[Unit] | None = None) -> set[int]:
        """Which candidates may go: those that are not protected, and without which a stock model is left."""
        intact = whole(len(layout))
        candidates = units(self.config.unit, intact) if candidates is None else candidates
        free = select.droppable(candidates, layout, self.protected)
        return {i for i in free if len(intact) > 1 and legality.refusal(model, remove(intact, candidates[i])) is None}

    def _trainable(
        self, state: State, candidates: list[Unit], evidence: scores.Evidence, choices: list[Choice]
    ) -> list[int] | None:
        """Original indices of the r * N blocks most likely to stay, ties by the norm; None trains everything."""
        count = sparse.count(self.config.train_ratio, self.base_depth)
        going = {choice.unit for choice in choices}
        staying = [i for i, unit in enumerate(candidates) if unit.kind == "block" and unit not in going]
        if self.config.sparse_update == "off" or count >= len(staying):
            return None
        decider = scores.importance(scores.parts(self.config.strategy)[0], evidence)
        breaker = scores.s_norm(evidence.norm) if evidence.norm is not None else np.zeros(len(candidates))
        order = sorted(staying, key=lambda i: (-decider[i], -breaker[i], i))
        return sorted(
            source for i in order[:count] if (source := state.layout[candidates[i].index].attention) is not None
        )

    def _keep_table(
        self, number: int, layout: Layout, result: scan.ScanResult, evidence: scores.Evidence, choices: list[Choice]
    ) -> None:
        if not self.main:
            return
        table = scan.table(result, evidence, self.config.strategy, [describe(u, layout) for u in result.candidates])
        dropped = [choice.index for choice in choices]
        path = self.dir.scans / f"scan-{number:03d}.json"
        journal.write_json(path, {**table, "dropped": dropped, "tied": list(choices[0].tied)})
        (self.dir.scans / f"scan-{number:03d}.jsonl").unlink(missing_ok=True)

    # ---- what is known of a depth

    def _size(self, model: Any, *, measured: bool = False) -> Size:
        """Parameters, bytes as they will be saved, and (if a target asks for it) decode speed against the base."""
        speedup = None
        if measured and self.config.target_speedup is not None:
            speedup = self._shared(lambda: bench.ratio(self._against_base(model, "now"), "now", "base")[0])
        count = sum(parameter.numel() for parameter in model.parameters())
        return Size(decoder.depth(model), count, count * self.save_dtype.itemsize, speedup)

    def _against_base(self, model: Any, name: str) -> dict[str, list[float]]:
        """Decode speeds of the base and of `model`, measured in turn; the base is loaded for it, in that dtype."""
        path, code = models.path_of(self.config.model), self.config.trust_remote_code
        base = loading.load_model(
            path,
            dtype=model.dtype,
            device=self.accelerator.device,
            trust_remote_code=code,
            allow_pickle=self.config.allow_pickle,
        )
        return bench.decode_speed({"base": base, name: model}, repeats=5)

    def _record(self, event: str, model: Any, layout: Layout, **more: Any) -> None:
        """Evaluate a depth and journal it, with a row for the user."""
        calibration = self.calibration.evaluate(model, self.metric, self.share)
        report = self.config.report_depths or event == "base"
        test = self.test.evaluate(model, self.metric, self.share) if report else None
        size = self._size(model)
        speed = bench.decode_speed({"now": model}, repeats=3)["now"] if self.main else [0.0]
        self.journal.add(
            event,
            depth=size.depth,
            layout=rundir.dump_layout(layout),
            calibration=calibration.summary(),
            test=test.summary() if test else None,
            parameters=size.parameters,
            bytes=size.bytes,
            tokens_per_second=float(np.median(speed)),
            **more,
        )
        if self.main:
            journal.write_json(self.dir.plans / f"depth-{size.depth}.json", rundir.plan(layout, self.config.model))
        self.console.say(depth_row(event, size, calibration, test, float(np.median(speed)), more))

    def history(self) -> History:
        """One row per depth: the base, the warmed-up model, and every depth on the way."""
        return [*self.journal.of("base"), *self.journal.of("stage")]

    # ---- the product

    def _finish(self, state: State, loaded: Loaded, data: TaskData, seconds: float) -> tuple[Any, History]:
        stages = self.journal.of("stage")
        good = stages[-1] if self._above_floor() else stages[-2]
        depth, layout = len(good["layout"]), rundir.load_layout(good["layout"])
        model = state.model if good is stages[-1] else self._load(self.dir.checkpoint(depth))
        models.cast(model, self.save_dtype)
        report: Any = None
        base = {"name": self.config.model, "sha256": loaded.fingerprint}
        if self.main:
            text = card.trimmed(self.config, data, good, self.history(), base)
            report = export.save_trimmed(
                model,
                self.dir.model,
                tokenizer=loaded.tokenizer,
                layout=layout,
                base=self.config.model,
                card=text,
                overwrite=True,
            )
            journal.write_json(self.dir.plan, rundir.plan(layout, self.config.model) | {"sha256": loaded.fingerprint})
        self.accelerator.wait_for_everyone()
        saved = self._load(self.dir.model)
        test = self.test.evaluate(saved, self.metric, self.share)
        if self.main:
            result = card.result(
                self.config,
                data,
                good,
                self.history(),
                self.journal.of("drop"),
                base,
                test,
                report,
                self._against_base(saved, "trimmed"),
                seconds,
            )
            journal.write_json(self.dir.result, result)
        self.console.say(
            f"saved {self.dir.model}: {depth} of {self.base_depth} layers, {self.metric} {test}, reloaded and compared"
        )
        self.journal.add("done", table=f"{depth} layers, {self.metric} {test}")
        return saved, self.history()


def _cut(depth: int, dropped: list[Unit]) -> Layout:
    """The layout of the present model after several units (blocks if more than one) are gone."""
    if len(dropped) == 1:
        return remove(whole(depth), dropped[0])
    gone = {unit.index for unit in dropped}
    return tuple(block for block in whole(depth) if block.attention not in gone)


def describe(unit: Unit, layout: Layout) -> str:
    """The unit in original indices: `block 7` or `MLP 3 + attention 4`."""
    here = layout[unit.index]
    if unit.kind == "pair":
        return f"MLP {here.mlp} + attention {layout[unit.index + 1].attention}"
    if unit.kind == "block":
        whole_block = here.attention == here.mlp
        return f"block {here.attention}" if whole_block else f"block {here.attention}/{here.mlp}"
    return f"{unit.kind} {getattr(here, unit.kind)}"


def drop_line(choices: list[Choice], layout: Layout, result: scan.ScanResult) -> str:
    """What goes and why, for the user."""
    names = ", ".join(describe(choice.unit, layout) for choice in choices)
    if len(choices) > 1:
        return f"drop {names} at once (intact {result.base.value:.1f}; scan {clock(result.seconds)})"
    score = f", {result.trials[choices[0].index].value:.1f} without it" if result.trials else ""
    return f"drop {names} ({choices[0].why}{score}; intact {result.base.value:.1f}; scan {clock(result.seconds)})"


def depth_row(
    event: str, size: Size, calibration: Evaluation, test: Evaluation | None, speed: float, more: dict[str, Any]
) -> str:
    """The line that a user sees for a depth."""
    dropped = ", ".join(unit for drop in more.get("dropped", []) for unit in drop["units"])
    what = "base" if event == "base" else (f"- {dropped}" if dropped else "fine-tuned")
    report = more.get("train") or {}
    trained = f"  loss {report['loss']:.3f} in {clock(report['seconds'])}" if report.get("loss") is not None else ""
    tested = f"  test {test}" if test else ""
    return (
        f"depth {size.depth:3d}  {what:24s}  calibration {calibration}{tested}  "
        f"{size.parameters / 1e6:.2f} M parameters  {speed:.0f} tokens/s{trained}"
    )


def accelerator(config: TrimConfig) -> Any:
    """The accelerate object of this process: device, mixed precision, number of processes."""
    from accelerate import Accelerator

    wanted = torch.device("cpu") if config.device == "auto" and not torch.cuda.is_available() else None
    if config.device != "auto":
        wanted = models.device_of(config.device)
        if wanted.type == "cuda" and wanted.index is not None:
            torch.cuda.set_device(wanted)
    on_cpu = wanted is not None and wanted.type == "cpu"
    mixed = "no" if on_cpu or config.dtype != "auto" or not torch.cuda.is_available() else "bf16"
    return Accelerator(cpu=on_cpu, mixed_precision=mixed)
