"""How fast a model decodes: greedy, one token at a time, with its key-value cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from trimllm import decoder, encoding, families


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def decode_once(model: Any, *, batch: int = 1, prompt: int = 32, new: int = 64, limit: float = 10.0) -> float:
    """Tokens per second over up to `new` decode steps behind a prompt of `prompt` tokens, for at most `limit` seconds.

    Both are less where the model's context is shorter.
    """
    context = encoding.context_length(model.config)
    prompt = min(prompt, max(1, context // 2))
    new = min(new, context - prompt)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, prompt), generator=generator).to(model.device)
    cached = families.family(decoder.text_config(model)).cache_argument
    out = model(input_ids=ids, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    _synchronize(model.device)
    started, steps = time.perf_counter(), 0
    while steps < new and (steps == 0 or time.perf_counter() - started < limit):
        out = model(input_ids=token, use_cache=True, **({cached: out[cached]} if out.get(cached) is not None else {}))
        token = out.logits[:, -1:].argmax(-1)
        steps += 1
    _synchronize(model.device)
    return batch * steps / (time.perf_counter() - started)


def decode_speed(models: Mapping[str, Any], *, repeats: int = 5, **settings: int) -> dict[str, list[float]]:
    """Tokens per second of several models, measured in turn `repeats` times after one warm-up each."""
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(repeats + 1):
        for name, model in models.items():
            model.eval()
            speed = decode_once(model, **settings)
            if round_:
                speeds[name].append(speed)
    return speeds


def ratio(speeds: Mapping[str, list[float]], ours: str, other: str) -> tuple[float, float, float]:
    """Median, least and largest of the round-by-round ratios ours / other."""
    ratios = [a / b for a, b in zip(speeds[ours], speeds[other], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)
