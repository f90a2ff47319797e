"""The Hugging Face Hub where no network is: found out once, not by every file's retries (80 s and more each)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session

AGAIN = 60.0
"""Seconds after which it is asked again whether the Hub answers."""

_known = (float("-inf"), True)
"""When it was last asked, and whether it answered."""


@contextmanager
def hub_or_cache(name: str = "") -> Iterator[None]:
    """While files of the Hub are asked for: if it does not answer, work offline, as with `HF_HUB_OFFLINE=1`.

    What was downloaded before is then taken from the cache, and anything else is missed at once. Nothing is asked
    where `name` can only be a folder or file of this machine.
    """
    before = constants.HF_HUB_OFFLINE
    if not before and not (name and is_path(name)):
        constants.HF_HUB_OFFLINE = not _answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_path(name: str) -> bool:
    """Whether a name can only be a path, not one on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _answers() -> bool:
    global _known
    asked, answered = _known
    if time.monotonic() < asked + AGAIN:
        return answered
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        answered = True
    except Exception:  # whatever this release's client raises where it gets no answer
        answered = False
    _known = (time.monotonic(), answered)
    return answered
