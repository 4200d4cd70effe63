"""The log-prob benchmark, start to finish without a GPU (profiling/ is a folder of scripts, not a package)."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PROFILING = Path(__file__).resolve().parents[1] / "profiling"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Any:
    sys.path.insert(0, str(PROFILING))
    yield
    sys.path.remove(str(PROFILING))


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("bench_logprob_kl")


@pytest.fixture(scope="module")
def work() -> ModuleType:
    return importlib.import_module("logprob_kl_work")


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "OUT"}
    return subprocess.run(
        [sys.executable, str(PROFILING / name), *arguments], env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_runs_start_to_finish(tmp_path: Path, work: ModuleType) -> None:
    pytest.importorskip("triton")
    for stage in ("main", "rest"):
        # torch.compile only passes its function on: compiling it takes longer than all the rest.
        done = run_script("bench_logprob_kl.py", "--tiny", "--stage", stage, TORCHDYNAMO_DISABLE="1", OUT=str(tmp_path))
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "logprob_kl.json").read_text())
    rows = result["rows"]
    cases = [case for framework in work.ROWS for case in work.list_cases(framework, work.list_sizes(True))]
    assert not work.find_missing(cases, rows) and len(rows) == 2 * len(cases)
    for row in rows:
        if row["framework"] == "jax":
            assert row["status"] == "measured", row
            assert row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"] and row["extra_bytes"] > 0 and row["share"] > 0
            assert row["logp_error"] < 1e-4
            assert row.get("gradient_error", 0) < 5e-3 and row.get("head_gradient_error", 0) < 5e-3
            assert ("gradient_error" in row) == (row["job"] != "forward") and ("head_gradient_error" in row) == (row["job"] == "grad_head")
        else:
            assert row["status"] == "measured" or row["reason"]
        assert row["row"] != "kernel" or row["times_kernel"] == 1
    assert {machine["framework"] for machine in result["machines"]} >= {"jax"}
    table = (tmp_path / "logprob_kl.md").read_text()
    assert table.count("\n| ") == len(rows) + 2 and "Bars at N = 16384" in table


def test_without_a_gpu_the_full_size_is_refused(bench: ModuleType) -> None:
    if bench.find_gpu() is not None:
        pytest.skip("there is a GPU")
    for script in ("bench_logprob_kl.py", "tune_logprob_kl.py"):
        done = run_script(script)
        assert done.returncode == 2 and "nvidia-smi names no GPU here" in done.stderr


def test_a_worker_that_dies_loses_one_case_at_a_time(
    bench: ModuleType, work: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "worker.py"
    dying.write_text("import sys\nprint('gone', file=sys.stderr)\nsys.exit(7)\n")
    monkeypatch.setitem(bench.WORKERS, "torch", dying)
    monkeypatch.setattr(work, "ROWS", {"torch": {"A": ("forward",), "B": ("forward",)}})
    lines = tmp_path / "lines.jsonl"
    bench.run_stage("main", "torch", lines, bench.time.time() + 60, tiny=True)
    lines.write_text(lines.read_text() + '{"cut short')
    _, rows = work.read_lines(lines)
    assert [row["row"] for row in rows] == ["A", "A", "B", "B"]
    assert {row["reason"] for row in rows} == {"its process ended with status 7: gone"}


def test_what_the_budget_does_not_reach_is_skipped_by_name(bench: ModuleType, work: ModuleType, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    bench.run_stage("rest", "jax", lines, 0.0, tiny=False)
    _, rows = work.read_lines(lines)
    assert len(rows) == 2 * len(work.list_cases("jax", work.list_sizes(False)[1:]))
    assert {row["reason"] for row in rows} == {"no time left in the budget"}
    assert bench.make_table(rows).count("skipped: no time left in the budget") == len(rows)


def test_what_matters_most_is_measured_first(work: ModuleType) -> None:
    sizes = work.list_sizes(False)
    assert len(sizes) == len(set(sizes)) == 9 and sizes[0] == (16384, 2560, 151_936)
    assert [case.row for case in work.list_stage("jax", "main", tiny=False)][:5] == ["kernel"] * 5


def test_bars_tell_met_from_missed(bench: ModuleType, work: ModuleType) -> None:
    def make(job: str, row: str, ms: float, **more: Any) -> dict[str, Any]:
        case = work.Case(work.MAIN, job, row, "jax")
        return work.make_row(case, "random", status="measured", ms={"p50": ms}, extra_bytes=0.5e9, gradient_error=1e-2, **more)

    rows = [make("forward", "kernel", 20.0), make("grad_hidden", "kernel", 46.2), make("grad_hidden", "Liger CE", 92.4)]
    text = "\n".join(bench.check_bars(rows, "a GPU"))
    assert "forward, random: 20 ms against 21 ms: met" in text
    assert "grad_hidden, random: 46.2 ms against 42 ms: MISSED by 10%" in text
    assert "grad_hidden, random, extra memory: 0.5 GB against 0.6 GB: met" in text
    assert "grad_hidden, random, gradient error: 0.01 of the norm against 0.005 of the norm: MISSED by 100%" in text
    assert "grad_hidden, random, faster than Liger CE: 2.00 times: met" in text
    assert "policy_ref, trained_like: not measured" in text
    bench.add_speedups(rows)
    assert rows[2]["times_kernel"] == pytest.approx(2)


@pytest.mark.parametrize(("job", "nll"), [("grad_hidden", False), ("policy_ref", False), ("exact_kl", False), ("grad_hidden", True)])
def test_true_gradient_is_the_finite_difference_of_the_loss(work: ModuleType, job: str, nll: bool) -> None:
    rng = np.random.default_rng(0)
    logits, logits_ref, step = rng.normal(size=(4, 9)), rng.normal(size=(4, 9)), rng.normal(size=(4, 9))
    target, logp_ref, advantage = rng.integers(0, 9, 4), rng.normal(size=4) - 2, rng.normal(size=4)
    truth = work.compute_truth(logits, logits_ref, target, logp_ref, advantage, job=job, nll=nll)
    row = np.arange(4)
    np.testing.assert_allclose(truth.logp, work.log_softmax(logits)[row, target])

    def loss(z: np.ndarray) -> float:
        log_p, log_q = work.log_softmax(z), work.log_softmax(logits_ref)
        logp = log_p[row, target]
        if nll:
            return -logp.sum()
        gap = (log_q[row, target] if job == "policy_ref" else logp_ref) - logp
        kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1) if job == "exact_kl" else np.exp(gap) - gap - 1
        return float(np.sum(-advantage * np.exp(logp - truth.logp) + work.BETA * kl))

    numeric = (loss(logits + 1e-5 * step) - loss(logits - 1e-5 * step)) / 2e-5
    np.testing.assert_allclose(np.sum(truth.d_logits * step), numeric, rtol=1e-7)


def test_reasons_are_short_and_name_what_is_absent(work: ModuleType) -> None:
    with pytest.raises(ModuleNotFoundError) as absent:
        importlib.import_module("no_such_peer")
    assert work.describe_error(absent.value) == "no_such_peer is not installed"
    assert work.describe_error(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")) == "out of memory"
    assert work.describe_error(ValueError("\nfirst\nsecond")) == "ValueError: first"


@pytest.mark.gpu_lowering
@pytest.mark.skipif("MLLMREC_TRITON_DEVICE" not in os.environ, reason="run `make test-gpu-lowering`")
@pytest.mark.parametrize("row", ["kernel", "kernel, recompute"])
def test_the_kernels_rows_lower_for_a_gpu(work: ModuleType, row: str) -> None:
    import jax

    worker = importlib.import_module("logprob_kl_jax")
    inputs = jax.eval_shape(lambda: worker.draw_inputs(jax.random.key(0), work.MAIN, True))
    for job in work.ROWS["jax"][row]:
        program = jax.jit(worker.make_function(work.Case(work.MAIN, job, row, "jax")))
        assert "triton_kernel_call" in program.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
