"""The harness tells a good kernel from each kind of bad one, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from mllmrec_kernels.ahead_of_time import SHARED_BYTES_LIMIT, compile_kernel, read_assembler_log

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    """Compiled in a process of its own: in this one triton.jit may make interpreted kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("ahead_of_time_kernels.py")],
        env={**environment, "PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "faults"),
    [
        ("good", []),
        ("other GPU", []),
        ("too much shared memory", ["bytes of shared memory"]),
        ("serialised", ["spills registers", "instructions are serialized due to insufficient register resources"]),
        ("no matrix", ["no wgmma"]),
        ("spills", ["spills registers", "no wgmma"]),
    ],
)
def test_each_fault_is_told_apart(rows: dict[str, dict[str, Any]], case: str, faults: list[str]) -> None:
    found = rows[case]["faults"]
    assert len(found) == len(faults), found
    for fault, expected in zip(found, faults, strict=True):
        assert expected in fault


def test_numbers_come_from_the_compilers(rows: dict[str, dict[str, Any]]) -> None:
    good, large = rows["good"], rows["too much shared memory"]
    assert ".target sm_90a" in good["ptx"] and ".entry multiply" in good["ptx"]
    # Three stages of a [128, 64] and a [64, 128] tile in bfloat16; five of [128, 64] and [64, 256].
    assert good["shared_bytes"] == 3 * 2 * 128 * 64 * 2
    assert large["shared_bytes"] == 5 * (128 * 64 + 64 * 256) * 2 > SHARED_BYTES_LIMIT[90]
    assert good["wgmma"] == 4  # 64 / 16 steps of the inner axis
    # Each thread holds its share of the [128, 128] totals.
    assert 128 * 128 // 256 <= good["registers"] <= 255
    assert ".target sm_80" in rows["other GPU"]["ptx"] and rows["other GPU"]["wgmma"] == 0
    assert rows["spills"]["spill_stores"] > 0 and rows["spills"]["spill_loads"] > 0


def test_the_log_is_read() -> None:
    log = (
        "ptxas info    : (C7514) Potential Performance Loss: "
        "wgmma.mma_async instructions are serialized due to a reason in the function 'f'\n"
        "ptxas info    : Function properties for f\n    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
        "ptxas info    : Function properties for g\n    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
    )
    assert read_assembler_log(log) == {
        "registers": 168,
        "spill_stores": 8,
        "spill_loads": 12,
        "serialised": "wgmma.mma_async instructions are serialized due to a reason in the function 'f'",
    }
    with pytest.raises(ValueError, match="printed no registers"):
        read_assembler_log("")


def test_what_triton_jit_did_not_make_is_refused() -> None:
    with pytest.raises(ValueError, match="without TRITON_INTERPRET=1, was function"):
        compile_kernel(lambda x: x, {"x": "*fp32"}, {}, num_warps=4, num_stages=1)
