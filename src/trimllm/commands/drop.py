"""`trimllm drop`: surgery only, in memory or from folder to folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from trimllm import config
from trimllm.blocks import decoder, surgery
from trimllm.blocks.layout import positions, whole, without
from trimllm.checkpoints import export, folders, loading
from trimllm.checkpoints.origin import Origin
from trimllm.checkpoints.streaming import drop_on_disk
from trimllm.commands import shared
from trimllm.console import Console
from trimllm.errors import InputError
from trimllm.run import licences, model_card


def run(command: config.DropConfig) -> None:
    """Surgery only: the model as saved, less some layers."""
    if not command.layers:
        raise InputError("--layers names no layer: give at least one, such as --layers 3,7")
    folders.check_target(command.output, source=loading.path_of(command.model))
    if command.streaming:
        _drop_on_disk(command)
        return
    loaded = shared.load(command)
    if getattr(loaded.model, "is_quantized", False):
        raise InputError(
            f"--model {command.model} is quantized: add --streaming, which moves its weights as they are, or drop from "
            "the unquantized model"
        )
    depth = decoder.depth(loaded.model)
    dropped = positions(command.layers, depth)
    surgery.drop_layers(loaded.model, dropped)
    layout, base = without(whole(depth), dropped), Origin.of(command.model)
    report = export.save_trimmed(
        loaded.model,
        command.output,
        tokenizer=loaded.tokenizer,
        layout=layout,
        base=base.record(),
        card=model_card.cut(base, layout, depth),
        companions=licences.terms(base),
    )
    compared = f"reloaded and compared ({shared.differences(report)})"
    print(f"{command.output}: {depth - len(dropped)} of {depth} layers, {compared}")


def _drop_on_disk(command: config.DropConfig) -> None:
    source = loading.path_of(command.model)
    if (Path(source) / "adapter_config.json").exists():
        raise InputError(
            f"--model {command.model} is an adapter, and --streaming only moves tensors: leave it out, or merge the "
            "adapter into its base first"
        )
    if not Path(source).is_dir():
        raise InputError(
            f"--model {command.model}: --streaming cuts a directory on this disk: download the model first"
        )
    with Console().progress("bytes") as show:
        done = drop_on_disk(
            source,
            command.layers,
            command.output,
            max_shard_size=command.max_shard_size or "5GB",
            trust_remote_code=command.trust_remote_code,
            base=command.model,
            card=partial(model_card.cut, Origin(command.model)),
            progress=show,
        )
    if done.unused:
        few = f"{len(done.unused)} tensor{'s' if len(done.unused) > 1 else ''}"
        Console().say(f"  {few} for which the causal LM has no use, such as {done.unused[0]}: left out")
    print(
        f"{command.output}: {len(done.kept)} of {done.depth} layers, {done.bytes / 1e9:.3f} GB in "
        f"{done.shards} file(s), names, shapes and config checked"
    )
