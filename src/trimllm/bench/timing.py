"""How fast a model reads a prompt and decodes: greedy, one token at a time, with its key-value cache.

Steps are timed one by one. On CPU a clock does it; on CUDA events in the stream do, which wait for nothing, so the
percentiles cost no synchronization; on other devices every step is waited for.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from transformers import StaticCache

from trimllm.blocks import decoder, families
from trimllm.errors import InputError, one_line
from trimllm.evaluation import encoding


@dataclass(frozen=True)
class Pass:
    """One prompt read and some tokens decoded after it: seconds."""

    batch: int
    prompt: int
    first: float
    """from the prompt to the first new token"""
    steps: tuple[float, ...]
    """each further token"""

    @property
    def prefill(self) -> float:
        """Tokens of the prompt per second, over the batch."""
        return self.batch * self.prompt / self.first

    @property
    def decode(self) -> float:
        """Tokens decoded per second, over the batch."""
        return self.batch * len(self.steps) / sum(self.steps)


class Runner:
    """A model that decodes rows of a fixed length, with a growing cache or a static one, compiled or not.

    `once`: the prompt is read once, and every run decodes after it anew (a growing cache, cut back to the prompt; not
    for caches with a window or a state).
    """

    def __init__(
        self,
        model: Any,
        *,
        batch: int,
        prompt: int,
        new: int,
        cache: str = "dynamic",
        compiled: bool = False,
        once: bool = False,
    ) -> None:
        self.model, self.batch, self.prompt, self.new, self.once = model, batch, prompt, new, once
        self.ids = random_ids(model, batch, prompt + new)
        self.name, self.last = cache_argument(model), last_logits(model)
        self.static: Any = None
        self.read: Any = None
        self.step: Any = model
        if cache == "static":
            self.static = StaticCache(config=model.config, max_cache_len=prompt + new)
        if compiled:
            # As generate() does it: CUDA graphs where there are any, and only for the steps, whose shapes never change.
            self.step = torch.compile(model, mode="reduce-overhead" if model.device.type == "cuda" else None)

    def _prefill(self) -> Any:
        if self.read is not None:
            cache = self.read[self.name]
            if (more := cache.get_seq_length() - self.prompt) > 0:
                cache.crop(-more)
            return self.read
        given = {}
        if self.static is not None:
            self.static.reset()
            given = {self.name: self.static}
        out = self.model(input_ids=self.ids[:, : self.prompt], use_cache=True, **self.last, **given)
        self.read = out if self.once else None
        return out

    def _step(self, token: torch.Tensor, cache: Any) -> Any:
        if self.step is not self.model:  # importing torch's compiler for this takes seconds
            torch.compiler.cudagraph_mark_step_begin()
        return self.step(input_ids=token, use_cache=True, **({} if cache is None else {self.name: cache}))

    @torch.inference_mode()
    def run(self, *, limit: float = math.inf) -> Pass:
        """Read the prompt, then decode greedily for up to `limit` seconds, at least one token."""
        watch = _Clock(self.model.device)
        out = self._prefill()
        token = out.logits[:, -1:].argmax(-1)
        watch.mark()
        steps, started = 0, time.perf_counter()
        while steps < self.new and (steps == 0 or time.perf_counter() - started < limit):
            out = self._step(token, out.get(self.name))
            token = out.logits[:, -1:].argmax(-1)
            watch.mark()
            steps += 1
        first, *others = watch.seconds()
        return Pass(self.batch, self.prompt, first, tuple(others))

    @torch.inference_mode()
    def prompt_cache(self) -> Any:
        """The cache that the prompt leaves."""
        return self._prefill().get(self.name)

    @torch.inference_mode()
    def logits(self, steps: int = 3) -> torch.Tensor:
        """Logits of the tokens after the prompt when fixed ids are fed: (batch, steps, vocab), float32."""
        out, found = self._prefill(), []
        for place in range(self.prompt, self.prompt + min(steps, self.new)):
            out = self._step(self.ids[:, place : place + 1], out.get(self.name))
            found.append(out.logits[:, -1:].float())
        return torch.cat(found, dim=1)


def runner(model: Any, *, cache: str = "dynamic", compiled: bool = False, **sizes: Any) -> Runner:
    """A `Runner` of these `sizes` (batch, prompt, new, once) that gives the logits of the plain one, warmed up.

    Raises:
        InputError: in one line, if the model cannot decode so.
    """
    plain = Runner(model, **sizes)
    expected = plain.logits()
    if cache == "dynamic" and not compiled:
        return plain
    if families.family(decoder.text_config(model)).own_cache:
        raise InputError("--cache static: the model needs a cache of its own kind: use --cache dynamic")
    option, remedy = "--cache static", "use --cache dynamic"
    try:
        made = Runner(model, **sizes, cache=cache)
        found = made.logits()
        if compiled:
            _same(found, expected, model, option, remedy)
            option, remedy = "--compile", "leave it out"
            made = Runner(model, **sizes, cache=cache, compiled=True)
            made.logits()
            found = made.logits()
    except InputError:
        raise
    except Exception as error:
        said = shorten(one_line(error), width=160, placeholder=" ...")
        raise InputError(f"{option}: it failed with this model, here ({said}): {remedy}") from error
    _same(found, expected, model, option, remedy)
    return made


def _same(found: torch.Tensor, expected: torch.Tensor, model: Any, option: str, remedy: str) -> None:
    """Refuse a way of decoding that gives other logits; limits as for the checkpoints that `verification` compares."""
    difference, spread = float((found - expected).abs().max()), float(expected.std())
    if not difference <= spread * (1e-2 if model.dtype == torch.float32 else 0.5):
        raise InputError(f"{option}: the model's logits differ by {difference:.2g} from the plain ones: {remedy}")


class _Clock:
    """Stamps on a device's time line."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.stamps: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.stamps.append(event)
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self.stamps.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between every two stamps."""
        pairs = zip(self.stamps, self.stamps[1:], strict=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def random_ids(model: Any, batch: int, length: int) -> torch.Tensor:
    """The same random tokens every time: (batch, length)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


def cache_argument(model: Any) -> str:
    """The name of the cache in the model's forward pass and in its output."""
    return families.family(decoder.text_config(model)).cache_argument


def last_logits(model: Any) -> dict[str, int]:
    """What makes a prompt's forward pass compute the last logits only, as generate() does, where the model can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def decode_once(model: Any, *, batch: int = 1, prompt: int = 32, new: int = 64, limit: float = 10.0) -> float:
    """Tokens per second over up to `new` decode steps after a prompt of `prompt` tokens, for at most `limit` seconds.

    Both are less where the model's context is shorter.
    """
    context = encoding.context_length(model.config)
    prompt = min(prompt, max(1, context // 2))
    return Runner(model, batch=batch, prompt=prompt, new=min(new, context - prompt)).run(limit=limit).decode


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
