"""A checkpoint's model without its weights: transformers "loads" names and shapes, and reports what does not fit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from trimllm.checkpoints.dtypes import FLOATS
from trimllm.checkpoints.renumbering import Numbering
from trimllm.checkpoints.shards import Planned, Tensor
from trimllm.errors import InputError, one_line

QUANTIZATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Fit:
    """How a list of tensors fits a model: names of weights that would be missing, or have another shape."""

    lost: frozenset[str]
    shapes: frozenset[str]

    def renamed(self, numbering: Numbering) -> Fit:
        lost, shapes = ((numbering.rename(name) for name in names) for names in (self.lost, self.shapes))
        return Fit(frozenset(n for n in lost if n is not None), frozenset(n for n in shapes if n is not None))


class Skeleton:
    """A config with its model class, and the model that both give on the meta device."""

    def __init__(self, kind: Any, config: Any, tensors: Sequence[Tensor | Planned]) -> None:
        self.kind, self.config = kind, config
        self.model: nn.Module
        self.fit = self.load(tensors)

    def load(self, tensors: Sequence[Tensor | Planned]) -> Fit:
        """Load names and shapes as transformers would load the files, with its renamings and conversions."""
        weights = {
            tensor.name: torch.empty(tensor.shape, dtype=FLOATS.get(tensor.dtype, torch.float32), device="meta")
            for tensor in tensors
        }
        try:
            self.model, info = self.kind.from_pretrained(
                None,
                config=copy.deepcopy(self.config),
                state_dict=weights,
                device_map={"": "meta"},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise InputError(f"transformers cannot build this checkpoint's model: {one_line(error)}") from error
        if info["error_msgs"]:
            raise InputError(f"transformers cannot convert this checkpoint: {one_line(info['error_msgs'])}")
        return Fit(frozenset(info["missing_keys"]), frozenset(key[0] for key in info["mismatched_keys"]))

    def path(self, module: nn.Module) -> str:
        """The name of a submodule."""
        return next(name for name, other in self.model.named_modules() if other is module)


def problem_of(checkpoint: Skeleton, expected: Fit) -> str | None:
    """What is wrong with a checkpoint: it may lack what it lacked before the cut (nothing, unless it is quantized)."""
    for names, wanted, problem in (
        (checkpoint.fit.lost, expected.lost, "lacks"),
        (checkpoint.fit.shapes, expected.shapes, "has in another shape"),
    ):
        if names != wanted:
            wrong = sorted(names ^ wanted)
            return f"{problem} {len(wrong)} weights that its config asks for, such as {wrong[0]}"
    return None


def holders(config: Any) -> list[Any]:
    """The config and the text config in it."""
    text = config.get_text_config(decoder=True)
    return [config] if text is config else [config, text]


def quantization(config: Any) -> dict[str, Any]:
    """The quantization configs, by key."""
    found = {key: holder.__dict__.get(key) for holder in holders(config) for key in QUANTIZATION_KEYS}
    return {key: value for key, value in found.items() if value}


def plain_config(config: Any) -> Any:
    """The config without quantization, for building the model without the quantizer's library."""
    plain = copy.deepcopy(config)
    for holder in holders(plain):
        for key in QUANTIZATION_KEYS:
            holder.__dict__.pop(key, None)
    return plain


def model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class of the checkpoint's model.

    Raises:
        InputError: if it is not a causal language model, or not known.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise InputError("the model is an encoder-decoder, not a causal language model")
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and not getattr(config, "is_decoder", False):
        raise InputError(f"model type {config.model_type!r} is an encoder, not a causal language model")
    known = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    own_code = trust_remote_code and getattr(config, "auto_map", None)
    for name in config.architectures or ():
        if any(name in mapping.values() for mapping in known) and not own_code:
            return getattr(transformers, name)
    try:
        with torch.device("meta"):
            return type(AutoModelForCausalLM.from_config(plain_config(config), trust_remote_code=trust_remote_code))
    except Exception as error:
        raise InputError(f"model type {config.model_type!r} cannot be built: {one_line(error)}") from error
