"""Shards to batches, ahead of the device that wants them.

What a batch holds is a pure function of its step: a plan of all batches of an epoch is made from (seed, epoch, prompt lengths, buckets,
global batch size), so any step can be started from, and every process knows every other's rows. Reading runs in grain's prefetch threads;
no worker processes.

Rows are kept in memory, decoded, where they take less than `memory_bytes` (a million short prompts, fifty thousand long ones): a
shuffled batch then costs one gather of its rows. Over the limit, rows are read from the shards: each row of a shuffled batch lies in
another chunk, whose 1024 rows are decoded for the one that is wanted unless tensorstore's cache still has them. That is many times
slower, so raise the limit where the memory is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, SupportsIndex, TypeVar

import numpy as np

from mllmrec_jax.data.shards import Shards

MEMORY_BYTES = 1 << 30


class LoaderError(ValueError):
    """Batches that cannot be made; the message names the option, what it must be, and what it was."""


class ExampleBatch(NamedTuple):
    """B examples; prompts are padded to the batch's bucket P'. NumPy."""

    prompt: np.ndarray
    """[B, P'] int32."""
    prompt_length: np.ndarray
    """[B] int32."""
    history_mask: np.ndarray
    """[B, P'] uint8: 1 at the history's item tokens."""
    answer: np.ndarray
    """[B, C] int32."""
    answer_length: np.ndarray
    """[B] int32."""
    candidates: np.ndarray
    """[B, K] int32: rows of the item table."""
    target: np.ndarray
    """[B] int32: row of the item table."""
    user: np.ndarray
    """[B] int64."""
    row: np.ndarray
    """[B] int64: row in the shards, the same on every mesh."""
    valid: np.ndarray
    """[B] bool: false for the repeated rows that fill the last batch of `iterate_all`."""


class EpochPlan(NamedTuple):
    """S global batches."""

    rows: np.ndarray
    """[S, batch] int64."""
    bucket: np.ndarray
    """[S] int64: padded prompt length of each batch (tokens)."""


def plan_epoch(prompt_length: np.ndarray, *, seed: int, epoch: int, buckets: Sequence[int], batch_size: int) -> EpochPlan:
    """Which rows make which batch of an epoch.

    Rows are permuted and put into the smallest bucket that holds them; a bucket's incomplete last batch is filled up from the next larger
    bucket, so that only the last, fewer than `batch_size` rows of the epoch, is dropped; then batches are permuted.

    Args:
      prompt_length: [N] int.
      seed: seed of all epochs.
      epoch: number of the epoch, from 0.
      buckets: ascending padded lengths, the last at least the longest prompt.
      batch_size: rows of a global batch, at most N.

    Returns:
      Plan of floor(N / batch_size) batches.
    """
    generator = np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, epoch])
    order = generator.permutation(len(prompt_length))
    bucket_of = np.searchsorted(np.asarray(buckets), prompt_length[order])
    rows, lengths, left = [], [], np.empty(0, np.int64)
    for number, bucket in enumerate(buckets):
        members = np.concatenate([left, order[bucket_of == number]])
        whole = len(members) // batch_size
        rows.append(members[: whole * batch_size].reshape(whole, batch_size))
        lengths.append(np.full(whole, bucket, np.int64))
        left = members[whole * batch_size :]
    shuffled = generator.permutation(sum(map(len, lengths)))
    return EpochPlan(np.concatenate(rows)[shuffled], np.concatenate(lengths)[shuffled])


def check_buckets(buckets: Sequence[int], longest: int) -> tuple[int, ...]:
    """The buckets to use: those given, or the longest prompt alone where none are.

    Raises:
      LoaderError: not ascending, or the longest prompt does not fit in the last.
    """
    chosen = tuple(buckets) or (longest,)
    if list(chosen) != sorted(set(chosen)) or chosen[0] < 1:
        raise LoaderError(f"loader.buckets: expected ascending lengths, got {list(buckets)}")
    if chosen[-1] < longest:
        raise LoaderError(
            f"loader.buckets: expected the last to hold the longest prompt, {longest} tokens, got {chosen[-1]}; add {longest}"
        )
    return chosen


def _fit_width(array: np.ndarray, width: int, fill: int) -> np.ndarray:
    if array.shape[1] >= width:
        return array[:, :width]
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


class _RowReader:
    def __init__(self, shards: Shards, memory_bytes: int):
        self._shards = shards
        self._held = shards.read_rows() if shards.example_bytes <= memory_bytes else None

    def read(self, rows: np.ndarray, *, width: int, valid: np.ndarray) -> ExampleBatch:
        if self._held is None:
            found = self._shards.read_rows(rows)
        else:
            found = {name: (array[:, :width] if name in ("prompt", "history_mask") else array)[rows] for name, array in self._held.items()}
        del found["provenance"]
        found["prompt"] = _fit_width(found["prompt"], width, self._shards.pad_id)
        found["history_mask"] = _fit_width(found["history_mask"], width, 0)
        return ExampleBatch(**found, row=rows, valid=valid)


T = TypeVar("T")


class _Source(Generic[T]):
    """`read(step)` for step in range(length), as grain wants its sources."""

    def __init__(self, read: Callable[[int], T], length: int):
        self._read, self._length = read, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> T:
        return self._read(int(index))


def _iterate_ahead(read: Callable[[int], ExampleBatch], *, start: int, stop: int, prefetch: int, threads: int) -> Iterator[ExampleBatch]:
    if start >= stop:
        return
    import grain  # here: its import takes a second

    source: Any = grain.MapDataset.source(_Source(lambda step: read(start + step), stop - start))
    options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
    batches: Any = iter(source.to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()  # its threads would read on


class Loader:
    """Training batches of one process; each `iter` starts at `start_step`. Made by `make_loader`."""

    steps_per_epoch: int
    total_steps: int
    """Steps of all epochs, those before `start_step` included."""
    buckets: tuple[int, ...]
    """Prompt lengths that batches come in."""

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        seed: int,
        epochs: int,
        buckets: Sequence[int],
        places: np.ndarray | None,
        start_step: int,
        prefetch: int,
        threads: int,
        memory_bytes: int,
    ):
        self._mine = np.arange(batch_size) if places is None else np.asarray(places, np.int64)
        if not len(self._mine) or self._mine.min() < 0 or self._mine.max() >= batch_size:
            raise LoaderError(f"places: expected some of 0 to {batch_size - 1} (batch_size = {batch_size}), got {self._mine.tolist()}")
        if shards.rows < batch_size:
            raise LoaderError(f"batch_size: expected at most the {shards.rows} examples in {shards.folder}, got {batch_size}")
        self.buckets = check_buckets(buckets, int(shards.prompt_length.max()))
        self.steps_per_epoch = shards.rows // batch_size
        self.total_steps = self.steps_per_epoch * epochs
        if not 0 <= start_step <= self.total_steps:
            raise LoaderError(f"start_step: expected 0 to {self.total_steps} ({epochs} epochs of {self.steps_per_epoch}), got {start_step}")
        self._start, self._prefetch, self._threads = start_step, prefetch, threads
        self._reader = _RowReader(shards, memory_bytes)
        self._valid = np.ones(len(self._mine), bool)

        @functools.lru_cache(maxsize=2)  # threads read ahead into the next epoch
        def plan(epoch: int) -> EpochPlan:
            return plan_epoch(shards.prompt_length, seed=seed, epoch=epoch, buckets=self.buckets, batch_size=batch_size)

        self._plan = plan

    def __len__(self) -> int:
        return self.total_steps - self._start

    def read_batch(self, step: int) -> ExampleBatch:
        """Batch number `step` of 0 to `total_steps` - 1, whatever was read before it."""
        epoch, place = divmod(step, self.steps_per_epoch)
        plan = self._plan(epoch)
        return self._reader.read(plan.rows[place, self._mine], width=int(plan.bucket[place]), valid=self._valid)

    def __iter__(self) -> Iterator[ExampleBatch]:
        return _iterate_ahead(self.read_batch, start=self._start, stop=self.total_steps, prefetch=self._prefetch, threads=self._threads)


def make_loader(
    shards: Shards,
    *,
    batch_size: int,
    seed: int,
    epochs: int,
    buckets: Sequence[int] = (),
    places: np.ndarray | None = None,
    start_step: int = 0,
    prefetch: int = 4,
    threads: int = 1,
    memory_bytes: int = MEMORY_BYTES,
) -> Loader:
    """Shuffled training batches, each row at most once an epoch; fewer than a batch of rows are left out of each epoch.

    Args:
      shards: what to read.
      batch_size: examples a batch, of all processes together.
      seed: seed of the order.
      epochs: passes over the shards.
      buckets: ascending prompt lengths that batches are padded to (tokens); empty means the longest prompt.
      places: which of a batch's `batch_size` rows this process reads, in this order; all of them by default.
      start_step: batches to skip: what comes is exactly what an uninterrupted loader gives from there.
      prefetch: batches read ahead.
      threads: reading threads.
      memory_bytes: examples that take no more are held in memory.

    Raises:
      LoaderError: fewer examples than a batch, a bucket too short, or a number out of range.
    """
    return Loader(
        shards,
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        buckets=buckets,
        places=places,
        start_step=start_step,
        prefetch=prefetch,
        threads=threads,
        memory_bytes=memory_bytes,
    )


def iterate_all(
    shards: Shards,
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
    buckets: Sequence[int] = (),
    prefetch: int = 4,
    memory_bytes: int = MEMORY_BYTES,
) -> Iterator[ExampleBatch]:
    """Every row once, in order, for evaluation; the last batch is filled up with repeats of its last row, where `valid` is false.

    Args:
      shards: what to read.
      batch_size: rows a batch.
      rows: [M] int64 rows to read instead of all.
      buckets: prompt lengths; a batch is padded to the smallest that holds its longest prompt. Empty means the longest prompt.
      prefetch: batches read ahead.
      memory_bytes: examples that take no more are held in memory.

    Raises:
      LoaderError: a bucket is too short.
    """
    chosen = check_buckets(buckets, int(shards.prompt_length.max()))
    wanted = np.arange(shards.rows) if rows is None else np.asarray(rows, np.int64)
    reader = _RowReader(shards, memory_bytes)

    def read(step: int) -> ExampleBatch:
        part = wanted[step * batch_size : (step + 1) * batch_size]
        padded = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part))])
        width = chosen[int(np.searchsorted(chosen, shards.prompt_length[part].max()))]
        return reader.read(padded, width=width, valid=np.arange(batch_size) < len(part))

    return _iterate_ahead(read, start=0, stop=-(-len(wanted) // batch_size), prefetch=prefetch, threads=1)
