"""The words of a command line, with the YAML file that they name, as the settings of one command."""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stderr
from functools import cache
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSubCommand,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from trimllm import config as settings
from trimllm.config import plain_settings
from trimllm.console import to_stderr
from trimllm.errors import InputError, did_you_mean


class _Configurable(BaseModel):
    config: str | None = Field(None, description="YAML file with any of these settings; the command line wins")


COMMANDS: dict[str, type[settings.Settings]] = {
    "trim": settings.TrimConfig,
    "scan": settings.ScanConfig,
    "drop": settings.DropConfig,
    "eval": settings.EvalConfig,
    "bench": settings.BenchConfig,
    "compare": settings.CompareConfig,
    "export": settings.ExportConfig,
    "push": settings.PushConfig,
    "tasks": settings.TasksConfig,
    "demo": settings.DemoConfig,
}
_CONFIGURABLE = ("trim", "scan", "drop", "eval", "compare")
"""Commands whose settings may stand in a YAML file."""

ELSEWHERE = {
    "--learning-rate": "--lr",
    "--model-name-or-path": "--model",
    "--output-dir": "--output",
    "--dataset": "--task",
    "--tasks": "--task",
    "--per-device-train-batch-size": "--micro-batch-size",
}
"""What options are called in other programs for fine-tuning and evaluation, where that is far from our name."""

RESUMABLE = ("trim", "compare")
"""Commands whose output directory remembers their settings."""


class _Root(BaseSettings):
    """Drop layers of a causal language model while fine-tuning it: half the depth, as a stock checkpoint.

    Start with `trimllm demo`; every command explains itself with --help; --version says which release this is.
    """

    model_config = SettingsConfigDict(
        cli_prog_name="trimllm",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
    )

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The command line over the YAML file; never the environment."""
        return (init_settings,)


def _read_as(name: str) -> type[BaseModel]:
    """The settings of a command, with those that the command line alone has."""
    kind = COMMANDS[name]
    if name not in _CONFIGURABLE:
        return kind
    return create_model(kind.__name__, __base__=(kind, _Configurable), __doc__=kind.__doc__)


@cache
def _root(name: str) -> type[_Root]:
    """What reads the words of this command alone, since options take time to list; without a command's name, of all."""
    fields: dict[str, Any] = {
        each: (CliSubCommand[_read_as(each)], Field(description=(COMMANDS[each].__doc__ or "").splitlines()[0]))  # type: ignore[misc]
        for each in ((name,) if name in COMMANDS else COMMANDS)
    }
    return create_model("_Root", __base__=_Root, __doc__=_Root.__doc__, **fields)


def _small(word: str) -> str:
    """An option in small letters, as pydantic-settings reads it."""
    name, sign, value = word.partition("=")
    return name.lower() + sign + value if re.fullmatch(r"--[A-Za-z][A-Za-z_-]*", name) else word


def parse(arguments: list[str]) -> settings.Settings:
    """The settings of the command that `arguments` name; the YAML of `--config`, or of the run to resume, underneath.

    Raises:
        InputError: in one line, for anything that cannot be used.
    """
    arguments = _negative_lists([_small(word) for word in arguments] or ["--help"])
    name = arguments[0]
    if name == "--version":
        print(f"trimllm {version('trimllm')}")
        raise SystemExit
    if not name.startswith("-") and name not in COMMANDS:
        raise InputError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}: trimllm --help lists them")
    given = _configured(name, arguments)
    resumes, output = _resumes(name, arguments, given), _output(arguments, given)
    stored = _stored(name, output) if resumes else {}
    beneath = stored | given
    if name in COMMANDS:
        file = f" {path}" if (path := _value(arguments, "--config")) else ""
        for key in beneath:
            if key not in COMMANDS[name].model_fields:
                meant = _of_others(name, key) or did_you_mean(key, COMMANDS[name].model_fields)
                where = f"--config{file}" if key in given else f"--output {output}: config.yaml"
                raise InputError(f"{where}: unknown setting {key!r}{meant}")
    under: dict[str, Any] = {name: beneath} if beneath else {}
    try:
        root = _read(name, arguments, under)
    except ValidationError as error:
        lacking = any(one["type"] == "missing" for one in error.errors())
        if lacking and resumes and not stored:
            raise InputError(_no_run(output)) from None
        remedy = f"see trimllm {name} --help"
        if lacking and not resumes and _stored(name, output):
            remedy = f"to go on with the run in {output}, add --resume"
        raise InputError(f"{plain_settings.explain(error)}: {remedy}") from None
    except SettingsError as error:
        raise InputError(_unknown_option(name, str(error), arguments)) from None
    parsed = getattr(root, name)
    return COMMANDS[name](**parsed.model_dump(exclude={"config"}))


def _negative_lists(arguments: list[str]) -> list[str]:
    """`--protect -1,0` as `--protect=-1,0`: argparse takes what begins with a dash, and is no number, for an option."""
    out: list[str] = []
    for argument in arguments:
        if out and re.fullmatch(r"--[a-z-]+", out[-1]) and re.fullmatch(r"-\d+(,-?\d+)+", argument):
            out[-1] += f"={argument}"
        else:
            out.append(argument)
    return out


def _read(name: str, arguments: list[str], under: dict[str, Any]) -> Any:
    """The command line over `under`. In pydantic-settings before 2.16 commands print what is wrong, and end."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            root = CliApp.run(_root(name), cli_args=arguments, cli_exit_on_error=False, **under)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise SettingsError(said.getvalue().rpartition("error: ")[2].strip()) from None
    to_stderr(said.getvalue())
    return root


def _configured(name: str, arguments: list[str]) -> dict[str, Any]:
    """Settings from the YAML file of `--config`."""
    if name not in _CONFIGURABLE or (path := _value(arguments, "--config")) is None:
        return {}
    given = plain_settings.read_yaml(os.path.expanduser(path))
    for asked, other in (("--keep", "depth"), ("--depth", "keep")):  # two ways to say one thing: the command line wins
        if name == "trim" and _value(arguments, asked) is not None:
            given.pop(other, None)
    return given


def _stored(name: str, output: str | None) -> dict[str, Any]:
    """Settings of the run in that directory; empty if there is none, or the command makes none."""
    if output is None or name not in RESUMABLE:
        return {}
    from trimllm.run import placing

    return placing.stored_settings(output, COMMANDS[name])


def _output(arguments: list[str], given: dict[str, Any]) -> str | None:
    """The directory that the command line, or the YAML file, names; what is no text is refused later."""
    output = _value(arguments, "--output") or given.get("output")
    return output if isinstance(output, str) else None


def _resumes(name: str, arguments: list[str], given: dict[str, Any]) -> bool:
    """Whether a run goes on, by the command line or the YAML file."""
    said = [argument == "--resume" for argument in arguments if argument in ("--resume", "--no-resume")]
    return name in RESUMABLE and (said[-1] if said else _is_true(given.get("resume")))


def _is_true(value: Any) -> bool:
    """As the settings read it; what is neither true nor false is refused there."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


def _value(arguments: list[str], option: str) -> str | None:
    """The last value of an option, which is the one that counts."""
    found = None
    for argument, after in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == option and after is not None:
            found = after
        elif argument.startswith(option + "="):
            found = argument.split("=", 1)[1]
    return found


def _no_run(output: str | None) -> str:
    return f"--resume: there is no run in {output}: check --output" if output else "--resume needs --output DIR"


def _of_others(name: str, field: str) -> str:
    """Which other commands have a setting that this one has not, not even by nearly that name; nothing if none has."""
    others = [other for other, kind in COMMANDS.items() if field in kind.model_fields]
    near = {field, f"{field}s", field.removesuffix("s")} & COMMANDS[name].model_fields.keys()
    return f" (of {', '.join(others)}, and not of {name})" if others and not near else ""


def _lacks_model(name: str, arguments: list[str]) -> bool:
    return "model" in COMMANDS[name].model_fields and _value(arguments, "--model") is None


def _unknown_option(name: str, message: str, arguments: list[str]) -> str:
    message = message.removeprefix("error parsing CLI: ")
    if message.startswith("unrecognized arguments: ") and name in COMMANDS:
        given = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        if not given.startswith("-"):
            meant = f" (did you mean --model {given}?)" if _lacks_model(name, arguments) else ""
            return f"unexpected argument {given!r}{meant}: see trimllm {name} --help"
        options = ["--" + field.replace("_", "-") for field in COMMANDS[name].model_fields]
        ours = ELSEWHERE.get(given.replace("_", "-"))
        meant = f" (did you mean {ours!r}?)" if ours in options else did_you_mean(given, options)
        meant = _of_others(name, given.removeprefix("--").removeprefix("no-").replace("-", "_")) or meant
        return f"unknown option {given}{meant}: see trimllm {name} --help"
    if found := re.match(r"Parsing error encountered for \w+\.(\w+)", message):
        return f"--{found[1].replace('_', '-')} cannot be read: see trimllm {name} --help for how to write it"
    if message.startswith("error parsing value for field"):  # which, is not said
        return f"a value cannot be read: write several with commas, as 0,-1; see trimllm {name} --help"
    return f"{message}: see trimllm{f' {name}' if name in COMMANDS else ''} --help"
