"""How a benchmark measures: programs compiled apart, warm-up, repeats on fresh inputs, seconds until results are ready."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
import numpy as np

from mllmrec_jax.progress import track

PEAK_FLOPS = {
    ("NVIDIA B200", "bfloat16"): 2250e12,
    ("NVIDIA H200", "bfloat16"): 989e12,
    ("NVIDIA H100 80GB HBM3", "bfloat16"): 989e12,
    ("NVIDIA H100 PCIe", "bfloat16"): 756e12,
    ("NVIDIA A100", "bfloat16"): 312e12,
    ("NVIDIA L40S", "bfloat16"): 362e12,
    ("TPU v4", "bfloat16"): 275e12,
    ("TPU v5 lite", "bfloat16"): 197e12,
    ("TPU v5p", "bfloat16"): 459e12,
    ("TPU v5", "bfloat16"): 459e12,
    ("TPU v6 lite", "bfloat16"): 918e12,
}
"""Dense matrix products a second of one device, by the start of its name and the dtype, from the makers' data sheets."""


def find_peak_flops(device_kind: str, dtype: str) -> float | None:
    """The data sheet's FLOP/s of one device for products of `dtype`; None where it is not in the table (a CPU, float32)."""
    known = [(name, peak) for (name, of), peak in PEAK_FLOPS.items() if of == dtype and device_kind.startswith(name)]
    return max(known, key=lambda entry: len(entry[0]))[1] if known else None


class Program(NamedTuple):
    """A compiled program."""

    call: Any
    """`jax.stages.Compiled`: takes the arguments, returns before they are computed."""
    compile_s: float
    """Tracing, lowering and compiling (seconds)."""
    from_cache: bool
    """Whether the persistent compilation cache had it: `compile_s` is then no compile time."""


_cache_hits = 0


def _note_event(event: str, **_: Any) -> None:
    global _cache_hits
    _cache_hits += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(_note_event)


def compile_program(function: Any, *args: Any) -> Program:
    """Compiles a jitted function for the shapes and layouts of `args`."""
    hits, started = _cache_hits, time.perf_counter()
    compiled = function.lower(*args).compile()
    return Program(compiled, time.perf_counter() - started, _cache_hits > hits)


def time_call(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds until all results are ready, and the results. What `args` still wait for must be ready before."""
    started = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - started, result


def repeat_runs(run: Callable[[int], dict[str, float]], *, warmup: int, repeats: int, description: str) -> dict[str, list[float]]:
    """`run(repeat)` draws fresh inputs, makes them ready, and returns seconds by name; those after the warm-up, in order."""
    for repeat in range(warmup):
        run(repeat)
    rows = [run(warmup + i) for i in track(range(repeats), description=description, unit="repeat")]
    return {name: [row[name] for row in rows] for name in rows[0]}


def find_percentiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80, linear between the nearest values."""
    return {f"p{q}": float(np.percentile(seconds, q)) for q in (20, 50, 80)}


def read_allocator() -> dict[str, int] | None:
    """Bytes in use now and at most since the process began, of the first device's allocator; None where it keeps no account (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else {"in_use": stats["bytes_in_use"], "peak": stats["peak_bytes_in_use"]}


def read_host_memory() -> int:
    """Most bytes the process held in memory since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_clocks() -> dict[str, Any]:
    """Clocks (MHz), power (W), temperature (C) and load where they can be read: they say what a run shared its machine with."""
    found: dict[str, Any] = {"load_1min": round(os.getloadavg()[0], 2)}
    cpu = [float(line.split(":")[1]) for line in _read_lines(Path("/proc/cpuinfo")) if line.startswith("cpu MHz")]
    if cpu:
        found["cpu_mhz"] = round(float(np.mean(cpu)), 1)
    if jax.default_backend() == "gpu":
        names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            return found
        found["gpus"] = [dict(zip(names, map(str.strip, line.split(",")), strict=True)) for line in said]
    return found


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
