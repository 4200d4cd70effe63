"""The rendered batch script on a real SLURM of one node: munged, slurmctld and slurmd are started by hand."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mllmrec_launch.local import find_free_port

pytestmark = pytest.mark.slow

# The node is called by a name that resolves: process 0 listens there.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=1,sched_interval=2
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=localhost Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=localhost PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
"""

RunSlurm = Callable[..., str]


def wait_until(condition: Callable[[], bool], what: Callable[[], str], *, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.3)


@pytest.fixture(scope="module")
def slurm(
    require_command: Callable[[str, str], None], clone_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunSlurm]:
    """Runs a command of SLURM against a cluster of this machine; returns what it printed."""
    require_command("sbatch", "slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as other users, which only root may do")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    ports = {"controller_port": find_free_port(), "node_port": find_free_port()}
    conf.write_text(SLURM_CONF.format(host=host, folder=folder, **ports))
    environment = clone_environment | {"SLURM_CONF": str(conf)}
    munge = [f"--{name}={folder}/munge.{end}" for name, end in (("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"))]
    munge += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed", "--foreground", "--force"]
    sbin = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    daemons: list[subprocess.Popen[bytes]] = []

    def start(name: str, *words: str) -> None:
        command = shutil.which(name, path=sbin)
        assert command, f"{name} belongs to slurm-wlm and munge, but is not here"
        with open(folder / f"{name}.out", "w") as log:
            daemons.append(subprocess.Popen([command, *words], env=environment, stdout=log, stderr=log))

    def run(*words: str, text: str | None = None) -> str:
        done = subprocess.run(words, env=environment, input=text, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def read_logs() -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in folder.iterdir() if path.suffix in (".log", ".out"))

    def is_ready() -> bool:
        done = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
        return done.stdout.strip() == "idle"

    try:
        start("munged", *munge)
        wait_until((folder / "munge.socket").exists, read_logs, timeout_s=20)
        start("slurmctld", "-D", "-c", "-f", str(conf))
        start("slurmd", "-D", "-f", str(conf), "-N", "localhost")
        wait_until(is_ready, read_logs, timeout_s=60)
        yield run
    finally:
        if len(daemons) == 3:  # a job that a failed test left would outlive its daemons
            subprocess.run(["scancel", "--partition=all"], env=environment)
            end = time.monotonic() + 30
            while run("squeue", "--noheader").strip() and time.monotonic() < end:
                time.sleep(0.3)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def submit(slurm: RunSlurm, environment: dict[str, str], folder: Path, *options: str) -> tuple[str, Path]:
    """Renders by the command line and gives the script to sbatch; returns the job's number and its log."""
    log = folder / "job.log"
    words = ["-m", "mllmrec_jax.cli", "launch", "slurm", "quickstart", "--processes-per-node", "2", "--log", str(log)]
    script = subprocess.run([sys.executable, *words, *options], env=environment, capture_output=True, text=True, check=True).stdout
    reply = slurm("sbatch", text=script)
    found = re.search(r"Submitted batch job (\d+)", reply)
    assert found, reply
    return found[1], log


def read_log(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def show(slurm: RunSlurm, job: str) -> str:
    return slurm("scontrol", "show", "job", job)


def test_two_tasks_find_each_other(slurm: RunSlurm, clone_environment: dict[str, str], tmp_path: Path) -> None:
    job, log = submit(slurm, clone_environment, tmp_path, "--check")
    wait_until(lambda: "JobState=COMPLETED" in show(slurm, job), lambda: read_log(log) + show(slurm, job), timeout_s=120)
    for index in range(2):
        assert re.search(rf"process {index} of 2 on \S+: 1 of 2 cpu devices, sum over processes 3, expected 3", log.read_text())


def test_two_tasks_train(slurm: RunSlurm, training_environment: dict[str, str], tmp_path: Path, tiny_run: Any) -> None:
    job, log = submit(slurm, training_environment, tmp_path, "--", *tiny_run.overrides)
    wait_until(lambda: "JobState=COMPLETED" in show(slurm, job), lambda: read_log(log) + show(slurm, job), timeout_s=400)
    tiny_run.check()


def test_a_preempted_job_goes_back_to_the_queue(slurm: RunSlurm, clone_environment: dict[str, str], tmp_path: Path) -> None:
    job, log = submit(slurm, clone_environment, tmp_path, "--check", "--check-seconds", "100")
    try:
        wait_until(lambda: read_log(log).count("expected 3") == 2, lambda: read_log(log), timeout_s=60)
        slurm("scancel", "--signal=TERM", job)
        wait_until(lambda: "was preempted: requeueing it" in read_log(log), lambda: read_log(log), timeout_s=60)
        stopped = re.findall(r"process (\d) of 2 on \S+: stopped by SIGTERM after step (\d+)", log.read_text())
        assert sorted(index for index, _ in stopped) == ["0", "1"] and len({step for _, step in stopped}) == 1
        wait_until(lambda: "Restarts=1" in show(slurm, job), lambda: read_log(log) + show(slurm, job), timeout_s=60)
    finally:
        slurm("scancel", job)


def test_an_urgent_job_takes_the_node_once_everything_is_saved(slurm: RunSlurm, clone_environment: dict[str, str], tmp_path: Path) -> None:
    job, log = submit(slurm, clone_environment, tmp_path, "--check", "--check-seconds", "100", "--sbatch=--exclusive")
    try:
        wait_until(lambda: read_log(log).count("expected 3") == 2, lambda: read_log(log), timeout_s=60)
        words = ["sbatch", "--partition=urgent", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=echo urgent"]
        slurm(*words)
        wait_until(lambda: read_log(tmp_path / "urgent.log") == "urgent\n", lambda: read_log(log) + show(slurm, job), timeout_s=90)
        assert log.read_text().count("stopped by SIGTERM after step") == 2
        assert "Restarts=1" in show(slurm, job), read_log(log) + show(slurm, job)
    finally:
        slurm("scancel", job)


def test_a_killed_task_fails_the_job_with_the_reason(slurm: RunSlurm, clone_environment: dict[str, str], tmp_path: Path) -> None:
    job, log = submit(
        slurm, clone_environment, tmp_path, "--check", "--check-seconds", "100", "--", "--distributed.heartbeat-timeout-s", "20"
    )
    wait_until(lambda: read_log(log).count("expected 3") == 2, lambda: read_log(log), timeout_s=60)
    rows = [line.split() for line in slurm("scontrol", "listpids", f"{job}.0").splitlines()[1:]]
    [victim] = [int(row[0]) for row in rows if row[4] == "1"]  # PID JOBID STEPID LOCALID GLOBALID
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: "JobState=FAILED" in show(slurm, job), lambda: read_log(log) + show(slurm, job), timeout_s=60)
    assert "requeueing" not in log.read_text()
    assert re.search(r"stopped sending heartbeats\):\n0: 1\n", log.read_text())


def test_a_cancelled_job_stays_cancelled(slurm: RunSlurm, clone_environment: dict[str, str], tmp_path: Path) -> None:
    job, log = submit(slurm, clone_environment, tmp_path, "--check", "--check-seconds", "100")
    wait_until(lambda: read_log(log).count("expected 3") == 2, lambda: read_log(log), timeout_s=60)
    slurm("scancel", job)
    wait_until(lambda: "JobState=CANCELLED" in show(slurm, job), lambda: read_log(log) + show(slurm, job), timeout_s=60)
    time.sleep(8)  # longer than KillWait: the script has had its say
    assert "JobState=CANCELLED" in show(slurm, job) and "Restarts=0" in show(slurm, job), read_log(log)
    assert "requeueing" not in read_log(log)
