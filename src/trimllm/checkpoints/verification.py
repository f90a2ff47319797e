"""Prove that what is on disk is what is in memory.

transformers loads a wrongly cut checkpoint without an exception and with random layers, so a checkpoint counts as saved
only if it was loaded again and gives the same logits, plain and with both kinds of cache.

    from trimllm import verify
    report = verify("out/llama-12", model)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DynamicCache, StaticCache

from trimllm.blocks.decoder import text_config
from trimllm.blocks.families import family
from trimllm.checkpoints.loading import check_path, quiet, weight_files
from trimllm.errors import TrimError, one_line

PREFILL, STEPS = 6, 3
"""Tokens of the verification row that are read at once, and one by one."""


@dataclass(frozen=True)
class Report:
    """What `verify` measured. Differences are the largest between logits of the model in memory and the one on disk."""

    plain: float
    """without a cache"""
    cached: float
    """token by token with DynamicCache (or the family's own kind)"""
    static: float | None
    """with StaticCache; None where the family does not support it"""
    bytes: int
    """size of the weight files"""
    parameters: int
    """number of parameters; tied ones count once"""


def verify(directory: str | Path, model: nn.Module) -> Report:
    """Load the checkpoint in `directory` into a fresh object and compare it with `model`.

    Args:
        directory: a folder written by `save_trimmed`.
        model: the model in memory. The copy is put on the same device, in the checkpoint's dtype.

    Raises:
        InputError: if there is no checkpoint in `directory`.
        TrimError: if a weight is missing, left over or of another shape, or logits differ.
    """
    folder = Path(directory).expanduser()
    check_path(str(folder), local=True)
    device = next(model.parameters()).device
    if device.type != "cuda" or _spread_out(model) or weight_bytes(model) * 1.2 < torch.cuda.mem_get_info(device)[0]:
        return _compare(folder, model, _reload(folder, model))
    model.to("cpu")  # the GPU has no room for a second copy
    try:
        return _compare(folder, model, _reload(folder, model))
    finally:
        model.to(device)


def _compare(folder: Path, model: nn.Module, fresh: nn.Module) -> Report:
    tokens = _tokens(model)
    with _unrounded_buffers(model, fresh):
        in_memory = _logits(model, tokens)
    on_disk = _logits(fresh, tokens)
    plain, cached, static = (_distance(in_memory[kind], on_disk[kind]) for kind in ("plain", "cached", "static"))
    spread = float(in_memory["plain"].float().std())  # type: ignore[union-attr]
    if not math.isfinite(spread):
        raise TrimError("the model to save gives logits that are no finite numbers: look for NaN in its base's weights")
    limit = spread * (1e-4 if _wide(model) else 2e-2)
    for kind, difference in (("plain", plain), ("cached", cached), ("static-cache", static)):
        if difference is not None and not difference <= limit:
            raise TrimError(
                f"the checkpoint in {folder} is not the model in memory: {kind} logits differ by {difference:.3g}"
            )
    own = _distance(in_memory["plain"], in_memory["cached"])
    assert own is not None
    if not own <= spread * (1e-2 if _wide(model) else 0.5):
        raise TrimError(
            f"the trimmed model decodes wrongly with a cache: logits differ by {own:.3g} from those without: try "
            f"another release of transformers than {transformers.__version__}"
        )
    parameters = {id(parameter): parameter.numel() for parameter in fresh.parameters()}
    size = sum(file.stat().st_size for file in weight_files(folder))
    assert plain is not None
    assert cached is not None
    return Report(plain, cached, static, size, sum(parameters.values()))


def _spread_out(model: nn.Module) -> dict[str, Any] | None:
    """The device map of a model that lies on several devices."""
    device_map = model.__dict__.get("hf_device_map")
    return device_map if device_map and len(set(device_map.values())) > 1 else None


def weight_bytes(model: nn.Module) -> int:
    """Size of the model's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _reload(folder: Path, model: nn.Module) -> nn.Module:
    spread_out = _spread_out(model)
    try:
        with quiet():
            fresh, info = type(model).from_pretrained(  # type: ignore[attr-defined]
                folder,
                dtype="auto",
                attn_implementation=model.config._attn_implementation,  # type: ignore[union-attr]
                device_map=spread_out,
                output_loading_info=True,
                use_safetensors=True,
            )
    except Exception as error:
        raise TrimError(f"the checkpoint in {folder} cannot be loaded again: {one_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise TrimError(
                f"the checkpoint in {folder} is wrong: {len(info[what])} {what.replace('_', ' ')}, "
                f"such as {sorted(map(str, info[what]))[0]}"
            )
    if spread_out is None:
        fresh = fresh.to(next(model.parameters()).device)
    return fresh.eval()


@contextmanager
def _unrounded_buffers(model: nn.Module, fresh: nn.Module) -> Iterator[None]:
    """Lend the model the fresh copy's buffers wherever its own are the same, rounded.

    `model.to(torch.bfloat16)` rounds buffers that no checkpoint holds, such as the frequencies of RoPE; a load computes
    them anew in float32.
    """
    copies = dict(fresh.named_modules())
    lent: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for path, module in model.named_modules():
            for name in module._non_persistent_buffers_set:
                own, other = module._buffers.get(name), copies[path]._buffers.get(name) if path in copies else None
                if own is None or other is None or own.dtype == other.dtype or own.shape != other.shape:
                    continue
                if torch.equal(own, other.to(own)):
                    lent.append((module._buffers, name, own))
                    module._buffers[name] = other.to(own.device)
        yield
    finally:
        for buffers, name, own in lent:
            buffers[name] = own


def _wide(model: nn.Module) -> bool:
    return all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())


def _tokens(model: nn.Module) -> torch.Tensor:
    """A fixed row of ordinary tokens: (1, PREFILL + STEPS), on the device of the embedding."""
    config = text_config(model)
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    special = {
        value
        for part in (config, model.config)
        for name, value in part.__dict__.items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    ordinary = [token for token in range(min(embedding.shape[0], 4096)) if token not in special]
    chosen = torch.randint(len(ordinary), (1, PREFILL + STEPS), generator=torch.Generator().manual_seed(0))
    return torch.tensor(ordinary)[chosen].to(embedding.device)


@torch.no_grad()
def _logits(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Logits (1, seq, vocab) without a cache, with a growing one, and with a static one (None: not supported)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    config = model.config
    try:
        result: dict[str, torch.Tensor | None] = {"plain": model(input_ids=tokens, use_cache=False).logits}
        try:
            own = family(text_config(model)).own_cache
            cache = None if own else DynamicCache(config=config)  # type: ignore[arg-type]
            result["cached"] = _decode(model, tokens, cache)
        except Exception as error:
            raise TrimError(f"the trimmed model cannot decode with a cache: {one_line(error)}") from error
        try:
            static = StaticCache(config=config, max_cache_len=tokens.shape[1] + 2)  # type: ignore[arg-type]
            result["static"] = _decode(model, tokens, static)
        except Exception:  # not every family runs with a static cache, trimmed or not
            result["static"] = None
        return result
    finally:
        for module in training:
            module.training = True


def _decode(model: nn.Module, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits (1, seq, vocab), a few tokens and then one by one, with `cache`; None: with the one the model makes."""
    name = family(text_config(model)).cache_argument
    logits = []
    for piece in [tokens[:, :PREFILL], *tokens[:, PREFILL:].split(1, dim=1)]:
        output = model(input_ids=piece, use_cache=True, **{name: cache})
        cache = output[name] if cache is None else cache
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _distance(a: torch.Tensor | None, b: torch.Tensor | None) -> float | None:
    if a is None and b is None:
        return None
    if a is None or b is None:
        return float("nan")
    return float((a.float() - b.float()).abs().max())
