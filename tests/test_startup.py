"""Processes of our own start without garbage collections; those of others are left as they are."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from importlib import import_module

import pytest

from trimllm import startup


@pytest.fixture
def young(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As in a process that has not imported torch; the list tells what was exempted from collections."""
    exempted: list[str] = []
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(gc, "freeze", lambda: exempted.append("all"))
    return exempted


def test_nothing_is_collected_while_importing_even_if_that_fails(young: list[str]) -> None:
    collecting = []
    with pytest.raises(ImportError), startup.uncollected():
        collecting.append(gc.isenabled()) or import_module("trimllm.nothing")
    assert [*collecting, gc.isenabled()] == [False, True]
    assert young == ["all"]


def test_a_process_that_is_not_ours_is_left_as_it_is(young: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "isenabled", lambda: False)  # its owner does without
    with startup.uncollected():
        pass
    monkeypatch.undo()
    import torch  # noqa: F401

    with startup.uncollected():
        assert gc.isenabled()
    assert young == []


@pytest.mark.usefixtures("interruptible")
def test_a_child_imports_its_module_and_is_ended_by_an_interrupt(
    young: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    startup.child("colorsys")
    assert "colorsys" in sys.modules
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert young == ["all"]


def test_a_child_of_what_ctrl_c_does_not_end_is_not_ended_by_it(
    interruptible: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    startup.child("colorsys")
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


TERMINATED = """
import os, subprocess, sys
from trimllm import cli

def work(command):
    print(os.getpid(), flush=True)
    subprocess.run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])

cli.parse = lambda words: None
cli.run = work
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "more"), [("compare", "; a run that has begun goes on with --resume"), ("export", "")]
)
def test_a_scheduler_that_ends_a_command_ends_what_it_started(command: str, more: str) -> None:
    words = [sys.executable, "-c", TERMINATED, command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as begun:
        assert begun.stdout is not None
        own, child = int(begun.stdout.readline()), int(begun.stdout.readline())
        os.kill(own, signal.SIGTERM)
        _, error = begun.communicate(timeout=120)
    assert begun.returncode == 128 + signal.SIGTERM
    assert error == f"trimllm: ended by SIGTERM{more}\n"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def wait_for_sigterm() -> None:
    with startup.termination_raises():
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_does_afterwards_what_it_did() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(startup.Terminated):
        wait_for_sigterm()
    assert signal.getsignal(signal.SIGTERM) is before
