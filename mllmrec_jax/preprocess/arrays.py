"""Arrays of the stages on disk, written and read in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mllmrec_jax.data.zarr import make_zarr_spec

ROWS = 4096
"""Rows a chunk, and the block that arrays are written and read in."""


def write_array(path: Path, shape: tuple[int, ...], dtype: str, blocks: Iterable[np.ndarray]) -> None:
    """Writes an array of `shape` from blocks of `ROWS` rows (the last may be shorter), in order; `path` must not exist."""
    import tensorstore

    spec = make_zarr_spec(path, shape=shape, dtype=dtype, rows_per_chunk=ROWS)
    store = tensorstore.open(spec).result()
    start = 0
    for block in blocks:
        store[start : start + len(block)].write(np.ascontiguousarray(block, dtype)).result()
        start += len(block)
    if start != shape[0]:
        raise ValueError(f"{path}: expected {shape[0]} rows, got {start}")


class StoredArray:
    """An array on disk, read by row."""

    def __init__(self, path: Path):
        """Opens it.

        Raises:
          ValueError: it is missing or damaged.
        """
        import tensorstore

        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        self._store = tensorstore.open(spec, open=True, read=True).result()

    def __len__(self) -> int:
        return self._store.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The rows [M] of these numbers, in their order; raises ValueError where one is damaged."""
        return np.asarray(self._store[rows].read().result())


def read_array(path: Path) -> np.ndarray:
    """A whole array.

    Raises:
      ValueError: it is missing or damaged.
    """
    array = StoredArray(path)
    return array[np.arange(len(array))]
