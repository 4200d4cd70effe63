"""Finished work by content hash, in append-only files: killed at any moment, it loses at most the value being written.

A store is a folder of parts (`part-00000.jsonl`, ...). A line is `{"key": ..., "value": ..., "check": ...}`; a process appends to a part of
its own, so that several may write at once. A line that is torn or whose check is wrong is passed over: its work is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mllmrec_jax.data.atomic import naming_path


def hash_content(*parts: Any) -> str:
    """64 hex digits of plain JSON values: the key of work that these went into."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _write_line(key: str, value: Any) -> bytes:
    body = json.dumps([key, value], sort_keys=True, ensure_ascii=True)
    return f'{{"check": {zlib.crc32(body.encode())}, "entry": {body}}}\n'.encode()


def _read_line(line: bytes) -> tuple[str, Any] | None:
    """(key, value), or None where the line is torn or damaged."""
    try:
        row = json.loads(line)
        key, value = row["entry"]
    except (ValueError, KeyError, TypeError):
        return None
    return (key, value) if _write_line(key, value) == line else None


class Store:
    """Values by key; a context manager. The index (key to place) is in memory, the values are on disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.damaged = 0
        """Lines that could not be read."""
        folder.mkdir(parents=True, exist_ok=True)
        self._parts: list[Path] = []
        self._readers: dict[int, BinaryIO] = {}
        self._places: dict[bytes, tuple[int, int]] = {}
        self._writer: BinaryIO | None = None
        for path in sorted(folder.glob("part-*.jsonl")):
            self._index(path)

    def _index(self, path: Path) -> None:
        number = len(self._parts)
        self._parts.append(path)
        with path.open("rb") as file:
            place = 0
            for line in file:
                entry = _read_line(line)
                if entry is None:
                    self.damaged += 1
                else:
                    self._places.setdefault(bytes.fromhex(entry[0]), (number, place))
                place += len(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def keys(self) -> Iterator[str]:
        """Every key, in the order of their writing."""
        return (key.hex() for key in self._places)

    def get(self, key: str) -> Any:
        """The value stored under `key`.

        Raises:
          KeyError: there is none.
        """
        number, place = self._places[bytes.fromhex(key)]
        reader = self._readers.get(number)
        if reader is None:
            reader = self._readers[number] = self._parts[number].open("rb")
        reader.seek(place)
        entry = _read_line(reader.readline())
        if entry is None or entry[0] != key:
            raise OSError(f"{self._parts[number]}: changed while it was read, at byte {place}; start again")
        return entry[1]

    def put(self, key: str, value: Any) -> None:
        """Appends one value (plain JSON) and hands it to the operating system, so that a kill of this process does not lose it.

        Raises:
          OSError: the disk is full or the folder is not writable.
        """
        if key in self:
            return
        if self._writer is None:
            self._writer = self._open_part()
        place = self._writer.tell()
        with naming_path(self._parts[-1]):
            self._writer.write(_write_line(key, value))
            self._writer.flush()
        self._places[bytes.fromhex(key)] = (len(self._parts) - 1, place)

    def _open_part(self) -> BinaryIO:
        number = len(self._parts)
        while True:
            path = self.folder / f"part-{number:05d}.jsonl"
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:  # another process's
                number += 1
                continue
            self._parts.append(path)
            return os.fdopen(handle, "wb")

    def close(self) -> None:
        """Flushes what was written to the disk."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        if self._writer is not None:
            os.fsync(self._writer.fileno())
            self._writer.close()
            self._writer = None
