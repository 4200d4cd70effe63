"""Processes that find each other, end together and stop together, over gloo on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mllmrec_jax.config import DistributedConfig
from mllmrec_jax.distributed import (
    EXIT_FAILURE,
    EXIT_PREEMPTED,
    DistributedError,
    PreemptionGuard,
    Processes,
    is_main_process,
    resolve_processes,
    start_distributed,
    stop_distributed,
)

ROOT = Path(__file__).resolve().parents[1]
HEARTBEAT_TIMEOUT_S = 20
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}

# What a training does with the runtime, in small: a collective a step; ARGUMENTS: what process 1 does at step 3.
PROGRAM = """
import sys, time
from mllmrec_jax.config import DistributedConfig
from mllmrec_jax.distributed import *
from mllmrec_jax.distributed import sum_over_devices
coordinator, count, index, heartbeat, who, what = sys.argv[1:]
config = DistributedConfig("explicit", coordinator, int(count), int(index), int(heartbeat), 60)
processes = start_distributed(config)
assert is_main_process() == (processes.index == 0)
for step in range(200):
    sum_over_devices()
    print("step", step, flush=True)
    if step == 3 and processes.index == int(who):
        exec(what)
    time.sleep(0.1)
stop_distributed()
"""


def pick_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def process_environment() -> dict[str, str]:
    """Of a process in no cluster, with one device of the CPU."""
    other = ("SLURM", "OMPI", "KUBERNETES", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(other)}
    return kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


Start = Callable[[Sequence[str], int], list[subprocess.Popen[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command `count` times, with `{index}` in its words replaced; ends what is left of them after the test."""
    started: list[subprocess.Popen[str]] = []

    def start_all(words: Sequence[str], count: int) -> list[subprocess.Popen[str]]:
        environment = process_environment()
        for index in range(count):
            own = [word.replace("{index}", str(index)) for word in words]
            with open(tmp_path / f"{index}.log", "w") as log:
                started.append(subprocess.Popen([sys.executable, *own], env=environment, stdout=log, stderr=log, text=True))
        return started

    yield start_all
    for process in started:
        process.kill()
        process.wait()


def check_words(count: int, *, seconds: float = 0) -> list[str]:
    words = ["-m", "mllmrec_jax.distributed", "--check", "--seconds", str(seconds), "quickstart", "--distributed.method", "explicit"]
    words += ["--distributed.coordinator", f"127.0.0.1:{pick_port()}", "--distributed.process-count", str(count)]
    return [*words, "--distributed.process-index", "{index}", "--distributed.heartbeat-timeout-s", str(HEARTBEAT_TIMEOUT_S)]


def wait_for_text(path: Path, text: str, *, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while text not in path.read_text():
        assert time.monotonic() < end, f"no '{text}' in {path}:\n{path.read_text()}"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("method", "fields", "environment", "expected"),
    [
        (
            "explicit",
            {"coordinator": "h:1", "process_count": 2, "process_index": 1},
            {},
            {"cluster_detection_method": "deactivate", "coordinator_address": "h:1", "num_processes": 2, "process_id": 1},
        ),
        ("slurm", {}, SLURM, {"cluster_detection_method": "slurm"}),
        ("slurm", {"coordinator": "h:1"}, SLURM, {"cluster_detection_method": "slurm", "coordinator_address": "h:1"}),
        (
            "mpi",
            {"coordinator": "h:1"},
            OPEN_MPI,
            {
                "cluster_detection_method": "deactivate",
                "coordinator_address": "h:1",
                "num_processes": 4,
                "process_id": 3,
                "local_device_ids": [1],
            },
        ),
        (
            "mpi",
            {},
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "JAX_LOCAL_DEVICE_IDS": "0,1"},
            {"cluster_detection_method": "ompi", "num_processes": 4, "process_id": 3},
        ),
        (
            "kubernetes",
            {"coordinator": "h:1", "process_count": 2},
            {"JOB_COMPLETION_INDEX": "1"},
            {"cluster_detection_method": "deactivate", "coordinator_address": "h:1", "num_processes": 2, "process_id": 1},
        ),
        ("auto", {}, {}, {"cluster_detection_method": None}),
    ],
)
def test_processes_come_from_fields_and_environment(method: Any, fields: dict, environment: dict, expected: dict) -> None:
    assert resolve_processes(DistributedConfig(method, **fields), environment) == expected


@pytest.mark.parametrize(
    ("method", "fields", "environment", "message"),
    [
        ("explicit", {"coordinator": "h:1"}, {}, "expected distributed.process_count and distributed.process_index"),
        ("explicit", {"coordinator": "h:1", "process_count": 2, "process_index": 2}, {}, "expected less than .* = 2, got 2"),
        ("explicit", {"coordinator": "host", "process_count": 2, "process_index": 0}, {}, "expected host:port, got 'host'"),
        ("slurm", {}, {"SLURM_JOB_ID": "7"}, "expected a task started by srun, .* SLURM_STEP_NODELIST, SLURM_NTASKS"),
        ("mpi", {}, {}, "expected a process started by Open MPI's mpirun"),
        ("mpi", {}, OPEN_MPI, "expected distributed.coordinator, got nothing"),
        ("kubernetes", {"process_count": 2}, {"JOB_COMPLETION_INDEX": "1"}, "expected distributed.coordinator"),
        ("tpu", {}, {}, "expected libtpu"),
    ],
)
def test_what_a_method_lacks_is_named(method: Any, fields: dict, environment: dict, message: str) -> None:
    with pytest.raises(DistributedError, match=message):
        resolve_processes(DistributedConfig(method, **fields), environment)


def test_one_process_starts_nothing() -> None:
    assert start_distributed(DistributedConfig()) == Processes(0, 1, "")
    assert is_main_process()
    stop_distributed()


def test_guard_of_one_process_sees_sigterm_and_gives_the_handler_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionGuard() as guard:
        assert not guard.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.should_stop() and guard.should_stop()
    assert signal.getsignal(signal.SIGTERM) == before


def test_auto_without_a_cluster_is_an_error() -> None:
    code = "from mllmrec_jax.config import DistributedConfig as C; from mllmrec_jax.distributed import *; start_distributed(C('auto'))"
    done = subprocess.run([sys.executable, "-c", code], env=process_environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "distributed.method 'auto'" in done.stderr and "needs a cluster JAX can detect" in done.stderr


def test_check_of_one_process() -> None:
    words = ["-m", "mllmrec_jax.distributed", "--check"]
    done = subprocess.run([sys.executable, *words], env=process_environment(), capture_output=True, text=True, check=True)
    assert "process 0 of 1" in done.stdout and "sum over processes 1, expected 1" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_sum_over_each_other(start: Start, tmp_path: Path, count: int) -> None:
    processes = start(check_words(count), count)
    assert [process.wait(120) for process in processes] == [0] * count
    total = count * (count + 1) // 2
    for index in range(count):
        line = (
            f"process {index} of {count} on {socket.gethostname()}: 1 of {count} cpu devices, sum over processes {total}, expected {total}"
        )
        assert line in (tmp_path / f"{index}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_process_ends_the_others_within_a_minute(start: Start, tmp_path: Path, victim: int, number: signal.Signals) -> None:
    processes = start(check_words(2, seconds=120), 2)
    for index in range(2):
        wait_for_text(tmp_path / f"{index}.log", "expected 3")
    processes[victim].send_signal(number)
    survivor = 1 - victim
    assert processes[survivor].wait(60) not in (0, EXIT_PREEMPTED)
    text = (tmp_path / f"{survivor}.log").read_text()
    assert ("(stopped sending heartbeats):\n1\n" if victim == 1 else "the leader task was preempted/died") in text


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    ("what", "status", "reason"),
    [
        ("raise KeyError('no such item')", EXIT_FAILURE, "KeyError: 'no such item'"),
        ("abort_distributed('the disk is full', 2)", 2, "the disk is full"),
        ("sys.exit(5)", EXIT_FAILURE, "it ended before the run did; its own log says why"),
    ],
)
def test_a_failing_process_ends_the_others_with_its_reason(
    start: Start, tmp_path: Path, who: int, what: str, status: int, reason: str
) -> None:
    words = ["-c", PROGRAM, f"127.0.0.1:{pick_port()}", "2", "{index}", str(HEARTBEAT_TIMEOUT_S), str(who), what]
    processes = start(words, 2)
    assert processes[who].wait(60) == status
    begin = time.monotonic()
    assert processes[1 - who].wait(60) == EXIT_FAILURE
    assert time.monotonic() - begin < 15
    host = socket.gethostname()
    line = f"error: process {who} of 2 on {host} failed: {reason}; process {1 - who} of 2 on {host} stops too"
    assert line in (tmp_path / f"{1 - who}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("receivers", [[0], [1], [0, 1]])
def test_sigterm_stops_every_process_after_the_same_step(start: Start, tmp_path: Path, receivers: list[int]) -> None:
    processes = start(check_words(2, seconds=120), 2)
    for index in range(2):
        wait_for_text(tmp_path / f"{index}.log", "expected 3")
    for index in receivers:
        processes[index].send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in processes] == [EXIT_PREEMPTED] * 2
    steps = [(tmp_path / f"{index}.log").read_text().partition("stopped by SIGTERM after step ")[2].strip() for index in range(2)]
    assert steps[0] == steps[1] != ""


@pytest.mark.slow
def test_processes_that_do_not_come_are_not_waited_for_for_ever(start: Start, tmp_path: Path) -> None:
    words = [*check_words(2), "--distributed.initialization-timeout-s", "12"]
    [alone] = start(words, 1)
    assert alone.wait(60) == -signal.SIGABRT
    text = (tmp_path / "0.log").read_text()
    assert "waiting for the other processes of the run, 12 s at most" in text and "DEADLINE_EXCEEDED" in text
