"""Pre-train a lab base, a Llama of 20 blocks, on text that you name: what the comparison and the study trim.

One that was made so is in benchmarks/base/lab.

    python benchmarks/base/pretrain.py --output base --data DATA            # hours on a CPU, minutes on a GPU
    python benchmarks/base/pretrain.py --output base --data DATA            # the same after a kill: goes on
    python benchmarks/base/pretrain.py --output base --data DATA --card     # perplexities and the model card only
    torchrun --nproc-per-node 2 benchmarks/base/pretrain.py ...             # on two cores, each with half of the rows
    python benchmarks/base/pretrain.py --output longer --weights base --data DATA           # on from a finished base

`DATA` holds the files of `SOURCES` below (JSONL with a column `text`, also .xz). Every source is cut to rows of 256
tokens of whole documents one after the other; which source the next row comes from follows the shares, so that a
share is of the tokens seen. Only training splits are named: no reported question's text is ever seen, and no label.

The matrices of the blocks are trained with Muon, embeddings and norms with AdamW; after a plateau the learning rate
falls over the last part of `--steps`. Until it has begun to fall, `--steps` and `--decay` may be changed between two
starts; data, sizes, batch, rates and seed may not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import distributed
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimllm.config.shared import option_of
from trimllm.demo.steps import (
    fixed,
    lr_share,
    optimizers,
    read_state,
    save,
    settle,
    train_step,
    write_state,
)
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
HELD_OUT = {"books": "text/books_valid.jsonl.xz", "Federal Reserve": "text/fed_valid.jsonl.xz"}
WIKITEXT = "text/wikitext2_test.txt"
WIKITEXT_TOKENS = 245_569
"""Words, `<unk>` and end of lines of the test set: what its published perplexities are per."""

EOS = "<|endoftext|>"
VOCABULARY = 4096
ROW = 256
STATE = "state.pt"
FIGURES = "pretraining.json"
MADE_OF = "rows.json"

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


def place() -> tuple[int, int]:
    """Number of this process, and how many train together (torchrun)."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def say(line: str) -> None:
    """A line of the first process."""
    if place()[0] == 0:
        print(line, flush=True)


def build_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of a sample of every source."""
    rng = random.Random(0)
    texts = []
    for name in SOURCES:
        pieces = load_text(data / name)
        rng.shuffle(pieces)
        texts += pieces[: max(1, int(len(pieces) * min(1.0, 4_000_000 / sum(map(len, pieces)))))]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False, model_max_length=512
    )


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """The base with random weights, float32."""
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=2 * args.hidden,
            num_hidden_layers=args.blocks,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=args.hidden // 128,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64, do_sample=False
    )
    return model


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
        say(f"{name}: {found[-1].size / 1e6:.2f} M tokens")
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


FIXED = ("blocks", "hidden", "batch", "lr", "muon_lr", "seed", "bf16", "weights")
"""Options that stay what they were when the training goes on."""


def check_data(args: argparse.Namespace) -> None:
    """Whether rows and tokenizer in --output are of these files and this seed; noted there before they are made.

    Raises:
        InputError: if they are of others, or a file is not there.
    """
    path = args.output / MADE_OF
    if missing := next((name for name in SOURCES if not (args.data / name).is_file()), None):
        raise InputError(f"--data {args.data}: there is no {missing}: name the folder with the files of SOURCES")
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


def prepare(args: argparse.Namespace) -> None:
    """Settle what the training goes on from; put tokenizer and rows into --output where they are not there yet."""
    settle(args.output / STATE, args, FIXED, args.device)
    check_data(args)
    if not (args.output / "tokenizer.json").exists():
        made = PreTrainedTokenizerFast.from_pretrained(args.weights) if args.weights else build_tokenizer(args.data)
        made.save_pretrained(args.output)
    source_rows(PreTrainedTokenizerFast.from_pretrained(args.output), args)


def in_turn(work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Do `work` in the first process; what it settled in `args` holds for all."""
    rank, world = place()
    if rank == 0:
        work(args)
    if world > 1:
        box = [vars(args)]
        distributed.broadcast_object_list(box)
        vars(args).update(box[0])


def seen_rows(args: argparse.Namespace) -> int:
    """Rows that the base in --weights has been trained on, the first in the order of the seed.

    Raises:
        InputError: if it is not known, or the base has another seed, which orders rows, or other sizes.
    """
    if args.weights is None:
        return 0
    path = Path(args.weights) / FIGURES
    if not path.exists():
        raise InputError(f"--weights {args.weights}: there is no {path}: name the --output of a finished pre-training")
    figures = json.loads(path.read_text(encoding="utf-8"))
    for name in ("seed", "blocks", "hidden"):
        if (value := getattr(args, name)) != figures[name]:
            given, was = (option_of(name, one) for one in (value, figures[name]))
            raise InputError(f"{given}: the base in {args.weights} has {was}: give that")
    return int(figures["steps"] * figures["batch"] + figures.get("seen", 0))


def pretrain(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> dict[str, Any]:
    """Train (or go on training) and return what the card says of it."""
    model = build_model(tokenizer, args)
    if args.weights is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(args.weights, dtype=torch.float32).state_dict())
    model.to(args.device)
    if args.device == "cpu":
        model.set_attn_implementation("eager")  # of few rows of 256 tokens 1 to 1.2x as fast as SDPA, in bf16 1.3x
    trained = optimizers(model, args.lr, args.muon_lr, bf16=args.bf16)
    done, seconds, log = 0, 0.0, []
    path = args.output / STATE
    if path.exists():
        state = read_state(path, model, trained)
        done, seconds, log = state["step"], state["seconds"], state["log"]
        say(f"going on from step {done}")
    if done >= args.steps:
        raise InputError(
            f"--steps {args.steps}: the base in {args.output} has {done} already: give --card, or another --output"
        )
    sources = source_rows(tokenizer, args)
    plan = order([len(rows) for rows in sources], args.seen + args.steps * args.batch, args.seed)[args.seen :]
    rank, world = place()
    forward = torch.compile(model, dynamic=False) if args.compile else model

    def checkpoint() -> None:
        if rank:
            return
        write_state(path, model, trained, step=done, seconds=seconds, log=log, settings=fixed(args, FIXED))
        save(model.to("cpu"), tokenizer, args.output)
        model.to(args.device)

    model.train()
    losses, last_saved, first = [], time.time(), done
    began = time.time()
    while done < args.steps:
        start = time.time()
        chosen = plan[done * args.batch : (done + 1) * args.batch][rank::world]
        batch = torch.tensor(np.stack([sources[s][r] for s, r in chosen]).astype(np.int64), device=args.device)
        share = lr_share(done, args.steps, args.warmup, args.decay)
        losses.append(train_step(forward, trained, batch, share, bf16=args.bf16, micro_batch=args.micro_batch))
        done += 1
        seconds += time.time() - start
        if done % args.log_every == 0 or done == args.steps:
            log.append({"step": done, "loss": torch.stack(losses).mean().item()})
            pace = (time.time() - began) / (done - first)
            say(
                f"step {done} loss {log[-1]['loss']:.4f}, {args.batch * ROW / pace:.0f} tokens/s, "
                f"{seconds / 60:.1f} min, {(args.steps - done) * pace / 60:.1f} min left"
            )
            losses = []
        if time.time() - last_saved > args.save_minutes * 60 or done == args.steps:
            checkpoint()
            last_saved = time.time()
    return {
        "seed": args.seed,
        "steps": done,
        "batch": args.batch,
        "tokens": done * args.batch * ROW / 1e6,
        "hours": seconds / 3600,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{world * args.threads} CPU core(s)",
        "seen": args.seen,
        "bf16": args.bf16,
        "lr": args.lr,
        "muon_lr": args.muon_lr,
        "loss": log[-1]["loss"],
        "blocks": args.blocks,
        "hidden": args.hidden,
        "parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="model directory; also holds state.pt")
    parser.add_argument("--data", type=Path, required=True, help="folder with the files of SOURCES")
    parser.add_argument("--weights", help="a finished base to train on, from its weights and with its tokenizer")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 128")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="rows of 256 tokens a step")
    parser.add_argument(
        "--micro-batch", type=int, help="rows at a time through the model (default: 4 on a CPU, whose caches hold them)"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=4e-3, help="peak learning rate of Muon")
    parser.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    parser.add_argument("--decay", type=float, default=0.3, help="share of the steps over which the rate falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast and Muon (default: where it is fast)"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    parser.add_argument("--log-every", type=int, default=25, help="steps")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between checkpoints")
    parser.add_argument("--rows", type=int, default=400, help="rows of 256 tokens per perplexity")
    parser.add_argument("--card", action="store_true", help="only measure perplexities and write the card")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("gloo")
    rank, world = place()
    if args.batch % world:
        raise InputError(f"--batch {args.batch}: {world} processes cannot take as many rows each")
    args.seen = seen_rows(args)
    if args.micro_batch is None:
        args.micro_batch = 4 if args.device == "cpu" else args.batch
    path = args.output / FIGURES
    if args.card and not path.exists():
        raise InputError(f"--card: there is no {path}: name the --output of a finished pre-training")
    if not args.card:
        in_turn(prepare, args)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.output)
    figures = json.loads(path.read_text()) if args.card else pretrain(tokenizer, args)
    if rank:
        return
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    figures["perplexity"] = perplexities(tokenizer, args)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    write_card(figures, args.output)
    print((args.output / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from _sides import run

    run(main)
