"""Adapters of PEFT (LoRA and its like): merged before anything is cut, since they name layers by number.

An adapter is a folder or Hub repository with `adapter_config.json`, which names its base. `--model ADAPTER` works on
the base with the adapter merged into its weights.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from trimllm.errors import InputError, one_line
from trimllm.offline import hub_or_cache, is_path

REMEDY = "merge it first, with `model = model.merge_and_unload()`"


def base_of(name: str | Path) -> str | None:
    """The base that an adapter names; None if `name` is no adapter.

    Raises:
        InputError: if it is one whose base is not named, or is not there.
    """
    if is_path(os.fspath(name)) and not Path(name).is_dir():
        return None
    with hub_or_cache(os.fspath(name)):
        path = find_adapter_config_file(os.fspath(name))
    if path is None:
        return None
    try:
        base = json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise InputError(f"cannot use adapter {str(name)!r}: its adapter_config.json names no base_model_name_or_path")
    if (Path(name) / "config.json").exists():
        raise InputError(
            f"cannot use {str(name)!r}: it holds a model and an adapter: move adapter_config.json into another folder"
        )
    local = Path(base).expanduser()
    if not local.is_dir() and is_path(base):
        raise InputError(
            f"cannot use adapter {str(name)!r}: its base {base} is not there: put the right path into "
            "base_model_name_or_path of its adapter_config.json"
        )
    if (local / "adapter_config.json").exists():
        raise InputError(f"cannot use adapter {str(name)!r}: its base {base} is an adapter, too: merge that one first")
    return str(local) if local.is_dir() else base


def base_or_self(name: str) -> str:
    """The checkpoint with the config and most of the weights: an adapter's base, or the model itself."""
    return base_of(name) or name


def has_file(name: str, file: str) -> bool:
    """Whether an adapter, in a folder or on the Hub, has a file of that name."""
    if Path(name).is_dir():
        return (Path(name) / file).exists()
    with hub_or_cache(name):
        return bool(cached_file(name, file, _raise_exceptions_for_missing_entries=False))


def merge(model: nn.Module, name: str | Path, *, allow_pickle: bool = False) -> nn.Module:
    """The base `model` with the adapter `name` added to its weights, in their dtype; no trace of PEFT remains.

    Raises:
        InputError: if PEFT is missing, the adapter is of a kind that cannot be merged, or does not fit the model.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(f"--model {name}: to read an adapter, pip install 'trimllm[peft]'") from None
    if getattr(model, "is_quantized", False):
        raise InputError(
            f"cannot merge adapter {str(name)!r}: its base is quantized, and merging would round it again: name the "
            "unquantized base in its adapter_config.json"
        )
    before = set(vars(model))
    if not (allow_pickle or has_file(os.fspath(name), "adapter_model.safetensors")):
        raise InputError(
            f"cannot use adapter {str(name)!r}: it has no adapter_model.safetensors; if you trust its source, give "
            "--allow-pickle (in Python: allow_pickle=True)"
        )
    try:
        with hub_or_cache(os.fspath(name)):
            wrapped: Any = PeftModel.from_pretrained(model, os.fspath(name))
            if not hasattr(wrapped.base_model, "merge_and_unload"):
                kind = wrapped.active_peft_config.peft_type.value
                raise InputError(f"cannot use adapter {str(name)!r}: one of kind {kind} is no change of weights")
            fit = wrapped.load_adapter(os.fspath(name), "default")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot use adapter {str(name)!r}: {one_line(error)}") from error
    wrong = [*fit.missing_keys, *fit.unexpected_keys]
    if wrong:
        raise InputError(
            f"adapter {str(name)!r} does not fit its base: {len(wrong)} weights are missing or left over, such as "
            f"{sorted(wrong)[0]}; was the base cut or changed since the adapter was trained?"
        )
    return unload(wrapped, before)


def unload(wrapped: Any, before: set[str]) -> nn.Module:
    """The model in a PEFT one, the adapter merged into its weights; `before` are the attributes it had before PEFT."""
    _untie(wrapped.get_base_model())
    merged: nn.Module = wrapped.merge_and_unload(safe_merge=True)
    for left in set(vars(merged)) - before:  # the configs of the adapter
        delattr(merged, left)
    if (unmerged := _unmerged(merged)) is not None:
        raise InputError(
            f"cannot merge the adapter: PEFT leaves {unmerged} as it is: train one that does not target it"
        )
    return merged.requires_grad_(True)


def _untie(model: Any) -> None:
    """Give the output head a weight of its own if it shares that of the embeddings and an adapter adds to one of them:
    merged into the shared weight, it would change the other one, too.

    Raises:
        InputError: if the family's blocks share weights by the same entry of the config.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = any(hasattr(module, "get_base_layer") for module in (embeddings, head))
    if head is None or not adapted or head.weight is not embeddings.weight:
        return
    if len(model.all_tied_weights_keys) > 1:
        raise InputError(
            f"cannot merge the adapter: it changes the embeddings or the output head, and {model.config.model_type} "
            "shares their weight together with those of its blocks, or none: train one that targets neither"
        )
    plain = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    plain.weight = nn.Parameter(plain.weight.detach().clone())
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False


def check_merged(model: nn.Module) -> None:
    """Raise InputError for a model with adapters that are not merged: a cut would leave them at the wrong layers."""
    if (name := _unmerged(model)) is not None:
        place = f" (at {name})" if name else ""
        raise InputError(f"the model has an adapter that is not merged{place}: {REMEDY}")


def _unmerged(model: nn.Module) -> str | None:
    """The first module that is PEFT's."""
    return next((name for name, one in model.named_modules() if type(one).__module__.partition(".")[0] == "peft"), None)
