"""What the log-prob benchmark measures, in whichever framework: sizes, jobs, rows, their order, the clock, and the answer in float64.

A job is what GRPO asks for; a row is who does it. Hidden states come from two distributions, beside a head W of V rows, each normal with
variance 1/D (so about of length 1):

  random        h normal(0, 1): logits normal(0, 1), the entropy is near that of the uniform distribution
  trained_like  h normal(0, 1) + a W_target, a uniform in [6, 24]: the target's logit is near a and the others' log-sum-exp near
                log V + 1/2, which is 12.4 at V = 151,936: p_target runs from 0.002 to 0.99999, its median is 0.93
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BETA = 0.04
"""Weight of the KL."""
MARGIN = (6.0, 24.0)
"""Range of a, above."""
DISTRIBUTIONS = ("trained_like", "random")
CHECKED_ROWS = 32
"""Rows a gradient is compared on."""

JOBS = {"forward": 1, "grad_hidden": 2, "policy_ref": 3, "exact_kl": 3, "grad_head": 3}
"""Products of 2 N D V operations that the job needs where nothing is computed twice; shares of the matmul rate are in these.

forward: log-probs. grad_hidden: and the gradient to the hidden states of a policy loss with the k3 KL to given reference log-probs, head
frozen. policy_ref: the same, reference log-probs computed too. exact_kl: the same with the exact KL. grad_head: grad_hidden with a
gradient to the head."""

ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "jax": {
        "kernel": tuple(JOBS),
        "kernel, recompute": ("grad_hidden", "policy_ref"),
        "XLA chunked": tuple(JOBS),
        "XLA naive": tuple(JOBS),
    },
    "torch": {
        "CCE exact": ("forward", "grad_hidden", "policy_ref", "grad_head"),
        "CCE filtered": ("grad_hidden", "grad_head"),
        "Liger CE": ("grad_hidden", "grad_head"),
        "Liger GRPO": ("policy_ref",),
        "torch.compile": ("forward", "grad_hidden", "policy_ref", "grad_head"),
    },
}
OURS = ("kernel", "kernel, recompute")


def timing_seconds(tiny: bool) -> float:
    """Time for one measurement."""
    return 0.02 if tiny else 0.6


class Size(NamedTuple):
    n: int
    d: int
    v: int


MAIN, TINY = Size(16384, 2560, 151_936), Size(16, 32, 151)


class Case(NamedTuple):
    """Something to measure, on every distribution."""

    size: Size
    job: str
    row: str
    framework: str


def list_sizes(tiny: bool) -> list[Size]:
    """The size that matters most first."""
    if tiny:
        return [TINY, TINY._replace(n=8)]
    others = [Size(n, d, MAIN.v) for n in (MAIN.n, 4096, 32768) for d in (MAIN.d, 1024, 4096)]
    return [MAIN, *(size for size in others if size != MAIN)]


def list_cases(framework: str, sizes: Sequence[Size]) -> list[Case]:
    """In the order they are measured: a row at all sizes, then the next row."""
    return [Case(size, job, row, framework) for row, jobs in ROWS[framework].items() for size in sizes for job in jobs]


def make_row(case: Case, distribution: str, **measured: Any) -> dict[str, Any]:
    return {**case.size._asdict(), "distribution": distribution, "job": case.job, "row": case.row, "framework": case.framework, **measured}


def append_line(path: Path, line: dict[str, Any]) -> None:
    """On disk before this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}) + "\n")


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(machines, rows); a last line that a crash cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return [x for x in lines if "matmul_tflops" in x], [x for x in lines if "job" in x]


def find_missing(cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> list[Case]:
    """Cases without a row for every distribution."""
    there = {(r["n"], r["d"], r["v"], r["job"], r["row"], r["distribution"]) for r in rows}
    return [case for case in cases if any((*case.size, case.job, case.row, x) not in there for x in DISTRIBUTIONS)]


def describe_machine(framework: str, device: str, matmul_tflops: float, packages: Sequence[str]) -> dict[str, Any]:
    """The first line of a worker: what everything after it was measured on."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "framework": framework,
        "device": device,
        "matmul_tflops": matmul_tflops,
        "versions": {"python": platform.python_version(), **{p: find_version(p) for p in packages}},
        "commit": git.stdout.strip() or "unknown",
    }


def find_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclasses.dataclass
class Timing:
    """Milliseconds a call."""

    ms: dict[str, float]
    samples: int
    calls_a_sample: int


def time_calls(call: Callable[[], Any], wait: Callable[[Any], Any], *, seconds: float) -> Timing:
    """Enqueues several calls, waits for the last, divides; 5 to 20 such samples within about `seconds`
    (2 of one call where that takes half of them). The first call was made before."""

    def sample(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls - 1):
            call()
        wait(call())
        return (time.perf_counter() - started) / calls

    single = sample(1)
    if single > seconds / 2:
        calls, samples = 1, 2
    else:
        calls = min(max(2, math.ceil(0.03 / single)), 50)
        samples = int(min(max(seconds / (single * calls), 5), 20))
    times = [sample(calls) * 1e3 for _ in range(samples)]
    return Timing({f"p{q}": round(float(np.percentile(times, q)), 4) for q in (20, 50, 80)}, samples, calls)


def find_share(case: Case, ms: float, matmul_tflops: float) -> float:
    """Of the matmul rate."""
    operations = JOBS[case.job] * 2 * case.size.n * case.size.d * case.size.v
    return operations / (ms * 1e-3) / (matmul_tflops * 1e12)


def pick_rows(n: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, CHECKED_ROWS).astype(np.int64))


def sequence_tokens(size: Size) -> int:
    """Tokens that share an advantage; divides N."""
    return min(128, size.n // 4)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


class Truth(NamedTuple):
    """In float64, for the checked rows."""

    logp: np.ndarray
    d_logits: np.ndarray
    """[rows, V], of a loss that sums over tokens; a mean divides it."""
    top_probability: float
    """Median over rows of the largest probability."""
    entropy: float
    """Mean over rows, in nats."""


def compute_truth(
    logits: np.ndarray, logits_ref: np.ndarray, target: np.ndarray, logp_ref: np.ndarray, advantage: np.ndarray, *, job: str, nll: bool
) -> Truth:
    """Log-probs, and the loss's gradient to the logits: with A the advantage, b = BETA and r the reference's log-prob,

        sum of  -A exp(logp - constant logp) + b (exp(r - logp) - (r - logp) - 1)     (k3)
                -A exp(logp - constant logp) + b KL                                   (exact_kl)
                -logp                                                                 (`nll`: peers that know no other loss)

    Args:
        logits: [rows, V] float64, of the policy.
        logits_ref: [rows, V] float64, of the reference.
        target: [rows].
        logp_ref: [rows], given reference log-probs, which policy_ref replaces by its own.
        advantage: [rows].
        job: of JOBS.
        nll: the last of the three losses.
    """
    log_p, log_q, row = log_softmax(logits), log_softmax(logits_ref), np.arange(len(logits))
    p, logp = np.exp(log_p), log_p[row, target]
    if job == "policy_ref":
        logp_ref = log_q[row, target]
    d_logp = -advantage.astype(np.float64)
    if nll:
        d_logp = -np.ones_like(d_logp)
    elif job != "exact_kl":
        d_logp += BETA * (1 - np.exp(logp_ref - logp))
    onehot = np.arange(logits.shape[1])[None, :] == target[:, None]
    d_logits = d_logp[:, None] * (onehot - p)
    if job == "exact_kl":
        kl = np.sum(p * (log_p - log_q), axis=1, keepdims=True)
        d_logits += BETA * p * (log_p - log_q - kl)
    return Truth(logp, d_logits, float(np.median(p.max(axis=1))), float(np.mean(-np.sum(p * log_p, axis=1))))


def relative_error(value: np.ndarray, truth: np.ndarray) -> float:
    """Of the norm; not finite where the value is not."""
    return float(np.linalg.norm(np.asarray(value, np.float64) - truth) / np.linalg.norm(truth))


def describe_error(error: BaseException) -> str:
    """Why a row is skipped, in a line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = str(error)
    if re.search("out of memory|RESOURCE_EXHAUSTED", text, re.IGNORECASE):
        return "out of memory"
    line = next((x.strip() for x in text.splitlines() if x.strip()), "no message")
    return f"{type(error).__name__}: {line}"[:300]


def parse_worker_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=Path, required=True, help="file that rows are appended to; its rows are not measured again")
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch after which nothing new is begun")
    parser.add_argument("--stage", choices=("main", "rest"), required=True, help="the first size, or the others")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def list_stage(framework: str, stage: str, *, tiny: bool) -> list[Case]:
    sizes = list_sizes(tiny)
    return list_cases(framework, sizes[:1] if stage == "main" else sizes[1:])


def run_worker(
    framework: str, measure: Callable[[Case, str], dict[str, Any]], prepare: Callable[[list[Case]], None], is_usable: Callable[[], bool]
) -> int:
    """Measures what has no row yet, until the deadline. Ends with status 3 where a failure left the device unusable: start it again.

    Args:
        framework: of the worker.
        measure: (case, distribution) to what is measured of it; raises where it cannot be.
        prepare: called with the cases of one row and size, before the first of them.
        is_usable: whether the device still computes.
    """
    options = parse_worker_arguments()
    missing = find_missing(list_stage(framework, options.stage, tiny=options.tiny), read_lines(options.lines)[1])
    prepared = None
    for case in missing:
        if time.time() > options.deadline:
            return 0
        if (case.size, case.row) != prepared:
            prepared = (case.size, case.row)
            prepare([c for c in missing if (c.size, c.row) == prepared])
        for distribution in DISTRIBUTIONS:
            try:
                row = make_row(case, distribution, status="measured", **measure(case, distribution))
            except Exception as error:
                row = make_row(case, distribution, status="skipped", reason=describe_error(error))
            append_line(options.lines, row)
            print(f"{framework}: {case.size} {case.job} {case.row} {distribution}: {row.get('ms') or row['reason']}", file=sys.stderr)
            if row["status"] == "skipped" and row["reason"] != "out of memory" and not is_usable():
                return 3
    return 0
