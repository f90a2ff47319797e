"""Dtypes, as options and configs spell them and as safetensors files do."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What `--dtype` and `--save-dtype` name."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point dtypes by their names in safetensors files."""
HALF = (torch.float16, torch.bfloat16)


def name_of(dtype: torch.dtype) -> str:
    """As configs and options spell it: float32."""
    return str(dtype).removeprefix("torch.")
