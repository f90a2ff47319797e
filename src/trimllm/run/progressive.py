"""The main job: fine-tune, scan, drop the least important unit, train on, until the target; then save and verify.

    import trimllm
    model, history = trimllm.trim(model="demo", task="demo_law", text="demo_law", lr=2e-3, output="runs/law")

Every stage of training, every measurement and every drop is journaled when it is done. A run that was killed goes on
from the last one: weights and what AdamW knows are those of the last checkpoint, or of what the stage that was under
way saved since; the order of training rows comes from the seed and the stage's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers

from trimllm import files
from trimllm.blocks import surgery
from trimllm.blocks.layout import Layout, compose, dump_layout, load_layout, remove_all, whole
from trimllm.checkpoints import export, folders, loading, mixed, models, verification
from trimllm.checkpoints.dtypes import name_of
from trimllm.checkpoints.models import Loaded, load
from trimllm.config import TrimConfig
from trimllm.config.plain_settings import make
from trimllm.console import Console
from trimllm.errors import InputError, TrimError
from trimllm.evaluation import generation, inputs
from trimllm.parallel import Share
from trimllm.run import (
    account,
    checks,
    finishing,
    opening,
    placing,
    recovery,
    rundir,
    targets,
    used_rows,
)
from trimllm.run.journal import Journal
from trimllm.run.outcome import Outcome
from trimllm.run.preparing import Prepared, prepare
from trimllm.run.recording import Recorder
from trimllm.run.rundir import RunDir
from trimllm.run.targets import End
from trimllm.training import optimizer_state, sparse, train, training_rows
from trimllm.training.distill import Teacher
from trimllm.training.optimizer_state import Moments
from trimllm.training.step import Means
from trimllm.training.underway import Underway

History = list[dict[str, Any]]


def trim(config: TrimConfig | None = None, *, console: Console | None = None, **settings: Any) -> tuple[Any, History]:
    """Trim a model; see `TrimConfig` for the settings (given as one object or by name).

    With `resume=True` and `output` alone, the run in `output` goes on.

    Args:
        config: the settings as one object.
        console: where it is said what happens (default: standard error); `trimllm.Console(quiet=True)` says nothing.

    Returns:
        The trimmed model as it was saved in `output/model`, and the history: a row for the base, one for each depth
        that was measured, and one for the result as it was saved (see `Run.history`).

    Raises:
        InputError: if the settings, the model or the data cannot be used.
        TrimError: if training or saving fails; the journal is kept, and the run can be resumed.
    """
    if config is not None and settings:
        raise InputError(f"trim(config, {next(iter(settings))}=...): give a config or settings by name, not both")
    if config is None and settings.get("resume") and "output" in settings:
        stored = placing.stored_settings(settings["output"])
        if not stored and "model" not in settings:
            raise InputError(f"resume: there is no run in {settings['output']}: check output, or give model and task")
        settings = stored | settings
    return Run(config or make(TrimConfig, settings), Console() if console is None else console).go()


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
    trained: dict[str, Any] | None = None
    """What the stage after those drops was, where it is trained already and not yet measured."""
    chosen: list[int] | None = None
    """Original blocks that train (sparse update); None: all."""
    end: End | None = None
    """What ended the drops."""
    moments: Moments = field(default_factory=dict)
    """What AdamW goes on with in the next stage (--optimizer-state carried); filled by stages after drops."""


class Run:
    """One run in one directory. `go` does everything that the journal does not say is done."""

    fitted: int | None = None
    """Tokens of a micro-batch that memory had room for in the last stage."""
    ready: Prepared
    journal: Journal
    recorder: Recorder
    said: set[str]
    """Notes that stand in the output already: scans have the same ones again and again."""

    def __init__(self, config: TrimConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.dir = RunDir(config.output)
        self.accelerator = models.accelerator(config)
        self.share = Share(self.accelerator.process_index, self.accelerator.num_processes)
        transformers.utils.logging.disable_progress_bar()
        if not self.share.first:
            console.quiet = True

    def go(self) -> tuple[Any, History]:
        if not self.share.first:
            return self._go()
        folders.check_apart(self.dir.root, loading.path_of(self.config.model))
        with folders.held(self.dir.root):
            rundir.check(self.config)
            return self._go()

    def _go(self) -> tuple[Any, History]:
        inputs.check_task(self.config)
        earlier = Journal.read(self.dir.journal)
        for note in checks.memory(self.config, self.accelerator.device, measured=bool(earlier.of("drop"))):
            self.console.say(note)
        loaded = load(self.config, training=True, device=self.accelerator.device)
        if self.config.trains:
            generation.name_ends(loaded.model, loaded.tokenizer)
        autocast = mixed.measuring(self.accelerator) if self.config.trains else None
        self.ready = prepare(self.config, loaded, earlier, autocast)
        if not earlier.of("done") and (
            tight := checks.disk(self.config, loaded.model, self.ready.decider, self.ready.ahead)
        ):
            self.console.warn(tight)
        asked = self.ready.digests()
        rundir.same_data(rundir.data_of(earlier), asked, self.config, f"the run in {self.config.output}")
        self.journal = Journal(
            self.dir.journal, self.share.from_first(lambda: rundir.claim(self.config)), writes=self.share.first
        )
        rundir.wait_until_seen(self.dir, self.share.rank)
        self._begin(loaded, asked)
        if (done := self.journal.last("done")) is not None:
            self.console.say(f"{self.dir.root} is finished: {done['table']}")
            if self.share.first:
                self.dir.forget(self._measured())
            return self._load(self.dir.model), self.history()
        self.recorder = Recorder(
            self.config, self.ready, self.console, self.share, self.journal, self.accelerator.device
        )
        self._start(loaded)
        state = self._restore(loaded)
        del loaded  # a run that goes on has no more use for the base's weights, and training may need the memory
        self._loop(state)
        return self._finish(state)

    def _carries(self, drops: Sequence[dict[str, Any]]) -> bool:
        """Whether what AdamW knows at the end of the stage after these drops goes on. It does not after the warm-up (no
        drops), which trains everything where later stages train little, nor after the last stage."""
        return self.config.carries_state and bool(drops) and not any(drop["reached"] for drop in drops)

    def _begin(self, loaded: Loaded, data: dict[str, str]) -> None:
        """Journal what the run begins with, `data` by their SHA-256; one that goes on must have the same base."""
        config = self.config
        first = self.journal.last("start")
        if first is None:
            dtype = name_of(self.ready.save_dtype)
            known = {"base": loaded.fingerprint, "data": data, "depth": self.ready.base_depth, "save_dtype": dtype}
            first = self.journal.add("start", **known)
        elif first["base"] != loaded.fingerprint:
            raise InputError(
                f"--model {config.model}: its weights are not those that the run in {config.output} began with "
                f"(SHA-256 {first['base']}): give that model, or start another run"
            )
        if self.share.first:
            used_rows.keep(self.dir.root, self.ready.data, config.model, config.seed, trains=config.trains)

    def _start(self, loaded: Loaded) -> None:
        """Say what is there, and measure the base."""
        begun = bool(self.journal.of("base"))
        for line in opening.lines(self.config, loaded, self.ready, self.accelerator, begun=begun):
            self.console.say(line)
        for line in self.ready.warnings:
            self.console.warn(line)
        self.said = opening.scorer_notes(self.ready)
        if not begun:
            self.recorder.record("base", loaded.model, whole(self.ready.base_depth))

    def _restore(self, loaded: Loaded) -> State:
        """The state that the journal describes, weights included."""
        done, trained, last = (self.journal.last(event) for event in ("stage", "trained", "drop"))
        state = State(loaded.model, whole(self.ready.base_depth))
        if done is not None:
            state.layout, state.stages = load_layout(done["layout"]), done["stage"] + 1
            self.console.say(f"going on after stage {done['stage']}, at depth {len(state.layout)}")
        if last is not None:
            state.chosen, state.end = last["trains"], End.of(last)
        state.pending = [drop for drop in self.journal.of("drop") if drop["stage"] == state.stages]
        dropped = None if done is None else done["dropped"]
        if trained is not None and trained["stage"] == state.stages:
            self.console.say(f"stage {state.stages} is trained: it is measured now")
            state.trained, state.layout, dropped = trained["train"], self._layout_after(state), state.pending
        if dropped is not None:
            folder = self.dir.checkpoint(len(state.layout))
            state.model.to("meta")  # the base's weights, which others refer to: both would not fit
            state.model = self._load(folder)
            if self._carries(dropped):
                state.moments = optimizer_state.load(state.model, folder)
        if state.trained is None:
            for drop in state.pending:
                surgery.apply_layout(state.model, load_layout(drop["cut"]))
            state.layout = self._layout_after(state)
        state.moments = optimizer_state.present(state.moments, state.model)
        self._clean(state)
        return state

    def _layout_after(self, state: State) -> Layout:
        """The layout after the pending drops."""
        return load_layout(state.pending[-1]["layout"]) if state.pending else state.layout

    def _load(self, folder: Path) -> Any:
        """A checkpoint that this run wrote."""
        return loading.load_model(
            folder,
            device=self.accelerator.device,
            trust_remote_code=self.config.trust_remote_code,
            attention=self.config.attention,
        )

    def _loop(self, state: State) -> None:
        config = self.config
        if not state.stages:
            self._stage(state, config.warmup_epochs, "warm-up")
        while self._above_floor():
            enough = len(state.pending) >= config.drops_per_stage or state.end or config.one_shot
            if state.pending and enough:
                units = sum(len(drop["units"]) for drop in state.pending)
                epochs = targets.stage_epochs(config, units, state.stages, last=state.end is not None)
                self._stage(state, epochs, f"depth {len(state.layout)}")
            elif state.end:
                self.console.say(f"end of the drops: {state.end.words}")
                if missed := targets.missed(config, state.end):
                    self.console.warn(missed)
                return
            else:
                self._drop(state)
        self.console.say(
            "end of the drops: the last one fell below the accuracy floor; the last depth that does not is the result"
        )

    def _above_floor(self) -> bool:
        """Whether the last stage's calibration accuracy is acceptable."""
        values = [stage["calibration"]["value"] for stage in self.journal.of("stage")]
        limit = targets.floor(self.config, values)
        if values[-1] >= limit:
            return True
        if len(values) == 1:
            raise TrimError(
                f"the fine-tuned model itself reaches only {values[0]:.1f} on the calibration set, below the floor of "
                f"{limit:.1f}: go on with --resume and a lower --min-accuracy, or train longer in a new run"
            )
        return False

    def _stage(self, state: State, epochs: float, name: str) -> None:
        """Train, save, evaluate; on disk when it returns. What a kill left trained is only evaluated."""
        warm = state.stages == 0
        if state.trained is None:
            state.trained = self._train(state, epochs, name)
        known = {"stage": state.stages, "train": state.trained, "dropped": state.pending}
        row, base = self.recorder.record("stage", state.model, state.layout, **known), self.journal.of("base")[0]
        for warning in account.after_stage(row, base, self.config, self.ready.data.calibration):
            self.console.warn(warning)
        if warm and (time := opening.time_ahead(self.config, self.ready.ahead, self.ready.tokens_per_epoch, row)):
            self.console.say(time)
        state.stages += 1
        state.pending, state.trained = [], None
        self._clean(state)

    def _train(self, state: State, epochs: float, name: str) -> dict[str, Any]:
        """Train, and save a checkpoint; returns what the journal says of it, where it stands by then."""
        config, warm = self.config, state.stages == 0
        chosen = None if warm or config.sparse_update == "off" else state.chosen
        parameters = sparse.freeze(state.model, state.layout, chosen, embeddings=warm or config.train_embeddings)
        seed = config.seed * 1000 + state.stages
        plan = training_rows.steps(self.ready.task_rows, self.ready.text_rows, config, epochs, seed)
        watch = None
        if config.schedule == "recover" and not warm and state.end is None:
            limit = recovery.limit(self.journal.of("stage"), config.recover_tolerance)
            watch = recovery.follow(state.model, self.ready.calibration, self.share, plan, epochs, limit)
        remedies = {"lr": config.lr, "max_grad_norm": config.max_grad_norm}  # a run may go on with others
        saved, carried = self._underway(state, remedies), Moments() if self._carries(state.pending) else None
        with self.console.progress(name) as show:
            report = train.train_stage(
                state.model,
                parameters,
                plan,
                config,
                self.accelerator,
                Means(
                    pad_id=self.ready.calibration.pad_id,
                    attention=config.attention,
                    teacher=self._teacher() if config.distill and plan and not warm else None,
                    fitted=self.fitted,
                    folder=self.dir.root,
                    say=self.console.say,
                ),
                seed=seed,
                on_step=lambda step, steps, loss, speed: show(step, steps, f"loss {loss:.3f}  {speed:.0f} tokens/s"),
                watch=watch,
                moments=state.moments,
                carried=carried,
                underway=saved,
            )
        state.moments = carried or {}
        if chosen is not None or config.sparse_update == "off":  # more may fit where less trains
            self.fitted = report.micro_batch_size or self.fitted
        self._checkpoint(state)
        done = asdict(report) | remedies | ({"recovery": watch.record()} if watch else {})
        self.journal.add("trained", stage=state.stages, train=done)
        saved.delete()
        return done

    def _underway(self, state: State, remedies: dict[str, float]) -> Underway:
        """Where the stage that follows is saved on the way; it leaves room for its checkpoint. With another remedy it
        begins anew."""
        model, reserve = state.model, verification.weight_bytes(state.model)
        if self._carries(state.pending):
            reserve += optimizer_state.most_bytes(self.config, model)
        return Underway(
            self.dir.underway,
            self.config.checkpoint_minutes,
            number=state.stages,
            remedies=remedies,
            reserve=reserve,
            say=self.console.say,
            writes=self.share.first,
        )

    def _teacher(self) -> Teacher:
        """The model at the end of the warm-up; not kept between stages, in which scans may need the memory."""
        return Teacher(self._load(self.dir.checkpoint(self.ready.base_depth)), self.config.distill)

    def _checkpoint(self, state: State) -> None:
        if self.share.first:
            with folders.appearing(self.dir.checkpoint(len(state.layout)), overwrite=True) as folder:
                export.save_model(state.model, folder)
                self.ready.tokenizer.save_pretrained(folder)
                if self._carries(state.pending):
                    optimizer_state.save(state.moments, state.model, folder)
        self.accelerator.wait_for_everyone()

    def _clean(self, state: State) -> None:
        """Delete checkpoints that neither the user, nor a floor, nor a teacher, nor a resumed run needs, and batches of
        scans that led to a drop."""
        if self.share.first:
            for number in range(len(self.journal.of("drop"))):
                self.dir.batches_of_scan(number).unlink(missing_ok=True)
            stages = [stage["depth"] for stage in self.journal.of("stage")]
            ready = [*stages, *([] if state.trained is None else [len(state.layout)])]
            teacher = [self.ready.base_depth] if self.config.distill else []
            weights = self.dir.kept_depths() if self.config.keep_checkpoints else [*stages[-2:], *ready[-1:], *teacher]
            self.dir.clean(weights, state=ready[-1:])

    def _drop(self, state: State) -> None:
        """Scan, choose, cut. The scan's finished batches survive a kill."""
        parts = self.dir.batches_of_scan(len(self.journal.of("drop")))
        decision = self.ready.decider.decide(state.model, state.layout, parts, self.share, self.console)
        choices = decision.choices
        cut = remove_all(whole(len(state.layout)), [choice.unit for choice in choices])
        after = compose(state.layout, cut)
        staying = {source for block in after for source in block if source is not None}
        left = {block.attention for block in after}
        order = [source for source in decision.order if source in left]
        count = sparse.count(self.config.train_ratio, self.ready.base_depth)
        state.chosen = sparse.choose(self.config.sparse_update, order, count, state.chosen, staying)
        surgery.apply_layout(state.model, cut)
        state.moments = optimizer_state.present(state.moments, state.model)
        before, state.layout = state.layout, after
        state.end = targets.reached(self.config, self.ready.base_depth, self.recorder.size(state.model))
        state.end = state.end or self.ready.decider.stuck(state.model, state.layout)
        if self.share.first:
            files.write_json(parts.with_suffix(".json"), self.ready.decider.table(decision, before))
        state.pending.append(
            self.journal.add(
                "drop",
                stage=state.stages,
                **self.ready.decider.record(decision, before),
                cut=dump_layout(cut),
                layout=dump_layout(state.layout),
                trains=state.chosen,
                reached=state.end and state.end.words,
                ended_by=state.end and state.end.by,
                speedup=state.end and state.end.speedup,
            )
        )
        for note in decision.result.notes:
            if note not in self.said:
                self.console.say(f"  {note}")
                self.said.add(note)
        self.console.say(
            f"  {account.drop_line(choices, before, decision.result, decision.joint, self.config.strategy)}"
        )

    def _measured(self) -> set[int]:
        """Depths whose stage was measured."""
        return {stage["depth"] for stage in self.journal.of("stage")}

    def history(self) -> History:
        """Rows of the base, the warmed-up model, every depth on the way, and the result as it was saved."""
        return [*self.journal.of("base"), *self.journal.of("stage"), *self.journal.of("saved")[-1:]]

    def _finish(self, state: State) -> tuple[Any, History]:
        stages = self.journal.of("stage")
        good = targets.last_good(self.config, stages, self.dir.kept_depths())
        layout = load_layout(good["layout"])
        model = state.model if good is stages[-1] else self._load(self.dir.checkpoint(len(layout)))
        models.cast(model, self.ready.save_dtype)
        origin = replace(self.ready.origin, sha256=self.journal.of("start")[0]["base"])
        verified = finishing.save(self.dir, self.ready, model, layout, origin) if self.share.first else None
        state.model = model = None  # the saved one, and then the base, are loaded in its place
        self.accelerator.wait_for_everyone()
        saved, row = self._load(self.dir.model), self.journal.events[-1]
        if (row["event"], row.get("layout")) != ("saved", good["layout"]):  # or of another depth: floors may be lowered
            row = self.recorder.record("saved", saved, layout)
        if verified is not None:  # in the first process
            finishing.conclude(
                self.dir,
                Outcome(
                    config=self.config,
                    data=self.ready.data,
                    warned=self.ready.warnings,
                    origin=origin,
                    base=self.journal.of("base")[0],
                    stages=stages,
                    drops=self.journal.of("drop"),
                    good=good,
                    saved=row,
                    above=self.recorder.above_full(),
                    speedup=self.recorder.final_speedup(saved),
                    verified=verified,
                ),
                self.console,
            )
        reached = f"{self.ready.metric} {account.percent(row['test'])}"
        self.journal.add("done", table=f"{len(layout)} layers, {reached}")
        if self.share.first:
            self.dir.forget(self._measured())
        return saved, self.history()
