"""The end of a run: the result saved and verified, and what is written and said of it."""

from __future__ import annotations

from typing import Any

from trimllm import files
from trimllm.blocks.layout import Layout, plan_record
from trimllm.checkpoints import export
from trimllm.checkpoints.origin import Origin
from trimllm.checkpoints.verification import Report
from trimllm.console import Console
from trimllm.run import account, licences, model_card
from trimllm.run.outcome import Outcome
from trimllm.run.preparing import Prepared
from trimllm.run.rundir import RunDir


def save(run: RunDir, ready: Prepared, model: Any, layout: Layout, origin: Origin) -> Report:
    """Save the result, verified, and its plan; `origin` is the base with its SHA-256."""
    named = ready.origin.record()
    report = export.save_trimmed(
        model,
        run.model,
        tokenizer=ready.tokenizer,
        layout=layout,
        base=named,
        companions=licences.terms(origin),
        overwrite=True,
    )
    assert report is not None  # nothing is saved unverified
    files.write_json(run.plan, plan_record(layout, named) | {"sha256": origin.sha256})
    return report


def conclude(run: RunDir, outcome: Outcome, console: Console) -> None:
    """Write the model card and result.json, and tell the user how it ended."""
    files.write_atomic(run.model / "README.md", model_card.trimmed(outcome))
    files.write_json(run.result, account.result(outcome))
    for line in account.at_the_end(outcome):
        console.warn(line)
    depth, reached = len(outcome.layout), f"{outcome.data.metric} {account.percent(outcome.saved['test'])}"
    console.say(f"saved {run.model}: {depth} of {outcome.base_depth} layers, {reached}, reloaded and compared")
    if outcome.above:
        console.say(f"  {account.above_line(outcome.above, outcome.base_depth)}")
    if outcome.speedup and depth < outcome.base_depth:
        console.say(f"  {account.faster_line(outcome.speedup)}")
