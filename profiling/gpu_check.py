"""Everything that one NVIDIA GPU can prove, in one command: the kernels' tests at full size, then their benchmark.

    python profiling/gpu_check.py [--out FOLDER] [--budget-seconds 450] [--tiny]

Any Python will do that has jax with CUDA, triton, jax-triton, jaxtyping and pytest; nothing is installed. Each part's output is in FOLDER
(default: $OUT, else profiling/results/<device>) before the next begins, and a part that fails does not stop the next. --tiny runs the same
on the CPU, at sizes that say nothing of speed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from bench_logprob_kl import HERE, find_folder, find_gpu, make_environment

TEST_SECONDS = 150


def run_tests(folder: Path, *, tiny: bool) -> bool:
    """Without the repository's pytest settings, which ask for what tests of other things need."""
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider", "-rA"]
    command += ["-m", "not gpu" if tiny else "gpu", "--durations=0", "tests/kernels/test_logprob_kl_gpu.py"]
    log = folder / "gpu_tests.txt"
    with log.open("w", encoding="utf-8") as file:
        try:
            status = subprocess.run(
                command, cwd=HERE.parent, env=make_environment(tiny), stdout=file, stderr=subprocess.STDOUT, timeout=TEST_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {TEST_SECONDS} s\n")
            status = 1
    print(log.read_text(encoding="utf-8", errors="replace"), flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--budget-seconds", type=float, default=450, help="for everything; the benchmark gets what the tests leave")
    parser.add_argument("--tiny", action="store_true", help="sizes for the CPU; Triton in its interpreter")
    options = parser.parse_args()
    started, gpu = time.time(), find_gpu()
    if gpu is None and not options.tiny:
        print("error: nvidia-smi names no GPU here; --tiny runs the same on the CPU", file=sys.stderr)
        return 2
    folder = (options.out or find_folder("cpu (tiny)" if options.tiny else str(gpu))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tested = run_tests(folder, tiny=options.tiny)
    left = options.budget_seconds - (time.time() - started)
    command = [sys.executable, str(HERE / "bench_logprob_kl.py"), "--out", str(folder), "--budget-seconds", str(left)]
    measured = subprocess.run(command + ["--tiny"] * options.tiny).returncode == 0
    verdicts = f"tests: {'passed' if tested else 'FAILED'}; benchmark: {'complete' if measured else 'FAILED'}"
    print(f"\n{verdicts}; {time.time() - started:.0f} s; {folder}")
    return int(not (tested and measured))


if __name__ == "__main__":
    sys.exit(main())
