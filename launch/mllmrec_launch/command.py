"""`mllmrec launch SCHEDULER CONFIG [options] [-- overrides]`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from typing import Annotated

import tyro

from mllmrec_jax.config import ConfigError
from mllmrec_launch import kubernetes, mpi, slurm, tpu
from mllmrec_launch.kubernetes import KubernetesOptions
from mllmrec_launch.local import LocalOptions, find_free_port, plan_local, run_local
from mllmrec_launch.mpi import MpiOptions
from mllmrec_launch.options import check_options, check_run
from mllmrec_launch.slurm import SlurmOptions
from mllmrec_launch.tpu import TpuOptions

Scheduler = (
    Annotated[LocalOptions, tyro.conf.subcommand("local")]
    | Annotated[SlurmOptions, tyro.conf.subcommand("slurm")]
    | Annotated[KubernetesOptions, tyro.conf.subcommand("kubernetes")]
    | Annotated[TpuOptions, tyro.conf.subcommand("tpu")]
    | Annotated[MpiOptions, tyro.conf.subcommand("mpi")]
)
DESCRIPTION = """Start a run's processes on this machine, or print (with --submit: hand over) what a scheduler wants.
Words after -- are options of the run, as after `mllmrec run CONFIG`."""


def launch(argv: Sequence[str]) -> int:
    """Does what the words after `mllmrec launch` say; returns the exit status.

    Raises:
      ConfigError: options or configuration are wrong, or the scheduler's command is not on this machine.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    own, overrides = words[:cut], words[cut + 1 :]
    options = tyro.cli(Scheduler, args=own, prog="mllmrec launch", description=DESCRIPTION)  # type: ignore[call-overload]
    check_options(options, own[0])
    check_run(options.config, overrides)
    match options:
        case LocalOptions():
            commands = plan_local(options, overrides, port=find_free_port())
            if not options.dry_run:
                return run_local(commands)
            print("\n".join(map(str, commands)))
            return 0
        case SlurmOptions():
            text, receiver = slurm.render_slurm(options, overrides), slurm.SUBMIT
        case KubernetesOptions():
            text, receiver = kubernetes.render_kubernetes(options, overrides), kubernetes.SUBMIT
        case TpuOptions():
            text, receiver = tpu.render_tpu(options, overrides), tpu.SUBMIT
        case MpiOptions():
            text, receiver = mpi.render_mpi(options, overrides), mpi.SUBMIT
    if options.dry_run or not options.submit:
        print(text, end="")
        return 0
    return submit_text(text, receiver)


def submit_text(text: str, receiver: Sequence[str]) -> int:
    """Runs `receiver` with `text` as its input; returns its exit status.

    Raises:
      ConfigError: the command is not on this machine.
    """
    if shutil.which(receiver[0]) is None:
        raise ConfigError(f"--submit: expected the command '{receiver[0]}' on PATH, got none; without --submit the text is printed")
    return subprocess.run(receiver, input=text, text=True).returncode
