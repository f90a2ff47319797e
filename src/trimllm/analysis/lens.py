"""What the layers of the intact model say and write: measurements that may explain what a scan found.

All are taken at the last token of the prompt, from which the answer is predicted, and give one number per unit (a
block, or one half of it) and question. The logit lens is what the model's own tail (final norm and head) reads from the
residual stream after a unit (nostalgebraist, "interpreting GPT: the logit lens", 2020). Promotion is what the tail
reads from what an MLP alone adds to the stream: Geva et al. (arXiv 2012.14913, 2203.14680) project the value vectors of
the key-value memory, here it is their weighted sum, the MLP's output. The third, causal tracing, is in `tracing`.

What a family does not allow is refused with a reason, after a check on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from trimllm.analysis import probes
from trimllm.blocks import decoder, families
from trimllm.blocks.layout import HALVES, Unit
from trimllm.errors import InputError
from trimllm.evaluation import forward
from trimllm.evaluation.batches import Batch, Batches, make_rows
from trimllm.evaluation.encoding import Encoded
from trimllm.evaluation.evaluate import Scorer
from trimllm.evaluation.judging import Evaluation
from trimllm.importance import activations
from trimllm.importance.scores import Array


def questions(scorer: Scorer) -> list[Encoded]:
    """The scorer's items that have a prompt, each with its right continuation only.

    Raises:
        InputError: if there are none.
    """
    asked = [one for one in scorer.encoded if scorer.items[one.item].prompt]
    if not asked:
        raise InputError("--analysis is of prompts and their answers, and the task's rows are plain text: leave it out")
    return [one.right_only() for one in asked]


def batches(model: Any, scorer: Scorer, asked: Sequence[Encoded]) -> Batches:
    """One row per question, in batches of the scorer's size."""
    made = make_rows(asked)
    return Batches(made, scorer.token_budget, pad_id=scorer.pad_id, dtype=model.dtype, device=model.device)


def answered(model: Any, scorer: Scorer, asked: Sequence[Encoded], base: Evaluation, most: int) -> list[Encoded]:
    """The first `most` questions that the model answers right.

    `base`, its evaluation on the scorer's items, says which; where there were no choices to compare, those whose answer
    is what greedy decoding gives.
    """
    if base.correct:
        return [one for one in asked if base.correct[one.item]][:most]
    made = batches(model, scorer, asked)
    parts = (made.compute(number, lambda batch: forward.batch_pieces(model, batch)) for number in range(len(made)))
    scores = forward.add_up(pieces for part in parts for pieces in part)
    return [one for one in asked if scores[one.item, 0][2]][:most]


def last_tokens(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat positions (rows,) of the last tokens of the prompts, and the first ids (rows,) after them; every row has
    one continuation."""
    lengths = batch.segment.bincount()
    begin = lengths.cumsum(0) - lengths
    return batch.where[begin], batch.targets[begin]


def per_question(
    made: Batches, work: Callable[[Batch], Array], progress: Callable[[int, int], None] | None = None
) -> Array:
    """What `work` gives for each batch, (..., rows), put together in ascending order of items: (..., questions)."""
    parts = []
    for number in range(len(made)):
        parts += made.compute(number, lambda batch: (work(batch), batch.owners))
        if progress:
            progress(number + 1, len(made))
    order = np.argsort([item for _, owners in parts for item, _ in owners])
    return np.concatenate([values for values, _ in parts], axis=-1)[..., order]


@torch.no_grad()
def logit_lens(model: Any, made: Batches, units: Sequence[Unit]) -> dict[str, Array]:
    """What the stream after each unit says of the answer's first token, (units, questions) each.

    `lens_probability`: percent; `lens_gain`: points more than before the unit; `lens_accuracy`: 100 where the token is
    the most likely one of the vocabulary, else 0.

    Raises:
        InputError: if the tail does not give the model's own logits for the state after its last block.
    """
    _check_tail(model, made.longest(), "logit lens")

    def work(batch: Batch) -> Array:
        at, tokens = last_tokens(batch)
        _, stream = activations.keeping_stream(model, batch, mids=any(unit.kind != "block" for unit in units))
        states = probes.states_at(stream, at)
        read = dict(zip(states, _read(model, list(states.values()), tokens), strict=True))
        ends = [(read[begin], read[end]) for begin, end in map(activations.ends, units)]
        rows = [torch.stack([after[0], after[0] - before[0], after[1]]) for before, after in ends]
        return 100 * torch.stack(rows, dim=1).cpu().double().numpy()

    return dict(zip(("lens_probability", "lens_gain", "lens_accuracy"), per_question(made, work), strict=True))


@torch.no_grad()
def promotion(model: Any, made: Batches, units: Sequence[Unit]) -> dict[str, Array]:
    """`promotion` (units, questions): how much what each unit writes promotes the answer's first token, in logits.

    The vector that the unit's MLP (an attention unit: the attention) adds to the stream goes alone through the tail;
    the token's logit less the mean logit over the vocabulary is taken. The final norm sets every vector to the same
    length, so it says where the MLP points, not how far.

    Raises:
        InputError: if the tail cannot be run alone, the family's MLPs cannot be told apart, or do not add to a stream.
    """
    text = decoder.text_config(model)
    if families.family(text).normed_residual:
        raise InputError(f"promotion: the layers of {text.model_type} norm the residual stream instead of adding to it")
    _check_tail(model, made.longest(), "promotion")

    def work(batch: Batch) -> Array:
        at, tokens = last_tokens(batch)
        read = _read(model, _written(model, batch, at, units), tokens)
        return torch.stack([one[2] for one in read]).cpu().double().numpy()

    return {"promotion": per_question(made, work)}


def _written(model: Any, batch: Batch, at: torch.Tensor, units: Sequence[Unit]) -> list[torch.Tensor]:
    """What each unit (of a block: its MLP) adds to the stream at the positions `at`: (rows, hidden) each.

    Where halves run one after the other it is the difference of the stream; in parallel blocks the MLP's output, if
    that and the attention's make up what the block adds.
    """
    parallel = {unit.index for unit in units if decoder.halves(model, unit.index) is None}
    names = {i: [probes.half_modules(model, half, i)[-1:] for half in HALVES] for i in parallel}
    modules = [(i, name) for i, both in names.items() for half in both for name in half]
    with probes.reading(model, modules, at) as outputs:
        states = probes.states_at(activations.keeping_stream(model, batch, mids=True)[1], at)
    found = []
    for unit in units:
        i = unit.index
        if i not in parallel:
            begin, end = (i, i + 0.5) if unit.kind == "attention" else (i + 0.5, i + 1)
            found.append(states[end] - states[begin])
            continue
        halves = [outputs[i, name] for half in names[i] for name in half]
        if len(halves) < 2 or not probes.agree(model, halves[0] + halves[1], states[i + 1] - states[i]):
            kind = model.config.model_type
            raise InputError(f"promotion: what the MLP of layer {i} adds is not known for model type {kind}")
        found.append(halves[1])
    return found


def _read(model: Any, several: Sequence[torch.Tensor], tokens: torch.Tensor) -> list[torch.Tensor]:
    """What the tail reads from each of several states (k, hidden) about `tokens` (k,): (3, k) probability, whether it
    is the most likely one, and logit less the mean over the vocabulary."""
    hidden = torch.cat([states.to(tokens.device) for states in several], dim=-2)
    count = forward.chunk(decoder.text_config(model).vocab_size)
    found = []
    for states, ids in zip(hidden.split(count, dim=-2), tokens.repeat(len(several)).split(count), strict=True):
        logits = probes.tail_logits(model, states).to(ids.device)
        chosen = logits.gather(1, ids[:, None])[:, 0]
        likely = logits.argmax(1) == ids
        found.append(torch.stack([(chosen - logits.logsumexp(1)).exp(), likely, chosen - logits.mean(1)]))
    return list(torch.cat(found, dim=1).split(len(tokens), dim=1))


def _check_tail(model: Any, batch: Batch, what: str) -> None:
    at, _ = last_tokens(batch)
    try:
        own = probes.at_places(model(**batch.inputs, use_cache=False).logits, at)
        stream = activations.keeping_stream(model, batch, mids=False)[1]
        read = probes.tail_logits(model, probes.at_places(stream[decoder.depth(model)], at))
        fits = probes.agree(model, read, own)
    except forward.UNFIT:
        fits = False
    if not fits:
        kind = model.config.model_type
        raise InputError(f"{what}: the tail of {kind} does not give its logits for the state after the last block")
