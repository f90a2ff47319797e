"""Decode speed at half the depth, against what the bytes read allow.

    python benchmarks/decode.py

Two pairs, batch 1, rows of 512 tokens: the embedded model and every second of its blocks, and a larger Llama with
random weights against the same shape with half the blocks. The sides are measured in turn, each in a process of its
own. The last line is one JSON object about the larger pair (`pairs` holds both), without options also written to
results/decode.json (its record of 2026-11 has three rounds).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from _sides import SHAPES, changed, cut_shape, finish, ratios, run

from trimllm.bench import benching, tables
from trimllm.blocks import decoder, surgery
from trimllm.checkpoints import loading
from trimllm.config import BenchConfig
from trimllm.console import Console


def half_of_demo(folder: Path) -> str:
    """The embedded model without every second block."""
    model: Any = loading.load_model(loading.DEMO)
    surgery.drop_layers(model, range(1, decoder.depth(model), 2))
    model.save_pretrained(folder)
    return str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Path, default=SHAPES / "llama-300m.json", help="config of the larger model")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch (default: its own choice)")
    options = parser.parse_args()
    pairs = {}
    with tempfile.TemporaryDirectory(prefix="decode.") as folder:
        blocks = json.loads(options.shape.read_text(encoding="utf-8"))["num_hidden_layers"]
        half = cut_shape(options.shape, blocks // 2, Path(folder) / f"{options.shape.stem}-half.json")
        named = {
            "demo": ("demo", half_of_demo(Path(folder) / "demo-half")),
            options.shape.stem: (f"config:{options.shape}", f"config:{half}"),
        }
        for name, both in named.items():
            command = BenchConfig(models=both, repeats=options.repeats, threads=options.threads)
            with Console().progress(name) as show:
                found = tables.record(command, *benching.measure(command, show))
            print(tables.report(found), "\n", flush=True)
            base, cut = found["rows"]
            pairs[name] = {
                "ours": cut["decode_rounds"],
                "other": base["decode_rounds"],
                "ideal": cut["ratio"]["ideal"],
                **ratios(cut["decode_rounds"], base["decode_rounds"]),
            }
    larger = pairs[options.shape.stem]
    others = changed(parser, options)
    finish("decode", larger["ours"], larger["other"], "tokens/s", changed=others, ideal=larger["ideal"], pairs=pairs)
    return 0


if __name__ == "__main__":
    run(main)
