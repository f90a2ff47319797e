"""llama.cpp in an environment of its own, for benchmarks: a live process that answers jobs; files for it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trimllm import handover
from trimllm.config import ExportConfig
from trimllm.errors import TrimError

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-llamacpp/bin/python"
"""What `make .venv-llamacpp/.installed` builds."""


class Engine:
    """A process of the other Python; within `with`."""

    def __init__(self, python: Path) -> None:
        self.python = python

    def __enter__(self) -> Engine:
        command = [str(self.python), str(Path(__file__).with_name("_llamacpp_engine.py"))]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()

    def ask(self, kind: str, **job: Any) -> Any:
        """What the engine answers to a job of this kind.

        Raises:
            TrimError: if its process ended instead; with the end of what it wrote.
        """
        assert self.process.stdin
        assert self.process.stdout
        try:
            print(json.dumps({"kind": kind} | job), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise TrimError(f"llama.cpp failed:\n{self.errors.read()[-2000:]}")
        return json.loads(line)


def run_engine(python: Path, jobs: Iterable[dict[str, Any]]) -> list[Any]:
    """The answers to all jobs, of one process."""
    with Engine(python) as engine:
        return [engine.ask(**job) for job in jobs]


def speed_files(model: Any, name: str, folder: Path, types: Iterable[str]) -> list[Path]:
    """The model as one file per type, with a tokenizer that has nothing to do with it."""
    sys.path.insert(0, str(ROOT / "tests"))
    import gguf_cases

    checkpoint = gguf_cases.save(model, folder / name, gguf_cases.byte_level("gpt-2"))
    files = []
    for kind in types:
        files.append(folder / f"{name}-{kind}.gguf")
        handover.write(checkpoint, files[-1], ExportConfig(source=str(checkpoint), to="gguf", quant=kind))
    return files


def bytes_per_token(path: Path) -> int:
    """What a decoded token reads: all tensors but the embeddings, of which it takes one row."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if tensor.name != "token_embd.weight")
