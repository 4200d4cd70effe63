"""What a benchmark hands back: one JSON row a measured thing, and the document around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from mllmrec_jax.bench.executed import read_planned_memory
from mllmrec_jax.bench.flops import Sizes, Work
from mllmrec_jax.bench.measure import Program, find_peak_flops, find_percentiles, read_allocator, read_clocks, read_host_memory
from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.atomic import write_file
from mllmrec_jax.provenance import collect_provenance

FORMAT = "mllmrec-bench"


def make_row(name: str, seconds: list[float], *, shape: dict[str, Any], **measured: Any) -> dict[str, Any]:
    """`seconds` of each repeat and their p20, p50, p80, beside what else was measured.

    `name` and `shape` together say what was timed: rows of two documents that agree in both are compared.
    """
    return {"name": name, "shape": shape, **find_percentiles(seconds), "seconds": seconds, **measured}


def rate_tokens(seconds: list[float], sizes: Sizes) -> dict[str, float]:
    """Tokens a second with each prompt counted once, and as a trainer that repeats prompts counts; samples (completions) a second."""
    median = find_percentiles(seconds)["p50"]
    return {
        "tokens_per_s": sizes.tokens / median,
        "unshared_tokens_per_s": sizes.unshared_tokens / median,
        "samples_per_s": sizes.prompts * sizes.group_size / median,
    }


def rate_work(
    seconds: list[float],
    work: Work,
    *,
    dtype: str,
    executed_flops: float | None = None,
    executed_bytes: float | None = None,
    devices: int = 1,
) -> dict[str, Any]:
    """FLOPs and bytes by formula and by XLA, and their rates at the median; all devices together.

    `flops_per_s` and `hfu` are of executed FLOPs (XLA's count where there is one), `mfu` of those the mathematics asks for. Shares of the
    peak are None where the device's is not known.
    """
    median = find_percentiles(seconds)["p50"]
    peak = find_peak_flops(jax.devices()[0].device_kind, dtype)
    executed = work.flops if executed_flops is None else executed_flops
    return {
        "flops": {"executed_xla": executed_flops, "executed_formula": work.flops, "model": work.model_flops},
        "flops_per_s": executed / median,
        "hfu": None if peak is None else executed / median / (peak * devices),
        "mfu": None if peak is None else work.model_flops / median / (peak * devices),
        "bytes": {"accessed_xla": executed_bytes, "least_formula": work.bytes},
        "bytes_per_s": (work.bytes if executed_bytes is None else executed_bytes) / median,
    }


def describe_program(program: Program) -> dict[str, Any]:
    """Compile time and memory by XLA's plan of one device."""
    return {"compile_s": program.compile_s, "compile_from_cache": program.from_cache, "memory_xla": read_planned_memory(program.call)}


RATES = (
    "samples_per_s", "tokens_per_s", "unshared_tokens_per_s", "users_per_s", "examples_per_s", "captions_per_s", "drafts_per_s",
    "traces_per_s", "embeddings_per_s",
)  # fmt: skip


def format_rows(rows: list[dict[str, Any]]) -> str:
    """A line a row for reading: p20, p50 and p80 in milliseconds, GFLOP/s, MFU, and what was done a second."""
    width = max(len(row["name"]) for row in rows) + 2
    varying = {key for row in rows for key, value in row["shape"].items() if any(o["shape"].get(key, value) != value for o in rows)}
    lines = [f"{'row':<{width}}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'GFLOP/s':>10}{'MFU':>7}  a second"]
    for row in rows:
        times = "".join(f"{1e3 * row[name]:>10.4g}" for name in ("p20", "p50", "p80"))
        speed = f"{row['flops_per_s'] / 1e9:>10.4g}" if row.get("flops_per_s") else f"{'':>10}"
        share = f"{row['mfu']:>7.1%}" if row.get("mfu") is not None else f"{'':>7}"
        rates = ", ".join(f"{row[name]:.4g} {name.removesuffix('_per_s').replace('_', ' ')}" for name in RATES if name in row)
        apart = ", ".join(f"{key} {row['shape'][key]}" for key in sorted(varying) if key in row["shape"])
        lines.append(f"{row['name']:<{width}}{times}{speed}{share}  {rates}" + (f" ({apart})" if apart and len(rows) > 1 else ""))
    return "\n".join(lines)


def make_document(
    benchmark: str, config: RunConfig, rows: list[dict[str, Any]], *, repeats: int, clocks: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """All rows of one command, and what they were measured on. `clocks` are those read before the first repeat."""
    return {
        "format": FORMAT,
        "benchmark": benchmark,
        **more,
        "repeats": repeats,
        "rows": rows,
        "dtypes": {"compute": config.model.dtype, "base_weights": config.model.param_dtype, "trained": "float32"},
        # Of the whole process so far: neither can be set back between benchmarks.
        "memory_allocator": read_allocator(),
        "memory_host_peak": read_host_memory(),
        "clocks": {"before": clocks, "after": read_clocks()},
        "provenance": collect_provenance(config),
    }


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Indented JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(document, indent=2) + "\n").encode())


class BenchFileError(ValueError):
    """A file that is not a benchmark's; the message names it."""


def read_document(path: Path, *, benchmark: str) -> dict[str, Any]:
    """A document that `write_document` wrote, of `benchmark`.

    Raises:
      BenchFileError: it is missing, not JSON, or not such a document.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchFileError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BenchFileError(f"{path}: expected JSON of `mllmrec bench {benchmark} --json`, got a damaged file ({error})") from None
    found = document.get("benchmark") if isinstance(document, dict) and document.get("format") == FORMAT else None
    if found != benchmark:
        got = "something else" if found is None else f"one of `mllmrec bench {found}`"
        raise BenchFileError(f"{path}: expected a document of `mllmrec bench {benchmark} --json`, got {got}")
    return document
