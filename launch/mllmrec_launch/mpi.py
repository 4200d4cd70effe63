"""Open MPI: one mpirun line. MPI starts the processes; they talk to each other through JAX."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mllmrec_jax.config import PositiveInt
from mllmrec_jax.distributed import EXIT_PREEMPTED
from mllmrec_launch.options import BatchOptions, Line, Port, Word, build_program
from mllmrec_launch.template import render_template

SUBMIT = ("bash", "-s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MpiOptions(BatchOptions):
    """A script with one mpirun line, for Open MPI; one process a GPU."""

    hosts: Annotated[tuple[Word, ...], Field(min_length=1)] = ("localhost",)
    """Machines, the one of process 0 first."""
    processes_per_host: PositiveInt = 1
    """Processes a machine: as many as GPUs."""
    port: Port = 8476
    """Port of process 0."""
    export: tuple[Word, ...] = ()
    """Environment variables the processes get (`PATH`, `NCCL_DEBUG=INFO`)."""
    allow_run_as_root: bool = False
    """Whether mpirun may run as root."""
    mpirun: tuple[Line, ...] = ()
    """More words for mpirun (`--oversubscribe`)."""
    python: Line = sys.executable
    """The interpreter on the machines."""


def render_mpi(options: MpiOptions, overrides: Sequence[str]) -> str:
    """A shell script with one mpirun line."""
    share = options.processes_per_host
    words = ["mpirun", "-np", str(len(options.hosts) * share), "--host", ",".join(f"{host}:{share}" for host in options.hosts)]
    words += ["--map-by", f"ppr:{share}:node", "--bind-to", "none", "--tag-output"]
    if options.allow_run_as_root:
        words.append("--allow-run-as-root")
    for variable in ("PYTHONUNBUFFERED=1", *options.export):
        words += ["-x", variable]
    words += options.mpirun
    words += build_program(options, overrides, python=options.python, method="mpi", coordinator=f"{options.hosts[0]}:{options.port}")
    return render_template("mpi.sh.jinja", words=words, preempted=EXIT_PREEMPTED)
