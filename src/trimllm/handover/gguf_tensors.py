"""Tensors of a checkpoint as llama.cpp holds them: other names, rows in another order, another type."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open

from trimllm.checkpoints import shards
from trimllm.errors import InputError
from trimllm.handover.gguf_families import Described

SLICE = 1 << 24
"""Numbers that are converted at a time."""
LARGEST_HALF = 65504.0
"""Largest number of float16, in which also the scales of quantized blocks are stored."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the new file: where it comes from, and its type there."""

    name: str
    source: shards.Tensor
    quant: Type


def plan(folder: Path, config: Any, described: Described, wanted: Type) -> list[Planned]:
    """The tensors of the file in the order of the checkpoint, matrices in the type `wanted` where it can hold them.

    Raises:
        InputError: if the checkpoint has tensors that llama.cpp has not in this family, or lacks some.
    """
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[described.family.arch]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    stored = {t: names.get_name(t.name, try_suffixes=(".weight", ".bias")) for t in shards.read(folder)[0]}
    tied = bool(config.tie_word_embeddings) and not _own_head({name: tensor for tensor, name in stored.items()})
    needed, allowed = described.tensors(config.num_hidden_layers, tied)
    planned = []
    for tensor, name in stored.items():
        if (tied and name == "output.weight") or tensor.name.endswith(".rotary_emb.inv_freq"):
            continue
        if name not in needed | allowed:
            raise InputError(f"--to gguf: llama.cpp has no place for {tensor.name!r} in {described.family.arch} models")
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise InputError(f"--to gguf: {tensor.name!r} is {tensor.dtype}: save the checkpoint as bfloat16 first")
        is_output = name == ("token_embd.weight" if tied else "output.weight")
        planned.append(Planned(name, tensor, _type(tensor, wanted, is_output)))
    lost = needed - {tensor.name for tensor in planned}
    if lost:
        raise InputError(f"--to gguf: the checkpoint in {folder} gives no {min(lost)!r}: is it whole?")
    return planned


def _own_head(tensors: dict[Any, shards.Tensor]) -> bool:
    """Whether there is a head, and it is not the embeddings once more, whatever the config says: so transformers reads
    it, too."""
    embeddings, head = tensors.get("token_embd.weight"), tensors.get("output.weight")
    if head is None or embeddings is None:
        return head is not None
    same = (head.dtype, head.shape) == (embeddings.dtype, embeddings.shape)
    return not same or any(a != b for a, b in zip(head.chunks(), embeddings.chunks(), strict=True))


def _type(tensor: shards.Tensor, wanted: Type, is_output: bool) -> Type:
    if len(tensor.shape) < 2:
        return Type.F32
    if is_output and wanted.name.startswith(("Q4", "Q5")):
        wanted = Type.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return Type.F16 if tensor.shape[-1] % block else wanted


def size(tensor: Planned) -> int:
    """Bytes in the file."""
    block, width = gguf.GGML_QUANT_SIZES[tensor.quant]
    return math.prod(tensor.source.shape) // block * width


def converted(tensor: Planned, described: Described) -> tuple[np.ndarray, float, float]:
    """The data of a tensor as they are written, and the sums of squares of their rounding and of the weights.

    Raises:
        InputError: if the type cannot hold them.
    """
    parts: list[np.ndarray] = []
    error = total = 0.0
    for values in rows(tensor, described):
        if tensor.quant not in (Type.F32, Type.BF16):
            largest = float(np.abs(values).max(initial=0.0))
            if not largest <= LARGEST_HALF:
                raise InputError(
                    f"--quant: {tensor.source.name!r} holds {largest:.3g}, beyond float16: take --quant bf16 or f32"
                )
        parts.append(gguf.quantize(values, tensor.quant))
        if tensor.quant != Type.F32:
            back = gguf.dequantize(parts[-1], tensor.quant).reshape(values.shape)
            error += float(np.square(back - values).sum(dtype=np.float64))
            total += float(np.square(values).sum(dtype=np.float64))
    return np.concatenate(parts) if len(parts) > 1 else parts[0], error, total


def rows(tensor: Planned, described: Described) -> Iterator[np.ndarray]:
    """The tensor in float32 as llama.cpp computes with it, some rows (whole heads) at a time."""
    family, head = described.family, described.metadata["attention.key_length"]
    shape, part = tensor.source.shape, tensor.name.rsplit(".", 2)[-2]
    step = max(1, SLICE // (math.prod(shape[1:]) * head)) * head
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
