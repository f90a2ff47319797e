"""Models of a given shape with random weights: for speed and memory, which do not depend on what a model knows."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from trimllm.checkpoints import backends
from trimllm.checkpoints.loading import quiet
from trimllm.errors import InputError, one_line

PREFIX = "config:"
"""What a model is named by that only has a config: `config:FILE.json`."""


def config_of(file: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The config that the file holds.

    Raises:
        InputError: if it is not the config of a model.
    """
    path = Path(file).expanduser()
    try:
        if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            raise InputError(f"{PREFIX}{file}: not a model's config.json")
        with quiet():
            return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise InputError(f"{PREFIX}{file}: {error.strerror or one_line(error)}: check the path") from None
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"{PREFIX}{file}: no model can be built from it: {one_line(error)}") from error


def random_model(
    file: str | Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    trust_remote_code: bool = False,
    attention: str = backends.AUTO,
) -> Any:
    """A causal language model built from a config.json, layer by layer on its device and in its dtype.

    Args:
        file: the config, as in a checkpoint.
        dtype: of the weights; the config's own by default.
        device: where every layer is made.
        trust_remote_code: run the model code that the config names.
        attention: what computes attention (`backends.names`); by default what transformers chooses.

    Raises:
        InputError: if the file is not the config of a causal language model, or of one that cannot compute with this
            `attention`.
    """
    backends.check(attention, device, dtype)
    config = config_of(file, trust_remote_code=trust_remote_code)
    try:
        with quiet():
            torch.manual_seed(0)
            # torch's layers draw weights of their own first: half of the time, for nothing. Transformers' models
            # draw all of theirs afterwards; of code from elsewhere that is not known.
            with device, nullcontext() if trust_remote_code else no_init_weights():
                make: Any = AutoModelForCausalLM.from_config
                model = make(
                    config,
                    dtype=dtype or config.dtype,
                    trust_remote_code=trust_remote_code,
                    attn_implementation=backends.chosen(attention),
                )
            if not trust_remote_code:
                model.init_weights()
    except (ValueError, KeyError, TypeError, ImportError) as error:
        if refused := backends.refusal(attention, f"{PREFIX}{file}", error):
            raise InputError(refused) from error
        raise InputError(f"{PREFIX}{file}: no model can be built from it: {one_line(error)}") from error
    return model.eval()
