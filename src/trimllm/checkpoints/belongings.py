"""What a checkpoint's folder holds beside its weights and their config: files by what they are for."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

VOCABULARIES = ("*tokenizer*", "vocab*", "*.model", "*.codes", "*.spm", "*.tiktoken", "tekken*")
"""A tokenizer has at least one of these; some releases of transformers make up an empty one where there is none."""
TOKENIZERS = (
    *VOCABULARIES,
    *("merges.txt", "added_tokens.json", "special_tokens_map.json", "*processor_config.json"),
    *("chat_template*", "*.jinja", "additional_chat_templates/*.jinja"),
)
"""What tokenizers, processors and chat templates consist of."""
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*")
"""What goes wherever the weights go."""
QUANTIZATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Older places of the quantization config; they may name layers, too."""
CODE = ("*.py",)
"""The code of a model that brings its own."""


def found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a folder that are of one of these kinds, each once, by name; hidden ones are nobody's."""
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and path.name[0] != "."}
    return sorted(files)


def copy(paths: Iterable[Path], source: Path, target: Path) -> None:
    """Copy files of the folder `source` to where they are in it, in `target`."""
    for path in paths:
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
