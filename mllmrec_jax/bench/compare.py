"""Two benchmark documents: the ratio of each row's medians, with an interval from the repeats of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mllmrec_jax.bench.rows import BenchFileError

RESAMPLES = 10_000


class Ratio(NamedTuple):
    """Seconds of one row, new over old: 1.2 is 20% slower."""

    name: str
    shape: dict[str, Any]
    old_p50: float
    new_p50: float
    ratio: float
    """Of the medians."""
    low: float
    high: float
    """Its 95% interval."""
    slower: bool
    """Over the threshold, with the whole interval above 1."""


def estimate_ratio(old: Sequence[float], new: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """(ratio of the medians new / old, low, high): percentile bootstrap at 95% over the repeats of each (Efron and Tibshirani 1993)."""
    generator = np.random.default_rng(seed)
    medians = [np.median(np.asarray(values)[generator.integers(0, len(values), (RESAMPLES, len(values)))], axis=1) for values in (new, old)]
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    return float(np.median(new) / np.median(old)), float(low), float(high)


def compare_documents(old: dict[str, Any], new: dict[str, Any], *, threshold: float) -> list[Ratio]:
    """A ratio for each row that both have, same name and same shape; `threshold` is the slowdown that counts (0.1: 10%).

    Raises:
      BenchFileError: they have no row in common.
    """
    known = {_key(row): row for row in old["rows"]}
    ratios = []
    for row in new["rows"]:
        before = known.get(_key(row))
        if before is not None:
            ratio, low, high = estimate_ratio(before["seconds"], row["seconds"])
            slower = ratio > 1 + threshold and low > 1
            ratios.append(Ratio(row["name"], row["shape"], before["p50"], row["p50"], ratio, low, high, slower))
    if not ratios:
        raise BenchFileError("--compare: expected a document of the same work, got one with no row of the same name and shape")
    return ratios


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["name"], row["shape"]], sort_keys=True)


def list_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What besides the code may explain a ratio: another device, other versions, a machine that others used."""
    lines = []
    for name in ("device", "versions"):
        before, after = old["provenance"][name], new["provenance"][name]
        changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
        lines += [f"{name} {key}: {before.get(key)} before, {after.get(key)} now" for key in changed]
    for when, document in (("before", old), ("now", new)):
        load, cores = document["clocks"]["before"]["load_1min"], document["provenance"]["device"]["cpu_cores"]
        if load > cores:
            lines.append(f"load {when}: {load} on {cores} cores when the repeats began; others were running, and ratios may be theirs")
    return lines


def format_ratios(ratios: Sequence[Ratio], *, threshold: float) -> str:
    """A line a row, slow ones marked; what tells rows of one name apart is shown."""
    names = [ratio.name for ratio in ratios]
    width = max(map(len, names)) + 2
    lines = [f"{'row':<{width}}{'before (s)':>12}{'now (s)':>12}{'now/before':>12}  95% interval"]
    for ratio in ratios:
        twins = [other.shape for other in ratios if other.name == ratio.name]
        apart = [f"{key} {value}" for key, value in ratio.shape.items() if any(other.get(key) != value for other in twins)]
        line = f"{ratio.name:<{width}}{ratio.old_p50:>12.4g}{ratio.new_p50:>12.4g}{ratio.ratio:>12.3f}  {ratio.low:.3f} to {ratio.high:.3f}"
        lines.append(line + (f"  ({', '.join(apart)})" if apart else "") + (f"  SLOWER by over {threshold:.0%}" if ratio.slower else ""))
    return "\n".join(lines)
