"""Writing files so that a reader or a kill sees the old one or the new one, JSON lines that survive a kill, YAML, and
one-line errors for a full or unwritable disk."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from trimllm.errors import TrimError, one_line

FULL = (errno.ENOSPC, errno.EDQUOT)
ELSEWHERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
"""Another folder helps: no right to write, or a file system (or `ulimit -f`) that allows no file so large."""


def there(path: str | Path) -> bool:
    """Whether a file or folder exists.

    Raises:
        OSError: where the system does not let us know, as in a folder that may not be read (`os.path.exists` says no).
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; when the block ends well it takes the place of `path`, otherwise it is gone. What a kill
    leaves of it is a `.NAME.PID.tmp` beside it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process may be writing it, too
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, sees the old one or the new one."""
    with atomic(path) as file:
        file.write(text.encode())


class _EveryKeyOnce(yaml.SafeLoader):
    """Takes a mapping that names a key twice for what it is: a mistake."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                twice = f"{key.value!r} stands there twice"
                raise yaml.composer.ComposerError(problem=twice, problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


def parse_yaml(text: str) -> Any:
    """Plain values in YAML.

    Raises:
        yaml.YAMLError: if it is not YAML, or a mapping names a key twice.
    """
    return yaml.load(text, _EveryKeyOnce)


def not_yaml(path: str | Path, error: yaml.YAMLError) -> str:
    """What is wrong with a file, and in which line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{path}:{mark.line + 1 if mark else '?'}: not valid YAML: {problem or 'not a text'}"


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON; infinite and undefined numbers, which JSON does not know, become null."""
    write_atomic(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote there; empty where nothing is."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def finite(value: Any) -> Any:
    """The value with null for infinite and undefined numbers."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path, *, mend: bool = True) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file. What a kill left of the last one is cut off in the file, too, unless
    `mend` is false: whoever writes the file may be writing that line now.

    Raises:
        TrimError: if a whole line is not JSON.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if mend and len(whole) < len(data):
        with disk_errors(path), path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:  # not JSON, or not even text
        raise TrimError(f"{path} is damaged: move it away and start the run again") from None


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and wait until it is on disk."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one line. safetensors has an error class of its own, with the number in it;
    torch's writer, which is broken off, fails once more at the end of its file.

    Raises:
        TrimError: instead of any error of the operating system.
    """
    try:
        yield
    except TrimError:
        raise
    except Exception as last:
        error = last.__context__ if "inline_container" in str(last) and last.__context__ else last
        if not isinstance(error, Exception):  # a signal
            raise error from None
        found = re.search(r"\b(?:os error|Os \{ code:) (\d+)", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number in FULL or "No space left" in str(error):
            raise TrimError(full_disk(path)) from error
        if number is None and not isinstance(error, OSError):
            raise
        remedy = ": choose another --output" if number in ELSEWHERE else ""
        reason = os.strerror(number) if number else one_line(error)
        other = f" ({name})" if (name := getattr(error, "filename", None)) and _outside(name, path) else ""
        raise TrimError(f"cannot write to {path}: {reason}{other}{remedy}") from error


def size(count: float) -> str:
    """So many bytes, for the reader."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def full_disk(path: str | Path, sizes: str = "") -> str:
    """One line for a full disk, with what is known of sizes."""
    remedy = "free some space, then start again (trimllm trim goes on with --resume)"
    return f"cannot write to {path}: the disk is full{sizes}: {remedy}"


def umask() -> int:
    """The permissions that new files lack; temporary ones lack more, and get theirs when they are done."""
    current = os.umask(0)
    os.umask(current)
    return current


def _outside(name: str, path: str | Path) -> bool:
    return Path(path).absolute().parent not in Path(os.fsdecode(name)).absolute().parents
