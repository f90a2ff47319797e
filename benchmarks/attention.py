"""Eager attention against SDPA, forward and backward as in training, and forward only, over row lengths.

    python benchmarks/attention.py
    python benchmarks/attention.py --hidden 256 --head 64 --dtype bf16     # bf16 autocast on float32 weights

A Llama with random weights takes micro-batches of the same tokens: rows of one length (no mask), and rows packed from
four examples each (a block-diagonal mask, from the position ids). Both sides take turns in one process. *Saved* is what
autograd keeps for the backward pass, in MiB; eager attention keeps (rows, heads, length, length) probabilities. The
last line is one JSON object about SDPA's seconds over eager's in training, also in results/attention-HIDDEN-DTYPE.json
if --head is a quarter of --hidden and no other option was given.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from _sides import alternate, changed, finish, ratios, run
from transformers import LlamaConfig, LlamaForCausalLM

from trimllm.console import table
from trimllm.training import losses, packing
from trimllm.training.packing import Example, Packed

SIDES = ("eager", "sdpa")
PARTS = 4
"""Examples in a packed row."""


def model(blocks: int, hidden: int, head: int, vocabulary: int) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=blocks,
            num_attention_heads=hidden // head,
            num_key_value_heads=hidden // head,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )


def micro_batch(length: int, tokens: int, packed: bool, vocabulary: int) -> Packed:
    """Rows of `length` tokens, `tokens` in all; the last quarter of every example is learnt, as answers are."""
    parts = PARTS if packed else 1
    each = length // parts
    generator = torch.Generator().manual_seed(0)

    def example() -> Example:
        ids = torch.randint(3, vocabulary, (each + 1,), generator=generator).tolist()
        return Example(tuple(ids), 1 + each * 3 // 4)

    return packing.lay_out([[example() for _ in range(parts)] for _ in range(max(1, tokens // length))], 0, "cpu")


def autocast(dtype: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()


def step(net: Any, batch: Packed, side: str, dtype: str) -> Callable[[], float]:
    """Seconds of a forward and backward pass; the gradients go."""

    def run() -> float:
        net.set_attn_implementation(side)
        started = time.perf_counter()
        with autocast(dtype):
            losses.backward(net, batch, 1.0, 1 << 20)
        seconds = time.perf_counter() - started
        net.zero_grad(set_to_none=True)
        return seconds

    return run


def forward(net: Any, batch: Packed, side: str, dtype: str) -> Callable[[], float]:
    def run() -> float:
        net.set_attn_implementation(side)
        started = time.perf_counter()
        with torch.no_grad(), autocast(dtype):
            packing.target_logits(net, batch)
        return time.perf_counter() - started

    return run


def saved(net: Any, batch: Packed, side: str, dtype: str) -> float:
    """MiB that autograd keeps of one forward pass, weights not counted."""
    net.set_attn_implementation(side)
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(dtype):
        logits = packing.target_logits(net, batch)
    del logits
    return sum(kept.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--head", type=int, default=32, help="width of an attention head")
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32", help="bf16: autocast")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    net = model(options.blocks, options.hidden, options.head, options.vocabulary)
    shown, parts = [], []
    everything: dict[str, list[float]] = {side: [] for side in SIDES}
    for packed in (False, True):
        for length in options.lengths:
            batch = micro_batch(length, options.tokens, packed, options.vocabulary)
            net.train()
            train = alternate({side: step(net, batch, side, options.dtype) for side in SIDES}, options.rounds)
            memory = {side: saved(net, batch, side, options.dtype) for side in SIDES}
            net.eval()
            infer = alternate({side: forward(net, batch, side, options.dtype) for side in SIDES}, options.rounds)
            part: dict[str, Any] = {
                "length": length,
                "packed": packed,
                "train": {**{side: min(train[side]) for side in SIDES}, **ratios(train["sdpa"], train["eager"])},
                "forward": {**{side: min(infer[side]) for side in SIDES}, **ratios(infer["sdpa"], infer["eager"])},
                "saved_mib": memory,
            }
            parts.append(part)
            for side in SIDES:
                everything[side] += train[side]
            cells = [f"{length}{' packed' if packed else ''}"]
            for name in ("train", "forward"):
                found = part[name]
                cells += [f"{1000 * found[side]:.0f}" for side in SIDES]
                cells.append(f"{found['ratio']:.2f} ({found['ratio_min']:.2f}-{found['ratio_max']:.2f})")
            cells += [f"{memory[side]:.0f}" for side in SIDES]
            shown.append(cells)
    header = ["rows", "train ms: eager", "sdpa", "sdpa / eager", "forward ms: eager", "sdpa", "sdpa / eager"]
    print(table([*header, "saved MiB: eager", "sdpa"], shown))
    finish(
        f"attention-{options.hidden}-{options.dtype}",
        everything["eager"],
        everything["sdpa"],
        "seconds of a forward and backward pass",
        changed=changed(parser, options, "hidden", "dtype", head=options.hidden // 4),
        upside_down=True,
        parts=parts,
        **{key: value for key, value in vars(options).items() if key != "lengths"},
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


if __name__ == "__main__":
    run(main)
