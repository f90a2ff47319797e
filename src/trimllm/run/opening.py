"""What a user is told when a run begins or goes on: what is there, and what is ahead."""

from __future__ import annotations

from typing import Any

from trimllm.checkpoints.models import Loaded
from trimllm.config import TrimConfig
from trimllm.importance import scan, scores
from trimllm.importance.select import BREAKS_TIES
from trimllm.run import account, sizes, targets
from trimllm.run.preparing import Prepared


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
        f"{len(data.test):,} reported; {account.KINDS[data.kind]}, metric {data.metric}"
    )
    said += [f"  {note}" for note in (*data.notes, *scorer_notes(ready))]
    said.append(account.device_line(config, accelerator))
    if ready.text_rows:
        said.append(account.text_line(config, ready.text_rows, ready.task_rows, ready.ahead))
    said.append(account.training_ahead(config, ready.ahead, ready.tokens_per_epoch))
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
