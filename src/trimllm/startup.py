"""How our own processes start, and end when they are asked to.

At the start no garbage is collected while torch and transformers are imported. They make some 200,000 objects that all
stay, and the collector would look at them again and again. A command starts in three quarters of the time that it takes
with it (docs/performance.md).
"""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


class Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def termination_raises(again: Any = signal.SIG_DFL) -> Iterator[None]:
    """Within, SIGTERM, by which schedulers end a job, raises `Terminated`: what is half done is undone, and processes
    that were started end, too. A second one ends this process as ever, or does what `again` says. Signals belong to the
    main thread: elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, again)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without garbage collections; later ones pass over what was imported. Where torch is already imported, or
    nobody collects, nothing is changed: the process may not be ours."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def child(module: str) -> None:
    """Begin a process that runs functions of `module`. Ctrl-C, which it gets too, ends it without a traceback, if it
    ends the process that begins it."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with uncollected():
        import_module(module)
