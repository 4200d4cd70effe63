"""What is rendered for SLURM, MPI and TPU VMs, and how wrong options are refused."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mllmrec_jax.config import ConfigError
from mllmrec_launch import command
from mllmrec_launch.command import launch
from mllmrec_launch.mpi import MpiOptions, render_mpi
from mllmrec_launch.slurm import SlurmOptions, render_slurm
from mllmrec_launch.tpu import TpuOptions, render_tpu

# A path and an override that a shell would take apart.
NASTY = 'it\'s $(a) "path"'


def check_bash(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def find_words(script: str, start: str) -> list[str]:
    [line] = [line for line in script.splitlines() if line.startswith(start)]
    return shlex.split(line)


def read_directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_slurm_script_asks_for_what_the_options_say() -> None:
    options = SlurmOptions(
        config="quickstart",
        name="trial",
        nodes=4,
        gpus_per_node=8,
        cpus_per_process=12,
        memory="500G",
        time="1-00:00:00",
        partition="gpu",
        account="lab",
        qos="high",
        grace_s=300,
        setup=("module load cuda",),
        sbatch=("--exclusive", "--constraint=h100"),
        python="/venv/bin/python",
    )
    script = render_slurm(options, ["--seed", "3"])
    check_bash(script)
    assert read_directives(script) == {
        "job-name": "trial",
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "mem": "500G",
        "time": "1-00:00:00",
        "partition": "gpu",
        "account": "lab",
        "qos": "high",
        "output": "%x-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": "TERM@300",
        "exclusive": "",
        "constraint": "h100",
    }
    words = find_words(script, "srun")
    program = "/venv/bin/python -m mllmrec_jax.cli run quickstart --resume --seed 3 --distributed.method slurm"
    assert "--cpus-per-task=12" in words and " ".join(words).endswith(program)
    assert script.index("module load cuda") < script.index("\nsrun ")
    assert 'if [ "$status" -eq 75 ]' in script and 'scontrol requeue "$SLURM_JOB_ID"' in script


@pytest.mark.parametrize(
    ("gpus", "processes", "tasks", "device_ids"), [(8, 0, "8", None), (8, 8, "8", None), (8, 1, "1", "0,1,2,3,4,5,6,7"), (0, 3, "3", None)]
)
def test_slurm_processes_and_their_gpus(gpus: int, processes: int, tasks: str, device_ids: str | None) -> None:
    script = render_slurm(SlurmOptions(config="quickstart", gpus_per_node=gpus, processes_per_node=processes), [])
    assert read_directives(script)["ntasks-per-node"] == tasks
    assert ("JAX_LOCAL_DEVICE_IDS" in script) == (device_ids is not None)
    assert device_ids is None or f"export JAX_LOCAL_DEVICE_IDS={device_ids}\n" in script


def test_slurm_refuses_processes_that_share_gpus_unevenly() -> None:
    with pytest.raises(ConfigError, match="--processes-per-node: expected 1 or --gpus-per-node = 8, got 3"):
        render_slurm(SlurmOptions(config="quickstart", gpus_per_node=8, processes_per_node=3), [])


def test_the_check_takes_the_place_of_the_training() -> None:
    words = find_words(render_slurm(SlurmOptions(config="quickstart", check=True, check_seconds=5.0), []), "srun")
    assert words[-8:] == ["-m", "mllmrec_jax.distributed", "--check", "--seconds", "5.0", "quickstart", "--distributed.method", "slurm"]


def test_evaluation_is_not_resumed() -> None:
    assert "--resume" not in render_slurm(SlurmOptions(config="quickstart", command="evaluate"), [])


def test_mpirun_line() -> None:
    options = MpiOptions(
        config="quickstart", hosts=("a", "b"), processes_per_host=4, port=5000, export=("PATH",), mpirun=("--oversubscribe",)
    )
    script = render_mpi(options, [])
    check_bash(script)
    words = find_words(script, "mpirun ")
    assert words[words.index("-np") + 1] == "8" and words[words.index("--host") + 1] == "a:4,b:4"
    assert words[words.index("--map-by") + 1] == "ppr:4:node"
    assert "--allow-run-as-root" not in words and "--oversubscribe" in words
    assert [words[i + 1] for i, word in enumerate(words) if word == "-x"] == ["PYTHONUNBUFFERED=1", "PATH"]
    assert "--distributed.method mpi --distributed.coordinator a:5000" in " ".join(words)
    assert "--allow-run-as-root" in find_words(render_mpi(MpiOptions(config="quickstart", allow_run_as_root=True), []), "mpirun ")


def test_tpu_lines_copy_the_configuration_and_run_on_every_worker(tmp_path: Path) -> None:
    path = tmp_path / "my run.toml"
    path.write_text("")
    options = TpuOptions(config=str(path), name="pod", zone="us-east5-a", project="lab", setup=("source venv/bin/activate",))
    script = render_tpu(options, ["--name", NASTY])
    check_bash(script)
    lines = [shlex.split(line) for line in script.splitlines() if line.startswith("gcloud")]
    assert [line[:5] for line in lines] == [["gcloud", "compute", "tpus", "tpu-vm", verb] for verb in ("scp", "ssh")]
    for line in lines:
        assert "--worker=all" in line and line[line.index("--zone") + 1] == "us-east5-a" and line[line.index("--project") + 1] == "lab"
    assert lines[0][5:7] == [str(path), "pod:mllmrec-config.toml"]
    remote = lines[1][lines[1].index("--command") + 1]
    check_bash(remote)
    assert remote.startswith(
        "source venv/bin/activate && PYTHONUNBUFFERED=1 exec python3 -m mllmrec_jax.cli run mllmrec-config.toml --resume"
    )
    assert NASTY in shlex.split(remote) and remote.endswith("--distributed.method tpu")


def test_tpu_shipped_configuration_is_not_copied() -> None:
    script = render_tpu(TpuOptions(config="quickstart", name="pod", zone="z"), [])
    assert "scp" not in script and "mllmrec_jax.cli run quickstart --resume" in script


def test_nothing_of_a_word_reaches_the_shell(tmp_path: Path) -> None:
    path = tmp_path / NASTY
    path.write_text("")
    for script, start in (
        (render_slurm(SlurmOptions(config=str(path)), ["--name", NASTY]), "srun"),
        (render_mpi(MpiOptions(config=str(path)), ["--name", NASTY]), "mpirun "),
    ):
        check_bash(script)
        words = find_words(script, start)
        assert str(path) in words and words[words.index("--name") + 1] == NASTY


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurm", "quickstart", "--name", "a b"], r"launch slurm: --name: expected match pattern .*, got 'a b'"),
        (["slurm", "quickstart", "--setup", "a\nb"], r"launch slurm: --setup: expected match pattern .*, got 'a\\nb'"),
        (["slurm", "quickstart", "--grace-s", "0"], "launch slurm: --grace-s: expected greater than 0, got 0"),
        (
            ["kubernetes", "quickstart", "--image", "i", "--name", "Upper"],
            "launch kubernetes: --name: expected match pattern .*, got 'Upper'",
        ),
        (["mpi", "quickstart", "--port", "80"], "launch mpi: --port: expected greater than or equal to 1024, got 80"),
        (["local", "no-such-config"], "no-such-config: expected a TOML file or a shipped config"),
        (["local", "quickstart", "--", "--data.history-len", "0"], "data.history_len"),
        (["local", "quickstart", "--", "--distributed.method", "slurm"], "--distributed.method: expected an option of the run"),
        (["local", "quickstart", "--", "--distributed.process_index=1"], "--distributed.process_index=1: expected an option of the run"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        launch(words)


def test_without_submit_the_script_is_printed_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Any] = []
    monkeypatch.setattr(command, "submit_text", lambda text, receiver: received.append((text, receiver)) or 0)
    assert launch(["slurm", "quickstart"]) == 0
    printed = capsys.readouterr().out
    assert launch(["slurm", "quickstart", "--submit", "--dry-run"]) == 0
    assert capsys.readouterr().out == printed and not received
    assert launch(["slurm", "quickstart", "--submit"]) == 0
    assert received == [(printed, ("sbatch",))]


def test_submitting_without_the_scheduler_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="expected the command 'sbatch' on PATH"):
        launch(["slurm", "quickstart", "--submit"])


def test_local_dry_run_prints_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["local", "quickstart", "--dry-run", "--processes", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("--distributed.process-count 3" in line for line in lines)
