"""Options every scheduler shares, and the checks that name field, expected, got."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import Field, TypeAdapter, ValidationError

from mllmrec_jax.config import ConfigError, NonNegativeFloat, RunConfig, check_config, load_config
from mllmrec_jax.resources import find_config

# What ends up in one line of a script, or in one word of it.
Line = Annotated[str, Field(pattern=r"^[^\r\n]+$")]
Word = Annotated[str, Field(pattern=r"^\S+$")]
Port = Annotated[int, Field(ge=1024, le=65535)]

OptionsT = TypeVar("OptionsT", bound="LaunchOptions")

# What the launchers say to each process; a value from elsewhere would be overruled in silence.
_LAUNCHERS_OWN = tuple(f"--distributed.{name}" for name in ("method", "coordinator", "process-count", "process-index"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What is launched."""

    config: Annotated[tyro.conf.Positional[Line], tyro.conf.arg(metavar="CONFIG")]
    """The run's configuration: a TOML file, or the name of a shipped one."""
    command: Literal["run", "sft", "grpo", "evaluate", "export"] = "run"
    """The `mllmrec` command every process runs; those that train, with --resume."""
    check: bool = False
    """Run `python -m mllmrec_jax.distributed --check` instead: do the processes find each other, and can they sum a number?"""
    check_seconds: NonNegativeFloat = 0.0
    """How long the check goes on, to try the loss of a process or SIGTERM (seconds)."""
    dry_run: bool = False
    """Print what would be started, and start nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOptions(LaunchOptions):
    """What is launched; printed unless --submit is given."""

    submit: bool = False
    """Hand it to the scheduler."""


def check_options(options: OptionsT, scheduler: str) -> OptionsT:
    """Validates types, ranges and patterns; returns `options`.

    Raises:
      ConfigError: names every option that is wrong, with what was expected and got.
    """
    try:
        TypeAdapter[Any](type(options)).validate_python(dataclasses.asdict(options))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(issue, scheduler) for issue in error.errors())) from None
    return options


def _explain(issue: Any, scheduler: str) -> str:
    flag = str(issue["loc"][0]).replace("_", "-")
    expected = issue["msg"].removeprefix("Input should be ").removeprefix("String should ")
    return f"launch {scheduler}: --{flag}: expected {expected}, got {issue['input']!r}"


def check_run(config: str, overrides: Sequence[str]) -> None:
    """Reads the configuration with its overrides as every process will, so that a mistake is seen before anything is submitted.

    Raises:
      ConfigError: the configuration cannot be run, or an override is the launcher's to give.
    """
    for word in overrides:
        if word.partition("=")[0].replace("_", "-") in _LAUNCHERS_OWN:
            raise ConfigError(f"{word}: expected an option of the run, got one that the launcher gives to each process")
    default = load_config(find_config(config))
    check_config(tyro.cli(RunConfig, default=default, args=list(overrides), prog="mllmrec launch ... --"))


def build_program(
    options: LaunchOptions, overrides: Sequence[str], *, python: str, config: str | None = None, **distributed: str | int | None
) -> list[str]:
    """The words of the command one process runs.

    Args:
      options: what is launched.
      overrides: options of the run.
      python: the interpreter, as the process finds it.
      config: the configuration, as the process finds it; None: a file's absolute path, or a shipped name.
      **distributed: fields of the run's [distributed] section; None is left out.
    """
    path = Path(options.config)
    config = config or (str(path.absolute()) if path.is_file() else options.config)
    fields = [
        word for name, value in distributed.items() if value is not None for word in (f"--distributed.{name.replace('_', '-')}", str(value))
    ]
    if options.check:
        seconds = ["--seconds", str(options.check_seconds)] if options.check_seconds else []
        return [python, "-m", "mllmrec_jax.distributed", "--check", *seconds, config, *overrides, *fields]
    resume = ["--resume"] if options.command in ("run", "sft", "grpo") else []
    return [python, "-m", "mllmrec_jax.cli", options.command, config, *resume, *overrides, *fields]
