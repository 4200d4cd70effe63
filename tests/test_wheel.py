"""The wheel, installed where nothing of the clone can be seen, runs from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "mllmrec_jax", "kernels", "configs")

# `install` fetches the wheel's dependencies from the index (minutes); otherwise this environment's are borrowed.
DEPENDENCIES = os.environ.get("MLLMREC_WHEEL_DEPENDENCIES", "borrow")

pytestmark = pytest.mark.slow


def run(*command: str | Path, folder: Path) -> str:
    """Runs a command that sees nothing of the clone; returns what it printed, shows it where the command fails."""
    hidden = {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONSTARTUP"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the clone and no stale one gets into the wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", target, folder=source)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an empty environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    commands = folder / "bin"
    install = [sys.executable, "-m", "pip", "--python", commands / "python", "install", wheel]
    if DEPENDENCIES == "install":
        run(*install, "--constraint", ROOT / "constraints.txt", folder=folder)
    else:
        run(*install, "--no-deps", folder=folder)
        (site,) = folder.glob("lib/python*/site-packages")
        # After the wheel on the path; .pth files over there, which would bring in the clone, are not read.
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    return commands


def test_wheel_holds_the_packages_the_configs_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    configs = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.toml")}
    assert {name.removeprefix("mllmrec_jax/_configs/") for name in names if "/_configs/" in name} >= configs
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mllmrec_jax", "mllmrec_kernels"}
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    for package in (ROOT / "mllmrec_jax", ROOT / "kernels" / "mllmrec_kernels"):
        for path in package.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(package.parent).as_posix() in names


def test_code_comes_from_the_wheel(commands: Path, tmp_path: Path) -> None:
    code = "import mllmrec_jax, mllmrec_kernels; print(mllmrec_jax.__file__, mllmrec_kernels.__file__)"
    for path in run(commands / "python", "-c", code, folder=tmp_path).split():
        assert Path(path).is_relative_to(commands.parent)


def test_help_works_anywhere(commands: Path, tmp_path: Path) -> None:
    assert "evaluate" in run(commands / "mllmrec", "--help", folder=tmp_path)
    assert "--data.history-len" in run(commands / "mllmrec", "run", "--help", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_quickstart_runs_anywhere(commands: Path, tmp_path: Path) -> None:
    sizes = """
        --output out --cache cache --name tiny
        --data.posterworld.items 40 --data.posterworld.users 60
        --sft.max-steps 2 --grpo.max-steps 1 --grpo.batch-size 1 --grpo.accumulation 1 --grpo.group-size 2
        --evaluate.max-users 8 --evaluate.bootstrap 50 --evaluate.examples 2 --mesh.data 1
    """
    run(commands / "mllmrec", "run", "quickstart", *sizes.split(), folder=tmp_path)
    (report,) = tmp_path.glob("out/**/report.json")
    rows = json.loads(report.read_text())
    text = json.dumps(rows)
    for row in ("random", "popularity", "covisitation", "oracle", "sft", "grpo"):
        assert f'"{row}"' in text
    assert (report.parent / "report.html").stat().st_size > 0
