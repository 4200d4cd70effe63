"""Atomic writing: whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mllmrec_jax.data.atomic import new_folder, write_file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_file(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_block_leaves_no_folder(tmp_path: Path):
    def fail() -> None:
        with new_folder(tmp_path / "folder") as scratch:
            (scratch / "half").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert os.listdir(tmp_path) == []


def test_the_first_of_two_writers_wins(tmp_path: Path):
    folder = tmp_path / "folder"
    with new_folder(folder) as slow:
        (slow / "who").write_text("slow")
        with new_folder(folder) as fast:
            (fast / "who").write_text("fast")
    assert (folder / "who").read_text() == "fast"
    assert os.listdir(tmp_path) == ["folder"]
