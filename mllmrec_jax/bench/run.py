"""`mllmrec bench WHAT`: runs a benchmark on the configured mesh, writes what was asked for, and judges it against an earlier one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mllmrec_jax.bench.compare import compare_documents, format_ratios, list_differences
from mllmrec_jax.bench.curves import draw_curves
from mllmrec_jax.bench.kernels import bench_kernels
from mllmrec_jax.bench.loader import bench_loader
from mllmrec_jax.bench.preprocess import bench_preprocess
from mllmrec_jax.bench.rank import bench_rank
from mllmrec_jax.bench.rollout import bench_rollout
from mllmrec_jax.bench.roofline import bench_roofline, draw_roofline, format_roofline
from mllmrec_jax.bench.rows import format_rows, read_document, write_document
from mllmrec_jax.bench.scaling import Over, bench_scaling
from mllmrec_jax.bench.sft import bench_sft
from mllmrec_jax.bench.step import bench_step
from mllmrec_jax.bench.update import bench_update
from mllmrec_jax.config import ConfigError, RunConfig
from mllmrec_jax.data.atomic import write_file
from mllmrec_jax.model.hf_config import read_model_config
from mllmrec_jax.pipeline import open_mesh
from mllmrec_jax.sharding import use_mesh

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "kernels": bench_kernels,
    "rollout": bench_rollout,
    "update": bench_update,
    "step": bench_step,
    "sft": bench_sft,
    "loader": bench_loader,
    "preprocess": bench_preprocess,
    "rank": bench_rank,
    "scaling": bench_scaling,
    "roofline": bench_roofline,
}
PLOTS: dict[str, Callable[[dict[str, Any]], str]] = {"scaling": draw_curves, "roofline": draw_roofline}


def draw_sizes(config: RunConfig) -> RunConfig:
    """With `model.weights`, the configuration of random weights of the same sizes: benchmarks read no weights."""
    if config.model.weights is None:
        return config
    model, vocabulary = read_model_config(config.model.weights, config.model)
    tokenizer = dataclasses.replace(config.tokenizer, vocab_size=vocabulary)
    return dataclasses.replace(config, model=dataclasses.replace(model, weights=None), tokenizer=tokenizer)


def run_benchmark(
    what: str,
    config: RunConfig,
    *,
    repeats: int | None = None,
    json_path: Path | None = None,
    compare: Path | None = None,
    threshold: float = 0.1,
    over: Over | None = None,
    values: Sequence[int] = (),
    plot: Path | None = None,
) -> bool:
    """Runs benchmark `what` and prints its document or, where that goes to a file, a table; with `compare`, ratios to an earlier one.

    Args:
      repeats: timed repeats; None: as the benchmark has it.
      json_path: where to write the document.
      compare: an earlier document of the same benchmark.
      threshold: slowdown that counts (0.1: 10%).
      over, values: of `scaling`: which size, and its values.
      plot: of `scaling` and `roofline`: where to draw (SVG).

    Returns:
      False where a row is slower than before by more than `threshold`.

    Raises:
      ConfigError: an option is missing, or belongs to another benchmark, or the configuration cannot be timed.
      BenchFileError: `compare` is not such a document.
    """
    if (what == "scaling") != (over is not None):
        raise ConfigError(f"--over: expected {'a size, for' if what == 'scaling' else 'nothing, but for'} `bench scaling`, got {over}")
    if what != "scaling" and values:
        raise ConfigError("--values: belongs to `bench scaling`")
    if what not in PLOTS and plot:
        raise ConfigError(f"--plot: belongs to `bench {'` and `bench '.join(PLOTS)}`")
    if repeats is not None and repeats < 1:
        raise ConfigError(f"--repeats: expected at least 1, got {repeats}")
    if not threshold > 0:
        raise ConfigError(f"--threshold: expected a share above 0 (0.1 is 10%), got {threshold}")
    old = None if compare is None else read_document(compare, benchmark=what)  # before anything is timed
    options = {} if over is None else {"over": over, "values": values}
    with use_mesh(open_mesh(config.mesh)):
        document = BENCHMARKS[what](draw_sizes(config), **options, **({} if repeats is None else {"repeats": repeats}))
    if json_path is None:
        print(json.dumps(document, indent=2))
    else:
        write_document(json_path, document)
        table = format_roofline(document) if what == "roofline" else format_rows(document["rows"])
        print(f"{table}\nwrote {json_path}")
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        write_file(plot, PLOTS[what](document).encode())
    if old is None:
        return True
    ratios = compare_documents(old, document, threshold=threshold)
    print("\n".join([format_ratios(ratios, threshold=threshold), *list_differences(old, document)]))
    return not any(ratio.slower for ratio in ratios)
