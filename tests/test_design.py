"""The tables of docs/design.md: all modules stand in them, and each imports only what stands before it."""

import ast
import re
from collections.abc import Callable, Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "trimllm"
FILES = sorted(PACKAGE.rglob("*.py"))


def tables() -> dict[str, list[str]]:
    """Names in the order of reading, by table: `part` is that of all parts, the others are of one package's modules."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    found = {}
    for head, rows in re.findall(r"^\| (.+?) \|.*\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE):
        cells = re.findall(r"^\| (.+?) \|", rows, re.MULTILINE)
        found[head.strip("`")] = [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]
    return found


def part_of(file: Path) -> str:
    """The folder of the package that a file lies in, or the file itself."""
    first, *more = file.relative_to(PACKAGE).parts
    return f"{first}/" if more else first


def file_of(module: str) -> Path | None:
    """The file of a dotted name, which may be that of something within a module; None outside the package."""
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


def imported(file: Path) -> list[tuple[int, Path]]:
    """(line, file) of what a file of the package imports from it."""
    package = ".".join([PACKAGE.name, *file.parent.relative_to(PACKAGE).parts])
    return sorted(set(imports(file.read_text(encoding="utf-8"), package)))


def backwards(files: list[Path], order: list[str], name: Callable[[Path], str]) -> list[str]:
    """Imports of what stands below the importing file in `order`, by the `name` that files have there."""
    place = {each: number for number, each in enumerate(order)}
    wrong = []
    for file in files:
        for line, other in imported(file):
            if name(other) in place and place[name(other)] > place[name(file)]:
                wrong.append(
                    f"{file.relative_to(PACKAGE)}:{line} imports {name(other)}, which stands below {name(file)}"
                )
    return wrong


def test_imports_are_found_in_every_form():
    code = """
import trimllm.importance.scan as s, torch
from trimllm.tasks import world
from trimllm.errors import InputError
def late():
    from ..blocks import layout
    from trimllm import InputError
    from . import items
"""
    found = [(line, file.relative_to(PACKAGE).as_posix()) for line, file in imports(code, "trimllm.tasks")]
    assert sorted(found) == [
        *[(2, "importance/scan.py"), (3, "tasks/world.py"), (4, "errors.py")],
        *[(6, "blocks/layout.py"), (7, "__init__.py"), (8, "tasks/items.py")],
    ]


def test_every_module_has_one_part_and_every_part_a_module():
    parts = tables()["part"]
    assert len(parts) == len(set(parts))
    assert {part_of(file) for file in FILES} == set(parts)


def test_a_part_imports_only_parts_before_it():
    wrong = backwards(FILES, tables()["part"], part_of)
    assert not wrong, "\n".join(wrong)


FOLDERS = [name for name in tables() if name != "part"]


def test_the_parts_stand_in_one_order():
    parts = tables()["part"]
    assert [name for name in parts if name in FOLDERS] == FOLDERS
    assert len(FOLDERS) >= 8


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_module_imports_only_those_before_it_in_its_package(folder):
    order = tables()[folder]
    files = [file for file in FILES if part_of(file) == folder and file.name != "__init__.py"]
    assert sorted(order) == sorted(file.name for file in files)
    inside = {file: file.name for file in files}
    wrong = backwards(files, order, lambda file: inside.get(file, ""))
    assert not wrong, "\n".join(wrong)
