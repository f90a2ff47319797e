"""What `trimllm bench` says of its measurements: bench.json and the tables."""

from __future__ import annotations

import platform
import statistics
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

from trimllm.bench import timing
from trimllm.bench.benching import Lengths, percentiles
from trimllm.config import BenchConfig
from trimllm.console import table


def processor() -> str:
    """The processor's name, as Linux has it, else its kind."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """What was measured on, and when."""
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def record(
    command: BenchConfig, lengths: Lengths, known: list[dict[str, Any]], measured: dict[int, list[dict[str, Any]]]
) -> dict[str, Any]:
    """The contents of bench.json: per batch size and model, medians over the rounds, and ratios to the first model.

    The ideal ratio is that of the bytes which a decode step must read, weights and cache.
    """
    return {
        "machine": machine(),
        "threads": torch.get_num_threads() if command.threads is None else command.threads,
        "attention": command.attention,
        "sequence": lengths.sequence,
        "new_tokens": lengths.new_tokens,
        "repeats": command.repeats,
        "cache": command.cache,
        "compile": command.compile,
        "models": known,
        "rows": [
            {"batch": batch, "model": model["model"]} | row
            for batch, found in measured.items()
            for model, row in zip(known, _rows(found), strict=True)
        ],
    }


def _rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    speeds = {str(i): [one.decode for one in row["passes"]] for i, row in enumerate(found)}
    prompts = {str(i): [one.prefill for one in row["passes"]] for i, row in enumerate(found)}
    total = [row["reads"].weights + row["reads"].cache_read for row in found]
    rows = []
    for i, row in enumerate(found):
        passes, decode = row["passes"], statistics.median(speeds[str(i)])
        ratio = _ratio(speeds, i) | {"ideal": total[0] / total[i]}
        rows.append(
            {
                "prefill_tokens_per_second": statistics.median(prompts[str(i)]),
                "prefill_ratio": _ratio(prompts, i),
                "decode_tokens_per_second": decode,
                "decode_rounds": speeds[str(i)],
                "ratio": ratio,
                "token_ms": percentiles([step for one in passes for step in one.steps]),
                "first_token_ms": percentiles([one.first for one in passes]),
                "peak_bytes": row["peak_bytes"],
                "cache_bytes_per_token": row["reads"].growth,
                "cache_bytes": row["reads"].cache,
                "read_bytes_per_step": {"weights": row["reads"].weights, "cache": row["reads"].cache_read},
                "read_bytes_per_second": total[i] * decode / passes[0].batch,
            }
        )
    return rows


def _ratio(speeds: dict[str, list[float]], row: int) -> dict[str, float]:
    """Round by round to the first model."""
    return dict(zip(("median", "min", "max"), timing.ratio(speeds, str(row), "0"), strict=True))


def report(found: dict[str, Any]) -> str:
    """Two tables: speed, and bytes."""
    several = len({row["batch"] for row in found["rows"]}) > 1
    models = {model["model"]: model for model in found["models"]}
    speed, size = [], []
    for row in found["rows"]:
        model, prefill, ratio = models[row["model"]], row["prefill_ratio"], row["ratio"]
        name = row["model"] + (f", batch {row['batch']}" if several else "")
        speed.append(
            [
                name,
                model["layers"],
                f"{row['prefill_tokens_per_second']:.0f}",
                f"{prefill['median']:.2f}x ({prefill['min']:.2f}-{prefill['max']:.2f})",
                f"{row['decode_tokens_per_second']:.1f}",
                f"{ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})",
                f"{ratio['ideal']:.2f}x",
                *(" / ".join(f"{ms:.3g}" for ms in row[key].values()) for key in ("token_ms", "first_token_ms")),
            ]
        )
        reads = row["read_bytes_per_step"]
        size.append(
            [
                name,
                f"{model['parameters'] / 1e6:.2f}",
                model["dtype"],
                _mb(model["disk_bytes"]),
                _mb(model["stored_bytes"]),
                _mb(row["peak_bytes"]),
                "-" if row["cache_bytes_per_token"] is None else row["cache_bytes_per_token"],
                _mb(row["cache_bytes"]),
                f"{_mb(reads['weights'])} + {_mb(reads['cache'])}",
                f"{row['read_bytes_per_second'] / 1e9:.2f}",
            ]
        )
    first = found["models"][0]
    way = f"{found['cache']} cache{', compiled' if found['compile'] else ''}"
    batch = "" if several else f", batch {found['rows'][0]['batch']}"
    compiler = ", with the compiler" if found["compile"] else ""
    memory = "allocated on the GPU" if first["device"].startswith("cuda") else "growth of the resident set"
    columns = [
        "",
        "layers",
        "prefill tokens/s",
        "of the first",
        "decode tokens/s",
        "of the first",
        "ideal",
        "ms a token",
        "first token",
    ]
    byte_columns = ["", "M params", "dtype", "disk MB", "loaded MB", "peak MB", "cache B/token", "cache MB"]
    return "\n".join(
        [
            table(columns, speed),
            f"{first['device']}{batch}, {way}; {found['new_tokens']} tokens decoded at the end of rows of "
            f"{found['sequence']}, {found['repeats']} rounds in turn; milliseconds: p50 / p90 / p99",
            "",
            table([*byte_columns, "MB read a step", "GB/s"], size),
            f"loaded: the weights as the model holds them; peak: {memory} while decoding{compiler};\ncache: growth at "
            f"token {found['sequence']} and size there, per sequence; read: weights + cache; ideal: by bytes read",
        ]
    )


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}" if size < 1e8 else f"{size / 1e6:.0f}"
