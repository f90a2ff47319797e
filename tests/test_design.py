"""The rooms of docs/design.md: all modules stand in its table, and each imports only what stands before it."""

import ast
import re
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "trimllm"
FILES = sorted(PACKAGE.rglob("*.py"))


def table() -> list[str]:
    """Rooms in the order of reading: `name.py`, `folder/`, or `folder/name.py`."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.+?) \|", text, re.MULTILINE)
    return [room for cell in cells for room in re.findall(r"`(.+?)`", cell)]


def room_of(file: Path, rooms: list[str]) -> str:
    """The file's own room, or else that of its folder."""
    inside = file.relative_to(PACKAGE)
    own = inside.as_posix()
    return own if own in rooms or len(inside.parts) == 1 else f"{inside.parts[0]}/"


def file_of(module: str) -> Path | None:
    """The file behind a dotted name, which may be that of something within a module; None outside the package."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    for end in range(len(parts), 0, -1):
        stem = PACKAGE.joinpath(*parts[1:end])
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.exists():
                return file
    raise AssertionError(module)


def imports(code: str, package: str) -> Iterator[tuple[int, Path]]:
    """(line, file) of everything that the code imports from the package, at the top or within functions."""
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{each.name}" for each in node.names]
        yield from ((node.lineno, file) for file in map(file_of, names) if file)


def test_imports_are_found_in_every_form():
    code = """
import trimllm.scan as s, torch
from trimllm.demo import world
from trimllm.errors import InputError
def late():
    from .. import layout
    from trimllm import InputError
    from . import items
"""
    found = [(line, file.relative_to(PACKAGE).as_posix()) for line, file in imports(code, "trimllm.tasks")]
    assert sorted(found) == [
        *[(2, "scan.py"), (3, "demo/world.py"), (4, "errors.py")],
        *[(6, "layout.py"), (7, "__init__.py"), (8, "tasks/items.py")],
    ]


def test_every_module_has_one_room_and_every_room_a_module():
    rooms = table()
    assert len(rooms) == len(set(rooms))
    assert {room_of(file, rooms) for file in FILES} == set(rooms)


def test_a_room_imports_only_rooms_before_it():
    rooms = table()
    place = {room: number for number, room in enumerate(rooms)}
    wrong = []
    for file in FILES:
        room = room_of(file, rooms)
        package = ".".join([PACKAGE.name, *file.parent.relative_to(PACKAGE).parts])
        for line, other in sorted(set(imports(file.read_text(encoding="utf-8"), package))):
            target = room_of(other, rooms)
            if {room, target} <= place.keys() and place[target] > place[room]:
                wrong.append(f"{file.relative_to(PACKAGE)}:{line} imports {target}, which stands below {room}")
    assert not wrong, "\n".join(wrong)
