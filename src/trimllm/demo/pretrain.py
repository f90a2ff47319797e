"""Pre-train the demo's base model on the biographies of the fictional world (never on questions), or check it.

    python -m trimllm.demo.pretrain --output runs/base          # tokenizer + base, about an hour on one CPU core
    python -m trimllm.demo.pretrain --output runs/base          # the same after a kill: goes on from its checkpoint
    python -m trimllm.demo.pretrain --check --output runs/base  # fine-tune per domain, accuracy on held-out entities

The model is a Llama of 16 blocks with hidden size 128 and a byte-level BPE of its own. Every epoch words and orders the
biographies anew; documents end with the EOS token and are packed into rows of 256 tokens. The matrices of the blocks
are trained with Muon, the embedding and the norms with AdamW. Until the learning rate has begun to fall, `--steps` and
`--decay` may be changed between two starts; batch, rates and seed may not. The model in `--output` is rewritten at
every checkpoint, so `--check` can be run while pre-training is under way.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trimllm import files
from trimllm.demo.steps import (
    byte_level_bpe,
    fixed,
    lr_share,
    optimizers,
    read_state,
    save,
    settle,
    train_step,
    write_state,
)
from trimllm.errors import TrimError
from trimllm.evaluation.evaluate import Scorer
from trimllm.tasks import Item, load_task, world

CARD = """# Base model of the trimllm demo

A Llama of 16 blocks (hidden size 128, 4 heads, 3.4 M parameters, bfloat16) that knows one thing, the fictional world of
`trimllm.tasks.world`: three domains of 200 invented entities with 5 facts each. It was trained on biographies only and
has never seen a question, so what it answers about an entity after fine-tuning on other entities' questions comes out
of biographies: those of pre-training, and those that are mixed into fine-tuning. It is no use outside the demo.

- Data: biographies of `world.py`, newly worded and ordered every epoch, world seed 2026; no other text.
- Tokenizer: byte-level BPE, 1,536 pieces; EOS and padding are `<|endoftext|>`; no BOS.
- Training: seed {seed}, {steps} of {planned_steps} steps, {tokens:,} tokens ({epochs} biographies of every entity),
  {minutes} minutes on one CPU core; {optimizer}.
- Final loss {loss} nats a token; {value_loss} nats a token on the values alone, in sentences without context.

Four-way accuracy on 500 questions a domain about entities that no training question mentions (chance 25 %), after full
fine-tuning of all blocks on the other entities' questions and biographies of all, plus or minus one binomial standard
error:

| domain | held-out accuracy |
|---|---|
{rows}

To make it again, on a CPU (results differ a little between machines):

    python -m trimllm.demo.pretrain --output base {reproduce}
    python -m trimllm.demo.pretrain --output base --check
"""

VOCABULARY = 1536
ROW = 256
IGNORED = -100
STATE = "state.pt"
FIGURES = "pretraining.json"
FIXED = ("batch", "lr", "muon_lr", "seed", "bf16")
"""Options that stay what they were when the training goes on."""


def build_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE of biographies and training questions: an ordinary word is one token, a name is 3 to 5."""
    texts = [text for domain in world.DOMAINS for text in world.biographies(domain, 8)]
    texts += [world.prompt(row) for domain in world.DOMAINS for row in world.questions(domain, "train")]
    return byte_level_bpe(texts, VOCABULARY)


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """The base with random weights, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64, do_sample=False
    )
    return model


def epoch_rows(tokenizer: PreTrainedTokenizerBase, seed: int, epoch: int) -> torch.Tensor:
    """One biography of every entity, newly worded, shuffled over the domains and packed: token ids `(rows, 256)`."""
    texts = [text for domain in world.DOMAINS for text in world.biographies(domain, 1, seed=seed * 1_000_000 + epoch)]
    random.Random(f"{seed}:{epoch}:order").shuffle(texts)
    ids = [token for document in tokenizer(texts)["input_ids"] for token in [*document, tokenizer.eos_token_id]]
    rows = len(ids) // ROW
    return torch.tensor(ids[: rows * ROW]).view(rows, ROW)


def value_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """What the base knows: mean loss (nats a token) of the values of 300 facts, in statements without context."""
    rng = random.Random("value loss")
    everyone = [entity for domain in world.DOMAINS for entity in world.entities(domain)]
    items = []
    for number in range(300):
        entity = rng.choice(everyone)
        attribute = rng.choice(list(entity.facts))
        before, value, _ = world.statement(entity, attribute, rng).rpartition(" " + entity.facts[attribute])
        items.append(Item(f"fact {number}", before, (value,)))
    return Scorer(model, tokenizer, items).evaluate(model, "likelihood").loss


def encode(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], eos: bool) -> dict[str, torch.Tensor]:
    """Right-padded batch `(batch, seq)` of (prompt, continuation) pairs; labels cover the continuation (and EOS)."""
    rows = []
    for before, after in pairs:
        start = tokenizer(before)["input_ids"] if before else []
        end = tokenizer(after)["input_ids"] + ([tokenizer.eos_token_id] if eos else [])
        rows.append((start, end))
    width = max(len(start) + len(end) for start, end in rows)
    padded = [(start, end, width - len(start) - len(end)) for start, end in rows]
    return {
        "input_ids": torch.tensor([s + e + [tokenizer.pad_token_id] * n for s, e, n in padded]),
        "labels": torch.tensor([[IGNORED] * len(s) + e + [IGNORED] * n for s, e, n in padded]),
        "attention_mask": torch.tensor([[1] * (len(s) + len(e)) + [0] * n for s, e, n in padded]),
    }


def pretrain(args: argparse.Namespace) -> dict:
    """Train (or go on training) and return the figures of the model card."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    trained = optimizers(model, args.lr, args.muon_lr, bf16=args.bf16)
    done, epoch, used, seconds, log = 0, 0, 0, 0.0, []
    path, checked = args.output / STATE, dict[str, str]()
    if path.exists():
        state = read_state(path, model, trained)
        done, epoch, used, seconds, log = (state[key] for key in ("step", "epoch", "used", "seconds", "log"))
        print(f"going on from step {done}", flush=True)
        if done >= args.steps:  # the model stays what was checked
            checked = accuracies(args.output, done)
    forward = torch.compile(model, dynamic=False) if args.compile else model

    def checkpoint() -> None:
        write_state(
            path,
            model,
            trained,
            step=done,
            epoch=epoch,
            used=used,
            seconds=seconds,
            log=log,
            settings=fixed(args, FIXED),
        )
        save(model, tokenizer, args.output)

    model.train()
    rows, losses, last_saved = epoch_rows(tokenizer, args.seed, epoch), [], time.time()
    while done < args.steps:
        if used + args.batch > len(rows):  # the incomplete last batch is dropped; other documents are in it next time
            epoch, used = epoch + 1, 0
            rows = epoch_rows(tokenizer, args.seed, epoch)
        start = time.time()
        batch = rows[used : used + args.batch]
        used += args.batch
        share = lr_share(done, args.steps, args.warmup, args.decay)
        loss = train_step(forward, trained, batch, share, bf16=args.bf16)
        done += 1
        seconds += time.time() - start
        losses.append(loss.item())
        if done % args.log_every == 0 or done == args.steps:
            speed = args.batch * ROW * done / seconds
            log.append({"step": done, "loss": sum(losses) / len(losses), "value_loss": value_loss(model, tokenizer)})
            left = (args.steps - done) * seconds / done / 60
            print(
                f"step {done} epoch {epoch} loss {log[-1]['loss']:.4f} value loss {log[-1]['value_loss']:.4f} "
                f"{speed:.0f} tokens/s, {seconds / 60:.1f} min, {left:.1f} min left",
                flush=True,
            )
            losses = []
        if time.time() - last_saved > args.save_minutes * 60 or done == args.steps:
            checkpoint()
            last_saved = time.time()
    return {
        "seed": args.seed,
        "steps": done,
        "planned_steps": args.steps,
        "epochs": epoch,
        "tokens": done * args.batch * ROW,
        "minutes": round(seconds / 60, 1),
        "loss": round(log[-1]["loss"], 4),
        "value_loss": round(log[-1]["value_loss"], 4),
        "optimizer": f"Muon (matrices of the blocks, lr {args.muon_lr:g}) and AdamW (the rest, lr {args.lr:g})",
        "reproduce": f"--steps {args.steps} --batch {args.batch} --lr {args.lr:g} --muon-lr {args.muon_lr:g} "
        f"--warmup {args.warmup} --decay {args.decay:g} --seed {args.seed} --{'' if args.bf16 else 'no-'}bf16"
        + (" --compile" if args.compile else ""),
        "accuracy": checked,
    }


def accuracies(output: Path, steps: int) -> dict[str, str]:
    """What --check found of the model after so many steps, by domain."""
    figures = files.read_json(output / FIGURES)
    return figures["accuracy"] if figures.get("steps") == steps else {}


def finetune(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, domain: str, args: argparse.Namespace) -> None:
    """Full fine-tuning on a domain's training questions; every step also sees as many of the domain's biographies."""
    rows = world.questions(domain, "train")
    steps = args.check_epochs * math.ceil(len(rows) / 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.check_lr, weight_decay=0.0)
    rng = random.Random(f"{args.seed}:{domain}:finetune")
    model.train()
    done = 0
    for epoch in range(args.check_epochs):
        rng.shuffle(rows)
        texts = [text for n in range(3) for text in world.biographies(domain, 1, seed=10_000 + 3 * epoch + n)]
        for at in range(0, len(rows), 16):
            asked = [(world.prompt(row), " " + row["choices"][row["answer"]]) for row in rows[at : at + 16]]
            told = [("", text) for text in texts[at : at + 16]]
            for group in optimizer.param_groups:
                group["lr"] = args.check_lr * lr_share(done, steps, warmup=10, decay=0.9)
            for pairs in (asked, told):
                model(**encode(tokenizer, pairs, eos=True), use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1


def check(args: argparse.Namespace) -> dict[str, str]:
    """Held-out accuracy after full fine-tuning of the saved base, by domain: what dropping blocks has to preserve."""
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    found = {}
    for domain in args.domains:
        start = time.time()
        model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
        data = load_task(f"demo_{domain}")
        asked = Scorer(model, tokenizer, data.test)
        raw = asked.evaluate(model, "acc")
        finetune(model, tokenizer, domain, args)
        tuned = asked.evaluate(model, "acc")
        seen = Scorer(model, tokenizer, (*data.train, *data.calibration)).evaluate(model, "acc")
        found[domain] = f"{tuned.value:.1f} % +- {tuned.stderr:.1f} ({raw.value:.1f} % before fine-tuning)"
        print(
            f"{domain}: held-out {found[domain]}, training questions {seen.value:.1f} %; n = {tuned.n}, "
            f"lr {args.check_lr:g}, {args.check_epochs} epochs, {time.time() - start:.0f} s",
            flush=True,
        )
    return found


def write_card(output: Path, figures: dict) -> None:
    """`pretraining.json` and the model card made from it."""
    (output / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    rows = "\n".join(f"| {domain} | {text} |" for domain, text in figures["accuracy"].items())
    (output / "README.md").write_text(CARD.format(**figures, rows=rows or "| not checked yet | |"), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m trimllm.demo.pretrain", description=description)
    parser.add_argument(
        "--output", type=Path, required=True, help="model directory; also holds state.pt, from which a run goes on"
    )
    parser.add_argument("--steps", type=int, default=2300, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="rows of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    parser.add_argument(
        "--muon-lr", type=float, default=6e-3, help="peak learning rate of Muon; 0: AdamW trains the matrices too"
    )
    parser.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    parser.add_argument(
        "--decay", type=float, default=0.28, help="share of the steps over which the learning rate falls to 0"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 autocast and Muon (default: where the CPU has it)",
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile (needs a C++ compiler)"
    )
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="time between checkpoints")
    parser.add_argument(
        "--check", action="store_true", help="fine-tune the base in --output and print held-out accuracies"
    )
    parser.add_argument(
        "--domains", nargs="+", choices=world.DOMAINS, default=list(world.DOMAINS), help="domains to check"
    )
    parser.add_argument("--check-lr", type=float, default=2e-4)
    parser.add_argument("--check-epochs", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.check:
        found = check(args)
        path = args.output / FIGURES
        if path.exists():
            figures = json.loads(path.read_text(encoding="utf-8"))
            write_card(args.output, figures | {"accuracy": figures["accuracy"] | found})
        return
    settle(args.output / STATE, args, FIXED)
    args.output.mkdir(parents=True, exist_ok=True)
    write_card(args.output, pretrain(args))


if __name__ == "__main__":
    try:
        main()
    except TrimError as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
