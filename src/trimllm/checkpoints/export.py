"""Models out: write a trimmed model as a stock checkpoint that appears whole, proved, or not at all.

from trimllm import save_trimmed
report = save_trimmed(model, "out/llama-12")
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trimllm.blocks import adapters
from trimllm.blocks.decoder import depth
from trimllm.blocks.layout import Layout, as_layout, plan_record
from trimllm.blocks.surgery import layout_of
from trimllm.checkpoints import folders, verification
from trimllm.checkpoints.loading import plain_generation, quiet
from trimllm.checkpoints.streaming import REFERS_TO_LAYERS
from trimllm.checkpoints.verification import Report, weight_bytes
from trimllm.errors import InputError, TrimError


def save_trimmed(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    layout: Iterable[Any] | None = None,
    base: str | dict[str, Any] | None = None,
    card: str | None = None,
    companions: Sequence[Path] = (),
    verify: bool = True,
    overwrite: bool = False,
) -> Report | None:
    """Write a stock checkpoint: safetensors, config, generation config, tokenizer, and `plan.json`.

    All is written to a temporary folder beside `directory`, loaded again and compared there, then renamed into place.
    An earlier export stays until the new one is there.

    Args:
        model: the trimmed model.
        directory: must not exist, be empty, or (with `overwrite`) hold an earlier export.
        tokenizer: tokenizer or processor to save beside the model.
        layout: which original halves the blocks hold, for `plan.json`, as `apply_layout` takes it, or as it stands
            there; by default what is known of cuts since the model was made or loaded (see `surgery.layout_of`).
        base: name (or name and fingerprint) of the model that was trimmed, for `plan.json`.
        card: text of the model card (`README.md`).
        companions: files to copy beside it: the base's licence.
        verify: load the checkpoint again and compare logits.
        overwrite: replace an earlier export.

    Returns:
        What the comparison measured, or None without `verify`.

    Raises:
        InputError: if `directory` is in use, cannot be written, or holds (or lies in) the model's own folder; or if the
            model is quantized or has an adapter that is not merged.
        TrimError: if the disk is full, or the checkpoint differs from the model in memory.
    """
    folders.check_target(directory, source=getattr(model, "name_or_path", None), overwrite=overwrite)
    adapters.check_merged(model)
    if getattr(model, "is_quantized", False):
        raise InputError(
            "a quantized model cannot be saved after a cut: cut the unquantized one and quantize the result, or cut "
            "the files with trimllm drop --streaming"
        )
    layout = layout_of(model) if layout is None else as_layout(layout)
    if len(layout) != depth(model):
        raise TrimError(f"the layout describes {len(layout)} blocks and the model has {depth(model)}")
    with folders.appearing(directory, needed=weight_bytes(model), overwrite=overwrite) as folder:
        _write(model, folder, tokenizer, layout, base, card)
        for file in companions:
            shutil.copy(file, folder)
        return verification.verify(folder, model) if verify else None


def _write(model: nn.Module, folder: Path, tokenizer: Any, layout: Layout, base: Any, card: str | None) -> None:
    with quiet():
        save_model(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    (folder / "plan.json").write_text(json.dumps(plan_record(layout, base), indent=2) + "\n", encoding="utf-8")
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """`model.save_pretrained(folder, **options)`, without what generation settings say about layers.

    transformers refuses to save settings that contradict each other, as some are published (a temperature without
    sampling): before 5.23 all of them, later those that were changed. So it saves its own, and those of the model are
    written here.
    """
    with plain_generation(model) as own:
        model.save_pretrained(folder, **options)
    file = folder / "generation_config.json"
    if own is not None and file.exists():
        kept = json.loads(own.to_json_string())
        kept = {name: value for name, value in kept.items() if name not in (*REFERS_TO_LAYERS, "compile_config")}
        file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
