"""Comparisons: a planted slowdown is found, equal documents are not slower, other work is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from mllmrec_jax.bench.compare import compare_documents, estimate_ratio, format_ratios, list_differences
from mllmrec_jax.bench.measure import find_peak_flops, find_percentiles
from mllmrec_jax.bench.rows import BenchFileError, make_row, read_document, write_document


def make_seconds(median: float, seed: int, count: int = 20) -> list[float]:
    return (median * np.random.default_rng(seed).lognormal(0, 0.02, count)).tolist()


def make_bench(*seconds: tuple[str, list[float]]) -> dict[str, Any]:
    provenance = {"device": {"kind": "cpu", "cpu_cores": 2}, "versions": {"jax": "1"}}
    rows = [make_row(name, values, shape={"prompts": 2}) for name, values in seconds]
    clocks = {"before": {"load_1min": 0.5}}
    return {"format": "mllmrec-bench", "benchmark": "step", "rows": rows, "clocks": clocks, "provenance": provenance}


def test_percentiles_of_known_values() -> None:
    assert find_percentiles([float(i) for i in range(10, -1, -1)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert find_percentiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}
    assert find_percentiles([1.0, 2.0])["p80"] == pytest.approx(1.8)


def test_a_planted_slowdown_is_flagged_and_noise_is_not() -> None:
    old = make_bench(("generate", make_seconds(0.1, 0)), ("update", make_seconds(0.2, 1)))
    new = make_bench(("generate", make_seconds(0.1, 2)), ("update", make_seconds(0.24, 3)))
    same, slow = compare_documents(old, new, threshold=0.1)
    assert not same.slower
    assert same.low < 1 < same.high
    assert slow.slower
    assert 1.15 < slow.low < slow.ratio < slow.high < 1.25
    text = format_ratios([same, slow], threshold=0.1)
    assert [line.endswith("SLOWER by over 10%") for line in text.splitlines()] == [False, False, True]


def test_equal_documents_have_ratio_one() -> None:
    document = make_bench(("step", make_seconds(0.3, 4)))
    (ratio,) = compare_documents(document, copy.deepcopy(document), threshold=0.01)
    assert ratio.ratio == 1.0
    assert not ratio.slower


def test_a_ratio_that_may_be_chance_is_not_flagged() -> None:
    """Half of the repeats of each took twice as long: medians differ by more than the threshold, and their interval holds 1."""
    ratio, low, high = estimate_ratio([1.0, 1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0, 2.0])
    assert ratio == 2.0
    assert low <= 1 <= high


def test_rows_of_other_shapes_are_not_compared() -> None:
    old, new = (make_bench(("step", make_seconds(0.3, seed))) for seed in (5, 6))
    new["rows"][0]["shape"]["prompts"] = 4
    with pytest.raises(BenchFileError, match="no row of the same name and shape"):
        compare_documents(old, new, threshold=0.1)


def test_another_device_is_named() -> None:
    old, new = make_bench(), make_bench()
    new["provenance"]["device"]["kind"] = "gpu"
    assert list_differences(old, new) == ["device kind: cpu before, gpu now"]


def test_a_loaded_machine_is_named() -> None:
    old, new = make_bench(), make_bench()
    new["clocks"]["before"]["load_1min"] = 7.0
    (line,) = list_differences(old, new)
    assert line.startswith("load now: 7.0 on 2 cores")


def test_what_is_no_benchmark_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "deep" / "old.json"
    write_document(path, make_bench(("step", [1.0])))
    assert read_document(path, benchmark="step")["rows"][0]["p50"] == 1.0
    with pytest.raises(BenchFileError, match=r"expected a document of `mllmrec bench sft --json`, got one of `mllmrec bench step`"):
        read_document(path, benchmark="sft")
    path.write_text('{"rows": []}')
    with pytest.raises(BenchFileError, match="got something else"):
        read_document(path, benchmark="step")
    path.write_text('{"rows": [')
    with pytest.raises(BenchFileError, match="damaged"):
        read_document(path, benchmark="step")
    with pytest.raises(BenchFileError, match="No such file"):
        read_document(tmp_path / "none.json", benchmark="step")


def test_peaks_are_of_the_device_and_the_dtype() -> None:
    assert find_peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert find_peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert find_peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert find_peak_flops("NVIDIA H200", "float32") is None
    assert find_peak_flops("cpu", "bfloat16") is None
