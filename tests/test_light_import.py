"""`mllmrec --help` and a mistyped option answer at once: nothing heavy is imported before the arguments are known to be right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("jax", "flax", "torch", "transformers", "tensorstore", "orbax", "grain", "scipy")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "no-such-config"]])
def test_nothing_heavy_is_imported_for_an_early_answer(arguments: list[str]) -> None:
    code = f"""
import sys
from mllmrec_jax.cli import main
sys.argv = ["mllmrec", *{arguments!r}]
try:
    main()
except SystemExit:
    pass
print("HEAVY:", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "HEAVY:"
