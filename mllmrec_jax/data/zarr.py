"""How arrays lie on disk: zarr3, little-endian, zstd, a crc32c a chunk; for tensorstore."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_zarr_spec(path: Path, *, shape: tuple[int, ...], dtype: str, rows_per_chunk: int, chunks_per_shard: int = 1) -> dict[str, Any]:
    """The tensorstore spec of a new array at `path`, in chunks of rows; several chunks a file where `chunks_per_shard` is above 1."""
    rest = list(shape[1:])
    little, checksum = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    codecs = [little, {"name": "zstd", "configuration": {"level": 3}}, checksum]
    if chunks_per_shard > 1:
        inner = {"chunk_shape": [rows_per_chunk, *rest], "codecs": codecs, "index_codecs": [little, checksum], "index_location": "end"}
        codecs = [{"name": "sharding_indexed", "configuration": inner}]
    grid = {"name": "regular", "configuration": {"chunk_shape": [rows_per_chunk * chunks_per_shard, *rest]}}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "create": True,
        # Otherwise chunks of zeros are left out, and a lost chunk reads as zeros without a word.
        "store_data_equal_to_fill_value": True,
        "metadata": {"shape": list(shape), "data_type": dtype, "chunk_grid": grid, "codecs": codecs},
    }
