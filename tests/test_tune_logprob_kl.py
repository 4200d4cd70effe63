"""The script that chooses tile sizes, on the CPU: bad candidates are dropped unmeasured, other rows of the table stay as they are."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")
PROFILING = Path(__file__).resolve().parents[1] / "profiling"


@pytest.fixture(scope="module")
def tune() -> Any:
    before = list(sys.path)
    sys.path.insert(0, str(PROFILING))
    yield importlib.import_module("tune_logprob_kl")
    sys.path[:] = before


def test_the_table_is_written_as_it_was_read(tune: ModuleType, tmp_path: Path) -> None:
    rows = json.loads(tune.TABLE.read_text())
    tune.write_table(tmp_path / "table.json", rows)
    assert (tmp_path / "table.json").read_text() == tune.TABLE.read_text()


def test_a_row_takes_its_namesakes_place(tune: ModuleType) -> None:
    rows = [{"device": "a", "dtype": "t", "kernel": "k", "d": d, "n": 1, "variant": {"block_n": 1}} for d in (1, 2)]
    again = {**rows[0], "variant": {"block_n": 2}}
    other = {**rows[0], "d": 3}
    assert tune.replace_row(rows, again) == [again, rows[1]]
    assert tune.replace_row(rows, other) == [*rows, other]
    assert tune.replace_row(rows, rows[1]) == rows


def test_candidates_are_distinct_and_fit_their_kernel(tune: ModuleType) -> None:
    for kernel, variants in tune.CANDIDATES.items():
        assert len(set(variants)) == len(variants)
        assert all(v.splits == 1 for v in variants) or kernel == "mean_head"
    assert set(tune.CANDIDATES) == set(tune.MEASURED_IN)


@pytest.mark.slow
def test_tuning_runs_start_to_finish(tune: ModuleType, tmp_path: Path) -> None:
    table = tmp_path / "variants.json"
    done = subprocess.run(
        [sys.executable, str(PROFILING / "tune_logprob_kl.py"), "--tiny", "--table", str(table)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    log = [json.loads(line) for line in (tmp_path / "tune_logprob_kl.jsonl").read_text().splitlines()]
    dropped = [line for line in log if "dropped" in line]
    assert len(dropped) == 1 and "spills registers" in dropped[0]["dropped"][0]
    assert {line["kernel"] for line in log if "ms" in line} == {"forward", "mean_head"}
    before, after = json.loads(tune.TABLE.read_text()), json.loads(table.read_text())
    kept = [row for row in before if row in after]
    changed = [row for row in after if row not in before]
    assert all(row["device"] == "interpreter" and row["dtype"] == "bfloat16" for row in changed)
    assert len(kept) >= len(before) - len(changed)
