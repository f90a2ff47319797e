"""A guard on what choices do not show: whether the model still writes on, or says nothing, or the same again and again.

Greedy decoding goes on with the first halves of some calibration prompts, by the base and by the trimmed model; a small
base repeats itself too, so only a change counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trimllm.evaluation import encoding
from trimllm.evaluation.generation import generate
from trimllm.tasks.items import Item
from trimllm.tasks.metrics import WORD, repetition, words

PROMPTS, TOKENS, WORDS = 16, 48, 32
"""Prompts that are gone on with, tokens each, and words at most of a prompt."""
WORSE = {"repetition": 20.0, "silence": 50.0}
"""Percentage points above the base from which the model counts as collapsed."""

Fluency = dict[str, float]


def measure(model: Any, tokenizer: Any, items: Sequence[Item]) -> Fluency:
    """Percent of word 4-grams that occurred before in the same text, and of prompts after which nothing came."""
    beginnings = [replace(item, prompt=_beginning(item)) for item in items[:PROMPTS]]
    tokens = max(1, min(TOKENS, encoding.context_length(model.config) // 2))
    texts = [words(text) for text in generate(model, tokenizer, beginnings, max_new_tokens=tokens)]
    return {
        "repetition": 100 * sum(map(repetition, texts)) / len(texts),
        "silence": 100 * sum(not text for text in texts) / len(texts),
    }


def warning(base: Fluency, now: Fluency) -> str | None:
    """One line if the model collapsed since the base, else None."""
    worse = [name for name, limit in WORSE.items() if now[name] - base[name] > limit]
    if not worse:
        return None
    said = {"repetition": "repeats itself", "silence": "says nothing"}
    what = " and ".join(f"{said[name]} ({now[name]:.0f} %, the base {base[name]:.0f} %)" for name in worse)
    return (
        f"the trimmed model {what} where it writes freely, whatever its accuracy says: for open-ended use keep more "
        "layers, or mix in (more) domain text: --text, --text-ratio"
    )


def _beginning(item: Item) -> str:
    text = item.prompt or item.target
    ends = [word.end() for word in WORD.finditer(text)]
    return " ".join(text[: ends[max(1, min(WORDS, len(ends) // 2)) - 1] if ends else 0].split())
