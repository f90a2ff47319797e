"""AdamW's state from one stage after a drop to the next (--optimizer-state carried): by parameter in memory, by name
on disk.

A drop takes blocks out of a model and leaves the parameters of the others the objects they were, so their moments and
step counts stay theirs. A parameter that is itself cut (a weight with a slice per layer) is a new one, without state.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trimllm.blocks import decoder
from trimllm.config import TrainSettings
from trimllm.errors import InputError
from trimllm.training import sparse

Moments = dict[torch.Tensor, dict[str, torch.Tensor]]
"""What AdamW knows of each parameter: `exp_avg`, `exp_avg_sq` and `step`."""
FOLDER, FILE = "optimizer", "adamw.safetensors"
"""Where the state lies in a checkpoint: in a folder of its own, where nobody takes it for weights."""


def most_bytes(config: TrainSettings, model: Any) -> int:
    """Bytes of the state after the warm-up: two moments of each weight that trains, if blocks are alike."""
    depth = decoder.depth(model)
    blocks = sum(parameter.nbytes for parameter in decoder.blocks(model).parameters())
    outside = sum(parameter.nbytes for parameter in model.parameters()) - blocks
    share = 1.0 if config.sparse_update == "off" else sparse.count(config.train_ratio, depth) / depth
    return int(2 * (share * blocks + config.train_embeddings * outside))


def restore(optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Move into a new optimizer what is known of its parameters; the others of them begin without state.

    `moments` is empty afterwards: what does not train now is forgotten.
    """
    record = optimizer.state_dict()
    (group,) = optimizer.param_groups
    record["state"] = {number: moments[one] for number, one in enumerate(group["params"]) if one in moments}
    moments.clear()
    optimizer.load_state_dict(record)


def present(moments: Moments, model: Any) -> Moments:
    """Less what belongs to parameters that the model has lost."""
    left = set(model.parameters())
    return {parameter: known for parameter, known in moments.items() if parameter in left}


def save(moments: Moments, model: Any, checkpoint: Path) -> None:
    """Write it into the folder of the model's checkpoint, by the names that the parameters have there."""
    tensors = {
        f"{name}.{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in moments.get(parameter, {}).items()
    }
    (checkpoint / FOLDER).mkdir()
    save_file(tensors, checkpoint / FOLDER / FILE)


def load(model: Any, checkpoint: Path) -> Moments:
    """What `save` wrote beside the checkpoint that the model was loaded from.

    Raises:
        InputError: if there is nothing, or it cannot be read.
    """
    file = checkpoint / FOLDER / FILE
    parameters = dict(model.named_parameters())
    moments: Moments = {}
    try:
        for key, value in load_file(file).items():
            name, _, what = key.rpartition(".")
            moments.setdefault(parameters[name], {})[what] = value
    except (OSError, SafetensorError, KeyError):
        why = "is damaged" if file.exists() else "is not there"
        raise InputError(f"{file}: the state of the optimizer {why}: begin a new run in another --output") from None
    return moments


def delete(checkpoint: Path) -> None:
    """Take it out of a checkpoint, if there is any."""
    if (checkpoint / FOLDER).exists():
        shutil.rmtree(checkpoint / FOLDER)
