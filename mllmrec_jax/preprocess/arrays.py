"""Arrays of the stages on disk: zarr3 by tensorstore, chunks of rows, compressed and checksummed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

ROWS = 4096
"""Rows a chunk, and the block that arrays are written and read in."""


def write_array(path: Path, shape: tuple[int, ...], dtype: str, blocks: Iterable[np.ndarray]) -> None:
    """Writes an array of `shape` from blocks of `ROWS` rows (the last may be shorter), in order; `path` must not exist."""
    import tensorstore

    codecs = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 3}},
        {"name": "crc32c"},
    ]
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "create": True,
        # Otherwise chunks of zeros are left out, and a lost chunk reads as zeros without a word.
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [ROWS, *shape[1:]]}},
            "codecs": codecs,
        },
    }
    store = tensorstore.open(spec).result()
    start = 0
    for block in blocks:
        store[start : start + len(block)].write(np.ascontiguousarray(block, dtype)).result()
        start += len(block)
    if start != shape[0]:
        raise ValueError(f"{path}: expected {shape[0]} rows, got {start}")


def read_array(path: Path) -> np.ndarray:
    """A whole array.

    Raises:
      ValueError: it is missing or damaged.
    """
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())
