"""The process of a row: of this Python, or of another environment's where a library wants other versions than ours.

llm-compressor, for one, takes transformers up to a release only. Where the other environment has a trimllm of its own,
this one wins there, so that all rows are measured by the same code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import trimllm
from trimllm.baselines import Cell

OURS = (
    *("torch", "transformers", "accelerate", "safetensors", "datasets", "numpy", "psutil", "pydantic"),
    *("pydantic_settings", "yaml", "jinja2", "matplotlib", "rouge_score", "huggingface_hub", "pyarrow", "packaging"),
)
"""What this package depends on, by the names that are imported."""
_PROBE = "import importlib.util as u, sys; print(*[name for name in sys.argv[1:] if u.find_spec(name) is None])"


def lacking(python: str, cell: Cell) -> str:
    """Why this Python cannot make the row: what it lacks, or that it does not run; empty if it can."""
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, *OURS, *cell.method.needs], capture_output=True, text=True, timeout=600
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run: {getattr(error, 'strerror', None) or 'it does not answer'}"
    if done.returncode:
        return f"is no Python that runs: exit code {done.returncode}"
    if names := done.stdout.split():
        return f"lacks {', '.join(names)}: pip install 'trimllm[{cell.method.extra}]' there"
    return ""


def run(python: str | None, arguments: Sequence[str], lock: int) -> int:
    """Make a row by this Python, or another one, in a process that inherits the file descriptor `lock`; its exit
    code."""
    words = [python or sys.executable, "-m", "trimllm.baselines.cell", *arguments]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # no module in the user's folder stands before Python's
    if python is None:
        return ended(words, environment, lock)
    with tempfile.TemporaryDirectory(prefix="trimllm-") as folder:
        # Alone in a folder: the packages that are installed beside this one are for this Python.
        (Path(folder) / "trimllm").symlink_to(Path(trimllm.__file__).parent, target_is_directory=True)
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        return ended(words, environment | {"PYTHONPATH": path}, lock)


def ended(words: Sequence[str], environment: Mapping[str, str], lock: int) -> int:
    """The exit code of a process. Where this one is to end meanwhile, that one is asked to end (a row saves its stage
    then), and waited for; a second Ctrl-C kills it."""
    process = subprocess.Popen(words, env=environment, pass_fds=[lock])
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait()
        except BaseException:
            process.kill()
        raise
