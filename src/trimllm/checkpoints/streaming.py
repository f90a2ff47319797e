"""Cut a checkpoint that is larger than memory: from folder to folder, tensor by tensor, without loading the model.

    from trimllm.checkpoints.streaming import drop_on_disk
    drop_on_disk(Path("Llama-3.1-70B"), [40, 41, 42], Path("trimmed"))

Bytes are copied, so any dtype stays what it is. Which names on disk are the decoder blocks, and whether the new
checkpoint fits its config, transformers says itself: it "loads" names and shapes on the meta device, reading nothing.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimllm.blocks import config_rules, families
from trimllm.blocks.decoder import blocks, depth, text_config, text_decoder
from trimllm.blocks.layout import Layout, places, plan_record, positions, whole, without
from trimllm.blocks.legality import refusal
from trimllm.checkpoints import belongings, folders, models, shards
from trimllm.checkpoints.dtypes import FLOATS
from trimllm.checkpoints.loading import check_folder, no_safetensors, quiet
from trimllm.checkpoints.renumbering import Numbering, list_paths
from trimllm.checkpoints.shards import Planned, Tensor
from trimllm.checkpoints.skeleton import (
    QUANTIZATION_KEYS,
    Fit,
    Skeleton,
    holders,
    model_class,
    plain_config,
    problem_of,
    quantization,
)
from trimllm.errors import InputError, TrimError, one_line

WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".safetensors", ".h5", ".msgpack", ".onnx"}
REFERS_TO_LAYERS = ("dola_layers", "assistant_early_exit", "cache_implementation")
"""Entries of a generation config that refer to layers of the model before the cut."""
UNUSED = (r"(^|\.)mtp[._]", r"rotary_emb\.inv_freq$")
"""What the causal LM does not have: heads for further tokens (their count becomes 0), RoPE frequencies of old files."""


@dataclass(frozen=True)
class Streamed:
    """What `drop_on_disk` wrote."""

    kept: tuple[int, ...]
    """the layers that remain, by their old numbers"""
    depth: int
    """number of layers before the cut"""
    shards: int
    tensors: int
    bytes: int
    """size of the tensors"""
    largest: int
    """bytes of the largest tensor of the source"""
    unused: tuple[str, ...]
    """tensors outside the dropped layers that were left out, since the causal LM has no use for them"""


Progress = Callable[[int, int, str], None]


@quiet()
def drop_on_disk(
    source: str | Path,
    layers: Iterable[int],
    target: str | Path,
    *,
    max_shard_size: int | str = 5 * 10**9,
    trust_remote_code: bool = False,
    base: str | dict[str, Any] | None = None,
    card: Callable[[Layout, int], str] | None = None,
    progress: Progress | None = None,
) -> Streamed:
    """Remove whole decoder blocks from a checkpoint on disk; the result is what load, drop and save would write.

    Memory stays below twice the largest tensor and 1 GiB. What is written appears in `target` whole or not at all.

    Args:
        source: folder of a checkpoint with safetensors weights; it is only read.
        layers: indices of the blocks to remove, 0-based; negative ones count from the end.
        target: must not exist or be empty.
        max_shard_size: bytes per file, or a text such as "5GB"; a larger tensor gets a file of its own.
        trust_remote_code: run model code that comes with the checkpoint.
        base: name (or name and fingerprint) of the model that was trimmed, for `plan.json`; by default `source`.
        card: gives the text of the model card (`README.md`), from which blocks remain and how many there were.
        progress: called with bytes done, bytes in all, and the tensor's name.

    Raises:
        InputError: if the source is unusable, the target in use, a layer does not exist, or the cut cannot be exact.
        TrimError: if the disk is full, or what was written does not fit the new config.
    """
    source, target, limit = Path(source).expanduser(), Path(target).expanduser(), shards.parse_size(max_shard_size)
    folders.check_target(target, source=source)
    check_folder(source)
    config = models.config_of(str(source), trust_remote_code=trust_remote_code)
    if not shards.present(source):
        raise InputError(no_safetensors(str(source)))
    tensors, metadata = shards.read(source)
    old = Skeleton(model_class(config, trust_remote_code), plain_config(config), tensors)
    missing = old.fit
    if (missing.lost or missing.shapes) and not quantization(config):
        lost = sorted(missing.lost | missing.shapes)
        raise InputError(f"cannot use {source}: {len(lost)} weights are not as its config asks for, such as {lost[0]}")
    count = depth(old.model)
    dropped = positions(layers, count)
    if not dropped:
        raise InputError("no layer to drop was named: give at least one")
    layout = without(whole(count), dropped)
    reason = refusal(old.model, layout)
    if reason:
        raise InputError(reason)
    numbering = _numbering(old, tensors, missing, layout, metadata)
    unused = _unused(old, tensors, missing, numbering)
    plan = _plan(old, [tensor for tensor in tensors if tensor.name not in unused], numbering)
    new = _new_config(config, layout, numbering, old)
    expected = missing.renamed(numbering)
    problem = problem_of(Skeleton(old.kind, plain_config(new), plan), expected)
    if problem:
        raise InputError(f"this checkpoint cannot be cut as it is stored: without these layers it {problem}")

    total = sum(tensor.size for tensor in plan)
    groups = shards.grouped(plan, limit)
    with folders.appearing(target, needed=total) as scratch:
        done = 0

        def wrote(size: int, name: str) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total, name)

        shards.write(scratch, groups, wrote)
        new.save_pretrained(scratch)
        record = plan_record(layout, str(source) if base is None else base)
        (scratch / "plan.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _copy_files(source, scratch, numbering, trust_remote_code)
        if card is not None:
            (scratch / "README.md").write_text(card(layout, count), encoding="utf-8")
        _check_written(scratch, old.kind, plan, expected, trust_remote_code)
    kept = tuple(numbering.kept)
    largest = max(tensor.size for tensor in tensors)
    return Streamed(kept, count, len(groups), len(plan), total, largest, tuple(sorted(unused)))


def _new_config(config: Any, layout: Layout, numbering: Numbering, old: Skeleton) -> Any:
    new = copy.deepcopy(config)
    config_rules.update_config(new.get_text_config(decoder=True), layout)
    new.architectures = [old.kind.__name__]
    for holder in holders(new):
        for key in QUANTIZATION_KEYS:
            if holder.__dict__.get(key):
                holder.__dict__[key] = numbering.renumber(holder.__dict__[key])
    return new


def _numbering(
    old: Skeleton, tensors: Sequence[Tensor], before: Fit, layout: Layout, metadata: dict[str, str]
) -> Numbering:
    """How names on disk are renumbered. The list of blocks is the path without whose dropped layers transformers would
    miss those layers and nothing else."""
    kept = tuple(places(layout, "attention"))
    inside = old.path(blocks(old.model))
    dropped = {f"{inside}.{i}" for i in range(depth(old.model)) if i not in kept}
    rows = "|".join(map(re.escape, sorted(dropped)))
    found = []
    candidates = list_paths([tensor.name for tensor in tensors], depth(old.model))
    for path in candidates:
        numbering = Numbering((path,), kept)
        lost = old.load([tensor for tensor in tensors if numbering.rename(tensor.name) is not None]).lost - before.lost
        layers = {match[0] for name in lost if (match := re.match(rf"({rows})(?=\.)", name))}
        if layers == dropped and all(re.match(rf"({rows})\.", name) for name in lost):
            found.append(path)
    if len(found) != 1:
        seen = ", ".join(candidates) or "none"
        raise InputError(
            f"cannot tell which tensors on disk are the {depth(old.model)} layers of {inside!r} (lists of that length: "
            f"{seen}): load the model and cut it in memory"
        )
    names = {tensor.name for tensor in tensors}
    modules = {name.rpartition(".")[0] for name in names} | {name for name, _ in old.model.named_modules() if name}
    modules |= {found[0] + name[len(inside) :] for name in modules if name.startswith(f"{inside}.")}
    for key in metadata:
        if re.search(r"\.\d+\.", key):
            raise InputError(f"the files' metadata names layers ({key}): trim the unquantized model and quantize that")
    return Numbering(tuple(dict.fromkeys((*found, inside))), kept, frozenset(modules))


def _unused(old: Skeleton, tensors: Sequence[Tensor], before: Fit, numbering: Numbering) -> set[str]:
    """Names of tensors that the model class ignores on load, and extra layers after the last one."""
    count = depth(old.model)
    unused = {tensor.name for tensor in tensors if (numbering.layer(tensor.name) or 0) >= count}
    for pattern in sorted({*UNUSED, *(getattr(old.model, "_keys_to_ignore_on_load_unexpected", None) or ())}):
        names = {tensor.name for tensor in tensors if re.search(pattern, tensor.name)} - unused
        if names and old.load([tensor for tensor in tensors if tensor.name not in names]) == before:
            unused |= names
    return unused


def _plan(old: Skeleton, tensors: Sequence[Tensor], numbering: Numbering) -> list[Planned]:
    """The tensors of the new checkpoint: renamed; those with one slice per layer cut; scales of GPT-2 folded in."""
    per_layer = _per_layer(old, tensors)
    plan = []
    for tensor in tensors:
        name = numbering.rename(tensor.name)
        if name is None:
            continue
        if tensor.name in per_layer:
            plan.append(shards.sliced(tensor, per_layer[tensor.name], depth(old.model), numbering.kept))
        else:
            plan.append(_folded(old, tensor, name, numbering) or shards.renamed(tensor, name))
    return plan


def _per_layer(old: Skeleton, tensors: Sequence[Tensor]) -> dict[str, int]:
    """Names on disk of weights with one slice per layer -> the dimension of the slices."""
    decoder = text_decoder(old.model)
    found = {}
    for name in families.family(text_config(old.model)).per_layer_weights:
        module = decoder._modules.get(name)
        if module is None:
            continue
        names = [tensor.name for tensor in tensors if f".{name}." in f".{tensor.name}"]
        if len(names) != 1 or not names[0].endswith(f"{name}.weight"):
            raise InputError(
                f"{name} holds one slice per layer, and cannot be cut as it is stored "
                f"({', '.join(names) or 'nowhere'}): trim the unquantized model"
            )
        found[names[0]] = 1 if isinstance(module, nn.Embedding) else 0
    return found


def _folded(old: Skeleton, tensor: Tensor, name: str, numbering: Numbering) -> Planned | None:
    """The query projection of a GPT-2 that divides scores by (layer + 1), times the ratio of old and new divisor."""
    config = text_config(old.model)
    rule = families.family(config).inverse_scale
    layer = numbering.layer(tensor.name)
    if rule is None or layer is None or not getattr(config, rule[0], False):
        return None
    projection = f".{layer}.{rule[1]}.{rule[2]}."
    if projection not in tensor.name:
        return None
    if not tensor.name.endswith((f"{projection}weight", f"{projection}bias")) or tensor.dtype not in FLOATS:
        raise InputError(
            f"{tensor.name} must be rescaled for this cut, and cannot be in dtype {tensor.dtype}: "
            "trim the unquantized model"
        )
    width: Any = blocks(old.model)[layer].get_submodule(rule[1]).embed_dim
    ratio = (numbering.places[layer] + 1) / (layer + 1)

    def chunks() -> Iterator[bytes]:
        raw = bytearray().join(tensor.chunks())
        torch.frombuffer(raw, dtype=FLOATS[tensor.dtype]).view(tensor.shape)[..., :width] *= ratio
        yield bytes(raw)

    return Planned(name, tensor.dtype, tensor.shape, tensor.size, chunks)


def _copy_files(source: Path, folder: Path, numbering: Numbering, code: bool) -> None:
    others = WEIGHTS if code else {*WEIGHTS, ".py"}
    files = belongings.found(source, (*belongings.TOKENIZERS, *belongings.TERMS, *(belongings.CODE if code else ())))
    belongings.copy([file for file in files if file.suffix not in others], source, folder)
    generation = _json(source / "generation_config.json")
    if generation is not None:
        portable = {key: value for key, value in generation.items() if key not in REFERS_TO_LAYERS}
        _write_json(folder / "generation_config.json", portable)
    for name in belongings.QUANTIZATION:
        if (quantization := _json(source / name)) is not None:
            _write_json(folder / name, numbering.renumber(quantization))


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {one_line(error)}") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_written(folder: Path, kind: Any, plan: Sequence[Planned], expected: Fit, trust_remote_code: bool) -> None:
    """Read config and headers again: every tensor of the plan, and no other, and transformers takes them."""
    written, _ = shards.read(folder)
    facts = [{(t.name, t.dtype, t.shape, t.size) for t in tensors} for tensors in (plan, written)]
    if facts[0] != facts[1]:
        raise TrimError(f"the files in {folder} do not hold what was written: check the disk")
    config = models.config_of(str(folder), trust_remote_code=trust_remote_code)
    problem = problem_of(Skeleton(kind, plain_config(config), written), expected)
    if problem:
        raise TrimError(f"the new checkpoint is wrong: it {problem}")
