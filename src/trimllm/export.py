"""Models in and out: load a stock checkpoint, save a trimmed one, and prove that what is on disk is what is in memory.

transformers loads a wrongly cut checkpoint without an exception and with random layers, so nothing leaves
`save_trimmed` unless it was loaded again and gives the same logits, plain and with both kinds of cache.

    from trimllm.export import load_model, save_trimmed
    model = load_model("meta-llama/Llama-3.2-1B")
    report = save_trimmed(model, "out/llama-12")
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

from trimllm.errors import InputError, TrimError
from trimllm.families import family
from trimllm.layout import Layout, whole
from trimllm.surgery import depth, text_config

PREFILL, STEPS = 8, 6
"""Tokens of the verification row that are read at once, and one by one."""


@dataclass(frozen=True)
class Report:
    """What `verify` measured. Differences are the largest between logits of the model in memory and the one on disk."""

    plain: float
    """without a cache"""
    cached: float
    """token by token with DynamicCache"""
    static: float | None
    """with StaticCache; None where the family does not support it"""
    bytes: int
    """size of the weight files"""
    parameters: int
    """number of parameters; tied ones count once"""


# ---- in --------------------------------------------------------------------------------------------------------------


def load_model(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> nn.Module:
    """Load a causal language model, in evaluation mode.

    Args:
        path_or_id: a folder with a checkpoint, or a name on the Hugging Face hub.
        dtype: of the weights; the checkpoint's own by default.
        device: where to put it; CPU by default.
        trust_remote_code: run the model code that the checkpoint brings.
        allow_pickle: also accept weights that are not safetensors. Unpickling can run code: trust the source.

    Raises:
        InputError: if there is no such model, it is not a causal language model, or weights are missing.
    """
    name = str(path_or_id)
    _check_path(name)
    try:
        with _quiet():
            load: Any = AutoModelForCausalLM.from_pretrained
            model, info = load(
                name,
                dtype=dtype or "auto",
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
    except Exception as error:
        raise InputError(_explain(name, error, allow_pickle)) from error
    lost = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    if lost:
        raise InputError(
            f"cannot use model {name!r}: its checkpoint lacks {len(lost)} weights that its config asks for, "
            f"such as {sorted(lost)[0]}"
        )
    if model.config.is_encoder_decoder:
        raise InputError(f"cannot use model {name!r}: it is an encoder-decoder, not a causal language model")
    return model.to(device).eval() if device is not None else model.eval()


def load_tokenizer(path_or_id: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that belongs to a checkpoint.

    Raises:
        InputError: if there is none.
    """
    name = str(path_or_id)
    _check_path(name)
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(f"cannot load a tokenizer from {name!r}: {_line(error)}") from error


def _check_path(name: str) -> None:
    """Fail on a path that does not exist before the hub is asked for a model of that name."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"cannot load {name!r}: the folder has no config.json; give the folder of a checkpoint")
    elif path.exists():
        raise InputError(f"cannot load {name!r}: it is a file; give the folder of a checkpoint")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"cannot load {name!r}: there is no such folder")


def _explain(name: str, error: Exception, allow_pickle: bool) -> str:
    text = _line(error)
    if "Unrecognized configuration class" in text:
        return f"cannot use model {name!r}: it is not a causal language model"
    if "trust_remote_code" in text:
        return f"cannot load model {name!r}: it brings its own code; if you trust it, set trust_remote_code"
    if "safetensors" in text and not allow_pickle:
        return f"cannot load model {name!r}: it has no safetensors weights; if you trust its source, set allow_pickle"
    if "offline" in text.lower() or "couldn't connect" in text.lower() or "connection" in text.lower():
        return f"cannot load model {name!r}: it is not in the local cache and the hub cannot be reached"
    if "is not a local folder" in text or "Repository Not Found" in text:
        return f"cannot load model {name!r}: there is no such folder, and no such public model on the hub"
    return f"cannot load model {name!r}: {text}"


def fingerprint(source: nn.Module | str | Path) -> str:
    """SHA-256 of the weights, by name: of a folder's safetensors files, or of a model's parameters and buffers."""
    digest = hashlib.sha256()
    if isinstance(source, nn.Module):
        for name, tensor in sorted(source.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
    files = _weight_files(Path(source))
    if not files:
        raise InputError(f"cannot take the fingerprint of {str(source)!r}: it has no safetensors files")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


# ---- out -------------------------------------------------------------------------------------------------------------


def save_trimmed(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    layout: Layout | None = None,
    base: str | None = None,
    card: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> Report | None:
    """Write a stock checkpoint: safetensors, config, generation config, tokenizer, and `plan.json`.

    All is written to a temporary folder beside `directory`, loaded again and compared there, then renamed into place.

    Args:
        model: the trimmed model.
        directory: must not exist, be empty, or (with `overwrite`) hold an earlier export.
        tokenizer: tokenizer or processor to save beside the model.
        layout: which original halves the blocks hold, for `plan.json`; by default the model counts as its own original.
        base: name of the model that was trimmed, for `plan.json`.
        card: text of the model card (`README.md`).
        verify: load the checkpoint again and compare logits.
        overwrite: replace an earlier export.

    Returns:
        What the comparison measured, or None without `verify`.

    Raises:
        InputError: if `directory` is in use.
        TrimError: if the disk is full, or the checkpoint differs from the model in memory.
    """
    target = Path(directory)
    _check_target(target, overwrite)
    layout = whole(depth(model)) if layout is None else layout
    if len(layout) != depth(model):
        raise TrimError(f"the layout describes {len(layout)} blocks and the model has {depth(model)}")
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(model, target.parent)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        _write(model, scratch, tokenizer, layout, base, card)
        report = _verify(scratch, model) if verify else None
        scratch.chmod(0o777 & ~_umask())
        _move(scratch, target)
    except TrimError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise TrimError(f"cannot save to {target}: the disk is full") from error
        if isinstance(error, OSError):
            raise TrimError(f"cannot save to {target}: {_line(error)}") from error
        raise
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return report


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"cannot save to {target}: it is a file")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / "plan.json").exists():
        raise InputError(f"cannot save to {target}: the folder is not empty; choose another")
    if not overwrite:
        raise InputError(f"cannot save to {target}: it holds an earlier export; choose another folder or set overwrite")


def _check_space(model: nn.Module, parent: Path) -> None:
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise TrimError(
            f"cannot save to {parent}: the disk is full ({needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free)"
        )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _move(scratch: Path, target: Path) -> None:
    """Rename the finished folder into place; an earlier export stays until the new one is there."""
    if not target.exists():
        scratch.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / "export")
    try:
        scratch.rename(target)
    except BaseException:
        (old / "export").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write(model: nn.Module, folder: Path, tokenizer: Any, layout: Layout, base: str | None, card: str | None) -> None:
    original = getattr(model, "generation_config", None)
    try:
        if original is not None:
            model.generation_config = _portable(original)
        with _quiet():
            model.save_pretrained(folder)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    finally:
        if original is not None:
            model.generation_config = original
    plan: dict[str, Any] = {"base": base, "blocks": [block._asdict() for block in layout]}
    if all(block.attention == block.mlp for block in layout):
        plan["layers"] = [block.attention for block in layout]
    (folder / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    if card is not None:
        (folder / "README.md").write_text(card)


def _portable(generation_config: Any) -> Any:
    """The generation config less what refers to layers of the untrimmed model."""
    portable = copy.deepcopy(generation_config)
    portable.dola_layers = None
    portable.assistant_early_exit = None
    portable.cache_implementation = None
    return portable


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# ---- proof -----------------------------------------------------------------------------------------------------------


def verify(directory: str | Path, model: nn.Module) -> Report:
    """Load the checkpoint in `directory` into a fresh object and compare it with `model`.

    Args:
        directory: a folder written by `save_trimmed`.
        model: the model in memory. The copy is put on the same device, in the checkpoint's dtype.

    Raises:
        TrimError: if a weight is missing, left over or of another shape, or logits differ.
    """
    return _verify(Path(directory), model)


def _verify(folder: Path, model: nn.Module) -> Report:
    fresh = _reload(folder, model)
    tokens = _tokens(model)
    in_memory, on_disk = _logits(model, tokens), _logits(fresh, tokens)
    plain, cached, static = (_distance(in_memory[kind], on_disk[kind]) for kind in ("plain", "cached", "static"))
    spread = float(in_memory["plain"].float().std())  # type: ignore[union-attr]
    limit = spread * (1e-4 if _wide(model) else 2e-2)
    for kind, difference in (("plain", plain), ("cached", cached), ("static-cache", static)):
        if difference is not None and not difference <= limit:
            raise TrimError(
                f"the checkpoint in {folder} is not the model in memory: {kind} logits differ by {difference:.3g}"
            )
    own = _distance(in_memory["plain"], in_memory["cached"])
    if own is None or not own <= spread * (1e-2 if _wide(model) else 0.5):
        raise TrimError(f"the trimmed model decodes wrongly with a cache: logits differ by {own} from those without")
    parameters = {id(parameter): parameter.numel() for parameter in fresh.parameters()}
    size = sum(file.stat().st_size for file in _weight_files(folder))
    assert plain is not None
    assert cached is not None
    return Report(plain, cached, static, size, sum(parameters.values()))


def _reload(folder: Path, model: nn.Module) -> nn.Module:
    device_map = model.__dict__.get("hf_device_map")
    spread_out = device_map if device_map and len(set(device_map.values())) > 1 else None
    try:
        with _quiet():
            fresh, info = type(model).from_pretrained(  # type: ignore[attr-defined]
                folder,
                dtype="auto",
                attn_implementation=model.config._attn_implementation,  # type: ignore[union-attr]
                device_map=spread_out,
                output_loading_info=True,
                use_safetensors=True,
            )
    except Exception as error:
        raise TrimError(f"the checkpoint in {folder} cannot be loaded again: {_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise TrimError(
                f"the checkpoint in {folder} is wrong: {len(info[what])} {what.replace('_', ' ')}, "
                f"such as {sorted(map(str, info[what]))[0]}"
            )
    if spread_out is None:
        fresh = fresh.to(next(model.parameters()).device)
    return fresh.eval()


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
            result["cached"] = _decode(model, tokens, DynamicCache(config=config))  # type: ignore[arg-type]
        except Exception as error:
            raise TrimError(f"the trimmed model cannot decode with a cache: {_line(error)}") from error
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
    pieces = [tokens[:, :PREFILL], *tokens[:, PREFILL:].split(1, dim=1)]
    cached = {family(text_config(model)).cache_argument: cache, "use_cache": True}
    return torch.cat([model(input_ids=piece, **cached).logits for piece in pieces], dim=1)


def _distance(a: torch.Tensor | None, b: torch.Tensor | None) -> float | None:
    if a is None and b is None:
        return None
    if a is None or b is None:
        return float("nan")
    return float((a.float() - b.float()).abs().max())


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no reports: whatever matters is raised."""
    logging = transformers.utils.logging
    hub = huggingface_hub.utils.logging
    level, hub_level, bars = logging.get_verbosity(), hub.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
