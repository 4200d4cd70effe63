"""Memory a device needs at the paper's scale, by compiling alone: no weights exist, no GPU is needed.

    python profiling/paper_scale.py --devices 8 --out profiling/results/paper_scale_memory.json

Compiles one GRPO update and one rollout (G = 8, P = 1024, C = 128, bfloat16 weights, LoRA rank 16, remat "full") for meshes of virtual CPU
devices and writes what XLA's memory analysis says of a device, one JSON row a program. The CPU compiler widens bfloat16 matrices to
float32 before it multiplies them, so temporaries are upper bounds for a GPU or TPU; arguments (weights, adapters, optimizer) are exact.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

MESHES = {8: [(8, 1, 1), (1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)], 64: [(1, 64, 1), (8, 8, 1), (1, 32, 2), (8, 4, 2), (8, 1, 8)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, choices=sorted(MESHES), default=8)
    parser.add_argument("--models", nargs="+", default=["Qwen3-4B", "Qwen3-8B"], choices=["Qwen3-4B", "Qwen3-8B"])
    parser.add_argument("--prompts", type=int, default=1, help="prompts of a micro-batch on each data x fsdp device")
    parser.add_argument("--out", type=Path, help="JSON file that rows are added to")
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={options.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    rows = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    for model in options.models:
        for mesh in MESHES[options.devices]:
            for row in measure(model, mesh, prompts=options.prompts):
                print(json.dumps(row), flush=True)
                rows = [r for r in rows if any(r[key] != row[key] for key in ("model", "mesh", "program", "prompts_a_device"))] + [row]
            if options.out:
                options.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def measure(name: str, sizes: tuple[int, int, int], *, prompts: int) -> list[dict]:
    """Rows of the update and the rollout; bytes are of one device."""
    import jax

    from mllmrec_jax.config import ConfigError, MeshConfig
    from mllmrec_jax.plan.models import resolve_model
    from mllmrec_jax.plan.programs import compile_step
    from mllmrec_jax.sharding import make_mesh

    config = resolve_model(name)
    batch = prompts * sizes[0] * sizes[1]
    grpo = dataclasses.replace(config.grpo, batch_size=batch, accumulation=1, group_size=8, max_new_tokens=128, reuse_rollout=False)
    prompt = dataclasses.replace(config.prompt, max_prompt_tokens=1024)
    config = dataclasses.replace(config, grpo=grpo, prompt=prompt)
    try:
        compiled = compile_step(config, make_mesh(MeshConfig(*sizes)))
    except ConfigError as error:
        print(f"{name} on {sizes}: {error}")
        return []
    return [
        {
            "model": name,
            "mesh": dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)),
            "program": program,
            "prompts_a_device": prompts,
            "argument_bytes": found.arguments,
            "temp_bytes": found.temporaries,
            "compile_s": round(found.seconds, 1),
            "jax": jax.__version__,
        }
        for program, found in compiled.items()
    ]


if __name__ == "__main__":
    main()
