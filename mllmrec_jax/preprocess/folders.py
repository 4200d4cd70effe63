"""Output folders that say what they are of, and are replaced whole when that changes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mllmrec_jax.data.atomic import new_folder
from mllmrec_jax.data.manifests import MANIFEST, describe_files


def is_current(folder: Path, content: Mapping[str, Any]) -> bool:
    """Whether `folder` was filled under `content` and all its files are as they were written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return manifest == {**content, "files": describe_files(folder)}


@contextlib.contextmanager
def fill_folder(folder: Path, content: Mapping[str, Any]) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder` when the block ends well, with a manifest of `content` and the files.

    One process at a time may fill `folder`: what a killed one left beside it is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(left)
    with new_folder(folder) as scratch:
        yield scratch
        manifest = {**content, "files": describe_files(scratch)}
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if folder.exists():  # moved away first: a kill leaves no half of it under its name
            retired = folder.with_name(f".{folder.name}.old.part")
            os.rename(folder, retired)
            shutil.rmtree(retired)
