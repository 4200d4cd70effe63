"""`make gpu-check`, start to finish without a GPU (profiling/ is a folder of scripts, not a package)."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mllmrec_jax.bench.work import find_sizes
from mllmrec_jax.config import load_config
from mllmrec_jax.plan.models import resolve_model
from mllmrec_jax.resources import find_config

PROFILING = Path(__file__).resolve().parents[1] / "profiling"


@pytest.fixture(scope="module")
def gpu_check() -> Any:
    sys.path.insert(0, str(PROFILING))
    yield importlib.import_module("gpu_check")
    sys.path.remove(str(PROFILING))


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("OUT", "XLA_FLAGS")}
    command = [sys.executable, str(PROFILING / "gpu_check.py"), *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)


def read_lines(folder: Path) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, (folder / "gpu_check.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["part"]: line for line in lines}


@pytest.mark.slow
def test_runs_start_to_finish(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    # The kernels' benchmark has a test of its own; the Triton kernels run in their interpreter here.
    parts = ("kernel tests", "step", "profile", "TRL", "ncu", "rollout")
    done = run_script("--tiny", "--budget-seconds", "3600", "--only", *parts, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = read_lines(tmp_path)
    assert list(lines) == [
        "kernel tests", "step qwen3_0_6b", "profile qwen3_0_6b", "TRL step qwen3_0_6b", "ncu others_kernel", "rollout qwen3_0_6b",
    ]  # fmt: skip
    for name, line in lines.items():
        assert line["status"] == "done" or (name.startswith(("TRL", "ncu")) and line["reason"].startswith("not "))
    step = {row["name"]: row for row in lines["step qwen3_0_6b"]["document"]["rows"]}
    assert set(step) == {"generate", "update", "step"}
    # XLA does not see into the kernels: the formula stands where its count would be too low.
    assert step["update"]["flops"]["executed_xla"] is None and step["generate"]["flops"]["executed_xla"] > 0
    assert step["update"]["flops_per_s"] * step["update"]["p50"] == pytest.approx(step["update"]["flops"]["executed_formula"])
    assert step["step"]["shape"]["logprob"] == "triton" and step["step"]["unshared_tokens_per_s"] > step["step"]["tokens_per_s"]
    # Seconds of decoding are a difference of two times, which at tiny sizes can be noise of either sign.
    rollout = lines["rollout qwen3_0_6b"]["document"]
    assert {row["name"] for row in rollout["rows"]} == {"prefill", "rollout"}
    assert rollout["decode_token_s"]["p20"] <= rollout["decode_token_s"]["p50"] <= rollout["decode_token_s"]["p80"]
    assert lines["profile qwen3_0_6b"]["document"]["breakdown"]["phases"]
    with tarfile.open(tmp_path / "profile_qwen3_0_6b.tar.gz") as archive:
        names = archive.getnames()
    assert any(name.endswith(".xplane.pb") for name in names) and any(name.endswith("breakdown.html") for name in names)
    summary = (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
    assert "| step qwen3_0_6b | update |" in summary and summary.count("| done |") + summary.count("| skipped |") == len(lines)
    assert "===== step qwen3_0_6b" in (tmp_path / "gpu_check.log").read_text(encoding="utf-8")


def test_without_a_gpu_the_full_size_is_refused() -> None:
    sys.path.insert(0, str(PROFILING))
    if importlib.import_module("bench_logprob_kl").find_gpu() is not None:
        pytest.skip("there is a GPU")
    done = run_script()
    assert done.returncode == 2 and "nvidia-smi names no GPU here" in done.stderr


@pytest.mark.parametrize(("name", "shape"), [("qwen3_0_6b", "Qwen3-0.6B"), ("qwen3_1_7b", "Qwen3-1.7B"), ("qwen3_4b", "Qwen3-4B")])
def test_configurations_have_the_public_shapes(name: str, shape: str) -> None:
    config, public = load_config(find_config(f"bench/{name}")), resolve_model(shape)
    assert find_sizes(config)[1:] == (1024, 8, 128, public.tokenizer.vocab_size)
    for field in (
        "family", "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "tie_embeddings",
        "rope_theta", "norm_eps",
    ):  # fmt: skip
        assert getattr(config.model, field) == getattr(public.model, field), field


def make_part(gpu_check: ModuleType, code: str, **more: Any) -> Any:
    return gpu_check.Part("a part", [sys.executable, "-c", code], 30.0, **more)


def test_a_part_that_fails_says_so_and_its_output_is_kept(gpu_check: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    entry = gpu_check.run_part(make_part(gpu_check, "import sys; print('why'); sys.exit(3)"), log, dict(os.environ), seconds=60)
    assert (entry["status"], entry["reason"]) == ("failed", "ended with status 3")
    assert "===== a part\nwhy" in log.read_text()


def test_a_part_out_of_time_is_stopped_with_what_it_started(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0)
    started = tmp_path / "started"
    code = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); open({str(started)!r}, 'w')"
    )
    code += ".write(str(p.pid)); p.wait()"
    entry = gpu_check.run_part(make_part(gpu_check, code), tmp_path / "log", dict(os.environ), seconds=3)
    assert (entry["status"], entry["reason"]) == ("failed", "no end within 3 s")
    for _ in range(100):
        state = Path(f"/proc/{started.read_text()}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the part's own child still runs")


def test_what_is_missing_or_has_no_time_is_skipped_by_name(gpu_check: ModuleType, tmp_path: Path) -> None:
    run = lambda part, seconds: gpu_check.run_part(part, tmp_path / "log", {}, seconds=seconds)["reason"]  # noqa: E731
    assert run(make_part(gpu_check, "", needs=("json", "no_such_module", "nor_this")), 60) == "not installed: no_such_module, nor_this"
    assert run(make_part(gpu_check, "", program="no-such-program"), 60) == "not on the PATH: no-such-program"
    assert run(make_part(gpu_check, ""), 5) == "no time left in the budget"
