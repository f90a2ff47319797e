"""A checkpoint as a GGUF file, which llama.cpp and what is built on it read.

    trimllm export runs/medicine --to gguf --quant q8_0

Tensors are read, rearranged, quantized and written one at a time, so memory holds one of them at most. Norms, biases
and other vectors stay float32; below 8 bits the output matrix is q8_0; rows that no block of 32 divides stay float16.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trimllm import files
from trimllm.blocks.layout import HALVES
from trimllm.checkpoints import models
from trimllm.config import ExportConfig
from trimllm.errors import InputError, TrimError, one_line

try:
    import gguf
except ImportError:
    raise InputError("--to gguf needs the package gguf: pip install 'trimllm[gguf]'") from None

from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value

from trimllm.handover import gguf_families, gguf_tensors, gguf_tokenizer
from trimllm.handover.gguf_families import Described
from trimllm.handover.gguf_tensors import Planned
from trimllm.run import licences


def write(folder: Path, target: Path, command: ExportConfig) -> str:
    """Write the checkpoint in `folder` to the file `target`; `command.quant` is the type of its matrices.

    Returns:
        What was written, with the rounding of the weights, in one line.

    Raises:
        InputError: if the file exists, or llama.cpp cannot express model or tokenizer.
        TrimError: if it could not be written.
    """
    if target.exists():
        raise InputError(f"--output {target}: it exists: choose another name")
    own_code = command.trust_remote_code
    config = _config(folder, own_code)
    described = gguf_families.describe(config)
    wanted = Type[(command.quant or "f16").upper()]
    planned = gguf_tensors.plan(folder, config, described, wanted)
    tokens = gguf_tokenizer.describe(folder, config.vocab_size, trust_remote_code=own_code)
    keys = _about(folder, command, config.num_hidden_layers)
    keys |= {"general.file_type": _file_type(wanted), "general.quantization_version": gguf.GGML_QUANT_VERSION}
    keys |= {f"{described.family.arch}.{key}": value for key, value in described.metadata.items()}
    keys |= {f"tokenizer.{key}": value for key, value in tokens.items()}
    rounding = _to_file(target, keys, planned, described)
    size = f"{wanted.name.lower()}, {config.num_hidden_layers} blocks, {target.stat().st_size / 2**20:.1f} MiB"
    weights = f"weights rounded by {100 * rounding:.2g} % (rms)" if rounding else "weights exact"
    return "; ".join([f"{size}, {weights}", *_exceptions(planned, wanted), *described.notes])


def _config(folder: Path, trust_remote_code: bool) -> Any:
    config = models.config_of(str(folder), trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"--to gguf: the weights in {folder} are quantized already: export the unquantized checkpoint")
    return config


def _exceptions(planned: list[Planned], wanted: Type) -> list[str]:
    """What is not of the type that was asked for, in words."""
    matrices = [tensor.quant for tensor in planned if len(tensor.source.shape) > 1 and tensor.quant != wanted]
    halves = matrices.count(Type.F16)
    notes = [f"{halves} matrices stayed f16: their rows are no multiples of 32"] if halves else []
    return notes + (["the output matrix is q8_0"] if Type.Q8_0 in matrices else [])


def _file_type(wanted: Type) -> int:
    return int(gguf.LlamaFileType["ALL_F32" if wanted == Type.F32 else f"MOSTLY_{wanted.name}"])


def _about(folder: Path, command: ExportConfig, depth: int) -> dict[str, Any]:
    """Name, base and licence of the model, and which blocks of the base it kept."""
    kept = files.read_json(folder / "plan.json")
    base = kept.get("base")
    base = base.get("name") if isinstance(base, dict) else base
    name = Path(base or command.source).name or folder.name
    keys: dict[str, Any] = {"general.type": "model", "general.name": f"{name}, {depth} blocks" if kept else name}
    if base:
        keys |= {"general.base_model.count": 1, "general.base_model.0.name": name}
    for half in HALVES if kept.get("blocks") else ():
        keys[f"trimllm.kept.{half}"] = [int(block[half]) for block in kept["blocks"]]
    card = folder / "README.md"
    stated = licences.read_card(card).data.license if card.exists() else None
    return keys | ({"general.license": stated} if isinstance(stated, str) else {})


def _add(writer: Any, key: str, value: Any) -> None:
    kind = Value.get_type(value)
    if kind is Value.ARRAY:
        writer.add_array(key, value)
    else:  # llama.cpp reads counts and ids as unsigned
        writer.add_key_value(key, value, Value.UINT32 if kind is Value.INT32 else kind)


def _to_file(target: Path, keys: dict[str, Any], planned: list[Planned], described: Described) -> float:
    """Write beside the target, check, rename; returns the rounding of the weights, relative to them (rms).

    Raises:
        InputError: if weights do not fit the type.
        TrimError: if the file could not be written.
    """
    writer = gguf.GGUFWriter(None, described.family.arch)
    for key, value in keys.items():
        _add(writer, key, value)
    for tensor in planned:
        size = gguf_tensors.size(tensor)
        writer.add_tensor_info(tensor.name, tensor.source.shape, np.dtype(np.float32), size, raw_dtype=tensor.quant)
    for name, values in described.extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        scratch = Path(path)
        writer.write_header_to_file(scratch)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        error = total = 0.0
        for tensor in planned:
            data, difference, norm = gguf_tensors.converted(tensor, described)
            writer.write_tensor_data(data)
            error, total = error + difference, total + norm
        for values in described.extra.values():
            writer.write_tensor_data(values)
        writer.close()
        _check(scratch, planned)
        scratch.chmod(0o666 & ~files.umask())
        scratch.rename(target)
        scratch = None
    except OSError as caught:
        # numpy reports a full disk without its number
        full = caught.errno in files.FULL or "requested and" in str(caught)
        raise TrimError(f"cannot write {target}: {'the disk is full' if full else one_line(caught)}") from caught
    finally:
        for stream in writer.fout or ():
            with contextlib.suppress(OSError):  # on a full disk closing fails once more
                stream.close()
        if scratch is not None:
            scratch.unlink(missing_ok=True)
    return math.sqrt(error / total) if total else 0.0


def _check(path: Path, planned: list[Planned]) -> None:
    """Read the file's own list of tensors: names, shapes and types must be those that were planned.

    Raises:
        TrimError: if they are not.
    """
    found = {t.name: (tuple(map(int, reversed(t.shape))), t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    for tensor in planned:
        if found.get(tensor.name) != (tensor.source.shape, tensor.quant):
            raise TrimError(f"{tensor.name!r} was not written as planned: {found.get(tensor.name)}")
