"""Progressive layer dropping while fine-tuning: half the depth of a causal LM, as a stock checkpoint.

import trimllm
model, history = trimllm.trim(model="demo", task="demo_law", text="demo_law", lr=2e-3, output="runs/law")
trimllm.drop_layers(model, [3, 7]); trimllm.save_trimmed(model, "trimmed")
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

_PUBLIC = {
    "trim": "run.progressive",
    "TrimConfig": "config",
    "Console": "console",
    "drop_layers": "blocks.surgery",
    "apply_layout": "blocks.surgery",
    "save_trimmed": "checkpoints.export",
    "verify": "checkpoints.verification",
    "push_to_hub": "handover.hub",
    "load_model": "checkpoints.loading",
    "load_tokenizer": "checkpoints.loading",
    "scan_layers": "importance.ranking",
    "evaluate": "evaluation.evaluate",
    "difference": "evaluation.paired",
    "load_task": "tasks",
    "load_text": "tasks",
    "InputError": "errors",
    "TrimError": "errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Load what is asked for, when it is asked for: `import trimllm` alone does not import torch."""
    if name == "__version__":
        return version("trimllm")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trimllm' has no attribute {name!r}")
    return getattr(import_module(f"trimllm.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
