"""Content hashes of many rows, 32 bytes each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

_BYTES = 32


class Hashes(Sequence[str]):
    """64 hex digits a row, or "" where a row has none."""

    def __init__(self, rows: int = 0):
        self._content = bytearray(_BYTES * rows)

    def __len__(self) -> int:
        return len(self._content) // _BYTES

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(f"row: expected 0 to {len(self) - 1}, got {row}")
        found = self._content[_BYTES * row : _BYTES * (row + 1)]
        return found.hex() if any(found) else ""

    def __setitem__(self, row: int, digest: str) -> None:
        self._content[_BYTES * row : _BYTES * (row + 1)] = bytes.fromhex(digest)

    def append(self, digest: str) -> None:
        """Adds a row; "" is a row without a hash."""
        self._content += bytes.fromhex(digest) or bytes(_BYTES)
