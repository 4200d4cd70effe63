"""Finished work by content hash, in append-only files: killed at any moment, it loses at most the value being written.

A store is a folder of parts (`part-00000.jsonl`, ...). A line is `{"check": crc32, "entry": [key, value]}`; a process appends to a part of
its own, so that several may write at once. A line that is torn or whose check is wrong is passed over: its work is done again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mllmrec_jax.data.atomic import naming_path
from mllmrec_jax.preprocess.key_table import KeyTable

_READERS = 64  # parts open at once: a store that was often interrupted has many


def hash_content(*parts: Any) -> str:
    """64 hex digits of plain JSON values: the key of work that these went into."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def hash_rows(rows: Iterable[Any], *start: Any) -> str:
    """64 hex digits of `start` and, in their order, of all rows (plain JSON values), which are not held together in memory."""
    return functools.reduce(hash_content, rows, hash_content(*start))


def _write_line(key: str, value: Any) -> bytes:
    entry = json.dumps([key, value], sort_keys=True, ensure_ascii=True).encode()
    return b'{"check": %d, "entry": %b}\n' % (zlib.crc32(entry), entry)


_LINE = re.compile(rb'\{"check": (\d+), "entry": (\["([0-9a-f]{64})", .*\])\}\n')


def _read_line(line: bytes) -> tuple[str, bytes] | None:
    """The key, and the JSON of key and value; None where the line is torn or damaged."""
    match = _LINE.fullmatch(line)
    if match is None or zlib.crc32(match[2]) != int(match[1]):
        return None
    return match[3].decode(), match[2]


class Store:
    """Values by key; a context manager. Neither keys nor values are held in memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.damaged = 0
        """Lines that could not be read."""
        folder.mkdir(parents=True, exist_ok=True)
        self._parts: list[Path] = []
        self._readers: dict[int, BinaryIO] = {}
        self._places = KeyTable()
        self._writer: BinaryIO | None = None
        for path in sorted(folder.glob("part-*.jsonl")):
            self._index(path)

    def _index(self, path: Path) -> None:
        number = len(self._parts)
        self._parts.append(path)

        def list_places(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
            place = 0
            for line in file:
                entry = _read_line(line)
                if entry is None:
                    self.damaged += 1
                else:
                    yield entry[0], number, place
                place += len(line)

        with path.open("rb") as file:
            self._places.fill(list_places(file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return self._places.find(key) is not None

    def get(self, key: str) -> Any:
        """The value stored under `key`.

        Raises:
          KeyError: there is none.
        """
        found = self._places.find(key)
        if found is None:
            raise KeyError(key)
        number, place = found
        reader = self._readers.get(number)
        if reader is None:
            if len(self._readers) == _READERS:
                self._readers.pop(next(iter(self._readers))).close()
            reader = self._readers[number] = self._parts[number].open("rb")
        reader.seek(place)
        entry = _read_line(reader.readline())
        if entry is None or entry[0] != key:
            raise OSError(f"{self._parts[number]}: changed while it was read, at byte {place}; start again")
        return json.loads(entry[1])[1]

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
        self._places.add(key, len(self._parts) - 1, place)

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
        """Flushes what was written to the disk. The store cannot be used afterwards."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        if self._writer is not None:
            os.fsync(self._writer.fileno())
            self._writer.close()
            self._writer = None
        self._places.close()
