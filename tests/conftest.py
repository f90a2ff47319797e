"""Shared by the tests: a tokenizer of 64 ids for the tiny models of `tiny.py`, and items in its alphabet.

torch is imported when it is needed: the process that hands tests to others begins without.
"""

from __future__ import annotations

import gc
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trimllm.tasks.items import Item

gc.disable()  # until all tests are collected (with several workers, their controller collects none, and has little)
TEXT = "the cat sat on the mat. a dog ran to the cat; the man had no hat? yes or no: maybe yes."


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is asked of every family comes first, a family after the other, so that few workers import its code."""
    count = Counter(item.nodeid.partition("[")[0] for item in items)
    place: dict[str, int] = {}
    rank = {}
    for item in items:
        test, _, case = item.nodeid.partition("[")
        rank[item] = place.setdefault(case, len(place)) if count[test] > 80 else len(items)
    items.sort(key=rank.__getitem__)


def pytest_collection_finish() -> None:
    """Spare every garbage collection what importing and collecting made: a tenth of the tests' time."""
    gc.freeze()
    gc.enable()


def make_tokenizer(template: str = "$A") -> Any:
    """Byte-level BPE of at most 64 ids, with the special ids of `tiny.py`; `template` says what surrounds a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = ["Ġ" if letter == " " else letter for letter in "abcdefghijklmnopqrstuvwxyz .;:?"]
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator([TEXT], trainer)
    ids = [(token, number) for number, token in enumerate(special)]
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, though the tests may run where it is ignored, as in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW divides by the gradient's size: where that is rounding noise, so is the step, unless eps is large."""
    import torch

    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=0.1))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of `helpers_run.DEPTH` blocks."""
    import helpers_run as h

    return h.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rows that such a model can be asked."""
    import helpers_run as h

    return h.save_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes time in a run, and what is not looked at, is left out (see `helpers_run.fast`)."""
    import helpers_run as h

    h.fast(monkeypatch)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def questions() -> list[Item]:
    """Choices of different lengths, one of a single token, duplicates, and prompts of different lengths."""
    rows = [
        ("the cat sat on", (" the mat", " a dog", " no", " yes or maybe")),
        ("a dog", (" ran to the hat", " ran", " ran to the hat")),
        ("the man had no hat? question: yes or no:", (" yes", " no")),
        ("q:", (" mat mat mat", " cat")),
        ("the dog had the cat and the mat:", (" qzx", " so it was", " the", " a cat", " on")),
        ("no", (" a", " the man")),
    ]
    return [
        Item(f"rows:{n}", prompt, choices, n % len(choices), tuple(len(choice) - 1 for choice in choices))
        for n, (prompt, choices) in enumerate(rows, start=1)
    ]


@pytest.fixture(scope="session")
def targets() -> list[Item]:
    """Generation items: one target each."""
    rows = [("say:", " the cat"), ("the cat sat on", " a mat. yes"), ("no hat?", " no"), ("a", " dog ran to the man")]
    return [Item(f"rows:{n}", prompt, (target,)) for n, (prompt, target) in enumerate(rows, start=1)]
