"""What a run was: resolved configuration, versions, commit, device; written into its folder before anything else."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import tomli_w

from mllmrec_jax import __version__
from mllmrec_jax.config import RunConfig, to_dict
from mllmrec_jax.data.atomic import write_file

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "tensorstore", "numpy", "grain")


def _find_commit() -> str:
    """Commit of the clone this code runs from, marked where it has uncommitted changes; of an installed wheel, nothing is known."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown (not run from a clone)"
    try:
        run = {"cwd": root, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        dirty = subprocess.run(["git", "status", "--porcelain"], **run).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return "unknown (git failed)"
    return f"{commit} with uncommitted changes" if dirty else commit


def collect_provenance(config: RunConfig) -> dict[str, Any]:
    """Plain JSON values; starts the JAX backend to name the device."""
    device = jax.devices()[0]
    return {
        "name": config.name,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _find_commit(),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "cpu_cores": os.cpu_count(),
        },
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {
            "mllmrec-jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "config": to_dict(config),
    }


def write_provenance(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Writes `config.toml` (resolved: it reruns this run) and `provenance.json`; returns the latter.

    How these processes found each other is left out of `config.toml`: it is the launcher's to say, each time.
    """
    provenance = collect_provenance(config)
    alone = dataclasses.replace(config.distributed, method="none", coordinator=None, process_count=None, process_index=None)
    write_file(folder / "config.toml", tomli_w.dumps(to_dict(dataclasses.replace(config, distributed=alone))).encode())
    write_file(folder / "provenance.json", (json.dumps(provenance, indent=2) + "\n").encode())
    return provenance
