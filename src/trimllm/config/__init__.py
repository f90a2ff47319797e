"""Every setting of every command: frozen pydantic models, read from the command line and from YAML.

The field's description is the option's help; the same names stand in `--config FILE.yaml` and in `config.yaml`, which
a run writes beside its results.
"""

from __future__ import annotations

from trimllm.config.commands import (
    BenchConfig,
    CompareConfig,
    DemoConfig,
    DropConfig,
    EvalConfig,
    ExportConfig,
    PushConfig,
    ScanConfig,
    ScanSettings,
    SpeedSettings,
    TasksConfig,
)
from trimllm.config.shared import (
    COARSEST,
    EMBEDDED,
    RESOLUTION,
    STRATEGIES,
    DataSettings,
    ModelSettings,
    ScoreSettings,
    Settings,
    Several,
    TaskSettings,
    TrainedModel,
    TrainSettings,
    each_path,
    unknown_strategy,
    without_idle,
)
from trimllm.config.trim import TrimConfig

__all__ = [
    "COARSEST",
    "EMBEDDED",
    "RESOLUTION",
    "STRATEGIES",
    "BenchConfig",
    "CompareConfig",
    "DataSettings",
    "DemoConfig",
    "DropConfig",
    "EvalConfig",
    "ExportConfig",
    "ModelSettings",
    "PushConfig",
    "ScanConfig",
    "ScanSettings",
    "ScoreSettings",
    "Settings",
    "Several",
    "SpeedSettings",
    "TaskSettings",
    "TasksConfig",
    "TrainSettings",
    "TrainedModel",
    "TrimConfig",
    "each_path",
    "unknown_strategy",
    "without_idle",
]
