"""Commands of other projects that some tests run: found, installed where CI allows it, or a reason to skip."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mllmrec_jax.train.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[2]

Require = Callable[[str, str], None]


@pytest.fixture(scope="session")
def require_command() -> Require:
    """A function of a command and its Debian packages: skips the test where the command is not here and may not be installed."""

    def require(command: str, packages: str) -> None:
        if shutil.which(command):
            return
        if os.environ.get("MLLMREC_TEST_INSTALL") != "1" or os.geteuid() != 0 or not shutil.which("apt-get"):
            pytest.skip(f"no {command}; as root on Debian, MLLMREC_TEST_INSTALL=1 installs {packages}")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=environment, check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages.split()], env=environment, check=True)

    return require


@pytest.fixture(scope="session")
def clone_environment() -> dict[str, str]:
    """The environment of a process that finds this clone's packages and computes on the CPU."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "launch"))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES"))
    }
    return environment | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def training_environment(clone_environment: dict[str, str]) -> dict[str, str]:
    """The same of a process that also keeps the programs it compiles."""
    paths = os.pathsep.join([clone_environment["PYTHONPATH"], str(ROOT / "tests" / "processes")])
    return clone_environment | {"PYTHONPATH": paths}


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """A run of the quickstart cut down to two SFT steps and two GRPO steps."""

    folder: Path

    @property
    def overrides(self) -> list[str]:
        sizes = {
            "output": self.folder / "runs", "cache": self.folder / "cache", "data.posterworld.items": 40, "data.posterworld.users": 60,
            "tokenizer.vocab-size": 280, "model.num-layers": 1, "model.hidden-size": 32, "model.intermediate-size": 48,
            "model.head-dim": 8, "sft.max-steps": 2, "grpo.max-steps": 2, "grpo.batch-size": 8, "evaluate.examples": 0,
            "evaluate.bootstrap": 100, "mesh.fsdp": 2,
        }  # fmt: skip
        return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]

    def check(self) -> None:
        """Both processes did their part of two GRPO steps, and process 0 wrote the report."""
        run = self.folder / "runs" / "quickstart"
        assert [row["step"] for row in read_metrics(run / "grpo.jsonl")] == [0, 1]
        assert json.loads((run / "report.json").read_text())["provenance"]["device"]["processes"] == 2


@pytest.fixture
def tiny_run(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path)
