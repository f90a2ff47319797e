"""What llama.cpp makes of the files that `trimllm export --to gguf` writes, beside transformers.

    make check-llamacpp        # builds llama-cpp-python in an environment of its own first: 10 minutes on 2 cores
    python benchmarks/llamacpp.py --engine .venv-llamacpp/bin/python --only gemma2-out-of-step --no-speed

Models: the embedded demo base, whole and with every other block dropped, and the tiny trimmed ones of
`tests/gguf_cases.py` (every family, every setting that a file states). Compared are tokens of some hundred texts,
logits of the next token after 100 prompts in four types, and greedy text. Then tokens/s of a Llama large enough that
its weights decide, whole and with every other block dropped, measured in turn. The last line is one JSON object, which
also goes to `benchmarks/results/llamacpp.json` if no option but --engine was given; the exit code is 1 if something
differed by more than it may.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _llamacpp import PYTHON, ROOT, bytes_per_token, run_engine, speed_files
from _sides import changed, run, write
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import trimllm
from trimllm import handover
from trimllm.bench import tables
from trimllm.checkpoints.loading import DEMO, quiet
from trimllm.config import ExportConfig
from trimllm.console import table
from trimllm.handover.gguf_families import FAMILIES
from trimllm.tasks import world

sys.path.insert(0, str(ROOT / "tests"))
import gguf_cases

TYPES = ("f32", "f16", "q8_0", "q4_0")
EXACT = 1e-5
"""Largest difference of a logit in float32, relative to the largest logit of the prompt."""
ROUNDED = 3.0
"""In other types: the mean difference, in units of what rounding the weights alone changes in transformers. llama.cpp
rounds what the weights are multiplied with, too: to float16, or to blocks of 8 bits."""
HALF = 1e-3
"""Added to that: what rounding to float16 alone does where weights are exact (the demo base, bfloat16: 5e-4)."""
TABLE, SHALLOW = 5e-4, 8
"""The same for Gemma, whose activation llama.cpp takes from a table in float16, beside transformers with such a table:
where float32 rounds differently, the entry is another one. For models of up to so many blocks; deeper ones add up the
errors of their blocks, which are independent: with the root of their number."""
PROMPTS, LONGEST, NEW = 100, 48, 16


def demo(dropped: bool) -> tuple[Any, Any]:
    model, tokenizer = trimllm.load_model(DEMO, dtype=torch.float32), AutoTokenizer.from_pretrained(DEMO)
    if dropped:
        model = trimllm.drop_layers(model, list(range(1, model.config.num_hidden_layers, 2)))
    return model, tokenizer


def case(name: str) -> tuple[Any, Any]:
    if name.startswith("demo"):
        return demo(name.endswith("half"))
    return gguf_cases.build(name), gguf_cases.tokenizer_of(gguf_cases.CASES[name].tokenizer)


def texts() -> list[str]:
    """Some hundred: prose, code, markup, invented biographies, and signs of all kinds thrown together."""
    lines = [
        line for name in ("README.md", "Makefile", "pyproject.toml") for line in (ROOT / name).read_text().splitlines()
    ]
    lines += (ROOT / "src/trimllm/blocks/surgery.py").read_text().split("\n\n")
    lines += [text for domain in ("medicine", "law", "finance") for text in world.biographies(domain, 1)[:20]]
    rng = random.Random(0)
    atoms = [
        "a",
        "B",
        "é",
        "中",
        "\u0301",
        "1",
        "42",
        "٣",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'s",
        "'LL",
        ".",
        "/",
        "-",
        "🙂",
    ]
    lines += [
        "".join(rng.choices([*atoms, "</s>", "<think>", "привет", "don't"], k=rng.randint(1, 16))) for _ in range(200)
    ]
    kept = [line for line in dict.fromkeys(lines) if line]
    return rng.sample(kept, min(400, len(kept)))


def prompts(rows: list[list[int]], size: int) -> list[list[int]]:
    """Prompts of 4 to `LONGEST` tokens."""
    long = [row for row in rows if len(row) >= 4 and max(row) < size]
    rng = random.Random(1)
    return [row[: rng.randint(4, LONGEST)] for row in (long * PROMPTS)[:PROMPTS]]


@torch.no_grad()
def expected(model: Any, rows: list[list[int]]) -> np.ndarray:
    return np.array([model(torch.tensor([row])).logits[0, -1].numpy() for row in rows])


@torch.no_grad()
def rounded(model: Any, path: Path) -> Any:
    """The model with its matrices as the file rounds them: rows change places there, but rounding is within a row."""
    import gguf

    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[FAMILIES[model.config.model_type].arch]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    copied = copy.deepcopy(model)
    for name, weight in copied.named_parameters():
        kind = types[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        if weight.dim() > 1:
            values = gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)
            weight.copy_(torch.from_numpy(values.reshape(weight.shape)))
    return copied


class TableGelu(torch.nn.Module):
    """The activation of Gemma as llama.cpp computes it: from float16 to float16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, half))


def with_table(model: Any) -> Any:
    copied = copy.deepcopy(model)
    for layer in copied.model.layers:
        layer.mlp.act_fn = TableGelu()
    return copied


def greedy(model: Any, row: list[int]) -> list[int]:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": 0, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    out = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), **settings)
    return out[0, len(row) :].tolist()


def check(names: list[str], python: Path, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per model and type, and what differed by more than it may."""
    found, wrong = [], []
    lines = texts()
    for name in names:
        with quiet():
            model, tokenizer = case(name)
            checkpoint = gguf_cases.save(model, folder / name, tokenizer)
        tokens = [tokenizer(line).input_ids for line in lines]
        rows = prompts(tokens, model.config.vocab_size)
        want, spoken = expected(model, rows), [greedy(model, row) for row in rows[:5]]
        jobs = []
        kinds = TYPES if model.config.num_hidden_layers < 40 else TYPES[:1]  # the deep ones are about scales alone
        for kind in kinds:
            target = folder / f"{name}-{kind}.gguf"
            handover.write(checkpoint, target, ExportConfig(source=str(checkpoint), to="gguf", quant=kind))
            job = {"kind": "check", "path": str(target), "prompts": rows, "greedy": rows[:5], "new": NEW}
            jobs.append(job | {"out": str(folder / f"{kind}.npy"), "texts": lines if kind == "f32" else []})
        for kind, answer in zip(kinds, run_engine(python, jobs), strict=True):
            got = np.load(folder / f"{kind}.npy")
            difference = np.abs(got - want).max(-1) / np.abs(want).max(-1)
            same = sum(a == b for a, b in zip(answer["greedy"], spoken, strict=True))
            row = {"model": name, "type": kind, "max": float(difference.max()), "mean": float(difference.mean())}
            found.append(row | {"greedy": f"{same}/{len(spoken)}"})
            if kind != "f32":
                alone = expected(rounded(model, folder / f"{name}-{kind}.gguf"), rows)
                found[-1]["weights"] = float((np.abs(alone - want).max(-1) / np.abs(want).max(-1)).mean())
                if not row["mean"] <= ROUNDED * found[-1]["weights"] + HALF:
                    wrong.append(
                        f"{name} {kind}: logits differ by {row['mean']:.2g}, {found[-1]['weights']:.2g} by weights"
                    )
            else:
                gemma = name.startswith("gemma")
                deeper = math.sqrt(max(1.0, model.config.num_hidden_layers / SHALLOW))
                beside, bound = (expected(with_table(model), rows), TABLE * deeper) if gemma else (want, EXACT)
                worst = float((np.abs(got - beside).max(-1) / np.abs(beside).max(-1)).max())
                found[-1]["exact"] = worst
                if not worst <= bound:
                    wrong.append(f"{name} f32: a logit differs by {worst:.2g} of the largest, over {bound:g}")
                differ = [line for line, a, b in zip(lines, tokens, answer["tokens"], strict=True) if a != b]
                found[-1]["tokens"] = f"{len(lines) - len(differ)}/{len(lines)}"
                wrong += [f"{name}: tokens differ: {line!r}" for line in differ[:3]]
                if same < len(spoken):
                    wrong.append(f"{name} f32: greedy text differs")
        print(
            *(
                f"{row['model']:20s} {row['type']:5s} {row['max']:.1e} {row['mean']:.1e}"
                for row in found[-len(kinds) :]
            ),
            sep="\n",
        )
    return found, wrong


def ignored_list(python: Path, folder: Path) -> list[str]:
    """A file less its list of windows must differ: else the check above would not see whether it is read."""
    import gguf

    name = "gemma2-out-of-step"
    source, target = folder / f"{name}-f32.gguf", folder / "no-list.gguf"
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "gemma2")
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and "sliding_window_pattern" not in key:
            writer.add_key_value(
                key, entry.contents(), entry.types[0], entry.types[1] if len(entry.types) > 1 else None
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rows = [[1, *range(20, 50)]]
    jobs = [
        {"kind": "check", "path": str(path), "prompts": rows, "greedy": [], "new": 0, "texts": [], "out": str(out)}
        for path, out in ((source, folder / "with.npy"), (target, folder / "without.npy"))
    ]
    run_engine(python, jobs)
    change = float(np.abs(np.load(folder / "with.npy") - np.load(folder / "without.npy")).max())
    print(f"{name} without its list of windows: logits change by {change:.2g}")
    return [] if change > 0.1 else ["the list of windows makes no difference"]


def speed_models(folder: Path, types: list[str], shape: dict[str, int]) -> dict[str, list[Path]]:
    """Files of a random Llama, whole and with every other block dropped, by type."""
    config = AutoConfig.for_model("llama", **shape, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    files: dict[str, list[Path]] = {kind: [] for kind in types}
    for name in ("dense", "half"):
        if name == "half":
            model = trimllm.drop_layers(model, list(range(1, config.num_hidden_layers, 2)))
        for kind, target in zip(types, speed_files(model, f"speed-{name}", folder, types), strict=True):
            files[kind].append(target)
    return files


def measure(python: Path, folder: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens/s of the halved file (`ours`) and the whole one (`other`), per type and phase; ratios of each turn."""
    shape = {
        "vocab_size": 8192,
        "hidden_size": asked.hidden,
        "intermediate_size": asked.hidden * 11 // 4,
        "num_attention_heads": asked.hidden // 64,
        "num_key_value_heads": asked.hidden // 64,
        "num_hidden_layers": asked.blocks,
        "max_position_embeddings": 1024,
    }
    parts = []
    for kind, (dense, half) in speed_models(folder, asked.types, shape).items():
        job = {"kind": "speed", "paths": [str(dense), str(half)], "repeats": asked.repeats, "threads": asked.threads}
        (rounds,) = run_engine(python, [job | {"prompt": 128, "new": 24}])
        ideal = bytes_per_token(dense) / bytes_per_token(half)
        for i, phase in enumerate(("prefill", "decode")):
            ratios = [turn[1][i] / turn[0][i] for turn in rounds]
            part = {"type": kind, "phase": phase, "unit": "tokens/s", "ideal": ideal}
            part |= {
                "ours": statistics.median(t[1][i] for t in rounds),
                "other": statistics.median(t[0][i] for t in rounds),
            }
            part |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
            parts.append(part)
    return parts


def machine(threads: int) -> str:
    return f"{tables.processor()}, {os.cpu_count()} cores, {threads} thread(s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, default=PYTHON, help="python with llama_cpp")
    parser.add_argument("--only", nargs="+", help="models to compare (default: all)")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_0"], help="types whose speed is measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = asked.only or ["demo", "demo-half", *gguf_cases.CASES]
        found, wrong = check(names, asked.engine, folder)
        if "gemma2-out-of-step" in names:
            wrong += ignored_list(asked.engine, folder)
        parts = [] if asked.no_speed else measure(asked.engine, folder, asked)
    rows = [
        [
            r["model"],
            r["type"],
            f"{r['max']:.1e}",
            f"{r['mean']:.1e}",
            f"{r.get('weights', 0):.1e}",
            r["greedy"],
            r.get("tokens", ""),
        ]
        for r in found
    ]
    print(table(["model", "type", "largest", "mean", "weights alone", "greedy", "tokens"], rows))
    speeds = [
        [
            p["type"],
            p["phase"],
            f"{p['other']:.0f}",
            f"{p['ours']:.0f}",
            f"{p['ratio']:.2f}",
            f"{p['ratio_min']:.2f}-{p['ratio_max']:.2f}",
            f"{p['ideal']:.2f}",
        ]
        for p in parts
    ]
    print(table(["type", "phase", "whole, tokens/s", "half", "ratio", "range", "ratio of bytes"], speeds))
    print(*wrong, sep="\n")
    head = next((p for p in parts if p["phase"] == "decode" and p["type"] == "q8_0"), parts[-1] if parts else {})
    line = {"name": "llamacpp"}
    line |= {key: head.get(key) for key in ("ours", "other", "unit", "ratio", "ratio_min", "ratio_max")}
    line |= {"machine": machine(asked.threads), "parts": parts, "logits": found, "wrong": wrong}
    write("llamacpp", line, changed(parser, asked, "engine"))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    run(main)
