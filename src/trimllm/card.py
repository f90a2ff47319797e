"""The documents that go with a trimmed model: its model card and result.json."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from trimllm import bench, rundir
from trimllm.config import TrimConfig
from trimllm.console import table
from trimllm.evaluate import Evaluation
from trimllm.tasks import TaskData

LIBRARIES = ("trimllm", "torch", "transformers", "accelerate", "tokenizers", "safetensors")


def percent(record: dict[str, Any] | None) -> str:
    """`87.2 +- 1.5` of a journaled evaluation."""
    return f"{record['value']:.1f} +- {record['stderr']:.1f}" if record else "-"


def depth_table(history: list[dict[str, Any]]) -> str:
    """One line per depth: what went, accuracies, size, speed."""
    rows = []
    for row in history:
        dropped = ", ".join(unit for drop in row.get("dropped", []) for unit in drop["units"])
        rows.append(
            [
                row["depth"],
                dropped or ("base" if row["event"] == "base" else "fine-tuned"),
                percent(row["calibration"]),
                percent(row["test"]),
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['tokens_per_second']:.0f}",
            ]
        )
    return table(["depth", "dropped", "calibration", "test", "M params", "MB", "tokens/s"], rows)


def trimmed(
    config: TrimConfig, data: TaskData, stage: dict[str, Any], history: list[dict[str, Any]], base: dict[str, str]
) -> str:
    """The model card of the trimmed checkpoint (Markdown with the Hub's metadata block)."""
    layout = rundir.load_layout(stage["layout"])
    kept = rundir.layers(layout)
    which = f"layers {kept}" if kept else "re-packed pairs, listed in plan.json"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [trimllm, layer-pruning]
base_model: {base["name"]}
---
# {base["name"]}, trimmed to {len(layout)} of {history[0]["depth"]} layers

A stock {data.name} specialist: it loads with `AutoModelForCausalLM.from_pretrained` and needs no special code.
It keeps {which} (0-based, of the base) and was fine-tuned on `{data.name}` while layers were dropped (TrimLLM,
arXiv 2412.11242; strategy {config.strategy}, unit {config.unit}, sparse update {config.sparse_update} with
r = {config.train_ratio}). Knowledge outside that domain is reduced.

Base weights: SHA-256 {base["sha256"]}

```
{depth_table(history)}
```

`test` is the reported split ({data.metric}, with its standard error), which no decision was taken on;
`calibration` ({len(data.calibration)} rows held out of train) decided what was dropped.
"""


def result(
    config: TrimConfig,
    data: TaskData,
    stage: dict[str, Any],
    history: list[dict[str, Any]],
    drops: list[dict[str, Any]],
    base: dict[str, str],
    test: Evaluation,
    verified: Any,
    speeds: dict[str, list[float]],
    seconds: float,
) -> dict[str, Any]:
    """The contents of result.json."""
    median, least, largest = bench.ratio(speeds, "trimmed", "base")
    return {
        "base": base,
        "task": data.name,
        "metric": data.metric,
        "test": test.summary(),
        "depth": stage["depth"],
        "base_depth": history[0]["depth"],
        "blocks": stage["layout"],
        "layers": rundir.layers(rundir.load_layout(stage["layout"])),
        "parameters": stage["parameters"],
        "bytes": stage["bytes"],
        "decode_speedup": {"median": median, "min": least, "max": largest},
        "verified": vars(verified),
        "rows": {
            "train": len(data.train),
            "calibration": len(data.calibration),
            "test": len(data.test),
            "left_out": list(data.left_out),
        },
        "notes": list(data.notes),
        "history": history,
        "drops": drops,
        "settings": config.model_dump(mode="json"),
        "seconds": seconds,
        "machine": {"system": platform.platform(), "python": platform.python_version()},
        "libraries": {name: version(name) for name in LIBRARIES},
    }
