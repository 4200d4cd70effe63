"""Memory of `mllmrec preprocess` as the catalogue grows: resident set size by stage, one process a size.

    python profiling/preprocess_memory.py --sizes 10000 30000 100000 --json profiling/results/preprocess_memory.json

The data set is generated in the MLLMRec-R1 layout: every item has a title and a small JPEG of its own, users are as many at every size, and
every item is in some history. Backend `local`; the encoder trains on as many pairs at every size (`embed.max_pairs`). A thread reads the
resident set size while the stages run. `catalogue` is what the data set alone takes: loaded and split, nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

USERS, HISTORY, MAX_PAIRS, STEPS = 2000, 5, 8000, 60
_FIRST = "amber bitter crimson distant electric faded golden hollow iron jagged kindred lonely midnight northern"
_SECOND = "anchor bridge circus desert empire forest garden harbour island journey kingdom lantern mirror ocean"


def make_catalogue(folder: Path, items: int) -> None:
    """Writes `items` titles and pictures, and `USERS` histories that hold every item once."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    first, second = _FIRST.split(), _SECOND.split()
    rows = [f'{item},"{first[item % 14]} {second[item // 14 % 14]} {item}"\n' for item in range(1, items + 1)]
    (folder / "synthetic_titles.csv").write_text("item,title\n" + "".join(rows))
    for item in range(1, items + 1):
        cells = (np.array([60, 90, 120]) + rng.integers(0, 6, (6, 4, 3))).astype(np.uint8)
        picture = Image.fromarray(cells, "RGB").resize((12, 18), Image.Resampling.NEAREST)
        picture.save(folder / "images" / f"{item}.jpg", quality=60, comment=str(item).encode())  # every content another
    shares = np.array_split(rng.permutation(items) + 1, USERS)
    extra = rng.integers(1, items + 1, (USERS, HISTORY + 3))
    lines = []
    for user, share in enumerate(shares):
        history = list(dict.fromkeys([*share.tolist(), *extra[user].tolist()]))
        lines.append(f"{user}\t{' '.join(map(str, history))}\n")
    (folder / "synthetic_pairs.tsv").write_text("".join(lines))


def make_config(data: Path, work: Path) -> Any:
    from mllmrec_jax.config import DataConfig, PromptConfig, RunConfig
    from mllmrec_jax.preprocess_config import EmbedConfig, PreprocessConfig

    return RunConfig(
        name="memory",
        output=work / "runs",
        cache=work / "cache",
        data=DataConfig(source="mllmrec", path=data, history_len=HISTORY, negatives=9),
        prompt=PromptConfig(reasoning=True, history_fields=("title", "caption"), max_prompt_tokens=2048),
        preprocess=PreprocessConfig(embed=EmbedConfig(steps=STEPS, max_pairs=MAX_PAIRS)),
    )


class Sampler(threading.Thread):
    """Reads this process's resident set size (bytes) every 20 ms."""

    def __init__(self) -> None:
        import psutil

        super().__init__(daemon=True)
        self._process, self._done = psutil.Process(), threading.Event()
        self.samples: list[tuple[float, int]] = []

    def run(self) -> None:
        while not self._done.wait(0.02):
            self.samples.append((time.monotonic(), self._process.memory_info().rss))

    def stop(self) -> None:
        self._done.set()
        self.join()


def run_child(data: Path, work: Path, *, load_only: bool) -> dict[str, Any]:
    import psutil
    import torch  # noqa: F401

    from mllmrec_jax.data.load import load_dataset
    from mllmrec_jax.data.splits import split_windows
    from mllmrec_jax.preprocess.backends import local_encoder  # noqa: F401
    from mllmrec_jax.preprocess.run import run_preprocess

    config = make_config(data, work)
    gc.collect()
    before = psutil.Process().memory_info().rss
    if load_only:
        dataset = load_dataset(config.data, config.cache)
        splits = split_windows(dataset, config.data)
        gc.collect()
        return {"catalogue_mb": to_mb(psutil.Process().memory_info().rss - before), "users": len(splits.train_histories)}
    sampler = Sampler()
    sampler.start()
    end = start = time.monotonic()
    report = run_preprocess(config)
    sampler.stop()
    stages, seen = {}, [before]
    for name, seconds in report["seconds"].items():
        start, end = end, end + seconds
        # A stage that is over before it is seen has what the one before left.
        seen = [size for moment, size in sampler.samples if start <= moment < end] or seen[-1:]
        stages[name] = {"peak_mb": to_mb(max(seen) - before), "end_mb": to_mb(seen[-1] - before), "seconds": round(seconds, 1)}
    peak = max(size for _, size in sampler.samples)
    stored = {path.name: to_mb(measure_folder(path)) for path in sorted((config.cache / "preprocess").iterdir())}
    return {"imports_mb": to_mb(before), "peak_mb": to_mb(peak - before), "stages": stages, "stored_mb": stored}


def to_mb(size: int) -> float:
    return round(size / 1e6, 1)


def measure_folder(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def start_child(data: Path, work: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(data), str(work), *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000], help="items")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--folder", type=Path, help="keeps generated catalogues here; not given: a temporary folder")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--load-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(*options.child, load_only=options.load_only)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for items in options.sizes:
            data = (options.folder or Path(temporary)) / f"catalogue-{items}"
            if not data.exists():
                make_catalogue(data, items)
            with tempfile.TemporaryDirectory() as work:
                row = {"items": items, "users": USERS, "max_pairs": MAX_PAIRS, **start_child(data, Path(work), "--load-only")}
                row.update(start_child(data, Path(work)))
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
