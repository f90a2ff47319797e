"""Changes that can be taken back: a trial, or a cut that failed half-way, leaves no trace."""

from __future__ import annotations

from typing import Any

_MISSING = object()


class Changes:
    """A journal of what was overwritten in dictionaries of attributes and modules."""

    def __init__(self) -> None:
        self._journal: list[tuple[dict[str, Any], dict[str, Any] | None, str, Any]] = []
        self._handles: list[Any] = []

    def put(self, mapping: dict[str, Any], key: str, value: Any) -> None:
        self._journal.append((mapping, None, key, mapping.get(key, _MISSING)))
        mapping[key] = value

    def snapshot(self, mapping: dict[str, Any]) -> None:
        """Remember all of `mapping`; order included."""
        self._journal.append((mapping, dict(mapping), "", None))

    def hook(self, handle: Any) -> None:
        self._handles.append(handle)

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        for mapping, everything, key, old in reversed(self._journal):
            if everything is not None:
                mapping.clear()
                mapping.update(everything)
            elif old is _MISSING:
                mapping.pop(key, None)
            else:
                mapping[key] = old
        self._journal, self._handles = [], []
