"""Hand-over: a stock checkpoint, in the formats that engines read.

Each module has `write(folder, target, command)`: from a checkpoint directory to a new file or directory, which appears
whole or not at all; it returns what was written and how it was checked, in one line.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from trimllm.checkpoints import belongings
from trimllm.config import ExportConfig

WRITERS = {"gguf": "gguf", "onnx": "graphs", "openvino": "graphs", "int8": "quantized", "int4": "quantized"}
"""Format -> module of this package."""


def copy_companions(folder: Path, target: Path) -> None:
    """Copy the licence and the plan of the checkpoint in `folder`, which go with the weights whatever these become."""
    belongings.copy(belongings.found(folder, (*belongings.TERMS, "plan.json")), folder, target)


def write(folder: Path, target: Path, command: ExportConfig) -> str:
    """Write the checkpoint in `folder` to `target`, in the format that `command.to` names."""
    return import_module(f"trimllm.handover.{WRITERS[command.to]}").write(folder, target, command)
