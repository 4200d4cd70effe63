"""Stages on a file system that is really full: a few megabytes of tmpfs, mounted in a namespace of its own.

Run as a script inside that namespace, this file is the job: `test_disk_full.py FOLDER` prints what happened as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from mllmrec_jax.cli import main
from mllmrec_jax.config import MeshConfig, RunConfig, load_config, to_dict

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SIZE = 8 << 20  # bytes
FULL = "No space left on device"


def make_config(folder: Path) -> RunConfig:
    base = load_config(ROOT / "configs" / "quickstart.toml")
    return dataclasses.replace(
        base,
        name="toy",
        output=folder / "runs",
        cache=folder / "cache",
        data=dataclasses.replace(
            base.data, posterworld=dataclasses.replace(base.data.posterworld, items=40, users=60, min_length=12, max_length=16)
        ),
        tokenizer=dataclasses.replace(base.tokenizer, vocab_size=400),
        model=dataclasses.replace(base.model, num_layers=1, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1, head_dim=16),
        sft=dataclasses.replace(base.sft, max_steps=6, batch_size=4, accumulation=2, checkpoint_every=2),
        evaluate=dataclasses.replace(base.evaluate, batch_size=8, bootstrap=100, examples=2),
        mesh=MeshConfig(1, 1, 1),  # of the tests' eight devices
    )


def fill(folder: Path, *, leave: int) -> None:
    """Fills the file system but for `leave` bytes; what an earlier call took is freed first."""
    ballast = folder / "ballast"
    ballast.unlink(missing_ok=True)
    with ballast.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(max(0, file.tell() - leave))


def call(arguments: Sequence[str]) -> dict[str, Any]:
    """Exit code and last line said of an `mllmrec` command, in a process of its own."""
    with tempfile.TemporaryFile(dir="/tmp") as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code = 1
            try:
                main(arguments)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        text = said.read().decode()
        return {"code": os.waitstatus_to_exitcode(status), "error": text[text.rfind("\nerror: ") + 1 :] or text}


def read_rows(folder: Path) -> list[list[float]]:
    lines = (folder / "sft.jsonl").read_text().splitlines()
    return [[row["step"], row["loss"], row["grad_norm"]] for row in map(json.loads, lines)]


def list_files(folder: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(pattern))


def run_job(folder: Path) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".toml", dir="/tmp") as file:
        file.write(tomli_w.dumps(to_dict(make_config(folder))))
        file.flush()
        toml, runs = file.name, folder / "runs"
        found: dict[str, Any] = {}

        def attempt(name: str, leave: int, *arguments: str) -> None:
            fill(folder, leave=leave)
            found[name] = call([arguments[0], toml, *arguments[1:]]) | {"parts": list_files(folder, "*.part")}

        attempt("pictures", 64 << 10, "prepare")
        attempt("prepared", SIZE, "prepare")
        shutil.rmtree(folder / "cache" / "shards")
        attempt("shards", 8 << 10, "prepare")
        found["shards"]["left"] = list_files(folder / "cache" / "shards", "manifest.json")
        attempt("straight", SIZE, "sft", "--name", "straight")
        found["straight"]["rows"] = read_rows(runs / "straight")
        shutil.rmtree(runs / "straight")
        attempt("run folder", 0, "sft")
        attempt("first checkpoint", 64 << 10, "sft", "--resume")
        attempt("later checkpoint", 224 << 10, "sft", "--resume")
        found["later checkpoint"]["marked"] = list_files(runs, "*.finished")
        attempt("unfinished", 0, "evaluate")
        attempt("resumed", SIZE, "sft", "--resume")
        found["resumed"]["rows"] = read_rows(runs / "toy")
        attempt("report", 64 << 10, "evaluate")
        found["report"]["left"] = list_files(runs, "report.*")
        attempt("reported", SIZE, "evaluate")
        found["reported"]["left"] = list_files(runs, "report.*")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the job said, by attempt; skips where no file system can be mounted."""
    folder = tmp_path_factory.mktemp("full")
    mount = f'mount -t tmpfs -o size={SIZE} tmpfs "$1"'
    try:
        subprocess.run(["unshare", "-rm", "sh", "-c", mount, "sh", str(folder)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted in a user namespace here: {getattr(error, 'stderr', None) or error}")
    script = [sys.executable, "-W", "ignore::RuntimeWarning:jax", __file__, str(folder)]
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && shift && exec "$@"', "sh", str(folder), *script]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("attempt", "place"),
    [
        ("pictures", "cache/posterworld-"),
        ("shards", "cache/shards/train-"),
        ("run folder", "runs/toy/config.toml"),
        ("first checkpoint", "runs/toy/checkpoints/sft"),
        ("later checkpoint", "runs/toy/checkpoints/sft"),
        ("report", "runs/toy/report.html"),
    ],
)
def test_the_error_names_the_cause_and_the_path_and_nothing_half_written_stays(found: dict[str, Any], attempt: str, place: str):
    assert found[attempt]["code"] == 2
    assert found[attempt]["error"].startswith("error: ")
    assert FULL in found[attempt]["error"]
    assert place in found[attempt]["error"]
    assert not found[attempt]["parts"]


def test_what_was_cut_short_is_not_taken_for_whole(found: dict[str, Any]):
    assert found["shards"]["left"] == []
    assert found["later checkpoint"]["marked"] == []
    assert "expected a finished sft stage" in found["unfinished"]["error"]
    assert found["report"]["left"] == []


def test_after_space_is_freed_the_job_goes_on(found: dict[str, Any]):
    for attempt in ("prepared", "straight", "resumed", "reported"):
        assert found[attempt]["code"] == 0, found[attempt]["error"]
    assert found["resumed"]["rows"] == found["straight"]["rows"]
    assert [row[0] for row in found["resumed"]["rows"]] == list(range(6))
    assert found["reported"]["left"] == ["toy/report.html", "toy/report.json"]


if __name__ == "__main__":
    print(json.dumps(run_job(Path(sys.argv[1]))))
