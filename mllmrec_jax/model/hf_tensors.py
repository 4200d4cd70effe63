"""The tensors of a Hugging Face folder (safetensors, one file or sharded), read by parts and written one by one."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

# Bytes of a source tensor that are in memory beside their destination at a time.
READ_BYTES = 4 * 2**20
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FLOATS = set(_DTYPES.values())

Part = tuple[range, ...]
"""The indices of each dimension that belong to a part of an array."""


class WeightsError(ValueError):
    """Weights that cannot be used; the message names file, tensor, expected and got."""


class StoredTensor(NamedTuple):
    """One tensor of an open safetensors file, read by slices."""

    file: Path
    name: str
    data: Any
    shape: tuple[int, ...]
    dtype: str

    def read(self, part: Part) -> np.ndarray:
        return self.data[tuple(slice(axis.start, axis.stop) for axis in part)]


def _list_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder, and the index's tensor -> file name, where there is an index."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise WeightsError(f"{folder}: expected {SINGLE} or {INDEX}, got both; remove the one that is out of date")
    if single.is_file():
        return [single], None
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {', '.join(others)} may hold pickled code and is never loaded: convert it to safetensors" if others else ""
        raise WeightsError(f"{folder}: expected {SINGLE} or {INDEX}, got neither{hint}")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: expected a JSON object with a 'weight_map' of tensor to file name, got {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise WeightsError(f"{index}: expected the name of a file in {folder}, got {name!r}")
    return [folder / name for name in names], listed


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """Every tensor of the folder, unread, while the files are mapped."""
    files, listed = _list_files(folder)
    with contextlib.ExitStack() as stack:
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file}: not a whole safetensors file: {error}") from None
            for name in list(handle.keys()):
                if name in tensors:
                    raise WeightsError(f"{file}: tensor '{name}' is in {tensors[name].file.name} too")
                data = handle.get_slice(name)
                tensors[name] = StoredTensor(file, name, data, tuple(data.get_shape()), data.get_dtype())
        if listed is not None:
            wrong = sorted(
                name for name in tensors.keys() | listed.keys() if name not in tensors or listed.get(name) != tensors[name].file.name
            )
            if wrong:
                raise WeightsError(f"{folder / INDEX}: does not list what the files hold: {list_some(wrong)}")
        yield tensors


def list_some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def read_blocks(stored: StoredTensor, part: Part) -> Iterator[tuple[slice, np.ndarray]]:
    """`part` of a tensor in blocks of at most READ_BYTES (as float32), each with its rows' place in `part`."""
    rows, *columns = part
    step = max(1, READ_BYTES // max(1, 4 * math.prod(map(len, columns))))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        yield slice(start, start + len(block)), stored.read((block, *columns))


def read_checked(stored: StoredTensor, part: Part, dtype: np.dtype) -> Iterator[tuple[slice, np.ndarray]]:
    """`read_blocks` in another dtype."""
    for rows, block in read_blocks(stored, part):
        with np.errstate(over="ignore"):  # seen below, by name
            block = block.astype(dtype, copy=False)
        if not np.isfinite(block).all():
            first, last = part[0][rows.start], part[0][rows.stop - 1]
            raise WeightsError(f"{stored.file}: tensor '{stored.name}' holds NaN or infinity in rows {first} to {last}")
        yield rows, block


def copy_part(stored: StoredTensor, part: Part, destination: np.ndarray) -> None:
    for rows, block in read_checked(stored, part, destination.dtype):
        destination[rows] = block


def write_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, arrays: Iterable[np.ndarray]) -> None:
    """Writes a safetensors file, one array after the other: the format's own library wants them all in memory at once.

    The file is the length of its header (8 bytes), the header (JSON: each tensor's dtype, shape and bytes from where to where, counted
    from the header's end), and the numbers, little-endian.

    Args:
      shapes: of every tensor, by name, in the order of `arrays`.

    Raises:
      OSError: the disk is full or not writable.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array, shape in zip(arrays, shapes.values(), strict=True):
            assert array.shape == shape and array.dtype == dtype and array.flags.c_contiguous
            stream.write(array.view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
