"""What a lab base reads: its sources, its tokenizer, and the rows of tokens in the order of training."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from trimllm.demo.steps import byte_level_bpe
from trimllm.errors import InputError
from trimllm.files import write_json
from trimllm.tasks.text import load_text

SOURCES = {
    "text/books_train.jsonl.xz": 0.2,
    "text/fed_train.jsonl.xz": 0.2,
    "text/factbook.jsonl.xz": 0.1,
    "medical/medquad_qtype/train.jsonl": 0.3,
    "legal/cuad_clause_type/train.jsonl": 0.13,
    "finance/banking77/train.jsonl": 0.07,
}
"""File -> share of the tokens seen."""

VOCABULARY = 4096
ROW = 256
MADE_OF = "rows.json"


def check_data(args: argparse.Namespace) -> None:
    """Whether rows and tokenizer in --output are of these files and this seed; noted there before they are made.

    Raises:
        InputError: if they are of others, or a file is not there.
    """
    path = args.output / MADE_OF
    if missing := next((name for name in SOURCES if not (args.data / name).is_file()), None):
        raise InputError(
            f"--data {args.data}: there is no {missing}: name the folder with the files of SOURCES (_rows.py)"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {"seed": args.seed}
    made |= {name: hashlib.sha256((args.data / name).read_bytes()).hexdigest() for name in SOURCES}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else made
    if other := next((name for name in made if made[name] != before.get(name)), None):
        raise InputError(
            f"--data {args.data} --seed {args.seed}: the rows in {args.output} are of another {other}: "
            "give those that it was begun with, or another --output"
        )
    write_json(path, made)


def build_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of a sample of every source."""
    rng = random.Random(0)
    texts = []
    for name in SOURCES:
        pieces = load_text(data / name)
        rng.shuffle(pieces)
        texts += pieces[: max(1, int(len(pieces) * min(1.0, 4_000_000 / sum(map(len, pieces)))))]
    return byte_level_bpe(texts, VOCABULARY)


def token_rows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Documents, each closed by EOS, one after the other: token ids `(rows, 256)`; what is left of a row is not."""
    ids: list[int] = []
    for begin in range(0, len(texts), 1000):
        for document in tokenizer(texts[begin : begin + 1000], verbose=False)["input_ids"]:
            ids += [*document, tokenizer.eos_token_id]
    rows = len(ids) // ROW
    return np.array(ids[: rows * ROW], dtype=np.uint16).reshape(rows, ROW)


def source_rows(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> list[np.ndarray]:
    """The rows of every source, kept in the output folder between two starts."""
    found = []
    for number, name in enumerate(SOURCES):
        path = args.output / f"rows-{number}.npy"
        if not path.exists():
            pieces = load_text(args.data / name)
            random.Random(f"{args.seed}:{name}").shuffle(pieces)
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as stream:
                np.save(stream, token_rows(tokenizer, pieces))
            temporary.replace(path)
        found.append(np.load(path))
    return found


def order(sizes: list[int], rows: int, seed: int) -> list[tuple[int, int]]:
    """(source, row) of the first `rows` rows of training: sources by their shares, rows anew shuffled in every pass."""
    shares = list(SOURCES.values())
    taken = [0] * len(sizes)
    passes: list[np.ndarray] = [np.empty(0, dtype=np.int64) for _ in sizes]
    out = []
    for done in range(rows):
        source = max(range(len(sizes)), key=lambda each: shares[each] * (done + 1) - taken[each])
        number, place = divmod(taken[source], sizes[source])
        if place == 0:
            passes[source] = np.random.default_rng([seed, source, number]).permutation(sizes[source])
        out.append((source, int(passes[source][place])))
        taken[source] += 1
    return out
