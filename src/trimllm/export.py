"""Models out: write a trimmed model as a stock checkpoint that appears whole, proved, or not at all.

from trimllm.export import save_trimmed
report = save_trimmed(model, "out/llama-12")
"""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from trimllm import verification
from trimllm.decoder import depth
from trimllm.errors import InputError, TrimError, one_line
from trimllm.layout import Layout, whole
from trimllm.loading import quiet
from trimllm.verification import Report, weight_bytes


def save_trimmed(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    layout: Layout | None = None,
    base: str | dict[str, Any] | None = None,
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
        base: name (or name and fingerprint) of the model that was trimmed, for `plan.json`.
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
    check_target(target, overwrite=overwrite)
    layout = whole(depth(model)) if layout is None else layout
    if len(layout) != depth(model):
        raise TrimError(f"the layout describes {len(layout)} blocks and the model has {depth(model)}")
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(model, target.parent)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        _write(model, scratch, tokenizer, layout, base, card)
        report = verification.verify(scratch, model) if verify else None
        scratch.chmod(0o777 & ~_umask())
        _move(scratch, target)
    except TrimError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise TrimError(f"cannot save to {target}: the disk is full") from error
        if isinstance(error, OSError):
            raise TrimError(f"cannot save to {target}: {one_line(error)}") from error
        raise
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return report


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Whether an export may be written there; nothing is written.

    Raises:
        InputError: if it is a file, or a directory in use that is not (with `overwrite`) an earlier export.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"--output {target}: it is a file: name a directory")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / "plan.json").exists():
        raise InputError(f"--output {target}: the directory is not empty: choose another one")
    if not overwrite:
        raise InputError(
            f"--output {target}: the directory is not empty: choose another one (it holds an earlier export)"
        )


def _check_space(model: nn.Module, parent: Path) -> None:
    needed = weight_bytes(model)
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


def _write(model: nn.Module, folder: Path, tokenizer: Any, layout: Layout, base: Any, card: str | None) -> None:
    original = getattr(model, "generation_config", None)
    try:
        if original is not None:
            model.generation_config = _portable(original)
        with quiet():
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
