"""A scan of all blocks, against the exhaustive way and against lm-evaluation-harness.

    python benchmarks/scan.py                    # 24 blocks, three kinds of questions, under 10 minutes on one core
    python benchmarks/scan.py --growth           # how our cost grows with blocks and items

Both sides compute, for every block, the accuracy of the model without it, on the same items. Exhaustive: a whole
forward per candidate over length-sorted, padded (question, choice) rows with all logits, at the best of several batch
sizes. The sides take turns; accuracies and log-likelihoods must agree. Random weights: no cost depends on their values.
The last line is one JSON object, of these two calls also written to results/scan.json and results/scan_growth.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _sides import alternate, changed, finish, machine, ratios, run, write
from transformers import LlamaConfig, LlamaForCausalLM

from trimllm.blocks import decoder
from trimllm.blocks.layout import remove, units, whole
from trimllm.blocks.trial import trial
from trimllm.checkpoints.loading import DEMO, load_tokenizer
from trimllm.evaluation import evaluate
from trimllm.evaluation.batches import make_rows
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import scan
from trimllm.tasks.items import Item

KINDS = {"short": (12, 4, 4), "long": (100, 4, 12), "many": (60, 10, 4), "longer": (360, 4, 12), "twenty": (60, 20, 4)}
"""Tokens of the prompt, choices, tokens of a choice (each about)."""
ITEMS = {"short": 24, "long": 4, "many": 8, "longer": 2, "twenty": 4}
"""Questions of each kind: the exhaustive way takes a minute or two for them on one core."""
BATCHES = (16, 32, 64, 128)


def model_of(blocks: int, hidden: int) -> Any:
    """A random Llama with the vocabulary size of small published models."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def questions(kind: str, count: int, tokenizer: Any) -> list[Item]:
    """Questions of random words; lengths vary by a third around those of the kind."""
    prompt, choices, choice = KINDS[kind]
    rng = random.Random(f"{kind}:0")
    words = sorted(piece[1:] for piece in tokenizer.get_vocab() if piece[0] == "Ġ" and piece[1:].isalpha())

    def text(tokens: int) -> str:
        return "".join(" " + rng.choice(words) for _ in range(max(1, round(tokens * rng.uniform(2 / 3, 4 / 3)))))

    return [
        Item(f"{kind}:{i}", text(prompt).strip(), tuple(text(choice) for _ in range(choices)), rng.randrange(choices))
        for i in range(count)
    ]


@torch.no_grad()
def exhaustive(model: Any, scorer: Scorer, batch: int, candidates: int | None = None) -> list[np.ndarray]:
    """Log-likelihoods (items, choices) without each block: what every layer of the model and every row costs."""
    depth = decoder.depth(model)
    rows = sorted(make_rows(scorer.encoded, branches=False), key=lambda row: -len(row.ids))
    tables = []
    for unit in units("block", whole(depth))[:candidates]:
        found: dict[tuple[int, int], float] = {}
        with trial(model, remove(whole(depth), unit)):
            for begin in range(0, len(rows), batch):
                group = rows[begin : begin + batch]
                length = max(len(row.ids) for row in group)
                ids = torch.tensor([[*row.ids, *[0] * (length - len(row.ids))] for row in group])
                mask = torch.tensor([[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in group])
                logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
                for number, row in enumerate(group):
                    (branch,) = row.branches
                    places = range(row.prompt_length - 1, row.prompt_length - 1 + len(branch.targets))
                    chosen = logprobs[number, list(places), list(branch.targets)]
                    found[branch.item, branch.choice] = float(chosen.sum())
        tables.append(np.array([[found[one.item, c] for c in range(len(one.continuations))] for one in scorer.encoded]))
    return tables


def ours(model: Any, scorer: Scorer) -> tuple[Any, list[np.ndarray]]:
    """A scan, and its log-likelihoods per candidate."""
    parts: dict[int, Any] = {}
    result = scan.scan(model, scorer, "acc", on_part=lambda number, part: parts.__setitem__(number, part))
    pieces = [parts[number] for number in sorted(parts)]
    every = range(len(result.candidates))
    tables = [np.array(evaluate.gather([part.trials[i] for part in pieces], scorer.encoded).loglik) for i in every]
    return result, tables


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value


def harness_scores(model: Any, tokenizer: Any, items: list[Item]) -> list[list[float]]:
    """The same log-likelihoods by lm-evaluation-harness's own model class, for one model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32)
    requests = [
        Instance("loglikelihood", {}, (item.prompt, text), number)
        for number, item in enumerate(items)
        for text in item.continuations
    ]
    scores = iter(harness.loglikelihood(requests, disable_tqdm=True))
    return [[next(scores)[0] for _ in item.continuations] for item in items]


def padding(scorer: Scorer) -> float:
    """Positions that a scan computes over those of the rows: 1 where no pad is computed."""
    return sum(batch.real.numel() for batch in scorer.batches) / sum(int(batch.real.sum()) for batch in scorer.batches)


def compare(kind: str, blocks: int, hidden: int, count: int, repeats: int) -> dict[str, Any]:
    """Our scan, the exhaustive one and the harness (one model's evaluation, times the candidates) in turn."""
    tokenizer, model = load_tokenizer(DEMO), model_of(blocks, hidden)
    items = questions(kind, count, tokenizer)
    scorer = Scorer(model, tokenizer, items)
    # the best batch size of the other side, by two candidates
    batch = min(BATCHES, key=lambda size: timed(lambda: exhaustive(model, scorer, size, candidates=2))[0])
    result, tables = ours(model, scorer)  # the comparison of results, and a warm-up
    reference = exhaustive(model, scorer, batch)
    worst = max(float(np.abs(a - b).max()) for a, b in zip(tables, reference, strict=True))
    answers = np.array([item.answer for item in items])
    hits = [100 * float((table.argmax(1) == answers).mean()) for table in reference]
    if worst > 1e-3 or not np.allclose(hits, [trial.value for trial in result.trials]):
        raise SystemExit(f"the sides disagree: log-likelihoods by {worst}")
    harness_scores(model, tokenizer, items)  # its warm-up, which imports it
    speeds = alternate(
        {
            "ours": lambda: timed(lambda: ours(model, scorer))[0],
            "exhaustive": lambda: timed(lambda: exhaustive(model, scorer, batch))[0],
            "harness": lambda: blocks * timed(lambda: harness_scores(model, tokenizer, items))[0],
        },
        repeats,
        warm_up=0,
    )
    return {
        "kind": kind,
        "blocks": blocks,
        "items": count,
        "batch of the exhaustive way": batch,
        "seconds": {name: statistics.median(values) for name, values in speeds.items()},
        "exhaustive": ratios(speeds["exhaustive"], speeds["ours"]),
        "harness": ratios(speeds["harness"], speeds["ours"]),
        "largest difference": worst,
        "layer-tokens": sum(batch.real.numel() for batch in scorer.batches) * (blocks * (blocks + 1) // 2),
        "layer-tokens over the least possible": padding(scorer),
        "notes": list(result.notes),
        "raw": speeds,
    }


def growth(hidden: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Seconds of our scan alone, by blocks and by items (long questions): N^2/2 + N block passes, linear in items."""
    rows = []
    for blocks, count in ((12, 8), (24, 8), (32, 8), (24, 4), (24, 16)):
        model = model_of(blocks, hidden)
        scorer = Scorer(model, tokenizer, questions("long", count, tokenizer))
        seconds = sorted(timed(lambda: ours(model, scorer))[0] for _ in range(3))[1]  # noqa: B023
        passes = blocks + blocks * (blocks - 1) // 2
        per = 1e3 * seconds / passes / count
        rows.append({"blocks": blocks, "items": count, "seconds": seconds, "ms per block pass and item": per})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[24])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--items", type=int, default=None, help="of each kind (default: 2 to 24)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["short", "long", "many"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--growth", action="store_true", help="only how our cost grows with blocks and items")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.growth:
        rows = growth(arguments.hidden, load_tokenizer(DEMO))
        record = {"name": "scan_growth", "machine": machine(), "threads": arguments.threads, "rows": rows}
        write("scan_growth", record, changed(parser, arguments, growth=True))
        return
    parts = []
    for blocks in arguments.blocks:
        for kind in arguments.kinds:
            part = compare(kind, blocks, arguments.hidden, arguments.items or ITEMS[kind], arguments.repeats)
            parts.append(part)
            seconds, ratio = part["seconds"], part["exhaustive"]
            print(
                f"{blocks} blocks, {kind}: ours {seconds['ours']:.2f} s, exhaustive {seconds['exhaustive']:.2f} s "
                f"({ratio['ratio']:.1f}x, {ratio['ratio_min']:.1f}-{ratio['ratio_max']:.1f}), harness "
                f"{seconds['harness']:.2f} s ({part['harness']['ratio']:.1f}x); layer-tokens "
                f"{part['layer-tokens over the least possible']:.3f} of the least",
                flush=True,
            )
    first = parts[0]["raw"]
    record = {"changed": changed(parser, arguments), "parts": parts, "threads": arguments.threads}
    finish("scan", first["ours"], first["exhaustive"], "seconds", upside_down=True, **record)


if __name__ == "__main__":
    run(main)
