"""Layer numbers inside names: of tensors (`model.layers.3.mlp.weight`), and of modules in quantization configs.

A number counts only as a whole component right after the path of the list of blocks, so layer 3 is never layer 30.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from trimllm.errors import InputError

NUMBERED = re.compile(r"\\?\.(\d+)(?![A-Za-z0-9_])")
"""A component that is a number; the dot may be escaped, as in a regular expression."""
FLAG = re.compile(r"re:|[+-]:")
"""What marks a regular expression (compressed-tensors; GPTQ's `dynamic`)."""


@dataclass(frozen=True)
class Numbering:
    """Which layer becomes which."""

    paths: tuple[str, ...]
    """Names of the list of blocks: on disk, and in the model."""
    kept: tuple[int, ...]
    """Old numbers of the layers that stay."""
    modules: frozenset[str] = frozenset()
    """Names of modules and tensors, before the cut, that a pattern may select."""
    places: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", {layer: place for place, layer in enumerate(self.kept)})

    def layer(self, name: str) -> int | None:
        """The number of the layer that `name` belongs to, or None."""
        found = self._split(name)
        return found[1] if found else None

    def rename(self, name: str) -> str | None:
        """The name after the cut; None if its layer goes."""
        found = self._split(name)
        if found is None:
            return name
        path, layer, rest = found
        return f"{path}.{self.places[layer]}{rest}" if layer in self.places else None

    def _split(self, name: str) -> tuple[str, int, str] | None:
        for path in self.paths:
            if name.startswith(f"{path}."):
                number, dot, rest = name[len(path) + 1 :].partition(".")
                if number.isdecimal():
                    return path, int(number), dot + rest
        return None

    def renumber(self, value: Any) -> Any:
        """A quantization config with its lists and keys of module names renumbered; entries of dropped layers go.

        Raises:
            InputError: if a name or pattern cannot be renumbered so that it selects the same modules.
        """
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            items = [(self._text(key) if isinstance(key, str) else key, self.renumber(v)) for key, v in value.items()]
            return {new: v for (new, v), old in zip(items, value.values(), strict=True) if _stays(new, v, old)}
        if isinstance(value, list | tuple):
            entries = [(entry, self.renumber(entry)) for entry in value]
            return type(value)(new for old, new in entries if new is not None or old is None)
        return value

    def _text(self, text: str) -> str | None:
        if not any(letter.isdigit() for letter in text):
            return text
        pattern = _pattern(text)
        for match in NUMBERED.finditer(text):
            path = re.search(r"[\w.]*$", text[: match.start()].replace("\\.", "."))[0].lstrip(".")  # type: ignore[index]
            if not path or not self._is_ours(path):
                continue
            layer = int(match[1])
            if layer not in self.places and pattern is None:
                return None
            if layer in self.places:
                new = f"{text[: match.start(1)]}{self.places[layer]}{text[match.end(1) :]}"
                if pattern is None or self._same(pattern, _pattern(new)):
                    return new
            elif all(self.layer(name) == layer for name in self.modules if pattern(name)):  # type: ignore[misc]
                return None
            raise InputError(_unclear(text))
        if pattern is not None and not self._same(pattern, pattern):
            raise InputError(_unclear(text))
        return text

    def _is_ours(self, path: str) -> bool:
        """Whether a path, perhaps without its first components, is that of the list of blocks and of no other list."""
        if path in self.paths:
            return True
        if not any(_ends(own, path) or _ends(path, own) for own in self.paths):
            return False
        others = {name[: match.start()] for name in self.modules for match in NUMBERED.finditer(name)} - set(self.paths)
        if any(other == path for other in others):
            return False
        if any(_ends(other, path) for other in others if not other.startswith(tuple(f"{own}." for own in self.paths))):
            raise InputError(_unclear(path))
        return True

    def _same(self, before: Callable[[str], bool], after: Callable[[str], bool] | None) -> bool:
        """Whether a pattern selects after the cut what it selected before."""
        assert after is not None
        renamed = {name: new for name in self.modules if (new := self.rename(name)) is not None}
        return all(before(name) == after(new) for name, new in renamed.items())


def _stays(key: Any, new: Any, old: Any) -> bool:
    return key is not None and (new is not None or old is None)


def _ends(name: str, tail: str) -> bool:
    return name.endswith(f".{tail}")


def _pattern(text: str) -> Callable[[str], bool] | None:
    """What a regular expression or a glob selects; None for a plain name."""
    flag = FLAG.match(text)
    body = text[flag.end() :] if flag else text
    if flag or ".*" in body or "\\" in body:
        try:
            compiled = re.compile(body)
        except re.error:
            return None
        return lambda name: compiled.match(name) is not None
    if "*" in body or "?" in body:
        return lambda name: fnmatch.fnmatchcase(name, body)
    return None


def _unclear(text: str) -> str:
    return (
        f"quantization_config names layers by {text!r}, which cannot be renumbered for this cut: write the modules out "
        "one by one there, or trim the unquantized model and quantize the result"
    )


def list_paths(names: Iterable[str], depth: int) -> list[str]:
    """Paths that could be the list of `depth` blocks: all of the numbers 0 to depth - 1 follow them; outermost only."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdecimal() and i:
                numbers.setdefault(".".join(parts[:i]), set()).add(int(part))
    full = [path for path, found in numbers.items() if found.issuperset(range(depth))]
    return [path for path in full if not any(_inside(path, other) for other in full)]


def _inside(path: str, other: str) -> bool:
    return path.startswith(f"{other}.") and path[len(other) + 1 :].split(".")[0].isdecimal()
