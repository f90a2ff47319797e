"""The built-in tasks: one YAML file each in `builtin/`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from trimllm.tasks.spec import TaskSpec, read_spec

FOLDER = Path(__file__).parent / "builtin"


@lru_cache(maxsize=1)
def builtin_tasks() -> dict[str, TaskSpec]:
    """Every built-in task by its name, sorted."""
    specs = [read_spec(path) for path in sorted(FOLDER.glob("*.yaml"))]
    return {spec.name: spec for spec in specs}


def find_builtin(name: str) -> TaskSpec | None:
    """The built-in task of this name or alias (upper and lower case are one)."""
    for spec in builtin_tasks().values():
        if name.lower() in {each.lower() for each in (spec.name, *spec.aliases)}:
            return spec
    return None


def list_tasks() -> list[tuple[str, str, str, str]]:
    """(name, kind, metric, description) of every built-in task."""
    return [(spec.name, spec.kind, spec.default_metric, spec.description) for spec in builtin_tasks().values()]
