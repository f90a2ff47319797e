"""What each command does: call the packages, print a table, write JSON.

At the top stands what `trimllm trim` needs in any case; what only other commands need is imported within them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimllm import config, files, memory, parallel, tasks
from trimllm.blocks import decoder, legality, surgery
from trimllm.blocks.layout import Unit, describe, positions, remove, units, whole, without
from trimllm.checkpoints import arithmetic, export, folders, models
from trimllm.checkpoints.streaming import drop_on_disk
from trimllm.console import Console, table
from trimllm.errors import InputError
from trimllm.evaluation import encoding, inputs, paired
from trimllm.evaluation.evaluate import Evaluation, Scorer
from trimllm.evaluation.generation import generate
from trimllm.importance import scan, select, weights
from trimllm.importance.scores import Evidence
from trimllm.run import account, model_card, rundir
from trimllm.run.deciding import race_of
from trimllm.run.progressive import trim
from trimllm.tasks import metrics


def run_trim(command: config.TrimConfig) -> None:
    """Trim, then print the table of depths."""
    _, history = trim(command)
    if parallel.is_first():
        print(account.depth_table(history))
        print(f"trimmed checkpoint: {Path(command.output) / 'model'}")


@dataclass(frozen=True)
class _Prepared:
    """What a scan is made of: the model, what must stay of it, and the calibration rows that it is asked."""

    model: Any
    protected: frozenset[int]
    length: int
    """Blocks in the runs that go together (--keep-pattern)."""
    data: tasks.TaskData
    scorer: Scorer
    tolerance: float
    asked: list[Any]
    """Questions of the analysis."""


def run_scan(command: config.ScanConfig) -> None:
    """Importance of every unit: table, scan.json, scan.png; with --analysis what may explain it."""
    output, console = Path(command.output), Console()
    for product in ("scan.json", "analysis.json")[: 1 + command.analysis]:
        _fresh(output, product)
    folders.check_writable(output)
    prepared = _prepare(command, console)
    result = _scan(command, prepared, console)
    record = _show(command, prepared, result)
    if command.analysis:
        _explain(command, prepared, result, record)


def _prepare(command: config.ScanConfig, console: Console) -> _Prepared:
    """Load model and task, and refuse what cannot be scanned before anything is computed."""
    loaded = _load(command, evaluating=True)
    depth = decoder.depth(loaded.model)
    if command.run is not None and command.run > depth:
        raise InputError(f"--run {command.run}: the model has only {depth} layers")
    protected = select.protected(command.protect, depth)
    length = legality.run_length(loaded.model, command.unit, keep_pattern=command.keep_pattern)
    data = inputs.task_data(command, loaded.tokenizer)
    for note in data.notes:
        console.say(f"  {note}")
    tolerance = select.tolerance_points(data.metric, len(data.calibration), command.tie_tolerance)
    scorer = inputs.scorer(command, loaded.model, loaded.tokenizer, data.calibration)
    for note in encoding.row_notes(calibration=scorer.encoded):
        console.say(f"  {note}")
    asked: list[Any] = []
    if command.analysis:
        from trimllm.analysis import lens

        asked = lens.questions(scorer)
    return _Prepared(loaded.model, protected, length, data, scorer, tolerance, asked)


def _scan(command: config.ScanConfig, prepared: _Prepared, console: Console) -> scan.ScanResult:
    """Measure every candidate, and say what the user should know of it."""
    model, scorer, metric = prepared.model, prepared.scorer, prepared.data.metric
    depth = decoder.depth(model)
    every = units(command.unit, whole(depth), prepared.length)
    may_go = [every[i] for i in _open(command, model, every, prepared.protected)[0]]
    # An analysis compares what it finds with accuracies too.
    asks_every_choice = command.analysis or command.metric is not None
    if not asks_every_choice and command.scan == "exact":
        slow = scan.many_choices_note(scorer, command.strategy)
        if slow:
            console.say(f"  {slow}")
    questions = (scorer, metric) if asks_every_choice else scan.asked(model, scorer, metric, command.strategy)
    with console.progress("scan") as show:
        result = scan.scan(
            model,
            *questions,
            command.unit,
            length=prepared.length,
            run=command.run or max(1, depth // 2),
            race=race_of(command, prepared.tolerance, may_go, command.seed),
            progress=show,
        )
    for note in result.notes:
        console.say(f"  {note}")
    return result


def _show(command: config.ScanConfig, prepared: _Prepared, result: scan.ScanResult) -> dict[str, Any]:
    """Print the table and what would go first; write scan.json, which is returned, and its picture."""
    from trimllm.plot import importance_plot

    model, depth, output = prepared.model, decoder.depth(prepared.model), Path(command.output)
    extra = weights.evidence(command.strategy, model, prepared.scorer, result.candidates)
    evidence = result.evidence(scan.positions(result.candidates, range(depth)), depth, command.seed, **extra)
    names = [describe(unit, whole(depth)) for unit in result.candidates]
    record = scan.table(result, evidence, command.strategy, names)
    choice, reason = _first(command, model, result, evidence, prepared.protected, prepared.tolerance)
    record |= {"model": command.model, "task": prepared.data.name, "metric": result.intact.metric}
    record["first"] = names[choice.index] if choice else None
    if choice is None:
        first = f"nothing: {reason}"
    elif command.unit == "sublayer" and len(choice.tied) == 1:  # "least important" is what its line begins with
        first = names[choice.index]
    else:
        first = f"{names[choice.index]} ({choice.why})"
    print(f"intact: {result.intact.metric} {result.intact}")
    print(scan_table(record))
    print(f"{'least important' if command.unit == 'sublayer' else 'would go first'}: {first}")
    files.write_json(output / "scan.json", record)
    importance_plot(record, output / "scan.png")
    print(f"written: {output / 'scan.json'}, {output / 'scan.png'}")
    return record


def _explain(command: config.ScanConfig, prepared: _Prepared, result: scan.ScanResult, record: dict[str, Any]) -> None:
    """Print and write what may explain the scan: analysis.json and its picture."""
    from trimllm.analysis import summary
    from trimllm.plot import analysis_plot

    output = Path(command.output)
    explained = summary.analyse(command, prepared.model, prepared.scorer, prepared.asked, result, record)
    print(f"\n{summary.report(explained)}")
    files.write_json(output / "analysis.json", explained)
    analysis_plot(explained, output / "analysis.png")
    print(f"written: {output / 'analysis.json'}, {output / 'analysis.png'}")


def _first(
    command: config.ScanConfig,
    model: Any,
    result: scan.ScanResult,
    evidence: Evidence,
    protected: frozenset[int],
    tolerance: float,
) -> tuple[select.Choice | None, str]:
    """What a run would drop first, or None and why nothing may go."""
    free, reason = _open(command, model, result.candidates, protected)
    allowed = result.eligible(free, command.strategy)
    if free and not allowed:
        reason = "no run fits after a layer that may go: ask for a shorter --run"
    if not allowed:
        return None, reason
    return select.choose(result.candidates, evidence, command.strategy, tolerance=tolerance, allowed=allowed), ""


def _open(
    command: config.ScanConfig, model: Any, candidates: list[Unit], protected: frozenset[int]
) -> tuple[list[int], str]:
    """Which candidates may go, and why none may; sub-layers never go alone, so only protection counts for them."""
    intact = whole(decoder.depth(model))
    free = select.droppable(candidates, intact, protected)
    if command.unit == "sublayer" or not free:
        return free, "every layer is protected"
    if len(intact) == 1:
        return [], "the model has only one layer"
    refusals = [legality.refusal(model, remove(intact, candidates[i])) for i in free]
    return [i for i, why in zip(free, refusals, strict=True) if why is None], refusals[0] or ""


def scan_table(record: dict[str, Any]) -> str:
    """The units of a scan, most important first."""
    rows = [
        [
            row["unit"],
            "-" if row["importance"] is None else f"{row['importance']:.4g}",
            f"{row['value']:.1f} +- {row['stderr']:.1f}" + (f" (foreseen from {row['n']})" if "stopped" in row else ""),
            "-" if row["loss"] is None else f"{row['loss']:.3f}",
            f"{row['norm']:.1f}",
        ]
        for row in sorted(record["units"], key=_by_importance)
    ]
    return table(["unit", "importance", f"{record['metric']} without it", "loss", "norm"], rows)


def _by_importance(row: dict[str, Any]) -> float:
    return -math.inf if row["importance"] is None else -row["importance"]


def run_drop(command: config.DropConfig) -> None:
    """Surgery only: the model as saved, less some layers."""
    if not command.layers:
        raise InputError("--layers names no layer: give at least one, such as --layers 3,7")
    folders.check_target(command.output, source=models.path_of(command.model))
    if command.streaming:
        _drop_on_disk(command)
        return
    loaded = _load(command)
    if getattr(loaded.model, "is_quantized", False):
        raise InputError(
            f"--model {command.model} is quantized: add --streaming, which moves its weights as they are, or drop from "
            "the unquantized model"
        )
    depth = decoder.depth(loaded.model)
    dropped = positions(command.layers, depth)
    surgery.drop_layers(loaded.model, dropped)
    layout, base = without(whole(depth), dropped), models.origin(command.model)
    report = export.save_trimmed(
        loaded.model,
        command.output,
        tokenizer=loaded.tokenizer,
        layout=layout,
        base=base,
        card=model_card.cut(base, layout, depth),
        companions=model_card.terms(base),
    )
    print(f"{command.output}: {depth - len(dropped)} of {depth} layers, reloaded and compared ({_differences(report)})")


def _load(command: config.ModelSettings, *, evaluating: bool = False) -> models.Loaded:
    """The model of a command, with what the user should know of it."""
    loaded = models.load(command, evaluating=evaluating)
    for note in loaded.notes:
        Console().say(f"  {note}")
    return loaded


def _drop_on_disk(command: config.DropConfig) -> None:
    source = models.path_of(command.model)
    if (Path(source) / "adapter_config.json").exists():
        raise InputError(
            f"--model {command.model} is an adapter, and --streaming only moves tensors: leave it out, or merge the "
            "adapter into its base first"
        )
    if not Path(source).is_dir():
        raise InputError(
            f"--model {command.model}: --streaming cuts a directory on this disk: download the model first"
        )
    with Console().progress("bytes") as show:
        done = drop_on_disk(
            source,
            command.layers,
            command.output,
            max_shard_size=command.max_shard_size or "5GB",
            trust_remote_code=command.trust_remote_code,
            base=command.model,
            progress=show,
        )
    layout = tuple(whole(done.depth)[layer] for layer in done.kept)
    files.write_atomic(Path(command.output) / "README.md", model_card.cut(command.model, layout, done.depth))
    print(
        f"{command.output}: {len(done.kept)} of {done.depth} layers, {done.bytes / 1e9:.3f} GB in "
        f"{done.shards} file(s), names, shapes and config checked"
    )


def _differences(report: Any) -> str:
    shown = {"plain": report.plain, "cached": report.cached, "static cache": report.static}
    return "largest logit differences: " + ", ".join(
        f"{name} {'not supported' if value is None else f'{value:.2g}'}" for name, value in shown.items()
    )


def run_eval(command: config.EvalConfig) -> None:
    """One model, one task, the reported split."""
    if command.output and Path(command.output).is_dir():
        raise InputError(f"--output {command.output}: this is a directory: name a JSON file")
    if command.output:
        _check_result(Path(command.output))
        folders.check_writable(Path(command.output).parent)
    if command.against:
        _check_against(command)
    loaded, data, scorer = _asked(command)
    evaluation = scorer.evaluate(loaded.model, data.metric)
    record: dict[str, Any] = {"model": command.model, "task": data.name, **evaluation.summary()}
    _write_result(command.output, record)
    print(f"{data.name}: {evaluation_line(evaluation)}")
    if command.generate:
        record["generation"] = _generation(command, loaded, data)
        _write_result(command.output, record)
        print("generated: " + ", ".join(f"{name} {value:.1f}" for name, value in record["generation"].items()))
    if command.against:
        del loaded
        memory.release()
        record["against"], told = _against(command, data, scorer, evaluation)
        _write_result(command.output, record)
        print(told)


def _asked(
    command: config.EvalConfig, earlier: tasks.TaskData | None = None
) -> tuple[models.Loaded, tasks.TaskData, Scorer]:
    """The model, what it is asked, and that as it reads it; what was said of the `earlier` data is not said again."""
    loaded = _load(command, evaluating=True)
    data = inputs.task_data(command, loaded.tokenizer, reported_only=True)
    if command.generate and data.kind != "generation":
        raise InputError(f"--generate needs a generation task, and {data.name} is of kind {data.kind}: leave it out")
    console = Console()
    scorer = inputs.scorer(command, loaded.model, loaded.tokenizer, data.test)
    notes = [note for note in data.notes if earlier is None or note not in earlier.notes]
    for note in (*notes, *encoding.row_notes(reported=scorer.encoded), *filter(None, [scorer.note])):
        console.say(f"  {note}")
    return loaded, data, scorer


def _check_against(command: config.EvalConfig) -> None:
    """Refuse another model that is not there, or has no weights or tokenizer, before the first one is asked."""
    from trimllm.checkpoints import loading

    path = models.path_of(str(command.against))
    with _of_against(command):
        models.checked_config(path, command)
        loading.load_tokenizer(path, trust_remote_code=command.trust_remote_code)


@contextmanager
def _of_against(command: config.EvalConfig) -> Iterator[None]:
    """Within, an error is one of the other model: it names --against."""
    try:
        yield
    except InputError as error:
        text = str(error).removeprefix(f"--model {command.against}").removeprefix(": ").lstrip()
        raise InputError(f"--against {command.against}: {text}") from None


def _against(
    command: config.EvalConfig, data: tasks.TaskData, scorer: Scorer, evaluation: Evaluation
) -> tuple[dict[str, Any], str]:
    """Ask the other model the same: what is known of it and of the difference, and how that is told.

    Raises:
        InputError: if it divides what is to be likely into other tokens.
    """
    other = command.model_copy(update={"model": command.against, "generate": False})
    with _of_against(command):
        loaded, theirs, own = _asked(other, data)
        if data.metric == "likelihood" and _targets(own) != _targets(scorer):
            raise InputError(
                "its tokenizer, chat template or context makes other tokens of the rows, whose likelihoods cannot be "
                "compared: give both the same --max-length, or leave --against out"
            )
    if theirs.digest() != data.digest():
        Console().say(f"  {command.against} is asked in other words: the two have different chat templates")
    elif data.kind == "text" and own.encoded != scorer.encoded:
        Console().say(f"  {command.against} reads in other pieces: contexts differ; --max-length makes them equal")
    found = own.evaluate(loaded.model, data.metric)
    answers = [paired.answers(one.per_item, asked.test) for one, asked in ((evaluation, data), (found, theirs))]
    above = paired.apart(*answers)
    told = f"against {command.against}: {evaluation_line(found)}\ndifference: {paired.shown(above)} points (paired)"
    return {"model": command.against, **found.summary(), "above": above}, told


def _targets(scorer: Scorer) -> dict[int, tuple[int, ...]]:
    """Per item, the tokens whose likelihood is asked for, in however many pieces."""
    found: dict[int, tuple[int, ...]] = {}
    for row in scorer.encoded:
        found[row.item] = found.get(row.item, ()) + row.target
    return found


def _write_result(output: str | None, record: dict[str, Any]) -> None:
    if output:
        files.write_json(Path(output), record)


def _check_result(path: Path) -> None:
    """Refuse to replace a file that is not the result of an earlier evaluation."""
    if not path.exists():
        return
    with suppress(OSError, ValueError):
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(earlier, dict) and {"model", "task", "metric"} <= earlier.keys():
            return
    raise InputError(f"--output {path}: the file exists, and is no earlier result: choose another one")


def evaluation_line(evaluation: Evaluation) -> str:
    """Everything that was measured, in one line."""
    named = {"acc": evaluation.acc, "acc_norm": evaluation.acc_norm, "greedy match": evaluation.greedy}
    others = [f"{name} {value:.1f}" for name, value in named.items() if value is not None and name != evaluation.metric]
    losses = [f"loss {evaluation.loss:.4f}", f"perplexity {evaluation.perplexity:.3f}"]
    value = f"{evaluation.metric} {evaluation.value:.1f} +- {evaluation.stderr:.1f} (n={evaluation.n})"
    return ", ".join([value, *others, *losses])


def _generation(command: config.EvalConfig, loaded: models.Loaded, data: tasks.TaskData) -> dict[str, float]:
    """Percentages over the reported split: exact match, ROUGE-L against the best reference, repeated word 4-grams."""
    lengths: dict[str, Any] = {"max_new_tokens": command.max_new_tokens, "max_length": command.max_length}
    answers = generate(loaded.model, loaded.tokenizer, data.test, **lengths, token_budget=command.eval_batch_size)
    pairs = [
        (answer, item.references or (item.target.strip(),)) for answer, item in zip(answers, data.test, strict=True)
    ]
    exact = [metrics.exact_match(answer, references) for answer, references in pairs]
    rouge = [metrics.rouge_l(answer, references) for answer, references in pairs]
    repeated = [metrics.repetition(answer.split()) for answer in answers]
    columns = {"exact_match": exact, "rouge_l": rouge, "repetition": repeated}
    return {name: 100 * sum(map(float, values)) / len(values) for name, values in columns.items()}


def run_bench(command: config.BenchConfig) -> None:
    """Models in turn: tables, bench.json, bench.png."""
    from trimllm.bench import benching, tables
    from trimllm.plot import bench_plot

    output = Path(command.output) if command.output else None
    if output:
        _fresh(output, "bench.json")
        folders.check_writable(output)
    with Console().progress("bench") as show:
        record = tables.record(command, *benching.measure(command, show))
    if output:
        files.write_json(output / "bench.json", record)
    print(tables.report(record))
    if note := arithmetic.bench_note(record["models"]):
        Console().say(note)
    if output:
        bench_plot(record, output / "bench.png")
        print(f"written: {output / 'bench.json'}, {output / 'bench.png'}")


def run_compare(command: config.CompareConfig) -> None:
    """Methods one after the other, each in a process of its own; a table, compare.json, compare.png."""
    from trimllm.compare import compare

    compare(command, Console())


def run_export(command: config.ExportConfig) -> None:
    """A kept depth of a run as a checkpoint, or a checkpoint in another format."""
    from trimllm import handover
    from trimllm.handover import source

    target = Path(command.output or _default_target(command))
    if command.to == "checkpoint":
        folders.check_target(target, source=rundir.RunDir(command.source).checkpoint(command.depth or 0))
        report = source.save_depth(command, target)
        print(f"{target}: {command.depth} layers, reloaded and compared ({_differences(report)})")
        return
    if command.to == "gguf" and target.exists():
        raise InputError(f"--output {target}: it exists: name another file")
    if command.to != "gguf":
        folders.check_target(target)
    with source.checkpoint(command) as folder:
        print(f"{target}: {handover.write(folder, target, command)}")


def _default_target(command: config.ExportConfig) -> Path:
    """Beside what is handed over, named by what it becomes."""
    given = Path(command.source) if command.source not in (".", "..") else Path(command.source).resolve()
    is_run = rundir.RunDir(given).config.exists()
    stem = "model" if is_run else given.resolve().name
    stem += f"-depth-{command.depth}" if command.depth else ""
    what = {"checkpoint": "", "gguf": f"-{command.quant or 'f16'}.gguf"}.get(command.to, f"-{command.to}")
    return (given if is_run else given.parent) / (stem + what)


def run_push(command: config.PushConfig) -> None:
    """A finished export, to the Hub."""
    from trimllm.handover.hub import push_to_hub

    print(f"pushed: {push_to_hub(command.directory, command.repo_id, private=command.private)}")


def run_demo(command: config.DemoConfig) -> None:
    """The main job on the embedded model."""
    from trimllm.demo.demo import demo

    demo(command)


def _fresh(output: Path, product: str) -> None:
    folders.check_directory(output)
    if (output / product).exists():
        raise InputError(f"--output {output}: it already holds {product}: choose another directory")


CARRY_OUT: dict[type[config.Settings], Callable[[Any], None]] = {
    config.TrimConfig: run_trim,
    config.ScanConfig: run_scan,
    config.DropConfig: run_drop,
    config.EvalConfig: run_eval,
    config.BenchConfig: run_bench,
    config.CompareConfig: run_compare,
    config.ExportConfig: run_export,
    config.PushConfig: run_push,
    config.DemoConfig: run_demo,
}
