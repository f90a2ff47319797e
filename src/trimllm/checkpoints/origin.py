"""Where a checkpoint comes from: its base, as plans, results and cards name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimllm.blocks import adapters
from trimllm.checkpoints import loading


@dataclass(frozen=True)
class Origin:
    """A base, and what was merged into it."""

    name: str
    """As the user gave it."""
    adapter: str | None = None
    """An adapter that was merged into it, as the user named that."""
    sha256: str | None = None
    """Of its weights."""
    place: str | None = None
    """Where it lies, if the name does not lead there from here."""

    @classmethod
    def of(cls, model: str) -> Origin:
        """The base that a model is, or that an adapter names."""
        base = adapters.base_of(loading.path_of(model))
        return cls(model) if base is None else cls(base, adapter=model)

    @classmethod
    def load(cls, record: str | dict[str, Any]) -> Origin:
        """What `record` gave."""
        return cls(record) if isinstance(record, str) else cls(**record)

    def record(self) -> str | dict[str, str]:
        """As JSON: the name, or where more is known the fields."""
        more = {"adapter": self.adapter, "sha256": self.sha256}
        known = {name: value for name, value in more.items() if value is not None}
        return {"name": self.name, **known} if known else self.name

    @property
    def found_at(self) -> str:
        """The name by which it is found from here."""
        return self.place or self.name
