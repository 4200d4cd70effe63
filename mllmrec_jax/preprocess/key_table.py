"""A table from content hashes to places that may be larger than memory: SQLite, in a temporary file that is gone when the process is.

It is filled anew from what it indexes every time, so that nothing of it can be stale, and a kill leaves nothing behind. The file is in
SQLite's temporary folder (SQLITE_TMPDIR, TMPDIR, else /var/tmp or /tmp) and grows by about 60 bytes a key.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

_CACHE_KIB = 4096  # of the table, in memory; small tables never touch the disk

_INSERT = "INSERT OR IGNORE INTO places VALUES (?, ?, ?)"


class KeyTable:
    """(part, place) by key (64 hex digits)."""

    def __init__(self) -> None:
        # An empty name is SQLite's word for a private temporary file. Nothing is ever rolled back, so nothing is journalled.
        self._rows = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in (f"cache_size = -{_CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF"):
            self._rows.execute(f"PRAGMA {setting}")
        self._rows.execute("CREATE TABLE places (key BLOB PRIMARY KEY, part INTEGER, place INTEGER) WITHOUT ROWID")
        self._rows.execute("BEGIN")  # never ended: a transaction a row would cost more than the row
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, key: str, part: int = 0, place: int = 0) -> bool:
        """Adds a key; False, and nothing changes, where it is there already. Raises as `fill` does."""
        return bool(self.fill(((key, part, place),)))

    def fill(self, entries: Iterable[tuple[str, int, int]]) -> int:
        """Adds many keys; returns how many were not there.

        Raises:
          OSError: the temporary folder is full.
        """
        rows = ((bytes.fromhex(key), part, place) for key, part, place in entries)
        try:
            new = self._rows.executemany(_INSERT, rows).rowcount
        except sqlite3.OperationalError as error:
            raise OSError(f"table of keys: {error}; expected room in SQLite's temporary folder (SQLITE_TMPDIR, TMPDIR)") from error
        self._count += new
        return new

    def find(self, key: str) -> tuple[int, int] | None:
        """(part, place), or None where the key is not there."""
        return self._rows.execute("SELECT part, place FROM places WHERE key = ?", (bytes.fromhex(key),)).fetchone()

    def close(self) -> None:
        """Deletes the table."""
        self._rows.close()
