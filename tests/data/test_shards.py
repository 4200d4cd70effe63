"""Shards give back what was written, and say so when they cannot."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllmrec_jax.data.examples import TokenisedExamples
from mllmrec_jax.data.shards import EXAMPLE_ARRAYS, ITEM_ARRAYS, MANIFEST, ShardError, open_shards, write_shards

PROVENANCE = {"dataset": "d0", "candidates": "c0", "tokenizer": "t0", "prompt": {"style": "compact"}}
SMALL = {"rows_per_chunk": 8, "chunks_per_shard": 4}


def make_examples(rows: int = 100, seed: int = 0) -> TokenisedExamples:
    generator = np.random.default_rng(seed)
    length = generator.integers(3, 21, rows).astype(np.int32)
    target = generator.integers(0, 15, rows).astype(np.int32)
    candidates = np.stack([np.r_[row, np.delete(np.arange(15), row)[:4]] for row in target]).astype(np.int32)
    item_answer = generator.integers(0, 500, (15, 6)).astype(np.int32)
    item_length = generator.integers(1, 7, 15).astype(np.int32)
    return TokenisedExamples(
        prompt=np.where(np.arange(20) < length[:, None], generator.integers(1, 500, (rows, 20)), 499).astype(np.int32),
        prompt_length=length,
        history_mask=(np.arange(20) == 2).astype(np.uint8)[None].repeat(rows, 0),
        answer=item_answer[target],
        answer_length=item_length[target],
        candidates=candidates,
        target=target,
        user=generator.integers(0, 2**62, rows),
        provenance=generator.integers(0, 2**64, rows, dtype=np.uint64),
        item_id=np.sort(generator.permutation(1000)[:15]).astype(np.int64),
        item_answer=item_answer,
        item_answer_length=item_length,
        pad_id=499,
        dropped_history=7,
    )


def assert_same(found: TokenisedExamples, wanted: TokenisedExamples) -> None:
    for field in dataclasses.fields(TokenisedExamples):
        ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype, field.name
        np.testing.assert_array_equal(ours, theirs, field.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "train", make_examples(), provenance=PROVENANCE, **SMALL)
    return tmp_path / "train"


@pytest.mark.parametrize("options", [SMALL, {"rows_per_chunk": 1024, "chunks_per_shard": 64}, {"rows_per_chunk": 7, "chunks_per_shard": 1}])
@pytest.mark.parametrize("rows", [1, 32, 100])
def test_round_trip(tmp_path: Path, options: dict[str, int], rows: int) -> None:
    examples = make_examples(rows)
    manifest = write_shards(tmp_path / "a", examples, provenance=PROVENANCE, **options)
    shards = open_shards(tmp_path / "a", expected=PROVENANCE)
    assert_same(shards.read_examples(), examples)
    assert shards.manifest == manifest and manifest["rows"] == shards.rows == rows
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    shard_files = [name for name in manifest["files"] if name.startswith("prompt/c/")]
    assert len(shard_files) == -(-rows // (options["rows_per_chunk"] * options["chunks_per_shard"]))


def test_rows_are_read_by_index(folder: Path) -> None:
    rows = np.array([99, 0, 31, 32, 0])
    found = open_shards(folder).read_rows(rows)
    examples = make_examples()
    assert set(found) == set(EXAMPLE_ARRAYS)
    for name, array in found.items():
        np.testing.assert_array_equal(array, getattr(examples, name)[rows])


def test_every_field_is_stored() -> None:
    assert {field.name for field in dataclasses.fields(TokenisedExamples)} == {*EXAMPLE_ARRAYS, *ITEM_ARRAYS, "pad_id", "dropped_history"}


def test_format_is_the_documented_one(folder: Path) -> None:
    metadata = json.loads((folder / "prompt" / "zarr.json").read_text())
    assert metadata["zarr_format"] == 3 and metadata["data_type"] == "int32" and metadata["shape"] == [100, 20]
    (sharding,) = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed" and sharding["configuration"]["chunk_shape"] == [8, 20]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    for name in (*EXAMPLE_ARRAYS, *ITEM_ARRAYS):
        codecs = json.loads((folder / name / "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
        assert [codec["name"] for codec in codecs] == ["bytes", "zstd", "crc32c"]


def test_a_flipped_byte_in_any_file_is_found(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 2}:
            changed = bytearray(content)
            changed[place] ^= 1
            path.write_bytes(changed)
            with pytest.raises(ShardError) as error:
                open_shards(folder, expected=PROVENANCE)
            assert str(path) in str(error.value)
        path.write_bytes(content)
    open_shards(folder, expected=PROVENANCE)


def test_a_missing_or_cut_or_foreign_file_is_found(folder: Path) -> None:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ShardError, match=r"missing|cannot be read") as error:
            open_shards(folder, verify=False)
        assert str(path) in str(error.value)
        path.write_bytes(content[:-2])
        with pytest.raises(ShardError) as error:
            open_shards(folder, verify=False)  # names and sizes are always checked, and the manifest's own checksum
        assert str(path) in str(error.value)
        path.write_bytes(content)
    (folder / "prompt" / "c" / "9").mkdir()
    (folder / "prompt" / "c" / "9" / "0").write_bytes(b"x")
    with pytest.raises(ShardError, match=r"prompt/c/9/0: expected only files that the manifest lists"):
        open_shards(folder)
    with pytest.raises(ShardError, match=r"manifest\.json: cannot be read: No such file"):
        open_shards(folder.with_name("nothing"))


def test_chunks_are_checked_again_when_read(folder: Path) -> None:
    shards = open_shards(folder)
    path = folder / "prompt" / "c" / "0" / "0"
    changed = bytearray(path.read_bytes())
    changed[10] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ShardError, match=r"train/prompt: cannot be read"):
        shards.read_rows(np.arange(8))


def test_other_data_is_refused_and_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"of other data or settings \(tokenizer: expected 't1', got 't0'\)"):
        open_shards(folder, expected=PROVENANCE | {"tokenizer": "t1"})
    with pytest.raises(ShardError, match=r"prompt: expected \{'style': 'full'\}, got \{'style': 'compact'\}"):
        open_shards(folder, expected=PROVENANCE | {"prompt": {"style": "full"}})
    with pytest.raises(ShardError, match="reasoning: expected 'r0', got None"):
        open_shards(folder, expected=PROVENANCE | {"reasoning": "r0"})
    write_shards(tmp_path / "other", make_examples(seed=1), provenance=PROVENANCE | {"dataset": "d1"}, **SMALL)
    shutil.copy(tmp_path / "other" / MANIFEST, folder / MANIFEST)  # a manifest of other data
    with pytest.raises(ShardError, match="dataset: expected 'd0', got 'd1'"):
        open_shards(folder, expected=PROVENANCE)
    with pytest.raises(ShardError, match="write the shards again"):
        open_shards(folder)


def test_another_version_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ShardError, match=r"version 1, got .*99"):
        open_shards(folder)
    for content in ("[]", "{", "null"):
        (folder / MANIFEST).write_text(content)
        with pytest.raises(ShardError, match=r"manifest\.json"):
            open_shards(folder)


def test_existing_shards_are_not_overwritten(folder: Path) -> None:
    with pytest.raises(ShardError, match="does not exist yet"):
        write_shards(folder, make_examples(), provenance=PROVENANCE)
    open_shards(folder, expected=PROVENANCE)


def test_wrong_dtype_is_refused(tmp_path: Path) -> None:
    examples = dataclasses.replace(make_examples(), prompt=make_examples().prompt.astype(np.int64))
    with pytest.raises(ShardError, match="prompt: expected an array of int32, got int64"):
        write_shards(tmp_path / "a", examples, provenance=PROVENANCE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["rename", "write_text"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*{"rename": (os, "rename", fail), "write_text": (Path, "write_text", fail)}[step])
        with pytest.raises(ShardError, match=r"shards: could not be written, and nothing was left behind: .*No space left on device"):
            write_shards(tmp_path / "shards", make_examples(), provenance=PROVENANCE)
    assert not list(tmp_path.iterdir())
    write_shards(tmp_path / "shards", make_examples(), provenance=PROVENANCE)  # and the next try works


def test_a_write_that_the_system_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    # A real refusal in the middle of an array: files of this process may not grow beyond 2 KiB.
    code = (
        "import resource, sys; from pathlib import Path; from mllmrec_jax.data.shards import ShardError, write_shards\n"
        "import importlib.util as u; spec = u.spec_from_file_location('m', sys.argv[2])\n"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
        "try: write_shards(Path(sys.argv[1]), m.make_examples(5000), provenance={})\n"
        "except ShardError as error: print(error)"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "shards"), __file__]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(root)}, timeout=120)
    assert "could not be written" in result.stdout and "File too large" in result.stdout
    assert not list(tmp_path.iterdir())
