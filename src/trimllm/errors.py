"""The two kinds of failure a user can meet: both are one or two lines that say what to do; a traceback is for bugs."""

from __future__ import annotations


class TrimError(Exception):
    """The job could not be finished (exit code 1); what was computed so far is on disk."""

    exit_code = 1


class InputError(TrimError):
    """What the user gave cannot be used (exit code 2). The message names the value, the place and the remedy."""

    exit_code = 2


def one_line(error: BaseException) -> str:
    """An error's message on one line, at most 300 characters of it."""
    return " ".join(str(error).split())[:300] or type(error).__name__
