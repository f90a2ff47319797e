"""Processes of our own start without garbage collections; those of others are left as they are."""

from __future__ import annotations

import gc
import signal
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


def test_a_child_imports_its_module_and_is_ended_by_an_interrupt(
    young: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    try:
        startup.child("colorsys")
        assert "colorsys" in sys.modules
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    assert young == ["all"]
