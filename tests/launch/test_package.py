"""What the launchers may import: they run where there is no accelerator, and before anything heavy is known to be needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "launch" / "mllmrec_launch").glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_launchers_know_configurations_and_processes_only(path: Path) -> None:
    modules = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = {module for module in modules if module and module.startswith("mllmrec_jax")}
    assert ours <= {"mllmrec_jax.config", "mllmrec_jax.distributed", "mllmrec_jax.resources"}


def test_rendering_does_not_import_jax(clone_environment: dict[str, str]) -> None:
    code = "import sys; from mllmrec_launch.command import launch; launch(['slurm', 'quickstart']); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=clone_environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("#!/bin/bash\n") and done.stdout.endswith("False\n")


def test_every_template_is_used() -> None:
    texts = "".join(path.read_text() for path in SOURCES)
    templates = [path.name for path in (ROOT / "launch" / "mllmrec_launch").glob("*.jinja")]
    assert len(templates) == 4 and all(f'"{name}"' in texts for name in templates)
