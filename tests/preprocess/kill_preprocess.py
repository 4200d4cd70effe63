"""Kills preprocessing runs at random moments and compares what they leave in the end with an uninterrupted run, byte for byte.

    python tests/preprocess/kill_preprocess.py --kills 50 --seed 0

A run is started, killed (SIGKILL) after a random part of the time that a whole run takes, and started again; when one comes to its end
before it is killed, its outputs are compared, everything is removed, and the next round begins. All runs are of one copy of the code, made
at the start: code that is edited meanwhile would give other hashes. Prints one JSON object; exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = ("embeddings", "scores", "emit")


def run_child(folder: Path) -> None:
    """In a process of its own: says `ready` when everything is imported, then runs."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]
    from conftest import tiny_config

    from mllmrec_jax.preprocess.backends import local, local_encoder  # noqa: F401
    from mllmrec_jax.preprocess.run import run_preprocess

    print("ready", flush=True)
    run_preprocess(tiny_config(folder, items=80, users=120))


def copy_code(folder: Path) -> Path:
    """This script among copies of all that it imports."""
    for name in ("mllmrec_jax", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    here = folder / "tests" / "preprocess"
    here.mkdir(parents=True)
    for name in ("conftest.py", Path(__file__).name):
        shutil.copy(Path(__file__).with_name(name), here)
    return here / Path(__file__).name


def start_run(script: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), "--child", str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    if child.stdout.readline() != "ready\n":
        raise RuntimeError(child.communicate()[1])
    return child


def read_outputs(folder: Path) -> dict[str, bytes]:
    outputs = folder / "runs" / "tiny" / "preprocess"
    return {
        path.relative_to(outputs).as_posix(): path.read_bytes()
        for name in OUTPUTS
        for path in sorted((outputs / name).rglob("*"))
        if path.is_file()
    }


def finish_run(child: subprocess.Popen[str], timeout: float | None) -> bool:
    """Whether the run came to its end within `timeout` seconds; it is killed otherwise."""
    try:
        _, errors = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return False
    if child.returncode:
        raise RuntimeError(errors)
    return True


def time_run(script: Path, folder: Path) -> float:
    """Seconds of a run that is not killed, from `ready` on."""
    child = start_run(script, folder)
    start = time.monotonic()
    finish_run(child, None)
    return time.monotonic() - start


def explain_difference(name: str, found: dict[str, bytes], wanted: dict[str, bytes]) -> str:
    """The name; of a manifest also what in it differs, the hashes of single stages among that."""
    if name not in found or name not in wanted:
        return f"{name}: {'missing' if name in wanted else 'not expected'}"
    if Path(name).name != "manifest.json":
        return name
    one, other = json.loads(found[name]), json.loads(wanted[name])
    one, other = ({**manifest, **manifest.get("stages", {})} for manifest in (one, other))
    return f"{name}: {', '.join(sorted(key for key in {*one, *other} if one.get(key) != other.get(key)))}"


def compare_runs(folder: Path, kills: int, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    script = copy_code(folder / "code")
    finish_run(start_run(script, folder / "whole"), None)
    wanted = read_outputs(folder / "whole")
    again_s = time_run(script, folder / "whole")
    whole_s = time_run(script, folder / "timed")  # the first run of a machine waits for its disk
    different: set[str] = set()
    killed, rounds, stopped_in = 0, 0, []
    while killed < kills or rounds == 0 or (folder / "killed").exists():
        fresh = not (folder / "killed").exists()
        child = start_run(script, folder / "killed")
        start = time.monotonic()
        if killed < kills and not finish_run(child, rng.uniform(0, whole_s)):
            killed += 1
            stores = folder / "killed" / "cache" / "preprocess"
            stopped_in.append(sum(len(path.read_bytes().splitlines()) for path in stores.rglob("*.jsonl")))
            continue
        finish_run(child, None)
        if fresh:  # the machine has less to do than when a whole run was timed: moments of kills are drawn from what it takes now
            whole_s = time.monotonic() - start
        found = read_outputs(folder / "killed")
        different.update(explain_difference(name, found, wanted) for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        shutil.rmtree(folder / "killed")
        rounds += 1
    return {
        "kills": killed,
        "rounds": rounds,
        "seed": seed,
        "whole_run_s": round(whole_s, 2),
        "run_with_nothing_to_do_s": round(again_s, 2),
        "values_stored_at_each_kill": stopped_in,
        "files_compared": len(wanted),
        "files_that_differ": sorted(different),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        run_child(options.child)
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        result = compare_runs(Path(folder), options.kills, options.seed)
    print(json.dumps(result))
    sys.exit(bool(result["files_that_differ"]))


if __name__ == "__main__":
    main()
