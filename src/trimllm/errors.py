"""The two kinds of failure a user can meet: both are one or two lines that say what to do; a traceback is for bugs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimError(Exception):
    """The job could not be finished (exit code 1); what was computed so far is on disk."""

    exit_code = 1


class InputError(TrimError):
    """What the user gave cannot be used (exit code 2). The message names the value, the place and the remedy."""

    exit_code = 2


def one_line(error: object) -> str:
    """An error's message on one line, at most 300 characters of it."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_line(error: object) -> str:
    """The first line of an error's message, where those that follow are a trace or details."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0] if lines else error)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the known name that `name`, in whatever case, resembles; nothing if there is none."""
    by_case = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_case, n=1)
    return f" (did you mean {by_case[near[0]]!r}?)" if near else ""
