"""Times the log-prob kernel beside everything that does its job, on one NVIDIA GPU, and checks the bars it is held to.

    python profiling/bench_logprob_kl.py [--out FOLDER] [--budget-seconds 420] [--stage main|rest] [--tiny]

Peers (liger-kernel, cut-cross-entropy, torch) are measured where this Python has them; what it has not is skipped by name. --tiny runs
everything on the CPU at sizes that say nothing of speed. Results go to FOLDER: logprob_kl.jsonl grows by a line as each row is measured;
logprob_kl.json and logprob_kl.md are written at the end. docs/kernels.md says how to read them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from logprob_kl_work import (
    DISTRIBUTIONS,
    JOBS,
    MAIN,
    OURS,
    ROWS,
    TINY,
    append_line,
    find_missing,
    list_stage,
    make_row,
    read_lines,
)

HERE = Path(__file__).resolve().parent
WORKERS = {"jax": HERE / "logprob_kl_jax.py", "torch": HERE / "peers" / "logprob_kl_torch.py"}

STAGES = {"main": 0.6, "rest": 0.4}
"""The size that matters most, then the others, and their shares of the budget."""
FRAMEWORKS = {"jax": 0.6, "torch": 1.0}
"""In this order; the share of a stage's time that is spent when each has to be over."""

BARS_MS = {"forward": 21.0, "grad_hidden": 42.0, "policy_ref": 62.0}
"""At most, in milliseconds, for an H200 at N = 16384, D = 2560, V = 151,936."""
BAR_EXTRA_BYTES = 0.6e9
BAR_GRADIENT_ERROR = 5e-3


def find_gpu() -> str | None:
    """The first NVIDIA GPU's name, asked without starting CUDA in this process."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def find_folder(device: str) -> Path:
    """$OUT where it is set, else a folder of the device's name."""
    if out := os.environ.get("OUT"):
        return Path(out)
    return HERE / "results" / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def make_environment(tiny: bool) -> dict[str, str]:
    """For a worker. Two frameworks share one GPU, one after the other: neither takes memory before it needs it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")])}
    if triton := importlib.util.find_spec("triton"):
        # NVIDIA's assembler, where the machine has none of its own: XLA looks for it on the path.
        assembler = Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin"
        environment["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(assembler)])
    if tiny:
        return environment | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    return environment | memory | {"TRITON_INTERPRET": "0", "JAX_PLATFORMS": "cuda"}


def run_stage(stage: str, framework: str, lines: Path, deadline: float, *, tiny: bool) -> None:
    """Runs a framework's worker until every case has its rows, again where it dies, each time past the case it died of."""
    command = [sys.executable, str(WORKERS[framework]), "--lines", str(lines), "--stage", stage, "--deadline", str(deadline)]

    def skip(cases: list[Any], reason: str) -> None:
        for case in cases:
            for distribution in DISTRIBUTIONS:
                append_line(lines, make_row(case, distribution, status="skipped", reason=reason))

    while missing := find_missing(list_stage(framework, stage, tiny=tiny), read_lines(lines)[1]):
        if time.time() > deadline:
            return skip(missing, "no time left in the budget")
        try:
            done = subprocess.run(
                command + ["--tiny"] * tiny,
                env=make_environment(tiny),
                timeout=deadline + 45 - time.time(),
                stderr=subprocess.PIPE,
                text=True,
            )
            status, errors = f"status {done.returncode}", done.stderr
        except subprocess.TimeoutExpired as error:
            said: Any = error.stderr or b""  # bytes even where text was asked for
            status, errors = "no end within its time", said if isinstance(said, str) else said.decode(errors="replace")
        sys.stderr.write(errors[-6000:])
        left = find_missing(missing, read_lines(lines)[1])
        if len(left) == len(missing) and time.time() <= deadline:
            said = next((x.strip() for x in reversed(errors.splitlines()) if x.strip()), "")
            skip(left[:1], f"its process ended with {status}: {said}"[:300])


def find_row(rows: list[dict[str, Any]], size: tuple[int, ...], job: str, row: str, distribution: str) -> dict[str, Any] | None:
    key = (*size, job, row, distribution, "measured")
    return next((r for r in rows if (r["n"], r["d"], r["v"], r["job"], r["row"], r["distribution"], r["status"]) == key), None)


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """`times_kernel`: how many times the milliseconds of the kernel on the same job."""
    for row in rows:
        ours = find_row(rows, (row["n"], row["d"], row["v"]), row["job"], "kernel", row["distribution"])
        if ours and row["status"] == "measured":
            row["times_kernel"] = row["ms"]["p50"] / ours["ms"]["p50"]


def check_bars(rows: list[dict[str, Any]], device: str) -> Iterator[str]:
    """A line a bar: met, missed and by how much, or not measured."""
    yield f"Bars at N = {MAIN.n}, D = {MAIN.d}, V = {MAIN.v} on an H200; measured on {device}:"

    def judge(what: str, value: float | None, bar: float, unit: str) -> str:
        if value is None:
            return f"  {what}: not measured"
        verdict = "met" if value <= bar else f"MISSED by {value / bar - 1:.0%}"
        return f"  {what}: {value:.4g} {unit} against {bar:g} {unit}: {verdict}"

    for distribution in DISTRIBUTIONS:
        for job, bar in BARS_MS.items():
            row = find_row(rows, MAIN, job, "kernel", distribution) or {}
            yield judge(f"{job}, {distribution}", row.get("ms", {}).get("p50"), bar, "ms")
            if job == "forward":
                continue
            yield judge(f"{job}, {distribution}, extra memory", row["extra_bytes"] / 1e9 if row else None, BAR_EXTRA_BYTES / 1e9, "GB")
            yield judge(f"{job}, {distribution}, gradient error", row.get("gradient_error"), BAR_GRADIENT_ERROR, "of the norm")
        for job in ("grad_hidden", "policy_ref"):
            ours = find_row(rows, MAIN, job, "kernel", distribution)
            for peer in (name for table in ROWS.values() for name, jobs in table.items() if job in jobs and name not in OURS):
                theirs = find_row(rows, MAIN, job, peer, distribution)
                if ours is None or theirs is None:
                    yield f"  {job}, {distribution}, faster than {peer}: not measured"
                    continue
                factor = theirs["ms"]["p50"] / ours["ms"]["p50"]
                yield f"  {job}, {distribution}, faster than {peer}: {factor:.2f} times: {'met' if factor > 1 else 'MISSED'}"


def make_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a row, jobs together."""
    head = ("N", "D", "states", "job", "row", "ms (p20 to p80)", "of matmul", "extra GB", "gradient error", "times the kernel's ms")
    table = [head, ("---",) * len(head)]
    order = {name: i for i, name in enumerate([*JOBS, *ROWS["jax"], *ROWS["torch"], *DISTRIBUTIONS])}
    sizes = list(dict.fromkeys((r["n"], r["d"]) for r in rows))
    for r in sorted(rows, key=lambda r: (sizes.index((r["n"], r["d"])), order[r["distribution"]], order[r["job"]], order[r["row"]])):
        start = (str(r["n"]), str(r["d"]), r["distribution"], r["job"], r["row"])
        if r["status"] == "skipped":
            table.append((*start, f"skipped: {r['reason'].replace('|', '/')}", "", "", "", ""))
            continue
        errors = [f"{r[key]:.1e}" for key in ("gradient_error", "head_gradient_error") if key in r]
        extra = "" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 1e9:.2f}"
        ms = f"{r['ms']['p50']:.2f} ({r['ms']['p20']:.2f} to {r['ms']['p80']:.2f})"
        times = f"{r['times_kernel']:.2f}" if "times_kernel" in r else ""
        table.append((*start, ms, f"{r['share']:.0%}", extra, "; head ".join(errors), times))
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results (default: $OUT, else profiling/results/<device>)")
    parser.add_argument(
        "--budget-seconds", type=float, default=420, help="nothing new is begun after these; what is left is skipped by name"
    )
    parser.add_argument("--stage", choices=list(STAGES), help="main: the first size, starting over; rest: the others, beside what is there")
    parser.add_argument("--tiny", action="store_true", help="sizes for the CPU; Triton in its interpreter")
    options = parser.parse_args()
    started, gpu = time.time(), find_gpu()
    if gpu is None and not options.tiny:
        print("error: nvidia-smi names no GPU here; --tiny runs the same on the CPU, at sizes that say nothing of speed", file=sys.stderr)
        return 2
    device = "cpu (tiny)" if options.tiny else str(gpu)
    folder = options.out or find_folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "logprob_kl.jsonl"
    if options.stage != "rest":
        lines.unlink(missing_ok=True)
    begun, stages = started, {options.stage: 1.0} if options.stage else STAGES
    for stage, share in stages.items():
        seconds = share * options.budget_seconds
        for framework, part in FRAMEWORKS.items():
            run_stage(stage, framework, lines, begun + part * seconds, tiny=options.tiny)
        begun += seconds

    machines, rows = read_lines(lines)
    add_speedups(rows)
    result = {"device": device, "seconds": round(time.time() - started, 1), "machines": machines, "rows": rows}
    (folder / "logprob_kl.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rates = (
        f"{m['framework']} {m['matmul_tflops']:.3g} TFLOP/s bf16 matmul, commit {m['commit']}, {m['time']}, {m['versions']}"
        for m in machines
    )
    about = "\n".join(dict.fromkeys(rates))
    bars = "\n".join(check_bars(rows, device))
    (folder / "logprob_kl.md").write_text(f"# {device}\n\n{about}\n\n{bars}\n\n{make_table(rows)}\n", encoding="utf-8")
    main_size = TINY if options.tiny else MAIN
    print(f"{about}\n\n{bars}\n\nEvery size: {folder / 'logprob_kl.md'}. The first:\n")
    print(make_table([r for r in rows if (r["n"], r["d"]) == main_size[:2]]))
    failed = [r for r in rows if r["row"] in OURS and r["status"] == "skipped" and "no time left" not in r["reason"]]
    for row in failed:
        print(f"error: {row['row']}, {row['job']}, N = {row['n']}, D = {row['d']}: {row['reason']}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
