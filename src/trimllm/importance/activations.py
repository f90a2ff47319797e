"""The residual stream of the intact model, and what activations alone say of every candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from trimllm.blocks import decoder
from trimllm.blocks.layout import Unit
from trimllm.evaluation import forward
from trimllm.evaluation.batches import Batch
from trimllm.evaluation.forward import Pieces


def keeping_stream(model: Any, batch: Batch, *, mids: bool) -> tuple[Pieces, dict[float, torch.Tensor]]:
    """Scores of the intact model, and the residual stream: key i before block i, i + 0.5 amid it, n at the end."""
    stream: dict[float, torch.Tensor] = {}

    def keep(key: float) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream[key] = decoder.hidden_argument(args, kwargs)

        return hook

    def keep_output(_module: Any, _args: Any, output: Any) -> None:
        stream[depth] = decoder.hidden_of(output)

    depth = decoder.depth(model)
    with ExitStack() as hooks:
        for i, block in enumerate(decoder.blocks(model)):
            hooks.callback(block.register_forward_pre_hook(keep(i), with_kwargs=True).remove)
            middle = decoder.mid_block(model, i) if mids else None
            if middle is not None:
                hooks.callback(middle.register_forward_pre_hook(keep(i + 0.5), with_kwargs=True).remove)
        hooks.callback(decoder.blocks(model)[-1].register_forward_hook(keep_output).remove)
        return forward.batch_pieces(model, batch), stream


def ends(unit: Unit) -> tuple[float, float]:
    """Where the unit begins and ends in the residual stream (see `keeping_stream`)."""
    begin = {"block": 0.0, "attention": 0.0, "mlp": 0.5, "pair": 0.5}[unit.kind]
    length = {"block": float(unit.length), "pair": 1.0, "attention": 0.5, "mlp": 0.5}[unit.kind]
    return unit.index + begin, unit.index + begin + length


def sums(
    stream: dict[float, torch.Tensor], batch: Batch, candidates: Sequence[Unit], run: int
) -> dict[str, list[float]]:
    """Sums over the tokens of prompts and right continuations: norm of the stream after each unit, cosine over the
    unit, cosine over a run; and over right continuations: the angle over a run at the last input token, in half turns.
    """

    def at(key: float, chosen: torch.Tensor) -> torch.Tensor | None:
        hidden = stream.get(key)
        if hidden is None:
            return None
        if hidden.dim() == 4:
            # Streams: those of hyper-connections are one wide stream, the first of AltUp's is the main one.
            hidden = hidden.flatten(2) if hidden.shape[:2] == batch.real.shape else hidden[0]
        return hidden.reshape(-1, hidden.shape[-1])[chosen].float()

    def cosine(before: torch.Tensor | None, after: torch.Tensor | None) -> torch.Tensor:
        if before is None or after is None:
            return torch.tensor(math.nan)
        return torch.nn.functional.cosine_similarity(before, after, dim=-1)

    right = batch.right.flatten()
    found: dict[str, list[float]] = {"norm": [], "cosine": [], "run_cosine": [], "run_angle": []}
    for unit in candidates:
        begin, end = ends(unit)
        before, after = at(begin, right), at(end, right)
        angle = cosine(at(begin, batch.last), at(begin + run, batch.last)).clamp(-1, 1).arccos() / math.pi
        found["norm"].append(math.nan if after is None else float(after.norm(dim=-1).sum()))
        found["cosine"].append(float(cosine(before, after).sum()))
        found["run_cosine"].append(float(cosine(before, at(begin + run, right)).sum()))
        found["run_angle"].append(float(angle.sum()))
    return found
