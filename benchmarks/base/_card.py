"""What is said of a lab base: its perplexities on text that it has not seen, and its model card."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _rows import ROW, SOURCES, token_rows
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trimllm.tasks.text import load_text

HELD_OUT = {"books": "text/books_valid.jsonl.xz", "Federal Reserve": "text/fed_valid.jsonl.xz"}
WIKITEXT = "text/wikitext2_test.txt"
WIKITEXT_TOKENS = 245_569
"""Words, `<unk>` and end of lines of the test set: what its published perplexities are per."""

CARD = """# Lab base of the trimllm benchmarks

A Llama of {blocks} blocks (hidden size {hidden}, {parameters:.1f} M parameters, bfloat16, context 512) to be trimmed in
`benchmarks/`: fine-tuned, it comes to about what linear classifiers do on real text, and a CPU can train it. It is no
use outside such comparisons.

- Data, by share of the tokens seen: public-domain books 1870-1928 {books:.0%}, Federal Reserve speeches and minutes
  (US government works) {fed:.0%}, country profiles (CC0) {factbook:.0%}, and the training splits, without labels, of
  MedQuAD {medquad:.0%}, CUAD {cuad:.0%} and BANKING77 {banking:.0%} (all CC BY 4.0).
- Tokenizer: byte-level BPE of its own, 4,096 pieces; EOS and padding are `<|endoftext|>`; no BOS.
- Training: {begun}seed {seed}, {steps:,} steps of {batch} rows of 256 tokens, {tokens:.1f} M tokens,
  {hours:.1f} hours on {device}{dtype}; Muon (matrices of the blocks, lr {muon_lr:g}) and AdamW (the rest, lr {lr:g});
  final loss {loss:.3f} nats a token.

| text | nats a token | perplexity a token | bits a character | perplexity a word |
|---|---|---|---|---|
{rows}

Rows of 256 tokens. WikiText-2 is the raw test set; its words are those of the set's own
count (245,569), so that the last column can be held against published figures.
"""


@torch.no_grad()
def mean_loss(model: Any, rows: np.ndarray) -> float:
    """Nats a token over rows of 256, the first of each row given."""
    total = 0.0
    for begin in range(0, len(rows), 8):
        batch = torch.tensor(rows[begin : begin + 8].astype(np.int64), device=model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (rows.shape[0] * (ROW - 1))


def perplexities(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> list[list[str]]:
    """Rows of the card's table: held-out text of two sources, and WikiText-2, of which nothing was seen."""
    model = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32).eval().to(args.device)
    texts = {name: load_text(args.data / path) for name, path in HELD_OUT.items()}
    texts["WikiText-2 test"] = load_text(args.data / WIKITEXT)
    table = []
    for name, pieces in texts.items():
        rows = token_rows(tokenizer, pieces if name == "WikiText-2 test" else pieces[:: max(1, len(pieces) // 100)])
        rows = rows[: args.rows]
        loss = mean_loss(model, rows)
        characters = sum(len(tokenizer.decode(row, skip_special_tokens=True)) for row in rows)
        figures = [f"{loss:.3f}", f"{math.exp(loss):.1f}", f"{loss * rows.size / characters / math.log(2):.3f}"]
        share = characters / sum(map(len, pieces))
        word = f"{math.exp(loss * rows.size / (WIKITEXT_TOKENS * share)):.0f}" if name.startswith("Wiki") else "-"
        table.append([name, *figures, word])
    return table


def write_card(figures: dict[str, Any], output: Path) -> None:
    """The model card from the figures of training and of the measured perplexities."""
    names = ("books", "fed", "factbook", "medquad", "cuad", "banking")
    shares = dict(zip(names, SOURCES.values(), strict=True))
    rows = "\n".join("| " + " | ".join(row) + " |" for row in figures["perplexity"])
    dtype = " in bfloat16" if figures["bf16"] else " in float32"
    seen = figures.get("seen", 0) * ROW / 1e6
    begun = f"{seen:.1f} M tokens until a learning rate of 0, then, with fresh optimizers,\n  " if seen else ""
    card = CARD.format(**figures, **shares, dtype=dtype, rows=rows, begun=begun)
    (output / "README.md").write_text(card, encoding="utf-8")
