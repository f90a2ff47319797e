"""Domain text: documents for perplexity, calibration by activations, and continued pre-training."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from trimllm.errors import InputError
from trimllm.tasks import world
from trimllm.tasks.items import Item
from trimllm.tasks.render import check_whole
from trimllm.tasks.rows import Row, read_rows
from trimllm.tasks.sources import row_files

PIECE = 4_000
"""Characters after which a long document is cut at the next paragraph: about 1,000 tokens of English."""
FEW_PIECES = 50
"""A single document that would give fewer pieces is cut finer, down to ..."""
SMALL_PIECE = 200
"""... this many characters a piece."""
WORLD_PREFIX = "demo_"
_BOUNDARIES = (re.compile(r"\n[ \t]*\n"), re.compile(r"\n"), re.compile(r"\s"))


def load_text(name_or_path: str | Path, *, per_entity: int = 6, piece: int = PIECE, seed: int = 0) -> list[str]:
    """Documents of a domain, long ones cut at paragraphs to about `piece` characters.

    `name_or_path` is a file (.txt, or any table with a column `text`), a folder of such files, or `demo_medicine`,
    `demo_law`, `demo_finance`: `per_entity` biographies of each entity of the built-in world (a folder of that name
    would be `./demo_law`).

    Raises:
        InputError: if there is no such file or domain, the rows have no text, or a number is less than 1.
    """
    for name, number in (("per_entity", per_entity), ("piece", piece)):
        if number < 1:
            raise InputError(f"{name}={number}: give at least 1")
    domain = str(name_or_path).removeprefix(WORLD_PREFIX)
    if str(name_or_path).startswith(WORLD_PREFIX) and domain in world.DOMAINS:
        return world.biographies(domain, per_entity, seed)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        if str(name_or_path).startswith(WORLD_PREFIX):
            known = ", ".join(WORLD_PREFIX + each for each in world.DOMAINS)
            raise InputError(f"unknown domain text {name_or_path!r}: use {known}, a file or a folder")
        raise InputError(
            f"{path} does not exist: give a file or folder with text, or demo_medicine, demo_law, demo_finance"
        )
    files = row_files(path) if path.is_dir() else [path]
    return [text for file in files for row in read_rows(file) for text in pieces(_text(row), piece)]


def cut(items: list[Item], piece: int = PIECE) -> list[Item]:
    """Documents with long ones cut in pieces; the pieces of a document are one group.

    A single document (a plain-text file) has to be split itself: then each piece stands on its own.
    """
    out = []
    for item in items:
        texts = pieces(item.target, piece)
        group = item.group if len(items) == 1 or item.group is not None or len(texts) == 1 else item.place
        for number, text in enumerate(texts, 1):
            place = item.place if len(texts) == 1 else f"{item.place} part {number}"
            out.append(replace(item, place=place, continuations=(text,), lengths=(len(text),), group=group))
    return out


def piece_for(items: list[Item]) -> int:
    """Where to cut: at `PIECE` characters, or earlier if a single document would give too few pieces to split."""
    if len(items) != 1 or len(pieces(items[0].target)) >= FEW_PIECES:
        return PIECE
    return min(PIECE, max(SMALL_PIECE, len(items[0].target) // (2 * FEW_PIECES)))


def pieces(text: str, piece: int = PIECE) -> list[str]:
    """A text cut into pieces of `piece` to twice `piece` characters; joined again they are the text.

    The cut is after the first blank line beyond `piece` characters, else the first line or word, else anywhere.
    """
    found, start = [], 0
    while len(text) - start > 2 * piece:
        window = slice(start + piece, start + 2 * piece)
        ends = (boundary.search(text, window.start, window.stop) for boundary in _BOUNDARIES)
        end = next((match.end() for match in ends if match), window.stop)
        found.append(text[start:end])
        start = end
    found.append(text[start:])
    return [each for each in found if each.strip()]


def _text(row: Row) -> str:
    text = row.values.get("text")
    if "text" not in row.values:
        raise InputError(f"{row.place}: no column 'text'; columns found: {', '.join(row.values)}")
    if not isinstance(text, str):
        raise InputError(f"{row.place}: 'text' is {text!r}, not text: leave the row out, or mend it")
    check_whole(text, row.place)
    return text
