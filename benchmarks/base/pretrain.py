"""Pre-train a lab base, a Llama of 20 blocks, on text that you name: what the comparison and the study trim.

One that was made so is in benchmarks/base/lab.

    python benchmarks/base/pretrain.py --output base --data DATA            # hours on a CPU, minutes on a GPU
    python benchmarks/base/pretrain.py --output base --data DATA            # the same after a kill: goes on
    python benchmarks/base/pretrain.py --output base --data DATA --card     # perplexities and the model card only
    torchrun --nproc-per-node 2 benchmarks/base/pretrain.py ...             # on two cores, each with half of the rows
    python benchmarks/base/pretrain.py --output longer --weights base --data DATA           # on from a finished base

`DATA` holds the files of `SOURCES` in _rows.py (JSONL with a column `text`, also .xz). Every source is cut to rows of
256 tokens of whole documents one after the other; which source the next row comes from follows the shares, so that a
share is of the tokens seen. Only training splits are named: no reported question's text is ever seen, and no label.

The matrices of the blocks are trained with Muon, embeddings and norms with AdamW; after a plateau the learning rate
falls over the last part of `--steps`. Until it has begun to fall, `--steps` and `--decay` may be changed between two
starts; data, sizes, batch, rates and seed may not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _card import perplexities, write_card
from _rows import ROW, SOURCES, build_tokenizer, check_data, order, source_rows
from torch import distributed
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

STATE = "state.pt"
FIGURES = "pretraining.json"


def place() -> tuple[int, int]:
    """Number of this process, and how many train together (torchrun)."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def say(line: str) -> None:
    """A line of the first process."""
    if place()[0] == 0:
        print(line, flush=True)


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


FIXED = ("blocks", "hidden", "batch", "lr", "muon_lr", "seed", "bf16", "weights")
"""Options that stay what they were when the training goes on."""


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
    for name, rows in zip(SOURCES, sources, strict=True):
        say(f"{name}: {rows.size / 1e6:.2f} M tokens")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="model directory; also holds state.pt")
    parser.add_argument("--data", type=Path, required=True, help="folder with the files of SOURCES (_rows.py)")
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
