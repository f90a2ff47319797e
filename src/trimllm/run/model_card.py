"""The model card (`README.md`) of what is written: where it comes from, what was cut, how good it is, how to load it.

The metadata block is that of `huggingface_hub.ModelCardData`, so that the Hub shows base, licence and accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from trimllm.blocks.layout import Layout, whole_layers
from trimllm.checkpoints import loading
from trimllm.checkpoints.origin import Origin
from trimllm.config import EMBEDDED, TrimConfig
from trimllm.importance.scores import deciding
from trimllm.offline import is_path
from trimllm.run import licences
from trimllm.run.account import above_line, depth_table, faster_line, percent
from trimllm.run.licences import Licence
from trimllm.run.outcome import Outcome
from trimllm.run.targets import LATE_SHARE
from trimllm.tasks.catalog import find_builtin
from trimllm.tasks.spec import is_accuracy

METRICS = {"acc": "accuracy", "acc_norm": "accuracy", "likelihood": "likelihood"}
"""The Hub's names of our metrics."""


def trimmed(run: Outcome) -> str:
    """The card of a run's result."""
    config, data, base, layout = run.config, run.data, run.origin, run.layout
    depth, test = run.base_depth, run.saved["test"]
    results = [evaluation(data.name, data.metric, test, config.task)]
    tests = f"{data.metric} {percent(test)} (n={test['n']})"
    cut = f"trimmed to {len(layout)} of {depth} layers" if len(layout) < depth else f"with all of its {depth} layers"
    terms = licences.licence(base)
    more = [above_line(run.above, depth)] if run.above else []
    more += [faster_line(run.speedup)] if run.speedup and len(layout) < depth else []
    further = f"\nThis checkpoint: {'; '.join(more)}.\n" if more else ""
    return f"""{_front(base, terms, results, name=f"{_short(base)}-{len(layout)}-layers", task=config.task)}
# {_short(base)}, {cut}

A stock {data.name} specialist, {tests}: {_made(run)}

{_origin(base, terms)}

## What was kept

It has {_kept(layout)}.

{_scores(config, run.stages, len(layout))}

## Accuracy on the way

```
{depth_table(run.history)}
```

The last row is this checkpoint, loaded again after it was saved; the others were measured on the way, in
training precision. `test` is the reported split ({data.metric}, with its standard error), which no decision was taken
on; `calibration` ({len(data.calibration)} rows held out of train) decided what was dropped.
{further}
{_how_to_load()}"""


def _made(run: Outcome) -> str:
    """How it was made, in sentences."""
    config, data, depth = run.config, run.data, len(run.layout)
    stages = [row for row in run.stages if row["depth"] >= depth]
    before = any(row["train"]["steps"] for row in stages if not row["dropped"])
    after = any(row["train"]["steps"] for row in stages if row["dropped"])
    if depth == run.base_depth:
        return f"{f'fine-tuned on `{data.name}`' if before else 'not trained'}, and no layer was dropped."
    how = f"TrimLLM, arXiv 2412.11242; strategy {config.strategy}, unit {config.unit}"
    dropped = f"layers were dropped{' at once' if config.one_shot else ''}"
    if not before and not after:
        return f"""{dropped} by what they are worth on `{data.name}`, and nothing was trained
({how})."""
    tuned = f"it was fine-tuned on `{data.name}`"
    if not after:
        made = f"{tuned}, then {dropped}, and nothing was trained since"
    elif not config.one_shot:
        made = f"{tuned} while {dropped}"
    else:
        made = f"{tuned}, {dropped}, and it was trained on" if before else f"{dropped}, then {tuned}"
    if after:
        how += f", sparse update {config.sparse_update}"
        how += "" if config.sparse_update == "off" else f" with r = {config.train_ratio}"
    return f"""{made}
({how}). Knowledge outside that domain is reduced."""


def cut(base: Origin, layout: Layout, depth: int) -> str:
    """The card of a checkpoint that lost layers of `depth`, and nothing else."""
    terms = licences.licence(base)
    return f"""{_front(base, terms, [], name=f"{_short(base)}-{len(layout)}-layers")}
# {_short(base)}, cut to {len(layout)} of {depth} layers

Layers were removed and nothing was trained since: expect worse answers than the base's until it is fine-tuned.

{_origin(base, terms)}

It has {_kept(layout)}.

{_how_to_load()}"""


def depth_of_run(config: TrimConfig, base: Origin, layout: Layout, stages: list[dict[str, Any]]) -> str:
    """The card of a depth that a run kept; `stages` are those journaled, down to that depth."""
    row = stages[-1]
    at = f" `{config.task}`: {row['calibration']['metric']} {row['calibration']['value']:.1f} +- "
    at += f"{row['calibration']['stderr']:.1f} on the {row['calibration']['n']} rows that decisions were taken on"
    if row["test"]:
        at += f", {row['test']['value']:.1f} +- {row['test']['stderr']:.1f} on the {row['test']['n']} reported ones"
    terms = licences.licence(base)
    return f"""{_front(base, terms, [], name=f"{_short(base)}-{len(layout)}-layers", task=config.task)}
# {_short(base)}, trimmed to {len(layout)} layers

One of the depths that a run (TrimLLM, arXiv 2412.11242) passed.{at} (measured in training precision).{_late(config)}

{_origin(base, terms)}

It has {_kept(layout)}.

{_scores(config, stages, len(layout))}

{_how_to_load()}"""


def _late(config: TrimConfig) -> str:
    """What the reader must know of depths on the way, where the last one has most of the training."""
    if config.schedule != "late":
        return ""
    return f"""
Behind a drop, depths on the way train for {1 - LATE_SHARE:.0%} of `--epochs-per-drop`, and the one at which the run
ends for all that is left (`--schedule late`): more training should help any other."""


def quantized(
    folder: Path, base: str, to: str, share: float, sizes: tuple[int, int], results: list[EvalResult], measured: str
) -> str:
    """The card of a quantized checkpoint: that of the checkpoint in `folder`, and what became of it.

    Results in the metadata are those of the quantized model only; the text of the old card says what it measured.
    """
    kind = "8-bit (LLM.int8())" if to == "int8" else "4-bit (NF4)"
    note = f"""
## Quantized

The linear layers hold {kind} weights, by bitsandbytes (`pip install bitsandbytes`): {share:.0%} of all weights;
embeddings, head and norms are in 16 bits. The weights take {sizes[1] / 1e6:.2f} MB instead of {sizes[0] / 1e6:.2f}.

{f"Measured on the quantized model: {measured}." if measured else "The quantized model's accuracy was not measured."}
What is said above was measured before.
"""
    path = folder / "README.md"
    if path.exists():
        card = licences.read_card(path)
        data, text = card.data, card.text
    else:
        origin = Origin(base)
        data, text = _data(origin, licences.licence(origin), []), f"# {_short(origin)}\n\n{_how_to_load()}"
    data.eval_results = results or None
    if results:
        data.model_name = data.model_name or Path(base).name
    data.tags = [*dict.fromkeys([*(data.tags or []), "bitsandbytes", to])]
    return f"---\n{data.to_yaml()}\n---\n{text.strip()}\n{note}"


def evaluation(task: str, metric: str, summary: dict[str, Any], source: str) -> EvalResult:
    """A measured accuracy as the Hub's metadata wants it. `source` is what `--task` names."""
    spec = find_builtin(source)
    hub = spec.source if spec is not None and spec.source is not None else None
    return EvalResult(
        task_type="text-generation",
        dataset_type=(hub.hub if hub is not None and hub.hub else task),
        dataset_name=task,
        dataset_config=hub.config if hub is not None else None,
        dataset_split="test",
        metric_type=METRICS[metric],
        metric_name=metric,
        metric_value=round(summary["value"], 3),
        metric_args={"standard_error": round(summary["stderr"], 3), "rows": summary["n"]},
    )


def _short(base: Origin) -> str:
    return Path(base.name).name


def _on_hub(name: str) -> bool:
    return not is_path(name) and (name.count("/") == 1 or (name != EMBEDDED and loading.on_disk(name) is not None))


def _data(
    base: Origin, terms: Licence, results: list[EvalResult], name: str | None = None, task: str | None = None
) -> ModelCardData:
    spec = find_builtin(task) if task else None
    hub = spec.source.hub if spec is not None and spec.source is not None else None
    more: dict[str, Any] = dict(terms.more)
    return ModelCardData(
        base_model=base.name if _on_hub(base.found_at) else None,
        license=terms.id,
        **more,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["trimllm", "layer-pruning"],
        datasets=[hub] if hub else None,
        metrics=["accuracy"] if any(result.metric_type == "accuracy" for result in results) else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _front(base: Origin, terms: Licence, results: list[EvalResult], *, name: str, task: str | None = None) -> str:
    return f"---\n{_data(base, terms, results, name, task).to_yaml()}\n---"


def _origin(base: Origin, terms: Licence) -> str:
    adapter = f", with the adapter `{base.adapter}` merged" if base.adapter else ""
    weights = [f"Base weights: SHA-256 {base.sha256}"] if base.sha256 else []
    return "  \n".join([f"Base: `{base.name}`{adapter}", *weights, terms.sentence])


def _kept(layout: Layout) -> str:
    kept = whole_layers(layout)
    return (f"layers {kept}" if kept else "re-packed pairs, listed in plan.json,") + " of the base, counted from 0"


def _scores(config: TrimConfig, stages: list[dict[str, Any]], depth: int) -> str:
    """What went down to `depth`, in order, with the score it went by; drops that a floor took back lie deeper."""
    drops = [drop for row in stages if row["depth"] >= depth for drop in row["dropped"]]
    if not drops:
        return "Nothing was dropped on the way there."
    asked = drops[0]["metric"]
    by = "importance, the score that decided, is 100 less the mean probability of the right choice"
    by = f"; {by}" if deciding(config.strategy) == "probability" and is_accuracy(asked) else ""
    lines = [
        f"What went, in this order; `{asked} without it` is that of the trial deletion, on the calibration rows{by}:",
        "",
        f"| dropped | {asked} without it | importance | why |",
        "|---|---|---|---|",
    ]
    for drop in drops:
        for unit, value, score, why in zip(
            *(drop[name] for name in ("units", "value", "importance", "why")), strict=True
        ):
            shown = "not tried" if value is None else f"{value:.1f}"
            lines.append(f"| {unit} | {shown} | {'-' if score is None else f'{score:.4g}'} | {why} |")
    return "\n".join(lines)


def _how_to_load() -> str:
    return """## How to load it

A stock checkpoint: no special code is needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY_OR_REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY_OR_REPOSITORY")
```
"""
