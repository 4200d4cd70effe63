"""The launcher of this machine: what its processes print, how they end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mllmrec_jax.distributed import EXIT_PREEMPTED
from mllmrec_launch import local
from mllmrec_launch.local import Command, LocalOptions, plan_local, run_local


def python(code: str, **environment: str) -> Command:
    return Command((sys.executable, "-c", code), environment)


def test_every_process_gets_its_number_its_devices_and_one_address() -> None:
    options = LocalOptions(config="quickstart", processes=3, devices_per_process=2, cpu=True)
    commands = plan_local(options, ["--seed", "3"], port=4242)
    assert [command.environment["JAX_LOCAL_DEVICE_IDS"] for command in commands] == ["0,1", "2,3", "4,5"]
    for index, command in enumerate(commands):
        assert command.environment["JAX_PLATFORMS"] == "cpu" and command.environment["JAX_NUM_CPU_DEVICES"] == "2"
        text = " ".join(command.words)
        assert "mllmrec_jax.cli run quickstart --resume --seed 3 --distributed.method explicit" in text
        assert text.endswith(f"--distributed.coordinator 127.0.0.1:4242 --distributed.process-count 3 --distributed.process-index {index}")


def test_output_is_prefixed(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_local([python("import os; print(os.environ['WORD'])", WORD="a"), python("import sys; sys.stderr.write('b')")]) == 0
    assert sorted(capfd.readouterr().out.replace("b[", "b\n[").split()) == ["[0]", "[1]", "a", "b"]


@pytest.mark.parametrize(
    ("codes", "status"), [((0, 0), 0), ((0, EXIT_PREEMPTED), EXIT_PREEMPTED), ((EXIT_PREEMPTED, 3), 3), ((0, 2), 2), ((5, 0), 5)]
)
def test_status_is_the_failed_ones(codes: tuple[int, int], status: int) -> None:
    assert run_local([python(f"raise SystemExit({code})") for code in codes]) == status


def test_a_dead_process_takes_the_others_with_it(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_PATIENCE_S", 0.2)
    begin = time.monotonic()
    assert run_local([python("import time; time.sleep(60)"), python("import os; os.kill(os.getpid(), 9)")]) == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 10
    error = capfd.readouterr().err.splitlines()
    assert error[:2] == ["mllmrec launch: process 1 of 2 was killed by SIGKILL", "mllmrec launch: killing process 0: another one failed"]


def test_children_of_a_process_end_with_it() -> None:
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    assert run_local([python(child)]) == 0
    assert time.monotonic() - begin < 10


@pytest.fixture
def check(clone_environment: dict[str, str], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The launcher with two processes that have found each other and go on for a while, and its log."""
    words = ["launch", "local", "quickstart", "--check", "--check-seconds", "100", "--cpu"]
    command = [sys.executable, "-m", "mllmrec_jax.cli", *words]
    log = tmp_path / "log"
    with open(log, "w") as stream, subprocess.Popen(command, env=clone_environment, stdout=stream, stderr=stream, text=True) as process:
        try:
            end = time.monotonic() + 60
            while log.read_text().count("expected 3") < 2:
                assert time.monotonic() < end and process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield process, log
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "total"), [(2, 1, 3), (4, 1, 10), (2, 2, 6)])
def test_processes_sum_over_each_other(clone_environment: dict[str, str], processes: int, devices: int, total: int) -> None:
    words = ["launch", "local", "quickstart", "--check", "--cpu", "--processes", str(processes), "--devices-per-process", str(devices)]
    command = [sys.executable, "-m", "mllmrec_jax.cli", *words]
    done = subprocess.run(command, env=clone_environment, capture_output=True, text=True, check=True)
    for index in range(processes):
        counts = f"{devices} of {devices * processes} cpu devices, sum over processes {total}, expected {total}"
        assert re.search(rf"^\[{index}\] process {index} of {processes} on .*: {counts}$", done.stdout, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_stops_every_process(check: tuple[subprocess.Popen[str], Path], number: signal.Signals) -> None:
    process, log = check
    process.send_signal(number)
    assert process.wait(60) == EXIT_PREEMPTED
    steps = re.findall(r"stopped by SIGTERM after step (\d+)", log.read_text())
    assert len(steps) == 2 and len(set(steps)) == 1


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_is_named(check: tuple[subprocess.Popen[str], Path]) -> None:
    process, log = check
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    begin = time.monotonic()
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(60) == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 30
    assert "mllmrec launch: process 1 of 2 was killed by SIGKILL" in log.read_text()
