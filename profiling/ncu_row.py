"""Runs Nsight Compute on one launch of one kernel and turns its report into a JSON row.

    python profiling/ncu_row.py --kernel REGEX [--skip N] [--out ROWS.jsonl] -- COMMAND ...
    python profiling/ncu_row.py --report SAVED.csv

COMMAND is any program that launches the kernel, for example `python -m mllmrec_jax.cli bench kernels ...`; `ncu` has to be on the PATH and
may read the performance counters. Launches that match REGEX are counted from 0, and launch N is measured. --report reads what
`ncu --csv --page details` printed before. The row goes to standard output and, with --out, to the end of a file. docs/profiling.md says
what is in it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SECTIONS = ("LaunchStats", "Occupancy", "SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis")
COLUMNS = ("ID", "Kernel Name", "Block Size", "Grid Size", "Section Name", "Metric Name", "Metric Unit", "Metric Value")
"""Of `ncu --csv --page details`; there are more."""

PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0}

# Key of the row, section, metric: names as the sections above print them.
HEADLINES = (
    ("seconds", "GPU Speed Of Light Throughput", "Duration"),
    ("compute_share", "GPU Speed Of Light Throughput", "Compute (SM) Throughput"),
    ("memory_share", "GPU Speed Of Light Throughput", "Memory Throughput"),
    ("dram_share", "GPU Speed Of Light Throughput", "DRAM Throughput"),
    ("bytes_per_second", "Memory Workload Analysis", "Memory Throughput"),
    ("l2_hit_share", "Memory Workload Analysis", "L2 Hit Rate"),
    ("occupancy_share", "Occupancy", "Achieved Occupancy"),
    ("registers_per_thread", "Launch Statistics", "Registers Per Thread"),
)


class NcuError(RuntimeError):
    """A report that is not there or not whole; the message says why."""


def convert_value(text: str, unit: str) -> tuple[float | str, str]:
    """A value in seconds, bytes, hertz or a share of 1, and that unit; what is no number, or of another unit, as it is."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return text, unit
    if unit == "%":
        return value / 100, "share"
    if unit in SECONDS:
        return value * SECONDS[unit], "s"
    for base, name in (("byte/second", "byte/s"), ("byte/s", "byte/s"), ("byte", "byte"), ("hz", "Hz"), ("Hz", "Hz")):
        prefix = unit.removesuffix(base)
        if unit.endswith(base) and prefix in PREFIXES:
            return value * PREFIXES[prefix], name
    return value, unit


def parse_report(text: str) -> dict[str, Any]:
    """The first launch in what `ncu --csv --page details` printed; lines of ncu and of the program around the table are passed over.

    Returns:
      kernel, grid, block, device (compute capability); the headline numbers that the report has; `metrics`: section -> metric ->
      [value, unit].

    Raises:
      NcuError: no table, or no launch in it; with ncu's own words where it printed any.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        said = [line for line in lines if line.startswith(("==ERROR==", "==WARNING=="))]
        raise NcuError(f'report: expected a table that starts with the column "ID", found none; {" ".join(said) or "ncu said nothing"}')
    table = [line for line in lines[start:] if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(table))))
    if not rows:
        raise NcuError("report: expected a launch, found the table's header alone")
    if missing := [column for column in COLUMNS if column not in rows[0]]:
        raise NcuError(f"report: expected the columns {', '.join(COLUMNS)}, found no {', '.join(missing)}; is it of --page details?")
    own = [row for row in rows if row["ID"] == rows[0]["ID"]]
    metrics: dict[str, dict[str, Any]] = {}
    for row in own:
        if row["Metric Name"]:
            value, unit = convert_value(row["Metric Value"], row["Metric Unit"])
            metrics.setdefault(row["Section Name"], {})[row["Metric Name"]] = [value, unit]
    headlines = {key: metrics[section][name][0] for key, section, name in HEADLINES if name in metrics.get(section, {})}
    launch = {"kernel": own[0]["Kernel Name"], "grid": own[0]["Grid Size"], "block": own[0]["Block Size"], "cc": own[0].get("CC", "")}
    return {"benchmark": "ncu", **launch, **headlines, "metrics": metrics}


def run_ncu(command: list[str], *, kernel: str, skip: int) -> str:
    """What ncu prints for launch number `skip` of the kernels whose name matches.

    Raises:
      NcuError: ncu is not there or failed; the message holds the end of what it said.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise NcuError("ncu: expected Nsight Compute's command on the PATH, found none; it comes with the CUDA toolkit")
    sections = [word for section in SECTIONS for word in ("--section", section)]
    chosen = ["--kernel-name", f"regex:{kernel}", "--launch-skip", str(skip), "--launch-count", "1", "--target-processes", "all"]
    # ncu would hold the clocks at their base: times are of the clocks that the kernel runs at, and no setting of the device is touched.
    chosen += ["--clock-control", "none"]
    done = subprocess.run([ncu, "--csv", "--page", "details", *sections, *chosen, *command], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if "ERR_NVGPUCTRPERM" in said:
        raise NcuError("ncu: may not read the GPU's counters (ERR_NVGPUCTRPERM); run it as root or have the administrator allow it")
    if done.returncode:
        raise NcuError(f"ncu: ended with {done.returncode}: {said[-2000:].strip()}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default=".*", help="regular expression for the kernel's name")
    parser.add_argument("--skip", type=int, default=0, help="matching launches before the one that is measured")
    parser.add_argument("--out", type=Path, help="file that the row is added to")
    parser.add_argument("--report", type=Path, help="a saved report to read instead of running ncu")
    parser.add_argument("command", nargs="*", help="program to run, after --")
    options = parser.parse_args()
    if (options.report is None) == (not options.command):
        parser.error("expected either --report FILE or a command after --")
    try:
        read = (
            options.report.read_text(encoding="utf-8")
            if options.report
            else run_ncu(options.command, kernel=options.kernel, skip=options.skip)
        )
        row = parse_report(read)
    except (NcuError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    row |= {"command": " ".join(options.command), "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    line = json.dumps(row)
    print(line)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
