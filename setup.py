"""Puts configs/ into the wheel as mllmrec_jax/_configs, so that `mllmrec run quickstart` works outside the clone.

Everything else is in pyproject.toml. An editable install reads configs/ where it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shipped = Path(self.build_lib, "mllmrec_jax", "_configs")
            shutil.rmtree(shipped, ignore_errors=True)  # a reused build folder may hold configs that were deleted since
            shutil.copytree("configs", shipped, ignore=lambda folder, names: [n for n in names if n.startswith(".")])


setup(cmdclass={"build_py": BuildWithConfigs})
