"""What a stage trains on: token rows of the task and of domain text, and the optimizer steps that they are dealt to."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

from trimllm.config import CompareConfig, TrainSettings, TrimConfig
from trimllm.errors import InputError
from trimllm.evaluation import encoding
from trimllm.tasks import load_text
from trimllm.tasks.items import Item
from trimllm.training.packing import Example

Trained = TrimConfig | CompareConfig
"""What is trained on, and how."""

SMALLEST = 16
"""The smallest piece of a text row that is trained on is its length by this."""


def examples(
    settings: Trained, tokenizer: Any, model_config: Any, items: Sequence[Item], text_length: int
) -> tuple[list[Example], list[Example]]:
    """The rows of a task's items, and those of --text, which have `text_length` tokens or the context's.

    Raises:
        InputError: if there is nothing to train on, or a row does not fit the context or the model's vocabulary.
    """
    longest = encoding.context_length(model_config, settings.max_length)
    rows = task_examples(tokenizer, items, longest, truncate=settings.truncate)
    if not rows:
        raise InputError("there are no training rows left after the calibration set was held out: give more rows")
    texts = load_text(settings.text) if settings.text else []
    text_rows = text_examples(tokenizer, texts, min(longest, text_length))
    if settings.text and not text_rows:
        raise InputError(f"--text {settings.text}: there is no text of two tokens in it: give more, or leave it out")
    known = encoding.vocabulary_of(model_config)
    encoding.check_vocabulary(tokenizer, (row.ids for row in (*rows, *text_rows)), known)
    return rows, text_rows


def task_examples(tokenizer: Any, items: Sequence[Item], max_length: int, *, truncate: bool = False) -> list[Example]:
    """Prompt + target + EOS of every item, tokenized as evaluation does; only target and EOS are learnt.

    A target whose end was cut off has no EOS.

    Raises:
        InputError: if a row does not fit the context (see `encoding.encode`).
    """
    eos = tokenizer.eos_token_id
    ending = () if eos is None else (eos,)
    right = [item.right_only() for item in items]
    made = []
    for one in encoding.encode(tokenizer, right, max_length, truncate=truncate, room=len(ending)):
        tail = ending if items[one.item].prompt and not one.answer_cut else ()
        ids = (*one.prompt, *one.target, *tail)
        made.append(Example(ids, len(one.prompt), one.prompt_cut, one.answer_cut))
    return made


def text_examples(tokenizer: Any, texts: Sequence[str], length: int) -> list[Example]:
    """Documents, each closed by EOS, packed one after the other into rows of `length` tokens; all are learnt."""
    eos = tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if eos is not None:
            stream.append(eos)
    rows = [tuple(stream[begin : begin + length]) for begin in range(0, len(stream), length)]
    return [Example(row, 1) for row in rows if len(row) > 1]


def steps(
    task: Sequence[Example], text: Sequence[Example], settings: TrainSettings, epochs: float, seed: int
) -> list[list[Example]]:
    """The optimizer steps of a stage: batches of task rows and of text rows in random order, never both in one.

    Text rows take `text_ratio` times the tokens of the task rows: of the last one of an epoch, or of a part of one, a
    random piece is taken (or nothing, if less than a sixteenth of it is wanted). Each is used again only when all were
    used.
    """
    rng = random.Random(f"stage:{seed}")
    text_rows = _endless(text, rng)
    out: list[list[Example]] = []
    whole = [1.0] * int(epochs) + ([epochs % 1] if epochs % 1 > 1e-9 else [])
    for share in whole:
        rows = rng.sample(list(task), max(1, round(share * len(task))))
        wanted = round(settings.text_ratio * sum(len(row.ids) for row in rows)) if text else 0
        drawn: list[Example] = []
        while wanted > 1:
            ids = next(text_rows).ids
            if drawn and wanted < len(ids) // SMALLEST:  # hardly anything, in a step of its own
                break
            begin = rng.randrange(max(0, len(ids) - wanted) + 1)
            drawn.append(Example(ids[begin : begin + wanted], 1))
            wanted -= len(drawn[-1].ids)
        batches = [*_batches(rows, settings.batch_size, rng), *_batches(drawn, settings.batch_size, rng)]
        rng.shuffle(batches)
        out += batches
    return out


def digest(rows: Sequence[Example]) -> str:
    """SHA-256 of the rows' tokens, in order."""
    made = hashlib.sha256()
    for row in rows:
        made.update(repr(row.ids).encode())
    return made.hexdigest()


def _endless(rows: Sequence[Example], rng: random.Random) -> Iterator[Example]:
    while rows:
        yield from rng.sample(list(rows), len(rows))


def _batches(rows: Sequence[Example], budget: int, rng: random.Random) -> list[list[Example]]:
    """Rows of similar length together (sorted within random pools of about 16 batches), padding counted."""
    out = []
    average = max(1, sum(len(row.ids) for row in rows) // max(1, len(rows)))
    size = max(1, 16 * budget // average)
    order = rng.sample(list(rows), len(rows))
    pools = [sorted(order[begin : begin + size], key=lambda row: -len(row.ids)) for begin in range(0, len(order), size)]
    for pool in pools:
        while pool:
            rows_here = max(1, budget // len(pool[0].ids))
            out.append(pool[:rows_here])
            pool = pool[rows_here:]
    return out
