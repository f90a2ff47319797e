"""Safetensors files as ranges of bytes: what is where in a checkpoint, and new shards that are never whole in memory.

The format (https://huggingface.co/docs/safetensors) is a length of 8 bytes, a JSON header with dtype, shape and range
of every tensor, and the bytes. A header can therefore be written before the first tensor is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from trimllm.errors import InputError, TrimError, one_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK = 1 << 24
"""Bytes that are read and written at a time."""
LONGEST_HEADER = 100_000_000
"""Bytes; the limit that the format sets."""
WIDTHS = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)
"""Dtypes by width, narrow first. Wide ones come first in a file, so that each is aligned to its width."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: `size` bytes at `start`, an offset from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    file: Path
    start: int

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, at most `CHUNK` at a time."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            for begin in range(0, self.size, CHUNK):
                yield stream.read(min(CHUNK, self.size - begin))


@dataclass(frozen=True)
class Planned:
    """A tensor that a new shard will hold, and where its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterator[bytes]]


def present(folder: Path) -> bool:
    """Whether the folder has safetensors weights, by the names that transformers looks for."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def read(folder: Path) -> tuple[list[Tensor], dict[str, str]]:
    """The tensors of the checkpoint in `folder`, in the order of files and offsets, and the metadata of its files.

    Raises:
        InputError: if it has no safetensors weights, a shard is missing or broken, or its index is wrong.
    """
    if (folder / SINGLE).exists():
        return read_file(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}: give the folder of a checkpoint")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        places = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / INDEX} is not an index of shards: {one_line(error)}: download it again") from error
    found: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise InputError(f"{folder / INDEX} names the shard {file!r}: shards must lie in the same folder")
        tensors, more = read_file(folder / file)
        metadata |= more
        found |= {tensor.name: tensor for tensor in tensors if places.get(tensor.name, file) == file}
    lost = [name for name in places if name not in found]
    if lost:
        raise InputError(
            f"{folder / INDEX} places {lost[0]!r} in {places[lost[0]]}, which does not have it: "
            "download the checkpoint again"
        )
    return list(found.values()), metadata


def read_file(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    """The tensors of one file in the order of their bytes, and its metadata.

    Raises:
        InputError: if it is missing, not in the format, or cut short.
    """
    try:
        length = path.stat().st_size
        with path.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            if length < 8:
                raise InputError(_torn(path, "begins with 8 bytes", length))
            if header > LONGEST_HEADER:
                asks = f"its header would have {header} bytes, the file has {length}"
                raise InputError(f"{path} is not a safetensors file ({asks}): download it again")
            if 8 + header > length:
                raise InputError(_torn(path, f"asks for {8 + header} bytes for itself", length))
            entries: dict[str, Any] = json.loads(stream.read(header))
        metadata = entries.pop("__metadata__", {})
        tensors = []
        for name, entry in entries.items():
            begin, end = map(int, entry["data_offsets"])
            tensors.append(Tensor(name, entry["dtype"], tuple(entry["shape"]), end - begin, path, 8 + header + begin))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: download the checkpoint again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = one_line(error)
        raise InputError(f"{path} has no valid safetensors header: {text}: download it again") from error
    wanted = max((tensor.start + tensor.size for tensor in tensors), default=8 + header)
    if length != wanted:
        raise InputError(_torn(path, f"asks for {wanted} bytes", length))
    for tensor in tensors:
        if tensor.size < 0 or tensor.start < 8 + header:
            raise InputError(f"{path} has no valid safetensors header: tensor {tensor.name!r} lies outside the data")
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.name)), metadata


def _torn(path: Path, asks: str, length: int) -> str:
    return f"{path} is torn: its header {asks}, and the file has {length}: download it again"


def renamed(tensor: Tensor, name: str) -> Planned:
    """The same bytes under another name."""
    return Planned(name, tensor.dtype, tensor.shape, tensor.size, tensor.chunks)


def sliced(tensor: Tensor, dim: int, count: int, kept: Sequence[int]) -> Planned:
    """The slices `kept` of the `count` equal ones that `tensor` consists of along `dim` (0 or 1).

    Raises:
        InputError: if it does not consist of so many whole slices.
    """
    shape, rows = list(tensor.shape), math.prod(tensor.shape[:dim])
    if len(shape) <= dim or not rows or shape[dim] % count or tensor.size % (rows * count):
        raise InputError(f"tensor {tensor.name!r} of shape {shape} does not consist of {count} slices, one per layer")
    width = tensor.size // (rows * count)
    shape[dim] = shape[dim] // count * len(kept)

    def chunks() -> Iterator[bytes]:
        if dim == 0:
            for i in kept:
                yield from replace(tensor, start=tensor.start + i * width, size=width).chunks()
            return
        step = max(1, CHUNK // (width * count))
        for begin in range(0, rows, step):
            some = min(step, rows - begin)
            part = replace(tensor, start=tensor.start + begin * width * count, size=some * width * count)
            block = np.frombuffer(b"".join(part.chunks()), dtype=np.uint8).reshape(some, count, width)
            yield block[:, list(kept)].tobytes()

    return Planned(tensor.name, tensor.dtype, tuple(shape), rows * width * len(kept), chunks)


def parse_size(size: int | str) -> int:
    """Bytes, from a number or a text such as "5GB", "500 MB" or "2GiB".

    Raises:
        InputError: if it is neither, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(size), re.IGNORECASE)
    value = 0
    if match is not None:
        value = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if value <= 0:
        raise InputError(f"max_shard_size {size!r} is not a size: write a number of bytes, or such as 5GB")
    return value


def grouped(tensors: Sequence[Planned], limit: int) -> list[list[Planned]]:
    """The tensors in order, in shards of at most `limit` bytes; a larger tensor gets a shard of its own."""
    filled, shard = 0, 0
    numbers = []
    for tensor in tensors:
        if filled and filled + tensor.size > limit:
            filled, shard = 0, shard + 1
        filled += tensor.size
        numbers.append(shard)
    pairs = groupby(zip(numbers, tensors, strict=True), key=lambda pair: pair[0])
    return [[tensor for _, tensor in pair] for _, pair in pairs]


def write(folder: Path, groups: Sequence[Sequence[Planned]], wrote: Callable[[int, str], None]) -> None:
    """Write one shard per group, and the index where there are several; call `wrote(bytes, name)` along the way.

    Raises:
        TrimError: if a source changed or ended early.
    """
    count = len(groups)
    places: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        write_file(folder / file, group, wrote)
        places |= {tensor.name: file for tensor in group}
    if count > 1:
        size = sum(tensor.size for group in groups for tensor in group)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_file(path: Path, group: Sequence[Planned], wrote: Callable[[int, str], None]) -> None:
    """Write one safetensors file: the header, then the tensors chunk by chunk."""
    ordered = sorted(group, key=lambda tensor: (-_width(tensor.dtype), tensor.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        range_ = [offset, offset + tensor.size]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": range_}
        offset += tensor.size
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for tensor in ordered:
            size = 0
            for chunk in tensor.chunks():
                stream.write(chunk)
                size += len(chunk)
                wrote(len(chunk), tensor.name)
            if size != tensor.size:
                raise TrimError(f"tensor {tensor.name!r} gave {size} bytes instead of {tensor.size}: its file changed")


def _width(dtype: str) -> int:
    return WIDTHS.index(dtype) if dtype in WIDTHS else -1
