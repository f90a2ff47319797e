"""Causal tracing: how much of an answer comes back when one unit of a model that reads a blurred question is as it was.

Source: ROME (arXiv 2202.05262), section 2. There the tokens of a known subject are corrupted; here, where tasks name no
subject, it is all tokens of the question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from trimllm.analysis import probes
from trimllm.analysis.lens import last_tokens, per_question
from trimllm.blocks import decoder, families
from trimllm.blocks.layout import Unit
from trimllm.errors import InputError
from trimllm.evaluation.batches import Batch, Batches
from trimllm.evaluation.encoding import Encoded
from trimllm.evaluation.forward import Pieces
from trimllm.importance import activations
from trimllm.importance.scores import Array

NOISE = 3.0
"""Standard deviations of the embeddings in the noise, as in ROME."""
SAMPLES = 3
"""Draws of the noise per question."""


def spans(asked: Sequence[Encoded]) -> dict[int, range]:
    """Per item, the positions of its question's own tokens: those between what all prompts begin and end with.

    That is what a task's template leaves. A prompt that has nothing of its own is taken whole.
    """
    prompts = [one.prompt for one in asked]
    head, tail = _common(prompts), _common([prompt[::-1] for prompt in prompts])
    own = {one.item: range(head, len(one.prompt) - tail) for one in asked}
    return {one.item: own[one.item] or range(len(one.prompt)) for one in asked}


def _common(prompts: Sequence[Sequence[int]]) -> int:
    shortest = min(map(len, prompts))
    return next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest)


@torch.no_grad()
def trace(
    model: Any,
    made: Batches,
    own: Mapping[int, range],
    units: Sequence[Unit],
    *,
    seed: int = 0,
    noise: float = NOISE,
    samples: int = SAMPLES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Array]:
    """Indirect effects of the units, (units, questions) each, in points of the answer's probability.

    The probability of an answer, in percent, is the geometric mean over its tokens. `clean` (questions,) is the
    model's; `corrupted` (questions,) that with Gaussian noise of `noise` standard deviations on the embeddings of the
    question's tokens `own` (see `spans`), the mean over `samples` seeded draws. An effect is by how much it is higher
    than corrupted when, at the last token of the prompt alone,

    - `tracing_state` (blocks only): the residual stream after the block is that of the clean run;
    - `tracing_output`: what the unit adds to the stream is what it adds in the clean run. (ROME restores the outputs of
      ten MLPs or attentions at once, here it is one.) Not where blocks norm the stream instead of adding to it.

    Raises:
        InputError: if blocks see the tokens past the embeddings, or the output of a half cannot be set alone.
    """
    row = families.family(decoder.text_config(model))
    kind = model.config.model_type
    if any(decoder.text_decoder(model)._modules.get(name) is not None for name in row.per_layer_weights):
        raise InputError(f"causal tracing: the blocks of {kind} also see the tokens by embeddings of their own")
    modes = ["tracing_state", "tracing_output"] if units[0].kind == "block" else ["tracing_output"]
    modes = modes[:1] if row.normed_residual else modes
    mids = units[0].kind != "block"
    deviation = noise * _deviation(model, made, own)
    modules = {
        unit: [(unit.index, name) for name in probes.half_modules(model, unit.kind, unit.index)] if mids else []
        for unit in units
    }

    def work(batch: Batch) -> Array:
        at, _ = last_tokens(batch)
        with probes.reading(model, [module for each in modules.values() for module in each], at) as outputs:
            pieces, stream = activations.keeping_stream(model, batch, mids=mids)
        clean, states = _probability(pieces, batch), probes.states_at(stream, at)
        corrupted, effects = [], []
        for sample in range(samples):
            with _noisy(model, batch, own, deviation, seed, sample):
                pieces, stream = activations.keeping_stream(model, batch, mids=mids)
                broken = probes.states_at(stream, at)
                restored = []
                for mode, unit in ((mode, unit) for mode in modes for unit in units):
                    begin, end = activations.ends(unit)
                    wanted = states[end] if mode == "tracing_state" else broken[begin] + states[end] - states[begin]
                    values = {module: outputs[module] for module in modules[unit]} or {(unit.index, ""): wanted}
                    with probes.writing(model, values, at):
                        mended, stream = activations.keeping_stream(model, batch, mids=mids)
                    if not probes.agree(model, probes.at_places(stream[end], at), wanted):
                        raise InputError(f"causal tracing: what the {unit} of {kind} adds cannot be set alone")
                    restored.append(_probability(mended, batch))
            corrupted.append(_probability(pieces, batch))
            effects.append(np.stack(restored) - corrupted[-1])
        return np.concatenate([np.stack([clean, np.mean(corrupted, axis=0)]), np.mean(effects, axis=0)])

    clean, corrupted, *rows = per_question(made, work, progress)
    effects = np.reshape(rows, (len(modes), len(units), -1))
    return {"clean": clean, "corrupted": corrupted, **dict(zip(modes, effects, strict=True))}


def _probability(pieces: Pieces, batch: Batch) -> Array:
    """(rows,) geometric mean probability of the answers' tokens, in percent."""
    return np.array([100 * np.exp(loglik / tokens) for loglik, tokens, _ in map(pieces.__getitem__, batch.owners)])


def _deviation(model: Any, made: Batches, own: Mapping[int, range]) -> float:
    """Standard deviation of all entries of the embeddings of the questions' tokens."""
    count, total, squares = 0, 0.0, 0.0
    for number in range(len(made)):
        batch = made[number]
        embedded = model.get_input_embeddings()(batch.inputs["input_ids"]).cpu().double()  # devices may lack float64
        for row, (item, _) in enumerate(batch.owners):
            values = embedded[row, own[item].start : own[item].stop]
            count += values.numel()
            total += float(values.sum())
            squares += float((values**2).sum())
    return float(np.sqrt(max(0.0, squares / count - (total / count) ** 2)))


@contextmanager
def _noisy(
    model: Any, batch: Batch, own: Mapping[int, range], deviation: float, seed: int, sample: int
) -> Iterator[None]:
    """Within, the questions' tokens have noise on their embeddings, the same in whatever batch a question stands."""

    def blur(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        noise = np.zeros(output.shape, np.float32)
        for row, (item, _) in enumerate(batch.owners):
            draw = np.random.default_rng([seed % 2**32, item, sample]).standard_normal(
                (len(own[item]), output.shape[-1])
            )
            noise[row, own[item].start : own[item].stop] = deviation * draw
        return output + torch.from_numpy(noise).to(output)

    handle = model.get_input_embeddings().register_forward_hook(blur)
    try:
        yield
    finally:
        handle.remove()
