"""Nsight Compute's report as a row, from text in the shape that `ncu --csv --page details` prints."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "profiling" / "ncu_row.py"
ncu = runpy.run_path(str(SCRIPT))

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name",'
    '"Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type","Rule Description"'
)


def make_line(launch: int, section: str, metric: str, unit: str, value: str) -> str:
    start = f'"{launch}","7","python","host","forward(float *, int)","1","13","(256, 1, 1)","(128, 1, 1)","0","9.0"'
    return f'{start},"{section}","{metric}","{unit}","{value}","","",""'


REPORT = "\n".join(
    [
        "==PROF== Connected to process 7 (/usr/bin/python)",
        "loss 3.2",
        "==PROF== Disconnected from process 7",
        HEADER,
        make_line(0, "GPU Speed Of Light Throughput", "Duration", "us", "1,234.50"),
        make_line(0, "GPU Speed Of Light Throughput", "Memory Throughput", "%", "61.5"),
        make_line(0, "GPU Speed Of Light Throughput", "Compute (SM) Throughput", "%", "80"),
        make_line(0, "GPU Speed Of Light Throughput", "SM Frequency", "Ghz", "1.5"),
        make_line(0, "Memory Workload Analysis", "Memory Throughput", "Tbyte/s", "2.5"),
        make_line(0, "Launch Statistics", "Registers Per Thread", "register/thread", "168"),
        make_line(0, "Launch Statistics", "Function Cache Configuration", "", "CachePreferNone"),
        make_line(1, "GPU Speed Of Light Throughput", "Duration", "us", "9"),
    ]
)


def test_first_launch_becomes_a_row_in_base_units() -> None:
    row = ncu["parse_report"](REPORT)
    assert row["kernel"] == "forward(float *, int)"
    assert (row["grid"], row["block"], row["cc"]) == ("(128, 1, 1)", "(256, 1, 1)", "9.0")
    assert row["seconds"] == pytest.approx(1234.5e-6)
    assert row["memory_share"] == pytest.approx(0.615)
    assert row["compute_share"] == pytest.approx(0.8)
    assert row["bytes_per_second"] == pytest.approx(2.5e12)
    assert row["registers_per_thread"] == 168
    assert row["metrics"]["Launch Statistics"]["Function Cache Configuration"] == ["CachePreferNone", ""]
    assert "occupancy_share" not in row


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        ("5", "nsecond", (5e-9, "s")),
        ("2", "Gbyte/second", (2e9, "byte/s")),
        ("3", "Kbyte", (3e3, "byte")),
        ("4", "block", (4.0, "block")),
        ("n/a", "%", ("n/a", "%")),
    ],
)
def test_units(value: str, unit: str, expected: tuple) -> None:
    found = ncu["convert_value"](value, unit)
    assert found == (pytest.approx(expected[0]) if isinstance(expected[0], float) else expected[0], expected[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==WARNING== No kernels were profiled.", "No kernels were profiled"),
        (HEADER, "header alone"),
        ('"ID","Kernel Name"\n"0","k"', "found no .*Metric Value"),
    ],
)
def test_reports_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ncu["parse_report"](text)


def run_script(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env={"PATH": path})


def test_command_runs_ncu_and_adds_a_row(tmp_path: Path) -> None:
    fake = tmp_path / "ncu"
    (tmp_path / "report.csv").write_text(REPORT)
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat {tmp_path}/report.csv\n')
    fake.chmod(0o755)
    out = tmp_path / "rows" / "ncu.jsonl"
    for _ in range(2):
        done = run_script(
            "--kernel", "forward.*", "--skip", "3", "--out", str(out), "--", "python", "x.py", path=f"{tmp_path}:/usr/bin:/bin"
        )
        assert done.returncode == 0, done.stderr
    assert [json.loads(line)["command"] for line in out.read_text().splitlines()] == ["python x.py"] * 2
    assert "--kernel-name regex:forward.* --launch-skip 3 --launch-count 1" in (tmp_path / "arguments").read_text()


def test_missing_ncu_is_told(tmp_path: Path) -> None:
    done = run_script("--", "python", path=str(tmp_path))
    assert done.returncode == 2
    assert "expected Nsight Compute's command on the PATH" in done.stderr
