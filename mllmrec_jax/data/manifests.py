"""What a folder holds, for the manifest that lies in it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def hash_file(path: Path) -> str:
    """sha256 of a file's content (64 hex digits)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> list[str]:
    """Names of all files below `folder` but its own manifest, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size (bytes) and sha256 of each of them, by name."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)} for name in list_files(folder)}
