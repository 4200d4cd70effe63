"""Chooses the log-prob kernels' tile sizes on this machine's NVIDIA GPU, and rewrites the GPU's rows of variants.json.

    python profiling/tune_logprob_kl.py [--table FILE] [--budget-seconds 540] [--tiny]

Each kernel has a short list of candidates below. They are compiled first, without the GPU: what spills,
serialises its matrix instructions or does not fit is dropped. The others are timed in the whole operation they belong to, one kernel after
another, each with the best found for those before it; a row changes for a candidate more than 1% faster. The table is rewritten after each
choice, its other rows byte for byte as they were. What was measured goes to tune_logprob_kl.jsonl beside the table. --tiny tries all of
this on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import jax
from bench_logprob_kl import find_gpu, make_environment
from logprob_kl_work import MAIN, TINY, Case, Size, append_line, describe_error, time_calls, timing_seconds

from mllmrec_kernels.logprob_kl.variants import KernelName, Variant, find_variant

HERE = Path(__file__).resolve().parent
TABLE = HERE.parent / "kernels" / "mllmrec_kernels" / "logprob_kl" / "variants.json"
DTYPE = "bfloat16"
MARGIN = 0.01
"""Share by which a candidate must be faster than what the table has."""

# The table's own variant is a candidate everywhere.
CANDIDATES: dict[KernelName, tuple[Variant, ...]] = {
    "forward": (
        Variant(128, 256, 64, 8, 4),
        Variant(128, 256, 64, 8, 3),
        Variant(128, 256, 64, 8, 3, group=16),
        Variant(256, 128, 64, 8, 3),
        Variant(128, 128, 64, 8, 4),
        Variant(128, 128, 64, 4, 4),
        Variant(128, 256, 128, 8, 2),
    ),
    "mean_head": (
        Variant(128, 64, 256, 8, 4, splits=8),
        Variant(128, 64, 256, 8, 3, splits=4),
        Variant(128, 64, 256, 8, 3, splits=1),
        Variant(128, 64, 128, 8, 4, splits=8),
        Variant(128, 128, 128, 8, 3, splits=8),
        Variant(128, 32, 256, 8, 4, splits=8),
    ),
    "backward": (
        Variant(128, 128, 64, 8, 4, group=16),
        Variant(128, 128, 64, 8, 3),
        Variant(128, 128, 128, 8, 2),
        Variant(64, 256, 64, 8, 4),
        Variant(64, 128, 64, 4, 4),
    ),
    "forward_kl": (
        Variant(128, 128, 64, 8, 4),
        Variant(128, 128, 64, 8, 3, group=16),
        Variant(64, 256, 64, 8, 3),
        Variant(64, 128, 64, 4, 4),
    ),
    "backward_kl": (
        Variant(128, 128, 64, 8, 4),
        Variant(128, 128, 64, 8, 3, group=16),
        Variant(64, 128, 64, 8, 4),
        Variant(128, 64, 64, 8, 4),
    ),
}
TINY_CANDIDATES: dict[KernelName, tuple[Variant, ...]] = {
    "forward": (Variant(64, 64, 64, 4, 1), Variant(128, 256, 64, 4, 3)),  # the second spills
    "mean_head": (Variant(64, 64, 64, 4, 1, splits=1),),
}
MEASURED_IN: dict[KernelName, tuple[tuple[str, str], ...]] = {
    "forward": (("forward", "kernel"), ("grad_hidden", "kernel")),
    "mean_head": (("grad_hidden", "kernel"),),
    "backward": (("grad_hidden", "kernel, recompute"),),
    "forward_kl": (("exact_kl", "kernel"),),
    "backward_kl": (("exact_kl", "kernel"),),
}
"""(job, row) of the benchmark whose milliseconds are added up."""


def use_variants(chosen: dict[KernelName, Variant]) -> Any:
    """Inside, kernels run with these and otherwise with the table's."""

    def find(kernel: KernelName, **where: Any) -> Variant:
        return chosen.get(kernel) or find_variant(kernel, **where)

    return patch("mllmrec_kernels.logprob_kl.triton_chunk.find_variant", find)


def fits_beside(kernel: KernelName, variant: Variant, forward: Variant) -> bool:
    """The mean-head kernel steps through the forward kernel's tiles in whole blocks."""
    return kernel != "mean_head" or forward.block_v % variant.block_v == 0


def print_faults(kernel: KernelName, size: Size, variants: Sequence[Variant], device: str) -> None:
    """Prints a JSON list with each variant's faults; runs in a process of its own, whose kernels are not interpreted."""
    from mllmrec_kernels.ahead_of_time import compile_kernel
    from mllmrec_kernels.logprob_kl.compile_report import MODES, POINTERS, list_launches

    mode = {"forward": "accumulate", "mean_head": "accumulate", "backward": "recompute"}.get(kernel, "recompute with exact KL")
    wanted = {"mean_head": "mean_head_kernel", "backward": "logit_gradient_kernel", "backward_kl": "logit_gradient_kernel"}
    faults: list[list[str]] = []
    for variant in variants:
        faults.append([])
        with use_variants({kernel: variant}):
            launches = list_launches(size.n, size.d, size.v, DTYPE, **MODES[mode])
        for launch in launches:
            if launch.kernel.__name__ != wanted.get(kernel, "others_kernel"):
                continue
            pointers = {name: POINTERS[str(x.dtype)] for name, x in launch.pointers.items()}
            stages = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
            try:
                compiled = compile_kernel(launch.kernel, pointers, launch.constants, **stages, capability=int(device.removeprefix("sm_")))
                faults[-1] += compiled.find_faults()
            except Exception as error:
                faults[-1].append(describe_error(error))
    print(json.dumps(faults))


def find_faults(kernel: KernelName, size: Size, variants: Sequence[Variant], device: str) -> list[list[str]]:
    task = json.dumps([kernel, size, variants, device])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "JAX_PLATFORMS": "cpu", "MLLMREC_TRITON_DEVICE": device}
    done = subprocess.run(
        [sys.executable, __file__, "--faults-of", task], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(kernel: KernelName, size: Size, chosen: dict[KernelName, Variant], *, tiny: bool) -> float:
    """Milliseconds."""
    import logprob_kl_jax

    total = 0.0
    inputs = logprob_kl_jax.make_inputs(size)["trained_like"]
    with use_variants(chosen):
        for job, row in MEASURED_IN[kernel]:
            program = jax.jit(logprob_kl_jax.make_function(Case(size, job, row, "jax"))).lower(*inputs).compile()
            jax.block_until_ready(program(*inputs))
            total += time_calls(lambda p=program: p(*inputs), jax.block_until_ready, seconds=timing_seconds(tiny)).ms["p50"]
    return total


def format_variant(kernel: KernelName, variant: Variant) -> dict[str, int]:
    """Without the field that the kernel does not read."""
    unread = "group" if kernel == "mean_head" else "splits"
    return {name: value for name, value in variant._asdict().items() if name != unread}


def replace_row(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with this one in the place of its namesake, else at the end."""

    def name(r: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(r[key] for key in ("device", "dtype", "kernel", "d", "n"))

    replaced = [row if name(r) == name(row) else r for r in rows]
    return replaced if row in replaced else [*rows, row]


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A line a row."""
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")


def tune(table: Path, deadline: float, *, tiny: bool) -> None:
    from mllmrec_kernels.triton_launch import find_device

    log = table.with_name("tune_logprob_kl.jsonl")
    device = find_device()
    candidates = TINY_CANDIDATES if tiny else CANDIDATES
    sizes = [TINY] if tiny else [MAIN, MAIN._replace(d=4096), MAIN._replace(d=1024)]
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    write_table(table, rows)

    def now(kernel: KernelName, size: Size) -> Variant:
        return find_variant(kernel, device=device, dtype=DTYPE, d=size.d, n=size.n)

    tasks: list[tuple[Size, KernelName]] = [(size, kernel) for size in sizes for kernel in candidates]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        target = "sm_90" if tiny else device
        faults = list(pool.map(lambda task: find_faults(task[1], task[0], candidates[task[1]], target), tasks))
    chosen: dict[KernelName, Variant] = {}
    for (size, kernel), kernel_faults in zip(tasks, faults, strict=True):
        if kernel == next(iter(candidates)):
            chosen = {}
        best, least = now(kernel, size), float("inf")
        for variant, found in [(best, []), *zip(candidates[kernel], kernel_faults, strict=True)]:
            line = {"device": device, "kernel": kernel, **size._asdict(), "variant": format_variant(kernel, variant)}
            if least < float("inf") and variant == now(kernel, size):
                continue
            if not fits_beside(kernel, variant, chosen.get("forward") or now("forward", size)):
                found = ["its blocks do not divide the forward kernel's tiles"]
            if not found and time.time() > deadline:
                found = ["no time left in the budget"]
            # A forward tile is timed with the mean-head kernel, whose blocks must divide it.
            if not found and kernel == "forward" and variant.block_v % now("mean_head", size).block_v:
                found = ["the mean-head kernel's blocks do not divide its tiles"]
            if not found:
                try:
                    ms = measure(kernel, size, {**chosen, kernel: variant}, tiny=tiny)
                except Exception as error:
                    found = [describe_error(error)]
                else:
                    append_line(log, {**line, "ms": ms})
                    print(f"{kernel} D={size.d} {variant}: {ms:.3f} ms", flush=True)
                    if ms < least * (1 - MARGIN):
                        best, least = variant, ms
                    continue
            append_line(log, {**line, "dropped": found})
            print(f"{kernel} D={size.d} {variant}: dropped: {'; '.join(found)}", flush=True)
        chosen[kernel] = best
        if best != now(kernel, size):
            row = {"device": device, "dtype": DTYPE, "kernel": kernel, "d": size.d, "n": size.n, "variant": format_variant(kernel, best)}
            rows = replace_row(rows, row)
            write_table(table, rows)
    print(f"table: {table}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="file to write (default: variants.json in $OUT where it is set, else the package's own)")
    parser.add_argument("--budget-seconds", type=float, default=540, help="no candidate is begun after these")
    parser.add_argument("--tiny", action="store_true", help="on the CPU: one size, few candidates, Triton in its interpreter")
    parser.add_argument("--faults-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.faults_of:
        kernel, size, variants, device = json.loads(options.faults_of)
        print_faults(kernel, Size(*size), [Variant(*v) for v in variants], device)
        return 0
    if find_gpu() is None and not options.tiny:
        print("error: nvidia-smi names no GPU here; --tiny tries the same on the CPU", file=sys.stderr)
        return 2
    # Read when Triton is imported and when JAX looks for its devices, both of which happen below this line.
    environment = make_environment(options.tiny)
    os.environ.update(environment)
    jax.config.update("jax_platforms", environment["JAX_PLATFORMS"])
    table = options.table or (Path(os.environ["OUT"]) / TABLE.name if "OUT" in os.environ else TABLE)
    table.parent.mkdir(parents=True, exist_ok=True)
    tune(table, time.time() + options.budget_seconds, tiny=options.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
