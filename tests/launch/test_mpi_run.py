"""The rendered mpirun line with a real Open MPI on this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllmrec_jax.distributed import EXIT_PREEMPTED
from mllmrec_launch.local import find_free_port

pytestmark = pytest.mark.slow
MORE_WORDS = ["--mpirun=--oversubscribe"]


def render(environment: dict[str, str], *options: str) -> str:
    words = ["-m", "mllmrec_jax.cli", "launch", "mpi", "quickstart", "--processes-per-host", "2", "--port", str(find_free_port())]
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = [sys.executable, *words, *root, *MORE_WORDS, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_two_processes_find_each_other(require_command: Callable[[str, str], None], clone_environment: dict[str, str]) -> None:
    require_command("mpirun", "openmpi-bin")
    done = subprocess.run(["bash", "-s"], input=render(clone_environment, "--check"), env=clone_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for index in range(2):
        assert re.search(rf"process {index} of 2 on \S+: 1 of 2 cpu devices, sum over processes 3, expected 3", done.stdout)


def test_two_processes_train(require_command: Callable[[str, str], None], training_environment: dict[str, str], tiny_run: Any) -> None:
    require_command("mpirun", "openmpi-bin")
    script = render(training_environment, "--", *tiny_run.overrides)
    done = subprocess.run(["bash", "-s"], input=script, env=training_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tiny_run.check()


def test_sigterm_to_the_script_stops_both_after_the_same_step(
    require_command: Callable[[str, str], None], clone_environment: dict[str, str], tmp_path: Path
) -> None:
    require_command("mpirun", "openmpi-bin")
    script = tmp_path / "job.sh"
    script.write_text(render(clone_environment, "--check", "--check-seconds", "100"))
    log = tmp_path / "job.log"
    with open(log, "w") as stream, subprocess.Popen(["bash", script], env=clone_environment, stdout=stream, stderr=stream) as process:
        try:
            end = time.monotonic() + 60
            while log.read_text().count("expected 3") < 2:
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == EXIT_PREEMPTED, log.read_text()
        finally:
            process.kill()
    stopped = re.findall(r"process (\d) of 2 on \S+: stopped by SIGTERM after step (\d+)", log.read_text())
    assert sorted(index for index, _ in stopped) == ["0", "1"] and len({step for _, step in stopped}) == 1
