"""Peak memory and speed of cutting a checkpoint that is larger than memory should have to be.

    python benchmarks/streaming_memory.py --gigabytes 8.5 --folder /tmp

Writes a Llama with the 80 layers of a 70B model and a smaller width (bf16, several shards, never in memory), drops half
of the layers with `drop_on_disk` in a process of its own, checks the result, and deletes both. Needs 1.5 times the size
on disk. The last line is one JSON object; the exit code is 1 if memory went over the bound: twice the largest tensor
and 1 GiB. Reads are from disk where the system lets the page cache be dropped (Linux).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trimllm.checkpoints import shards
from trimllm.checkpoints.shards import Planned
from trimllm.console import table

LAYERS, VOCABULARY, HEADS, KV_HEADS = 80, 32000, 16, 2
DROPPED = list(range(20, 60))

CHILD = """
import json, resource, sys, time
from trimllm.checkpoints.streaming import drop_on_disk
source, target, layers, shard = sys.argv[1:]
start = time.perf_counter()
result = drop_on_disk(source, json.loads(layers), target, max_shard_size=shard)
seconds = time.perf_counter() - start
try:  # of this process alone; getrusage may count the parent's memory before exec
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"peak": peak, "seconds": seconds, "bytes": result.bytes, "largest": result.largest}))
"""


def shapes(size: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Config and weights of a Llama of 80 layers and about `size` bytes in bf16: name -> shape."""
    hidden = max(128, int(math.sqrt(size / (2 * LAYERS * 12.75))) // 128 * 128)
    kv = hidden // HEADS * KV_HEADS
    rest = size - 2 * (2 * VOCABULARY * hidden + LAYERS * (2 * hidden * hidden + 2 * hidden * kv))
    inner = max(128, math.ceil(rest / (2 * LAYERS * 3 * hidden)))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    weights: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        weights |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return config, weights | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def write_checkpoint(folder: Path, size: int, shard: int) -> None:
    """Random weights, another stretch of the same random numbers for every tensor."""
    config, weights = shapes(size)
    (folder / "config.json").write_text(json.dumps(config))
    small = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)
    noise = (small.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # the upper half of a float32 is a bfloat16

    def planned(name: str, shape: tuple[int, ...]) -> Planned:
        length = 2 * math.prod(shape)

        def chunks() -> Iterator[bytes]:
            begin = 2 * (zlib.crc32(name.encode()) % (len(noise) // 2))
            yield noise[begin : begin + length]
            written = min(length, len(noise) - begin)
            while written < length:
                yield noise[: length - written]
                written += min(len(noise), length - written)

        return Planned(name, "BF16", shape, length, chunks)

    tensors = [planned(name, shape) for name, shape in weights.items()]
    shards.write(folder, shards.grouped(tensors, shard), lambda size, name: None)


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that they are read from disk."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def differences(source: Path, target: Path) -> list[str]:
    """Names of tensors of the result whose first and last megabytes are not those of the tensor they come from."""
    old = {tensor.name: tensor for tensor in shards.read(source)[0]}
    new = {tensor.name: tensor for tensor in shards.read(target)[0]}
    kept = [i for i in range(LAYERS) if i not in DROPPED]
    wrong = [] if len(new) == 3 + 9 * len(kept) else ["(number of tensors)"]
    for name, tensor in new.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(kept[int(parts[2])])
        origin = old[".".join(parts)]
        ends = [(t.shape, *(_bytes(t, begin) for begin in (0, max(0, t.size - 2**20)))) for t in (tensor, origin)]
        if ends[0] != ends[1]:
            wrong.append(name)
    return wrong


def _bytes(tensor: shards.Tensor, begin: int) -> bytes:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start + begin)
        return stream.read(min(2**20, tensor.size - begin))


def measure(folder: Path, gigabytes: float, shard: str) -> dict[str, Any]:
    source, target = folder / "source", folder / "target"
    source.mkdir()
    write_checkpoint(source, int(gigabytes * 1e9), shards.parse_size(shard))
    forget(source)
    words = [sys.executable, "-c", CHILD, str(source), str(target), json.dumps(DROPPED), shard]
    result = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    return result | {
        "source_bytes": sum(tensor.size for tensor in shards.read(source)[0]),
        "bound": 2 * result["largest"] + 2**30,
        "gb_per_second": result["bytes"] / result["seconds"] / 1e9,
        "wrong": differences(source, target),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.5, help="size of the checkpoint (10^9 bytes)")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--folder", type=Path, default=None, help="where there is room (default: the temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="streaming_memory.", dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.gigabytes, arguments.max_shard_size)
    gib, gb = 2**30, 1e9
    row = [f"{result['source_bytes'] / gb:.2f}", f"{result['bytes'] / gb:.2f}", f"{result['largest'] / gib:.3f}"]
    row += [f"{result['peak'] / gib:.3f}", f"{result['bound'] / gib:.3f}", f"{result['seconds']:.1f}"]
    header = ["GB read from", "GB written", "largest tensor GiB", "peak GiB", "bound GiB", "seconds", "GB/s written"]
    print(table(header, [[*row, f"{result['gb_per_second']:.2f}"]]))
    print(json.dumps(result))
    return 1 if result["peak"] > result["bound"] or result["wrong"] else 0


if __name__ == "__main__":
    from _sides import run  # a test imports this file from elsewhere

    run(main)
