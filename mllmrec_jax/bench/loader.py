"""Examples a second out of shards, from a cold and a warm page cache, against what training eats."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mllmrec_jax.bench.measure import read_clocks
from mllmrec_jax.bench.rows import make_document, make_row
from mllmrec_jax.bench.sft import bench_sft
from mllmrec_jax.bench.work import draw_tokens
from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.examples import TokenisedExamples
from mllmrec_jax.data.loader import MEMORY_BYTES, make_loader
from mllmrec_jax.data.shards import open_shards, write_shards
from mllmrec_jax.progress import track

EXAMPLES = 8192
"""More than a trainer takes in a minute on two cores, and eight chunks of each array."""
TRAINER_REPEATS = 3


def draw_examples(config: RunConfig, count: int) -> TokenisedExamples:
    """Random examples of the configuration's sizes; prompts are of half to all of `prompt.max_prompt_tokens` tokens."""
    generator = np.random.default_rng(config.seed)
    p, c, v, k = config.prompt.max_prompt_tokens, config.grpo.max_new_tokens, config.tokenizer.vocab_size, config.data.negatives + 1
    items = 4 * k
    return TokenisedExamples(
        prompt=draw_tokens(generator, (count, p), v),
        prompt_length=generator.integers(max(1, p // 2), p + 1, count, dtype=np.int32),
        history_mask=generator.integers(0, 2, (count, p)).astype(np.uint8),
        answer=draw_tokens(generator, (count, c), v),
        answer_length=np.full(count, c, np.int32),
        candidates=generator.integers(0, items, (count, k), dtype=np.int32),
        target=generator.integers(0, items, count, dtype=np.int32),
        user=np.arange(count),
        provenance=np.arange(count, dtype=np.uint64),
        item_id=np.arange(items),
        item_answer=draw_tokens(generator, (items, c), v),
        item_answer_length=np.full(items, c, np.int32),
        pad_id=0,
        dropped_history=0,
    )


def _list_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def drop_page_cache(folder: Path) -> None:
    """Asks the kernel to forget the folder's files; `read_disk_bytes` says whether it did (it cannot on a file system in memory)."""
    for path in _list_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_page_cache(folder: Path) -> None:
    """Reads the folder's files once."""
    for path in _list_files(folder):
        path.read_bytes()


def read_disk_bytes() -> int | None:
    """Bytes this process had the disk read for it so far; None where the system keeps no account."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return None
    return int(fields["read_bytes"])


def time_epochs(
    folder: Path, config: RunConfig, *, set_cache: Callable[[Path], None], memory_bytes: int, seed: int
) -> list[tuple[float, int | None]]:
    """Opens the shards and takes two epochs of SFT's batches; (seconds, bytes read from disk) of each. `set_cache` runs before each."""
    epochs, loader_config = [], config.loader
    set_cache(folder)
    before, started = read_disk_bytes(), time.perf_counter()
    loader = make_loader(
        open_shards(folder),
        batch_size=config.sft.batch_size * config.sft.accumulation,
        seed=seed,
        epochs=2,
        buckets=loader_config.buckets,
        prefetch=loader_config.prefetch,
        threads=loader_config.threads,
        memory_bytes=memory_bytes,
    )
    batches = iter(loader)
    for _ in range(2):
        for _ in range(loader.steps_per_epoch):
            next(batches)
        seconds, after = time.perf_counter() - started, read_disk_bytes()
        epochs.append((seconds, None if after is None or before is None else after - before))
        set_cache(folder)
        before, started = read_disk_bytes(), time.perf_counter()
    batches.close()  # type: ignore[attr-defined]  # a generator
    return epochs


def bench_loader(config: RunConfig, *, repeats: int = 5) -> dict[str, Any]:
    """Writes shards of random examples, then times two epochs of SFT's batches, in a new order each repeat.

    Returns:
      Rows `<store> <cache> <epoch>` with `examples_per_s` and `disk_bytes`. `held`: rows are kept in memory, as the loader does where they
      fit; `sharded`: each row is read from the shards. `cold`: the kernel forgot the files before the epoch; `warm`: it had just read them.
      `first`: from opening and verifying the shards to the epoch's last batch; `next`: the epoch after. `trainer_examples_per_s` is what
      `bench sft` takes on this machine, and `times_trainer` of each row how many times that the loader gives.
    """
    batch = config.sft.batch_size * config.sft.accumulation
    trainer = bench_sft(config, repeats=TRAINER_REPEATS)["rows"][0]["samples_per_s"]
    clocks, rows, examples = read_clocks(), [], EXAMPLES // batch * batch
    config.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.cache, prefix="bench-loader-") as scratch:
        folder = Path(scratch) / "shards"
        write_shards(folder, draw_examples(config, EXAMPLES), provenance={"made by": "mllmrec bench loader"})
        shape = {
            "examples": examples,
            "batch": batch,
            "prompt_tokens": config.prompt.max_prompt_tokens,
            "files_bytes": sum(path.stat().st_size for path in _list_files(folder)),
            **{name: getattr(config.loader, name) for name in ("buckets", "prefetch", "threads")},
        }
        for store, memory_bytes in (("held", MEMORY_BYTES), ("sharded", 0)):
            for cache, set_cache in (("cold", drop_page_cache), ("warm", fill_page_cache)):
                measured = [
                    time_epochs(folder, config, set_cache=set_cache, memory_bytes=memory_bytes, seed=repeat)
                    for repeat in track(range(1 + repeats), description=f"bench loader {store} {cache}", unit="repeat")
                ][1:]  # after a warm-up
                for epoch, name in enumerate(("first", "next")):
                    seconds, disk = map(list, zip(*(pair[epoch] for pair in measured), strict=True))
                    row = make_row(f"{store} {cache} {name}", seconds, shape=shape, disk_bytes=disk)
                    rate = examples / row["p50"]
                    rows.append({**row, "examples_per_s": rate, "times_trainer": rate / trainer})
    return make_document("loader", config, rows, repeats=repeats, clocks=clocks, trainer_examples_per_s=trainer)
