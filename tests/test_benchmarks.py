"""Benchmarks end as the command does: what a user gets wrong is one line and exit code 2."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trimllm.errors import InputError, TrimError

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))
WITHOUT_TRIMLLM = {"check_engine.py"}
"""Runs in the environment of an engine."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_benchmark_is_run_by_the_shared_function(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert script.name in WITHOUT_TRIMLLM or text.endswith("    run(main)\n")
    assert script.name not in WITHOUT_TRIMLLM or "trimllm" not in text.replace("trimllm/", "").split('"""', 2)[2]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "law-0" / "published").mkdir(parents=True)
    (tmp_path / "law-0" / "published" / "foreign").touch()
    words = ["--seeds", "0", "--domains", "law", "--full-epochs", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, FOLDER / "schedule.py", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("schedule.py: --output ")


def test_exit_codes_are_those_of_the_command_and_of_own_processes(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    run = importlib.import_module("_sides").run

    def ended(error: Exception | int | None) -> Any:
        def main() -> int | None:
            if isinstance(error, Exception):
                raise error
            return error

        with pytest.raises(SystemExit) as caught:
            run(main)
        return caught.value.code or 0, capsys.readouterr().err.count("\n")

    assert [ended(code) for code in (None, 0, 3)] == [(0, 0), (0, 0), (3, 0)]
    assert ended(InputError("wrong")) == (2, 1)
    assert ended(TrimError("failed")) == (1, 1)
    assert ended(subprocess.CalledProcessError(2, "child")) == (2, 0)
    assert ended(subprocess.CalledProcessError(-9, "child")) == (1, 0)
    with pytest.raises(KeyError):
        run(lambda: {}["a bug"])
