"""SLURM: a batch script whose tasks are started by srun, and which goes back to the queue when they were preempted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from mllmrec_jax.config import ConfigError, Count, PositiveInt
from mllmrec_jax.distributed import EXIT_PREEMPTED
from mllmrec_launch.options import BatchOptions, Line, Word, build_program
from mllmrec_launch.template import render_template

SUBMIT = ("sbatch",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmOptions(BatchOptions):
    """A batch script for sbatch; one process a GPU, as JAX expects of SLURM, or one a node."""

    name: Word = "mllmrec"
    """Name of the job."""
    nodes: PositiveInt = 1
    """Nodes."""
    gpus_per_node: Count = 0
    """GPUs a node; 0 asks for none."""
    processes_per_node: Count = 0
    """Processes a node: as many as GPUs, or 1; 0 means one a GPU, or 1 where there are none."""
    cpus_per_process: Count = 0
    """Processor cores a process; 0 leaves it to the cluster."""
    memory: Word | None = None
    """Memory a node, as sbatch's --mem takes it (64G)."""
    time: Word | None = None
    """Time limit, as sbatch's --time takes it (1-12:00:00); a run that reaches it saves and goes back to the queue."""
    partition: Word | None = None
    """Partition."""
    account: Word | None = None
    """Account."""
    qos: Word | None = None
    """Quality of service."""
    grace_s: PositiveInt = 120
    """How long before the time limit SIGTERM comes: longer than a step and a checkpoint take (seconds)."""
    log: Line = "%x-%j.log"
    """Log file, appended to over requeues; sbatch's patterns."""
    setup: tuple[Line, ...] = ()
    """Shell lines before srun (`module load cuda`)."""
    sbatch: tuple[Line, ...] = ()
    """More options of sbatch, one each (`--exclusive`)."""
    python: Line = sys.executable
    """The interpreter on the nodes."""


def render_slurm(options: SlurmOptions, overrides: Sequence[str]) -> str:
    """The batch script.

    Raises:
      ConfigError: processes and GPUs of a node do not go together.
    """
    gpus = options.gpus_per_node
    processes = options.processes_per_node or gpus or 1
    if gpus and processes not in (1, gpus):
        raise ConfigError(f"launch slurm: --processes-per-node: expected 1 or --gpus-per-node = {gpus}, got {processes}")
    return render_template(
        "slurm.sh.jinja",
        options=options,
        processes=processes,
        # JAX gives each task of SLURM the one GPU of its number; a task that has the node to itself takes all.
        device_ids=",".join(map(str, range(gpus))) if processes == 1 and gpus > 1 else "",
        preempted=EXIT_PREEMPTED,
        program=build_program(options, overrides, python=options.python, method="slurm"),
    )
