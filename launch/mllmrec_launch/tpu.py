"""Cloud TPU VMs: the gcloud line that starts one process on every worker of a slice."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mllmrec_jax.distributed import EXIT_PREEMPTED
from mllmrec_launch.options import BatchOptions, Line, Word, build_program
from mllmrec_launch.template import render_template

SUBMIT = ("bash", "-s")
_REMOTE_CONFIG = "mllmrec-config.toml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuOptions(BatchOptions):
    """A script with the gcloud lines that start one process on every worker of a TPU VM slice."""

    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]
    """Name of the TPU VM."""
    zone: Word
    """Its zone."""
    project: Word | None = None
    """Its project; gcloud's own where none is given."""
    setup: tuple[Line, ...] = ()
    """Shell lines on each worker before the program (`source venv/bin/activate`); a failing one ends it."""
    python: Line = "python3"
    """The interpreter on the workers."""


def render_tpu(options: TpuOptions, overrides: Sequence[str]) -> str:
    """A shell script: copies a configuration file to the workers, if there is one, and runs the program on all of them."""
    path = Path(options.config)
    program = build_program(options, overrides, python=options.python, config=_REMOTE_CONFIG if path.is_file() else None, method="tpu")
    remote = " && ".join([*options.setup, "PYTHONUNBUFFERED=1 exec " + shlex.join(program)])
    place = ["--zone", options.zone, *(["--project", options.project] if options.project else []), "--worker=all"]
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
    lines = [[*gcloud, "ssh", options.name, *place, "--command", remote]]
    if path.is_file():
        lines.insert(0, [*gcloud, "scp", str(path.absolute()), f"{options.name}:{_REMOTE_CONFIG}", *place])
    return render_template("tpu.sh.jinja", lines=lines, preempted=EXIT_PREEMPTED)
