"""Speed of one stage of training at r = 1/4, in real tokens per second (padding counts on no side).

    python benchmarks/train_stage.py
    python benchmarks/train_stage.py --data FOLDER_WITH_ROWS

Three sides in turn, in one process, on the same rows, the same Llama with random weights and the same targets:

ours      `train_stage`: packed rows, a quarter of the blocks trains (spread evenly), with embeddings and head
trainer   `transformers.Trainer`, its 8 rows a step padded to the longest of them, the same parameters
recipe    as the authors' scripts: 8 rows a step, padded to the longest of the data, all logits, everything trains

A second pair has the last quarter of the blocks trained and embeddings frozen, over several epochs: ours with
--cache-frozen-prefix memory against Trainer with the same parameters. The last line is one JSON object about ours
against the recipe (`parts` holds all pairs), with --data .../cuad_clause_type also written to results/train_stage.json.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import _stages as stages
import torch
from _sides import alternate, finish, ratios, run

from trimllm.console import table

BATCH_ROWS = 8
"""Trainer's default."""


def main() -> None:
    parser = stages.parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of the pair with the frozen prefix")
    parser.add_argument("--recipe-rows", type=int, default=16, help="rows of the authors' way, which is slow")
    arguments = parser.parse_args()
    data = stages.data(arguments.data, arguments.rows)
    net = stages.model(len(data.tokenizer), arguments.blocks, arguments.hidden)
    spread, top = (stages.trained_blocks(arguments.blocks, top=way) for way in (False, True))
    batch = BATCH_ROWS * stages.tokens(data.rows) // len(data.rows)
    reports: dict[str, Any] = {}

    def our(name: str, chosen: list[int], embeddings: bool, epochs: int, **more: Any) -> Callable[[], float]:
        def side() -> float:
            parameters = stages.freeze(net, chosen, embeddings=embeddings)
            reports[name] = report = stages.ours(net, parameters, data.rows, batch, epochs, **more)
            return report.tokens / report.seconds

        return side

    def trainers(chosen: list[int], embeddings: bool, epochs: int) -> Callable[[], float]:
        def side() -> float:
            stages.freeze(net, chosen, embeddings=embeddings)
            seconds = stages.trainer(net, data.rows, data.tokenizer, BATCH_ROWS, epochs)
            return epochs * stages.tokens(data.rows) / seconds

        return side

    def recipe() -> float:
        rows = sorted(data.rows, key=lambda row: len(row.ids))[:: -(-len(data.rows) // arguments.recipe_rows)]
        parameters = stages.freeze(net, None)
        started = time.perf_counter()
        stages.recipe(net, parameters, rows, data.longest, BATCH_ROWS)
        return len(rows) * stages.tokens(data.rows) / len(data.rows) / (time.perf_counter() - started)

    epochs = arguments.epochs
    first = {"ours": our("ours", spread, True, 1), "trainer": trainers(spread, True, 1), "recipe": recipe}
    second = {
        "ours": our("prefix", top, False, epochs, cache_frozen_prefix="memory"),
        "trainer": trainers(top, False, epochs),
    }
    speeds = alternate(first, arguments.rounds, warm_up=0)
    frozen = alternate(second, arguments.rounds, warm_up=0)
    pairs = {
        "ours / padded, everything trains": (speeds["ours"], speeds["recipe"]),
        "ours / Trainer, same parameters": (speeds["ours"], speeds["trainer"]),
        f"the same, top quarter only, {epochs} epochs, prefix cached": (frozen["ours"], frozen["trainer"]),
    }
    parts = {
        name: {"ours": sorted(a)[len(a) // 2], "other": sorted(b)[len(b) // 2], **ratios(a, b)}
        for name, (a, b) in pairs.items()
    }
    shown = [
        [name, *(f"{part[key]:,.0f}" for key in ("ours", "other")), *(f"{part[key]:.2f}" for key in list(part)[2:])]
        for name, part in parts.items()
    ]
    print(table(["real tokens/s", "ours", "other", "ratio", "least", "most"], shown))
    finish(
        "train_stage",
        speeds["ours"],
        speeds["recipe"],
        "real tokens/s",
        changed=stages.changed(parser, arguments),
        parts=parts,
        data=data.name,
        rows=len(data.rows),
        mean_tokens=stages.tokens(data.rows) / len(data.rows),
        longest_row=data.longest,
        padding=reports["ours"].padding,
        read_back=reports["prefix"].cached,
        blocks=arguments.blocks,
        hidden=arguments.hidden,
        vocabulary=len(data.tokenizer),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


if __name__ == "__main__":
    run(main)
