"""Everything that one NVIDIA GPU can prove, in one command: kernels, GRPO on the shapes of real models, a trace, a peer.

    python profiling/gpu_check.py [--out FOLDER] [--budget-seconds 520] [--only PART ...] [--tiny]

Any Python will do that has jax with CUDA, triton, jax-triton, pytest and what mllmrec-jax needs; nothing is installed. A part that lacks
something is skipped and says what; one that fails does not stop the next; each part's result is in FOLDER (default: $OUT, else
profiling/results/<device>) before the next begins, and what matters most comes first. --tiny runs the same on the CPU, at sizes that say
nothing of speed. docs/benchmarks.md says what is in the files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench_logprob_kl import HERE, find_folder, find_gpu, make_environment

ROOT = HERE.parent
MODELS = ("qwen3_0_6b", "qwen3_1_7b", "qwen3_4b")
LEAST_SECONDS = 20
"""A part is not begun with less than this left."""
TRAINER = ("tyro", "pydantic", "tomli_w", "tensorboardX", "grain", "flax", "optax", "orbax", "tensorstore", "transformers", "jaxtyping")
"""Modules behind `mllmrec bench` and `mllmrec profile` that a Python with JAX may lack."""
KERNELS = ("triton", "pytest", "jaxtyping")
TINY = {
    "prompt.max-prompt-tokens": 24, "grpo.max-new-tokens": 4, "grpo.group-size": 2, "grpo.batch-size": 2, "tokenizer.vocab-size": 151,
    "model.num-layers": 2, "model.hidden-size": 32, "model.intermediate-size": 48, "model.num-heads": 2, "model.num-kv-heads": 1,
    "model.head-dim": 16, "model.max-position": 64,
}  # fmt: skip


class Part(NamedTuple):
    """One thing that is measured, in processes of its own."""

    name: str
    command: list[str]
    seconds: float
    """At most."""
    needs: tuple[str, ...] = ()
    """Modules."""
    program: str | None = None
    """That has to be on the PATH."""
    document: Path | None = None
    """JSON that the command writes."""
    archive: Path | None = None
    """Where the folder of the document is kept, in one file."""
    told_budget: bool = False
    """The command takes --budget-seconds, skips by name what it has no time for, and then writes its tables."""


def list_parts(folder: Path, scratch: Path, *, tiny: bool) -> list[Part]:
    """In the order they run; files that are kept go to `folder`, others to `scratch`. Tiny parts have no time limit of their own."""
    python = sys.executable
    small = [word for name, value in TINY.items() for word in (f"--{name}", str(value))] if tiny else []
    launcher = () if tiny else ("jax_triton",)
    tests = [python, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider", "-rA"]
    tests += ["-m", "not gpu" if tiny else "gpu", "--durations=0", "tests/kernels/test_logprob_kl_gpu.py"]

    def kernels(stage: str, seconds: float) -> Part:
        command = [python, str(HERE / "bench_logprob_kl.py"), "--out", str(folder), "--stage", stage, *["--tiny"] * tiny]
        return Part(f"log-prob kernel, {stage}", command, seconds, KERNELS + launcher, told_budget=True)

    def bench(what: str, model: str, seconds: float) -> Part:
        document = scratch / f"{what}_{model}.json"
        command = [python, "-m", "mllmrec_jax.cli", "bench", what, "--config", f"bench/{model}", "--json", str(document)]
        repeats = ["--repeats", "2" if tiny else "5"]
        return Part(f"{what} {model}", [*command, *repeats, *small], seconds, TRAINER + launcher, document=document)

    models = MODELS[:1] if tiny else MODELS  # tiny ones are all alike
    profiled = MODELS[0]
    trace = [python, "-m", "mllmrec_jax.cli", "profile", f"bench/{profiled}", "--first", "4", "--steps", "1", *small]
    trace += ["--output", str(scratch / "runs"), "--cache", str(scratch / "cache")]
    profile = scratch / "runs" / profiled / "profile" / "grpo" / "profile.json"
    peer = [python, str(HERE / "peers" / "trl_step.py"), "--config", str(ROOT / "configs" / "bench" / f"{profiled}.toml")]
    peer += ["--steps", "3", "--warmup", "2", "--micro-batch", "16", "--dtype", "bfloat16", "--device", "cuda"]
    peer += ["--json", str(scratch / "trl.json")]
    counters = [python, str(HERE / "ncu_row.py"), "--kernel", "others_kernel", "--skip", "2", "--out", str(scratch / "ncu.json"), "--"]
    counters += [python, "-m", "mllmrec_jax.cli", "bench", "kernels", "--config", f"bench/{profiled}", "--repeats", "1", *small]
    parts = [
        Part("kernel tests", tests, 150, KERNELS + launcher),
        kernels("main", 120),
        *(bench("step", model, seconds) for model, seconds in zip(models, (90, 90, 120), strict=False)),
        Part(f"profile {profiled}", trace, 90, TRAINER + launcher, document=profile, archive=folder / f"profile_{profiled}.tar.gz"),
        Part(f"TRL step {profiled}", peer, 120, ("trl", "peft", "datasets"), document=scratch / "trl.json"),
        Part("ncu others_kernel", counters, 90, TRAINER + launcher, "ncu", scratch / "ncu.json"),
        *(bench("rollout", model, 60) for model in reversed(models)),
        kernels("rest", 200),
    ]
    # The limits are a GPU's: what a CPU takes depends on what else it does.
    return [part._replace(seconds=math.inf) for part in parts] if tiny else parts


def make_trainer_environment(tiny: bool, scratch: Path) -> dict[str, str]:
    """As a worker of the kernel benchmark has it, with the packages of this clone and a cache of programs that parts share."""
    environment = make_environment(tiny)
    paths = [*(str(ROOT / folder) for folder in (".", "kernels", "launch")), environment["PYTHONPATH"]]
    return environment | {"PYTHONPATH": os.pathsep.join(paths), "JAX_COMPILATION_CACHE_DIR": str(scratch / "xla"), "HF_HUB_OFFLINE": "1"}


def find_lack(part: Part) -> str | None:
    """What this Python or machine does not have for the part."""
    absent = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return f"not on the PATH: {part.program}" if part.program and shutil.which(part.program) is None else None


def run_part(part: Part, log: Path, environment: dict[str, str], *, seconds: float) -> dict[str, Any]:
    """Runs the part's command, its output to the end of `log` and to ours; returns status, and why where it is not `done`."""
    lack = find_lack(part)
    if lack or seconds < LEAST_SECONDS:
        return {"status": "skipped", "reason": lack or "no time left in the budget"}
    seconds, started = min(part.seconds, seconds), time.time()
    with log.open("a+", encoding="utf-8", errors="replace") as file:
        file.write(f"\n===== {part.name}\n")
        file.flush()
        begin = file.tell()
        # A process group of its own, so that workers of a command that is stopped give the GPU back.
        running = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            status = running.wait(seconds)
            reason = None if status == 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            reason = f"no end within {seconds:.0f} s"
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
        file.seek(begin)
        print(file.read(), flush=True)
    taken = {"seconds": round(time.time() - started, 1)}
    return {"status": "done", **taken} if reason is None else {"status": "failed", "reason": reason, **taken}


def keep_folder(folder: Path, archive: Path) -> None:
    """A folder and all that is in it, in one file."""
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, arcname=archive.name.removesuffix(".tar.gz"))


def list_rows(entry: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Of a part's document: part, row, milliseconds, tokens a second both ways, MFU, bytes in use at the most."""
    document = entry.get("document") or {}
    for row in document.get("rows", []):
        share = "" if row.get("mfu") is None else f"{row['mfu']:.1%}"
        rates = (f"{row[name]:.0f}" if name in row else "" for name in ("tokens_per_s", "unshared_tokens_per_s"))
        memory = (row.get("memory_xla") or {}).get("peak")
        yield (entry["part"], row["name"], f"{1e3 * row['p50']:.2f}", *rates, share, "" if memory is None else f"{memory / 1e9:.2f}")
    if "step_s" in document and "peer" in document:
        for name in ("generate_s", "update_s", "step_s"):
            yield (entry["part"], name.removesuffix("_s"), f"{1e3 * document[name]['p50']:.2f}", "", "", "", "")


def make_summary(entries: list[dict[str, Any]], device: str) -> str:
    """Markdown: what each part came to, then every row measured."""
    lines = [f"# {device}", "", "| part | | seconds | |", "| --- | --- | --- | --- |"]
    lines += [f"| {e['part']} | {e['status']} | {e.get('seconds', '')} | {e.get('reason', '')} |" for e in entries]
    rows = [row for entry in entries for row in list_rows(entry)]
    if rows:
        head = ("part", "row", "p50 ms", "tokens/s", "unshared tokens/s", "MFU", "GB (XLA's peak)")
        lines += ["", *("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--budget-seconds", type=float, default=520, help="for everything; a part gets what those before it leave")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose names begin so")
    parser.add_argument("--tiny", action="store_true", help="sizes for the CPU; Triton in its interpreter")
    options = parser.parse_args()
    started, gpu = time.time(), find_gpu()
    if gpu is None and not options.tiny:
        print("error: nvidia-smi names no GPU here; --tiny runs the same on the CPU", file=sys.stderr)
        return 2
    device = "cpu (tiny)" if options.tiny else str(gpu)
    folder = (options.out or find_folder(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log, lines = folder / "gpu_check.log", folder / "gpu_check.jsonl"
    for path in (log, lines):
        path.unlink(missing_ok=True)
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        environment = make_trainer_environment(options.tiny, scratch)
        for part in list_parts(folder, scratch, tiny=options.tiny):
            if options.only and not part.name.startswith(tuple(options.only)):
                continue
            left = options.budget_seconds - (time.time() - started)
            if part.told_budget:
                part = part._replace(command=[*part.command, "--budget-seconds", str(min(part.seconds, left) - LEAST_SECONDS / 2)])
            entry = {"part": part.name, **run_part(part, log, environment, seconds=left)}
            if part.document is not None and part.document.exists():
                entry["document"] = json.loads(part.document.read_text(encoding="utf-8"))
                if part.archive is not None:
                    keep_folder(part.document.parent, part.archive)
            entries.append(entry)
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            (folder / "gpu_check.md").write_text(make_summary(entries, device), encoding="utf-8")
    print(f"{make_summary(entries, device)}\n{time.time() - started:.0f} s; {folder}")
    return int(any(entry["status"] == "failed" for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
