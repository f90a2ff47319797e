"""The command line: parse, carry out one command, turn errors into one line and an exit code.

Exit codes: 0 done, 1 failure, 2 bad input. Help, bad arguments and `tasks` are answered before torch is imported: the
modules of the other commands, which import it, are imported when one runs.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from contextlib import nullcontext, suppress

from trimllm import commands, files
from trimllm.config import Settings
from trimllm.console import to_stderr
from trimllm.errors import InputError, TrimError, one_line
from trimllm.parallel import another_failed, first_to_fail, processes
from trimllm.parsing import COMMANDS, RESUMABLE, parse
from trimllm.startup import Terminated, termination_raises

UNUSABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""Errors of the operating system that are about a path which the user gave and no command looked at. (Missing files
and folders in a file's place are refused by the commands.)"""


def run(command: Settings) -> None:
    """Carry out one parsed command.

    Raises:
        InputError: if several processes were started for a command that cannot share its work.
    """
    name = next(name for name, kind in COMMANDS.items() if isinstance(command, kind))
    if processes() > 1 and name != "trim":
        raise InputError(
            f"{name} is work for one process, and {processes()} were started: call it without torchrun or "
            "accelerate launch (trim alone shares its work)"
        )
    commands.carry_out(name, command)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error does so by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    code = _carried_out(sys.argv[1:] if arguments is None else arguments)
    try:
        print(end="", flush=True)  # while a full disk can still be said
    except OSError as error:
        if code == 0:
            return _refused(error)
        _give_up_output()
    return code


def _carried_out(words: list[str]) -> int:
    """The exit code of a command, which says itself what went wrong."""
    goes_on = dict.fromkeys(RESUMABLE, "; a run that has begun goes on with --resume")
    goes_on["scan"] = "; the same command goes on"
    remedy = goes_on.get(words[0], "") if words else ""
    try:
        with termination_raises() if processes() == 1 else nullcontext():  # a launcher ends its processes
            run(parse(words))
    except TrimError as error:
        if first_to_fail():
            to_stderr(f"trimllm: {error}\n")
        return error.exit_code
    except RuntimeError as error:
        if another_failed():
            return 1
        from trimllm import memory

        if not memory.is_out_of_memory(error):
            raise
        if first_to_fail():
            to_stderr(f"trimllm: out of memory on the device: {_less_memory(words[0])}\n")
        return 1
    except KeyboardInterrupt:
        to_stderr(f"trimllm: interrupted{remedy}\n")
        return 1
    except Terminated:
        to_stderr(f"trimllm: ended by SIGTERM{remedy}\n")
        return 128 + signal.SIGTERM
    except OSError as error:
        if error.errno is None:  # of a library, and no word of the operating system
            raise
        return _refused(error)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _less_memory(name: str) -> str:
    """What makes a command take less memory."""
    ways = {
        "micro_batch_size": "a smaller --micro-batch-size",
        "eval_batch_size": "a smaller --eval-batch-size",
        "gradient_checkpointing": "--gradient-checkpointing",
        "streaming": "--streaming",
        "dtype": "a narrower --dtype",
    }
    kept = {"dtype"} if name in RESUMABLE else set()  # what began goes on in its own
    there = [way for option, way in ways.items() if option in COMMANDS[name].model_fields.keys() - kept]
    goes_on = "; what is done is kept: go on with --resume" if name in RESUMABLE else ""
    return f"{' or '.join(there) or 'use a device that has more'}{goes_on}"


def _refused(error: OSError) -> int:
    """Report an error of the operating system that no command has explained, in one line; returns the exit code.

    Nothing is said of a broken pipe: whoever read the output has left.
    """
    if error.filename is None:
        _give_up_output()
    if not isinstance(error, BrokenPipeError) and first_to_fail():
        to_stderr(f"trimllm: {_system_line(error)}\n")
    return 2 if error.errno in UNUSABLE else 1


def _system_line(error: OSError) -> str:
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    where = "" if name is None else f"{name}: "
    remedy = ": free some space" if error.errno in files.FULL else ": check the path" if where else ""
    return f"{where}{error.strerror or one_line(error)}{remedy}"


def _give_up_output() -> None:
    """Drop what standard output still holds: at the end of Python it would be tried, and fail, once more."""
    with suppress(OSError, ValueError):  # not every stream is a file
        place = sys.stdout.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), place)
