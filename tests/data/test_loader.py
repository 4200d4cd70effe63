"""Batches are a pure function of their step: every row once an epoch, on any mesh, after any resume."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmrec_jax.data.examples import TokenisedExamples
from mllmrec_jax.data.loader import ExampleBatch, check_buckets, iterate_all, make_loader, plan_epoch
from mllmrec_jax.data.shards import Shards, open_shards, write_shards

ROWS, LONGEST = 103, 20


@pytest.fixture(scope="module")
def examples() -> TokenisedExamples:
    generator = np.random.default_rng(0)
    length = generator.integers(3, LONGEST + 1, ROWS).astype(np.int32)
    length[0] = LONGEST
    place = np.arange(LONGEST)
    return TokenisedExamples(
        prompt=np.where(place < length[:, None], generator.integers(1, 90, (ROWS, LONGEST)), 99).astype(np.int32),
        prompt_length=length,
        history_mask=((place > 0) & (place < length[:, None] - 1)).astype(np.uint8),
        answer=generator.integers(0, 90, (ROWS, 4)).astype(np.int32),
        answer_length=generator.integers(1, 5, ROWS).astype(np.int32),
        candidates=generator.integers(0, 9, (ROWS, 3)).astype(np.int32),
        target=generator.integers(0, 9, ROWS).astype(np.int32),
        user=np.arange(1000, 1000 + ROWS),
        provenance=generator.integers(0, 2**63, ROWS).astype(np.uint64),
        item_id=np.arange(9),
        item_answer=np.zeros((9, 4), np.int32),
        item_answer_length=np.ones(9, np.int32),
        pad_id=99,
        dropped_history=0,
    )


@pytest.fixture(scope="module")
def shards(examples: TokenisedExamples, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder: Path = tmp_path_factory.mktemp("shards") / "train"
    write_shards(folder, examples, provenance={}, rows_per_chunk=8, chunks_per_shard=4)
    return open_shards(folder)


def assert_same(ours: ExampleBatch, theirs: ExampleBatch) -> None:
    for name, left, right in zip(ExampleBatch._fields, ours, theirs, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right, name)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=8, max_size=60),
    batch_size=st.integers(1, 8),
    buckets=st.lists(st.integers(1, 29), unique=True, max_size=4).map(lambda some: [*sorted(some), 30]),
    seed=st.integers(-5, 5),
)
def test_plan(lengths: list[int], batch_size: int, buckets: list[int], seed: int) -> None:
    length = np.array(lengths)
    plan = plan_epoch(length, seed=seed, epoch=0, buckets=buckets, batch_size=batch_size)
    assert plan.rows.shape == (len(lengths) // batch_size, batch_size) and plan.bucket.shape == plan.rows.shape[:1]
    assert len(np.unique(plan.rows)) == plan.rows.size  # every row at most once; fewer than a batch are left out
    assert set(plan.bucket.tolist()) <= set(buckets)
    assert (length[plan.rows].max(axis=1, initial=0) <= plan.bucket).all()
    again = plan_epoch(length, seed=seed, epoch=0, buckets=buckets, batch_size=batch_size)
    assert (plan.rows == again.rows).all() and (plan.bucket == again.bucket).all()


def test_buckets_are_filled_from_below() -> None:
    length = np.array([4] * 10 + [8] * 10 + [16] * 10)
    plan = plan_epoch(length, seed=0, epoch=0, buckets=(4, 8, 16), batch_size=4)
    # 10 short rows fill two batches; the other two wait for the next bucket, and so on.
    assert sorted(plan.bucket.tolist()) == [4, 4, 8, 8, 8, 16, 16]


def test_epochs_and_seeds_differ() -> None:
    length = np.full(50, 5)
    plans = [plan_epoch(length, seed=seed, epoch=epoch, buckets=(5,), batch_size=5).rows for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert all((one != other).any() for one, other in itertools.combinations(plans, 2))


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0], ids=["in memory", "from disk"])
def test_batches_hold_their_rows(shards: Shards, examples: TokenisedExamples, memory_bytes: int) -> None:
    loader = make_loader(shards, batch_size=8, seed=3, epochs=2, buckets=(8, 16, 24), memory_bytes=memory_bytes)
    assert (loader.steps_per_epoch, loader.total_steps, len(loader)) == (12, 24, 24)
    batches = list(loader)
    assert len(batches) == 24
    for batch in batches:
        width = batch.prompt.shape[1]
        assert width in (8, 16, 24) and batch.prompt_length.max() <= width
        wanted = np.full((8, 24), 99, np.int32)
        wanted[:, :LONGEST] = examples.prompt[batch.row]
        np.testing.assert_array_equal(batch.prompt, wanted[:, :width])
        mask = np.zeros((8, 24), np.uint8)
        mask[:, :LONGEST] = examples.history_mask[batch.row]
        np.testing.assert_array_equal(batch.history_mask, mask[:, :width])
        for name in ("prompt_length", "answer", "answer_length", "candidates", "target", "user"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(examples, name)[batch.row], name)
        assert batch.valid.all() and batch.row.dtype == np.int64
    for epoch in (batches[:12], batches[12:]):
        assert len({row for batch in epoch for row in batch.row.tolist()}) == 96


@pytest.mark.parametrize("start", [0, 1, 11, 12, 23, 24])
def test_resumed_equals_uninterrupted(shards: Shards, start: int) -> None:
    options = {"batch_size": 8, "seed": 3, "epochs": 2, "buckets": (8, 16, 24)}
    whole = list(make_loader(shards, **options))
    resumed = list(make_loader(shards, **options, start_step=start, threads=3, prefetch=5))
    assert len(resumed) == 24 - start
    for ours, theirs in zip(resumed, whole[start:], strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(shards: Shards, processes: int) -> None:
    options = {"seed": 3, "epochs": 2, "buckets": (8, 24)}
    whole = make_loader(shards, batch_size=8, **options)
    parts = [make_loader(shards, batch_size=8, **options, places=places) for places in np.split(np.arange(8), processes)]
    for one, *several in zip(whole, *parts, strict=True):
        assert len({batch.prompt.shape for batch in several}) == 1  # all processes compile the same program
        assert_same(ExampleBatch(*map(np.concatenate, zip(*several, strict=True))), one)


def test_a_loader_can_be_read_twice_and_left_early(shards: Shards) -> None:
    before = threading.active_count()
    loader = make_loader(shards, batch_size=8, seed=0, epochs=50, prefetch=4, threads=2)
    first = list(itertools.islice(iter(loader), 3))
    for ours, theirs in zip(itertools.islice(iter(loader), 3), first, strict=True):
        assert_same(ours, theirs)
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_reading_runs_ahead(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(shards, batch_size=8, seed=0, epochs=2, prefetch=4, threads=1)
    read, asked = loader.read_batch, []
    monkeypatch.setattr(loader, "read_batch", lambda step: asked.append(step) or read(step))
    batches = iter(loader)
    next(batches)
    for _ in range(100):
        if len(asked) >= 4:
            break
        time.sleep(0.02)
    assert len(asked) >= 4  # while nobody asked for a second one
    batches.close()  # type: ignore[attr-defined]


def test_evaluation_reads_every_row_once(shards: Shards, examples: TokenisedExamples) -> None:
    batches = list(iterate_all(shards, batch_size=25, buckets=(8, LONGEST)))
    assert [batch.row.shape for batch in batches] == [(25,)] * 5
    rows = np.concatenate([batch.row[batch.valid] for batch in batches])
    assert rows.tolist() == list(range(ROWS))
    last = batches[-1]
    assert last.valid.tolist() == [True] * 3 + [False] * 22 and set(last.row[3:].tolist()) == {ROWS - 1}
    np.testing.assert_array_equal(last.user, examples.user[last.row])
    assert sum(len(batch.row) for batch in iterate_all(shards, batch_size=4, rows=np.array([5, 1, 7]))) == 4
    some = next(iter(iterate_all(shards, batch_size=4, rows=np.array([5, 1, 7]))))
    assert some.row.tolist() == [5, 1, 7, 7]
    assert list(iterate_all(shards, batch_size=4, rows=np.array([], np.int64))) == []


def test_evaluation_uses_the_smallest_bucket(shards: Shards, examples: TokenisedExamples) -> None:
    short = np.flatnonzero(examples.prompt_length <= 8)
    assert next(iter(iterate_all(shards, batch_size=len(short), rows=short, buckets=(8, LONGEST)))).prompt.shape[1] == 8
    assert next(iter(iterate_all(shards, batch_size=4))).prompt.shape[1] == LONGEST


def test_impossible_requests_are_refused(shards: Shards) -> None:
    with pytest.raises(ValueError, match=r"batch_size: expected at most the 103 examples .* got 120"):
        make_loader(shards, batch_size=120, seed=0, epochs=1)
    with pytest.raises(ValueError, match="hold the longest prompt, 20 tokens, got 16"):
        make_loader(shards, batch_size=6, seed=0, epochs=1, buckets=(8, 16))
    with pytest.raises(ValueError, match="expected ascending"):
        check_buckets((16, 8), 4)
    with pytest.raises(ValueError, match="start_step: expected 0 to 12"):
        make_loader(shards, batch_size=8, seed=0, epochs=1, start_step=13)
    with pytest.raises(ValueError, match=r"places: expected some of 0 to 7 .* got \[7, 8\]"):
        make_loader(shards, batch_size=8, seed=0, epochs=1, places=np.array([7, 8]))
