"""Attention backends (what computes attention): the names that transformers knows, and whether a model can take one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimllm.checkpoints.dtypes import HALF, name_of
from trimllm.errors import InputError, one_line

AUTO = "auto"
REMEDY = "leave --attention out, or use eager"
EAGER_LENGTH = 256
"""Tokens of a row up to which eager attention trains faster than SDPA on a CPU in bf16 autocast, and keeps less than
twice as much for the backward pass: measured, see benchmarks/attention.py. In float32 it is slower at every length."""
_ABOUT_ATTENTION = re.compile(r"flash|flex_?attention|scaled_dot_product|attn_implementation", re.IGNORECASE)


def names() -> list[str]:
    """What `--attention` takes. Left out are those for the paged caches of a server, which no command has."""
    return [AUTO, "eager", *sorted(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in name)]


def chosen(name: str) -> str | None:
    """What transformers is asked for: nothing where it chooses itself."""
    return None if name == AUTO else name


def check(name: str, device: torch.device, dtype: torch.dtype | None, *, training: bool = False) -> None:
    """Refuse what can be known to fail without the model. `dtype` is that of the weights, None where not yet known.

    Raises:
        InputError: if there is no such implementation, or it cannot compute on this device or in this dtype.
    """
    if name not in names():
        raise InputError(
            f"--attention {name}: transformers {transformers.__version__} does not know it: use {', '.join(names())}"
        )
    if name.startswith("flash_attention"):
        if device.type in ("cpu", "mps"):
            raise InputError(f"--attention {name}: it computes on a GPU, and the device is {device.type}: {REMEDY}")
        if dtype is not None and dtype not in HALF:
            raise InputError(
                f"--attention {name}: it computes in 16 bits, and the weights are {name_of(dtype)}: "
                "add --dtype bfloat16, or leave --attention out"
            )
    if name == "flex_attention" and training and device.type == "cpu":
        raise InputError(f"--attention {name}: torch has no backward pass of it on the device cpu: {REMEDY}")


def refusal(name: str, model: str, error: Exception) -> str | None:
    """One line for an error of transformers while it builds a model, if `name` is what it is about."""
    if name == AUTO or not _ABOUT_ATTENTION.search(str(error)):
        return None
    reason = re.split(r"(?<=\w)\.(?:\s|$)|: http", one_line(error))[0]
    return f"--attention {name}: model {model!r} cannot compute with it ({reason}): {REMEDY}"


def probe(model: Any, name: str, *, training: bool = False) -> None:
    """Try a few tokens, and the backward pass if the model is to be trained; no gradient is left.

    Raises:
        InputError: if the model cannot compute with the implementation that it was loaded with.
    """
    if name == AUTO:
        return
    ids = torch.tensor([[3, 5, 7, 9]], device=model.device) % model.get_input_embeddings().num_embeddings
    try:
        with torch.set_grad_enabled(training):
            logits = model(input_ids=ids, use_cache=False).logits
            if training:
                logits.float().logsumexp(-1).sum().backward()
    except Exception as error:  # compilers and kernels have errors of their own
        raise InputError(
            f"--attention {name}: the model cannot compute with it on {model.device.type} ({one_line(error)[:120]}): "
            f"{REMEDY}"
        ) from error
    finally:
        model.zero_grad(set_to_none=True)


def eager_length(model: Any, name: str, accelerator: Any) -> int:
    """Rows of up to so many tokens train with eager attention where `--attention` is auto; 0: none does."""
    fitting = (
        name == AUTO
        and accelerator.device.type == "cpu"
        and accelerator.mixed_precision == "bf16"
        and model.config.get_text_config(decoder=True) is model.config
        and model.config._attn_implementation == "sdpa"
        and model._can_set_attn_implementation()
    )
    return EAGER_LENGTH if fitting else 0


@contextmanager
def eager(model: Any, wanted: bool = True) -> Iterator[None]:
    """Within, the model computes attention without a kernel of its own, if that is `wanted`."""
    if not wanted:
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
