"""What `mllmrec preprocess` takes beside the model of the backend `transformers`: time of the writing stages over that of bare calls.

    python profiling/preprocess_overhead.py --json profiling/results/preprocess_overhead_cpu.json

A random Qwen3-VL writes captions, first and refined traces of a small posterworld. The tensors of every call of `model.generate` are kept,
and afterwards the same calls are made on them with nothing around, in the same process. The weights are in memory before the first stage
begins. A stage's time holds everything else: rendering prompts, decoding and processing pictures, batching, keys, and storing each answer.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import save_qwen3_vl
from transformers import AutoModelForImageTextToText

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from mllmrec_jax.config import DataConfig, PosterworldConfig, PromptConfig, RunConfig  # noqa: E402
from mllmrec_jax.preprocess.backends.pretrained import choose_device, load_model  # noqa: E402
from mllmrec_jax.preprocess.run import run_preprocess  # noqa: E402
from mllmrec_jax.preprocess_config import CaptionConfig, PreprocessConfig, TokenLimits, TraceConfig, TransformersConfig  # noqa: E402

STAGES = ("caption", "pseudo_cot", "refine_cot")


def make_config(model: Path, work: Path, options: argparse.Namespace) -> RunConfig:
    trace = TraceConfig(backend="transformers")
    limits = TokenLimits(caption=options.tokens, pseudo_cot=2 * options.tokens, refine_cot=2 * options.tokens)
    settings = TransformersConfig(
        model=str(model), device=options.device, dtype=options.dtype, batch_size=options.batch_size, max_new_tokens=limits
    )
    return RunConfig(
        name="overhead",
        output=work / "runs",
        cache=work / "cache",
        data=DataConfig(posterworld=PosterworldConfig(items=options.items, users=options.items), history_len=8, negatives=4),
        prompt=PromptConfig(reasoning=True),
        preprocess=PreprocessConfig(
            caption=CaptionConfig(backend="transformers"), pseudo_cot=trace, refine_cot=trace, transformers=settings
        ),
    )


def measure_stages(model: Any, config: RunConfig) -> dict[str, dict[str, float]]:
    """By stage: seconds of the stage, of its calls of the model, and of the same calls made again with nothing around."""
    bare, calls = model.generate, []

    def wait() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def record(**inputs: Any) -> torch.Tensor:
        start = wait()
        written = bare(**inputs)
        calls.append((inputs, wait() - start))
        return written

    rows = {}
    for stage in STAGES:
        calls.clear()
        model.generate = record
        report = run_preprocess(config, until=stage)
        model.generate = bare
        done = report["stages"][stage]["done"]
        assert done == sum(len(inputs["input_ids"]) for inputs, _ in calls)
        start = wait()
        with torch.inference_mode():
            for inputs, _ in calls:
                bare(**inputs)
        again = wait() - start
        usage = report["stages"][stage]["usage"]
        rows[stage] = {
            "texts": done,
            "calls": len(calls),
            "prompt_tokens": usage["prompt tokens"],
            "answer_tokens": usage["answer tokens"],
            "stage_s": report["seconds"][stage],
            "calls_in_stage_s": sum(seconds for _, seconds in calls),
            "bare_calls_s": again,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a caption; a trace has twice as many")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=224, help="side at which the model sees a picture (pixels)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on a CPU; the others decode pictures")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_qwen3_vl(Path(scratch) / "model", hidden=options.hidden, layers=options.layers, side=options.side)
        device = choose_device(options.device)
        model = load_model(AutoModelForImageTextToText, folder, device=device, dtype=options.dtype)
        runs = [measure_stages(model, make_config(folder, Path(scratch) / str(run), options)) for run in range(options.repeats)]
    repeats = []
    for rows in runs:
        stage, calls, bare = (sum(row[name] for row in rows.values()) for name in ("stage_s", "calls_in_stage_s", "bare_calls_s"))
        repeats.append({"overhead": stage / bare - 1, "overhead_over_calls_in_stage": stage / calls - 1, "stages": rows})
    overheads = [repeat["overhead"] for repeat in repeats]
    result = {
        "what": "wall time of the writing stages over bare model.generate on the same tensors, minus 1",
        "overhead": statistics.median(overheads),
        "overhead_min_max": [min(overheads), max(overheads)],
        "overhead_over_calls_in_stage": statistics.median(repeat["overhead_over_calls_in_stage"] for repeat in repeats),
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "repeats": repeats,
    }
    print(json.dumps({name: value for name, value in result.items() if name != "repeats"}, indent=2))
    for name, row in runs[-1].items():
        print(f"{name}: {row['texts']} texts, {row['calls']} calls; stage {row['stage_s']:.2f} s, bare {row['bare_calls_s']:.2f} s")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
