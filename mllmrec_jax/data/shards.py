"""Tokenised examples on disk: zarr3 arrays in shards, each chunk compressed and checksummed, under a manifest. See docs/shard-format.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mllmrec_jax.config import fingerprint
from mllmrec_jax.data.atomic import new_folder
from mllmrec_jax.data.examples import TokenisedExamples
from mllmrec_jax.data.manifests import MANIFEST, describe_files, hash_file, list_files
from mllmrec_jax.data.zarr import make_zarr_spec

FORMAT, VERSION = "mllmrec-shards", 1
ROWS_PER_CHUNK = 1024
CHUNKS_PER_SHARD = 64

EXAMPLE_ARRAYS = {
    "prompt": "int32",
    "prompt_length": "int32",
    "history_mask": "uint8",
    "answer": "int32",
    "answer_length": "int32",
    "candidates": "int32",
    "target": "int32",
    "user": "int64",
    "provenance": "uint64",
}
ITEM_ARRAYS = {"item_id": "int64", "item_answer": "int32", "item_answer_length": "int32"}


class ShardError(ValueError):
    """Shards that cannot be written or must not be read; the message names the file, what was expected and what was found."""


def _hash_manifest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_shards(
    folder: Path,
    examples: TokenisedExamples,
    *,
    provenance: Mapping[str, Any],
    rows_per_chunk: int = ROWS_PER_CHUNK,
    chunks_per_shard: int = CHUNKS_PER_SHARD,
) -> dict[str, Any]:
    """Writes `examples` to `folder`, which is there whole or not at all: everything goes to a temporary neighbour that is then renamed.

    Args:
      folder: must not exist.
      examples: what to write.
      provenance: plain JSON values that name everything that shaped the examples (`examples.describe_provenance`).
      rows_per_chunk: rows compressed together, the least that is read.
      chunks_per_shard: chunks a file.

    Returns:
      The manifest.

    Raises:
      ShardError: `folder` exists, an array has another dtype than the format's, or the disk is full or cannot be written; nothing is
        left behind.
    """
    import tensorstore

    if folder.exists():
        raise ShardError(f"{folder}: expected a folder that does not exist yet; delete it to write it again")
    arrays: dict[str, dict[str, Any]] = {}
    try:
        with new_folder(folder) as unfinished:
            for name, dtype in (EXAMPLE_ARRAYS | ITEM_ARRAYS).items():
                array: np.ndarray = getattr(examples, name)
                if array.dtype != dtype:
                    raise ShardError(f"{name}: expected an array of {dtype}, got {array.dtype}")
                shard_rows = rows_per_chunk * chunks_per_shard
                sizes = {"rows_per_chunk": rows_per_chunk, "chunks_per_shard": chunks_per_shard}
                store = tensorstore.open(make_zarr_spec(unfinished / name, shape=array.shape, dtype=dtype, **sizes)).result()
                for start in range(0, len(array), shard_rows):  # one file at a time: bounds the memory
                    part = array[start : start + shard_rows]
                    store[start : start + len(part)].write(part).result()
                arrays[name] = {"shape": list(array.shape), "dtype": dtype}
            manifest: dict[str, Any] = {
                "format": FORMAT,
                "version": VERSION,
                "rows": len(examples.prompt),
                "pad_id": examples.pad_id,
                "dropped_history": examples.dropped_history,
                "rows_per_chunk": rows_per_chunk,
                "chunks_per_shard": chunks_per_shard,
                "arrays": arrays,
                "provenance": json.loads(json.dumps(provenance)),
                "fingerprint": fingerprint(dict(provenance)),
                "files": describe_files(unfinished),
            }
            manifest["checksum"] = _hash_manifest(manifest)
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        # tensorstore reports the operating system's errors, a full disk among them, as ValueErrors with this mark
        if isinstance(error, ValueError) and "os_error_code" not in str(error):
            raise
        raise ShardError(f"{folder}: could not be written, and nothing was left behind: {error}; is the disk full?") from error
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}; write the shards again") from None
    except ValueError as error:
        raise ShardError(f"{path}: expected JSON, got a damaged file ({error}); delete the folder and write it again") from None
    kind = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if kind != (FORMAT, VERSION):
        raise ShardError(f"{path}: expected {FORMAT} version {VERSION}, got {kind}; delete the folder and write it again")
    if manifest.get("checksum") != _hash_manifest(manifest):
        raise ShardError(f"{path}: its content does not match its checksum: damaged or edited; delete the folder and write it again")
    return manifest


def _check_provenance(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(expected))
    differing = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
    if differing:
        details = "; ".join(f"{key}: expected {wanted.get(key)!r}, got {found.get(key)!r}" for key in differing)
        raise ShardError(f"{folder / MANIFEST}: these shards are of other data or settings ({details})")


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], *, contents: bool) -> None:
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise ShardError(f"{path}: missing; the manifest lists it with {wanted['bytes']} bytes; write the shards again")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise ShardError(f"{path}: expected {wanted['bytes']} bytes, got {size}: cut short or of other data; write the shards again")
        if contents and hash_file(path) != wanted["sha256"]:
            raise ShardError(f"{path}: its content does not match the manifest's sha256: damaged; write the shards again")
    unknown = set(list_files(folder)) - set(files)
    if unknown:
        raise ShardError(f"{folder / min(unknown)}: expected only files that the manifest lists; write the shards again")


class Shards:
    """Opened, verified shards. Example arrays are read by row on demand; the item table is in memory."""

    rows: int
    """N, number of examples."""
    prompt_length: np.ndarray
    """[N] int32, in memory: batches are planned by it."""
    item_id: np.ndarray
    item_answer: np.ndarray
    item_answer_length: np.ndarray
    pad_id: int
    manifest: dict[str, Any]

    def __init__(self, folder: Path, manifest: dict[str, Any], *, cache_bytes: int):
        import tensorstore

        self.folder, self.manifest = folder, manifest
        self.rows, self.pad_id = manifest["rows"], manifest["pad_id"]
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
        self._stores: dict[str, Any] = {}
        for name, dtype in (EXAMPLE_ARRAYS | ITEM_ARRAYS).items():
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}, "recheck_cached_data": False}
            try:
                store = tensorstore.open(spec, open=True, read=True, context=context).result()
            except ValueError as error:
                raise ShardError(f"{folder / name}: cannot be opened: {error}") from error
            found, wanted = (list(store.shape), store.dtype.name), (manifest["arrays"][name]["shape"], dtype)
            if found != wanted:
                raise ShardError(f"{folder / name}: expected shape and dtype {wanted}, got {found}; write the shards again")
            self._stores[name] = store
        self.prompt_length = self._read("prompt_length")
        self.item_id, self.item_answer, self.item_answer_length = (self._read(name) for name in ITEM_ARRAYS)

    def _read(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        store = self._stores[name]
        try:
            return np.asarray((store if rows is None else store.oindex[rows]).read().result())
        except ValueError as error:  # a chunk whose crc32c is wrong, for one
            raise ShardError(f"{self.folder / name}: cannot be read: {error}") from error

    @property
    def example_bytes(self) -> int:
        """Size of the example arrays in memory."""
        shapes = ((self.manifest["arrays"][name]["shape"], np.dtype(dtype)) for name, dtype in EXAMPLE_ARRAYS.items())
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes)

    def get_shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array, from the manifest."""
        return tuple(self.manifest["arrays"][name]["shape"])

    def read_rows(self, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The example arrays at `rows` [M] (all rows where None), by name; an index may repeat.

        Raises:
          ShardError: a file was damaged after it was verified.
        """
        return {name: self._read(name, rows) for name in EXAMPLE_ARRAYS}

    def read_examples(self) -> TokenisedExamples:
        """Everything, as it was written."""
        table = {name: getattr(self, name) for name in ITEM_ARRAYS}
        return TokenisedExamples(**self.read_rows(), **table, pad_id=self.pad_id, dropped_history=self.manifest["dropped_history"])


def open_shards(folder: Path, *, expected: Mapping[str, Any] | None = None, verify: bool = True, cache_bytes: int = 1 << 28) -> Shards:
    """Opens shards after checking that they are whole and of the data they should be of.

    Args:
      folder: what `write_shards` wrote.
      expected: the provenance the shards must have; None takes any.
      verify: whether every file's sha256 is compared with the manifest's (about a second a gigabyte); names and sizes always are.
      cache_bytes: decoded chunks kept in memory by row reads.

    Raises:
      ShardError: missing, damaged, of another version, or of other data; the message names the file, or what differs.
    """
    manifest = _read_manifest(folder)
    if expected is not None:
        _check_provenance(folder, manifest["provenance"], expected)
    _check_files(folder, manifest["files"], contents=verify)
    return Shards(folder, manifest, cache_bytes=cache_bytes)
