"""`trimllm eval`: how good a model is on a task, and how far it is from another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trimllm import config, files, memory, tasks
from trimllm.checkpoints import folders, loading, models
from trimllm.commands import shared
from trimllm.console import Console
from trimllm.errors import InputError
from trimllm.evaluation import encoding, inputs, paired
from trimllm.evaluation.evaluate import Scorer
from trimllm.evaluation.generation import cut_note, generate
from trimllm.evaluation.judging import Evaluation
from trimllm.run import used_rows
from trimllm.tasks import metrics
from trimllm.tasks.spec import is_accuracy


def run(command: config.EvalConfig) -> None:
    """One model, one task, the reported split."""
    if command.output and Path(command.output).is_dir():
        raise InputError(f"--output {command.output}: this is a directory: name a JSON file")
    if command.output:
        _check_result(Path(command.output))
        folders.check_writable(Path(command.output).parent)
    inputs.check_task(command)
    if command.against:
        _check_against(command)
    loaded, data, scorer = _asked(command)
    evaluation = scorer.evaluate(loaded.model, data.metric)
    record: dict[str, Any] = {"model": command.model, "task": data.name, **evaluation.summary()}
    _tell(command.output, record, f"{data.name}: {evaluation_line(evaluation)}")
    if command.generate:
        record["generation"], told = _generation(command, loaded, data)
        _tell(command.output, record, told)
    if command.against:
        del loaded
        memory.release()
        other, theirs, record["against"], told = _against(command, data, scorer, evaluation)
        _tell(command.output, record, told)
        if command.generate:
            record["against"]["generation"], told = _generation(command, other, theirs)
            _tell(command.output, record, f"against {command.against}: {told}")


def _asked(
    command: config.EvalConfig, earlier: tasks.TaskData | None = None
) -> tuple[models.Loaded, tasks.TaskData, Scorer]:
    """The model, what it is asked, and that as it reads it; what was said of the `earlier` data is not said again."""
    loaded = shared.load(command, evaluating=True)
    data = inputs.task_data(command, loaded.tokenizer, reported_only=True)
    if command.generate and data.kind != "generation":
        raise InputError(f"--generate needs a generation task, and {data.name} is of kind {data.kind}: leave it out")
    console = Console()
    if command.generate:
        asked = loaded.model, loaded.tokenizer, data.test, command.max_new_tokens, command.max_length
        if note := cut_note(*asked, truncate=command.truncate):
            console.say(f"  {note}")
    scorer = inputs.scorer(command, loaded.model, loaded.tokenizer, data.test)
    notes = [note for note in data.notes if earlier is None or note not in earlier.notes]
    for note in (*notes, *encoding.row_notes(reported=scorer.encoded), *filter(None, [scorer.note])):
        console.say(f"  {note}")
    for warning in used_rows.warnings(command.model, data, command.seed):
        console.warn(warning)
    return loaded, data, scorer


def _check_against(command: config.EvalConfig) -> None:
    """Refuse another model that is not there, or has no weights or tokenizer, before the first one is asked."""
    path = loading.path_of(str(command.against))
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
) -> tuple[models.Loaded, tasks.TaskData, dict[str, Any], str]:
    """Ask the other model the same: it and what it is asked, what is known of the difference, and how that is told.

    Raises:
        InputError: if it is asked other rows, or divides what is to be likely into other tokens.
    """
    other = command.model_copy(update={"model": command.against})
    with _of_against(command):
        loaded, theirs, own = _asked(other, data)
        if [item.place for item in theirs.test] != [item.place for item in data.test]:
            raise InputError(
                "its chat template makes other rows alike, so that others are drawn for the reported split: give the "
                "task a test file of its own, or leave --against out"
            )
        if not is_accuracy(data.metric) and _targets(own) != _targets(scorer):
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
    apart = f"difference: {paired.shown(above)} points (paired)"
    if paired.unanimous(above):
        apart = "every item scores the same"
    told = f"against {command.against}: {evaluation_line(found)}\n{apart}"
    return loaded, theirs, {"model": command.against, **found.summary(), "above": above}, told


def _targets(scorer: Scorer) -> dict[int, tuple[int, ...]]:
    """Per item, the tokens whose likelihood is asked for, in however many pieces."""
    found: dict[int, tuple[int, ...]] = {}
    for row in scorer.encoded:
        found[row.item] = found.get(row.item, ()) + row.target
    return found


def _tell(output: str | None, record: dict[str, Any], line: str) -> None:
    """Write what is known by now, and print what is new in it: each also where the other cannot be done."""
    try:
        if output:
            files.write_json(Path(output), record)
    finally:
        print(line)


def _check_result(path: Path) -> None:
    """Refuse to replace a file that is not the result of an earlier evaluation."""
    if not path.exists():
        return
    with suppress(OSError, ValueError):
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(earlier, dict) and {"model", "task", "metric", "perplexity"} <= earlier.keys():
            return
    raise InputError(f"--output {path}: the file exists, and is no earlier result: choose another one")


def evaluation_line(evaluation: Evaluation) -> str:
    """Everything that was measured, in one line."""
    named = {"acc": evaluation.acc, "acc_norm": evaluation.acc_norm, "greedy match": evaluation.greedy}
    others = [f"{name} {value:.1f}" for name, value in named.items() if value is not None and name != evaluation.metric]
    losses = [f"loss {evaluation.loss:.4f}", f"perplexity {evaluation.perplexity:.3f}"]
    value = f"{evaluation.metric} {evaluation.value:.1f} +- {evaluation.stderr:.1f} (n={evaluation.n})"
    return ", ".join([value, *others, *losses])


def _generation(
    command: config.EvalConfig, loaded: models.Loaded, data: tasks.TaskData
) -> tuple[dict[str, float], str]:
    """Percentages over the reported split, and how they are told: exact match, ROUGE-L against the best reference,
    repeated word 4-grams."""
    answers = generate(
        *(loaded.model, loaded.tokenizer, data.test),
        max_new_tokens=command.max_new_tokens,
        max_length=command.max_length,
        token_budget=command.eval_batch_size,
    )
    pairs = [(answer, item.references) for answer, item in zip(answers, data.test, strict=True)]
    exact = [metrics.exact_match(answer, references) for answer, references in pairs]
    rouge = [metrics.rouge_l(answer, references) for answer, references in pairs]
    repeated = [metrics.repetition(metrics.words(answer)) for answer in answers]
    columns = {"exact_match": exact, "rouge_l": rouge, "repetition": repeated}
    found = {name: 100 * sum(map(float, values)) / len(values) for name, values in columns.items()}
    return found, "generated: " + ", ".join(f"{name} {value:.1f}" for name, value in found.items())
