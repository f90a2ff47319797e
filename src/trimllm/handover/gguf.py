"""A checkpoint as a GGUF file, which llama.cpp and what is built on it read.

    trimllm export runs/medicine --to gguf --quant q8_0

Tensors are read, rearranged, quantized and written one at a time, so memory holds one of them at most. Norms, biases and
other vectors stay float32; below 8 bits the output matrix is q8_0; rows that no block of 32 divides stay float16.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig

from trimllm import shards
from trimllm.config import ExportConfig
from trimllm.errors import InputError, TrimError, one_line
from trimllm.handover import gguf_families, gguf_tokenizer
from trimllm.handover.gguf_families import Described

if TYPE_CHECKING:
    import gguf

SLICE = 1 << 24
"""Numbers that are converted at a time."""
LARGEST_HALF = 65504.0
"""Of float16, in which also the scales of quantized blocks are stored."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the new file: where it comes from, and its type there."""

    name: str
    source: shards.Tensor
    quant: gguf.GGMLQuantizationType


def write(folder: Path, target: Path, command: ExportConfig) -> str:
    """Write the checkpoint in `folder` to the file `target`; `command.quant` is the type of its matrices.

    Returns:
        What was written, with the rounding of the weights, in one line.

    Raises:
        InputError: if the file exists, the package is missing, or llama.cpp cannot express model or tokenizer.
        TrimError: if it could not be written.
    """
    library = _library()
    if target.exists():
        raise InputError(f"--output {target}: it exists: choose another name")
    config = _config(folder)
    described = gguf_families.describe(config)
    quant = command.quant or "f16"
    planned = plan(folder, config, described, quant)
    keys = gguf_tokenizer.describe(folder, config.vocab_size)
    writer = library.GGUFWriter(None, described.family.arch)
    _add_keys(writer, folder, command, described, keys, quant)
    return _to_file(writer, target, planned, config, described, quant)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("--to gguf needs the package gguf: pip install 'trimllm[gguf]'") from None
    return gguf


def _config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read {folder / 'config.json'}: {one_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"--to gguf: the weights in {folder} are quantized already: export the unquantized checkpoint")
    return config


# ---- which tensors ---------------------------------------------------------------------------------------------------


def plan(folder: Path, config: Any, described: Described, quant: str) -> list[Planned]:
    """The tensors of the file in the order of the checkpoint.

    Raises:
        InputError: if the checkpoint has tensors that llama.cpp has not in this family, or lacks some.
    """
    library = _library()
    arch = {name: arch for arch, name in library.MODEL_ARCH_NAMES.items()}[described.family.arch]
    names = library.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    needed, allowed = described.tensors(config.num_hidden_layers, tied)
    wanted = library.GGMLQuantizationType[quant.upper()]
    planned = []
    for tensor in shards.read(folder)[0]:
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if tied and name == "output.weight" or tensor.name.endswith(".rotary_emb.inv_freq"):
            continue
        if name not in needed | allowed:
            raise InputError(f"--to gguf: llama.cpp has no place for {tensor.name!r} in {described.family.arch} models")
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise InputError(f"--to gguf: {tensor.name!r} is {tensor.dtype}: save the checkpoint as bfloat16 first")
        is_output = name == ("token_embd.weight" if tied else "output.weight")
        planned.append(Planned(name, tensor, _type(library, tensor, wanted, is_output)))
    lost = needed - {tensor.name for tensor in planned}
    if lost:
        raise InputError(f"--to gguf: the checkpoint in {folder} gives no {min(lost)!r}: is it whole?")
    return planned


def _type(library: Any, tensor: shards.Tensor, wanted: Any, is_output: bool) -> Any:
    types = library.GGMLQuantizationType
    if len(tensor.shape) < 2:
        return types.F32
    if is_output and wanted.name.startswith(("Q4", "Q5")):
        wanted = types.Q8_0
    block, _ = library.GGML_QUANT_SIZES[wanted]
    return types.F16 if tensor.shape[-1] % block else wanted


# ---- metadata --------------------------------------------------------------------------------------------------------


def _add_keys(
    writer: Any, folder: Path, command: ExportConfig, described: Described, tokenizer: dict[str, Any], quant: str
) -> None:
    library = _library()
    stem = {"f32": "ALL_F32"}.get(quant, f"MOSTLY_{quant.upper()}")
    about = _about(folder, command, described.metadata["block_count"])
    about |= {"general.file_type": int(library.LlamaFileType[stem]), "general.quantization_version": 2}
    about |= {f"{described.family.arch}.{key}": value for key, value in described.metadata.items()}
    about |= {f"tokenizer.{key}": value for key, value in tokenizer.items()}
    for key, value in about.items():
        kind = library.GGUFValueType.get_type(value)
        if kind is library.GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:  # llama.cpp reads counts and ids as unsigned
            unsigned = kind is library.GGUFValueType.INT32
            writer.add_key_value(key, value, library.GGUFValueType.UINT32 if unsigned else kind)


def _about(folder: Path, command: ExportConfig, depth: int) -> dict[str, Any]:
    """Name, base and license of the model, and which blocks of the base it kept."""
    path = folder / "plan.json"
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    base = kept.get("base")
    base = base.get("name") if isinstance(base, dict) else base
    name = Path(base or command.source).name or str(folder.name)
    keys = {"general.type": "model", "general.name": f"{name}, {depth} blocks" if kept else name}
    if base:
        keys |= {"general.base_model.count": 1, "general.base_model.0.name": name}  # type: ignore[dict-item]
    blocks = kept.get("blocks", [])
    for half in ("attention", "mlp"):
        if blocks:
            keys[f"trimllm.kept.{half}"] = [int(block[half]) for block in blocks]  # type: ignore[assignment]
    card = folder / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card.exists() else None
    license_ = re.search(r"^license: *['\"]?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return keys | ({"general.license": license_[1]} if license_ else {})


# ---- writing ---------------------------------------------------------------------------------------------------------


def _to_file(
    writer: Any, target: Path, planned: list[Planned], config: Any, described: Described, quant: str
) -> str:
    library = _library()
    for tensor in planned:
        writer.add_tensor_info(
            tensor.name, tensor.source.shape, np.dtype(np.float32), _bytes(library, tensor), raw_dtype=tensor.quant
        )
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
        error, total = 0.0, 0.0
        for tensor in planned:
            data, difference, norm = _converted(tensor, config, described)
            writer.write_tensor_data(data)
            if tensor.quant != library.GGMLQuantizationType.F32:
                error, total = error + difference, total + norm
        for values in described.extra.values():
            writer.write_tensor_data(values)
        writer.close()
        _check(library, scratch, planned)
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)
        scratch.rename(target)
        scratch = None
    except OSError as caught:
        full = caught.errno == errno.ENOSPC or "requested and 0 written" in str(caught)
        raise TrimError(f"cannot write {target}: {'the disk is full' if full else one_line(caught)}") from caught
    finally:
        _close(writer)
        if scratch is not None:
            scratch.unlink(missing_ok=True)
    return _line(library, target, planned, quant, error, total, described)


def _bytes(library: Any, tensor: Planned) -> int:
    block, size = library.GGML_QUANT_SIZES[tensor.quant]
    return int(np.prod(tensor.source.shape)) // block * size


def _close(writer: Any) -> None:
    """Close what is still open after a failure; on a full disk closing fails once more."""
    for stream in writer.fout or ():
        try:
            stream.close()
        except OSError:
            pass


def _converted(tensor: Planned, config: Any, described: Described) -> tuple[np.ndarray, float, float]:
    """The data of a tensor as they are written, and the squares of their rounding and of the weights."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    parts: list[np.ndarray] = []
    error, total = 0.0, 0.0
    for values in rows(tensor, config, described):
        if tensor.quant not in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16):
            largest = float(np.abs(values).max(initial=0.0))
            if not largest <= LARGEST_HALF:
                raise InputError(
                    f"--quant: {tensor.source.name!r} holds {largest:.3g}, beyond float16: take --quant bf16 or f32"
                )
        part = quantize(values, tensor.quant)
        parts.append(part)
        if tensor.quant != GGMLQuantizationType.F32:
            error += float(np.square(dequantize(part, tensor.quant).reshape(values.shape) - values).sum(dtype=np.float64))
            total += float(np.square(values).sum(dtype=np.float64))
    return np.concatenate(parts) if len(parts) > 1 else parts[0], error, total


def rows(tensor: Planned, config: Any, described: Described) -> Iterator[np.ndarray]:
    """The tensor in float32 as llama.cpp computes with it, some rows at a time: whole heads where rows change places."""
    family, head = described.family, described.metadata["attention.key_length"]
    shape = tensor.source.shape
    part = tensor.name.rsplit(".", 2)[-2]
    width = int(np.prod(shape[1:]))
    step = max(1, SLICE // (width * head)) * head
    with safe_open(tensor.source.file, framework="pt") as file:
        whole = file.get_slice(tensor.source.name)
        for start in range(0, shape[0], step):
            values = whole[start : start + step].to(torch.float32).numpy()
            if family.permuted and part in ("attn_q", "attn_k"):
                values = interleaved(values, head)
            if family.norm_offset and part.endswith("norm"):
                values = values + np.float32(family.norm_offset)
            if described.query_scale != 1.0 and part == ("attn_q_norm" if family.arch == "gemma3" else "attn_q"):
                values = values * np.float32(described.query_scale)
            yield values


def interleaved(values: np.ndarray, head: int) -> np.ndarray:
    """Rows of heads of `head` rows, (heads * head, ...): row i and row i + head / 2 become neighbours."""
    halves = values.reshape(-1, 2, head // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _check(library: Any, path: Path, planned: list[Planned]) -> None:
    """Read the file's own list of tensors: names, shapes and types must be those that were planned.

    Raises:
        TrimError: if they are not.
    """
    found = {
        tensor.name: (tuple(map(int, reversed(tensor.shape))), tensor.tensor_type)
        for tensor in library.GGUFReader(path).tensors
    }
    for tensor in planned:
        if found.get(tensor.name) != (tensor.source.shape, tensor.quant):
            raise TrimError(f"{tensor.name!r} was not written as planned: {found.get(tensor.name)}")


def _line(
    library: Any, target: Path, planned: list[Planned], quant: str, error: float, total: float, described: Described
) -> str:
    size = target.stat().st_size / 2**20
    text = f"{quant}, {described.metadata['block_count']} blocks, {size:.1f} MiB"
    text += f", weights rounded by {100 * (error / total) ** 0.5:.2g} % (rms)" if total else ", weights exact"
    types = library.GGMLQuantizationType
    wanted = types[quant.upper()]
    stayed = sum(len(t.source.shape) > 1 and t.quant == types.F16 and wanted != types.F16 for t in planned)
    notes = [f"{stayed} matrices stayed f16: their rows are no multiples of 32"] if stayed else []
    if any(tensor.quant == types.Q8_0 != wanted for tensor in planned):
        notes.append("the output matrix is q8_0")
    return "; ".join([text, *notes, *described.notes])
