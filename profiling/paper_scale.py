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
import time
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
    import jax.numpy as jnp
    from flax import nnx

    from mllmrec_jax.config import ConfigError, GrpoConfig, LogprobConfig, LoraConfig, MeshConfig, ModelConfig
    from mllmrec_jax.data.group_batch import GroupBatch
    from mllmrec_jax.generate.rollout import make_keys
    from mllmrec_jax.model.lora import LoraParam, add_adapters
    from mllmrec_jax.model.qwen3 import Decoder
    from mllmrec_jax.sharding import batch_sharding, find_shardings, make_mesh, use_mesh
    from mllmrec_jax.train.grpo_loop import make_rollout
    from mllmrec_jax.train.grpo_step import GrpoBatch, make_grpo_step
    from mllmrec_jax.train.state import Policy, init_state, make_optimizer

    # Sizes as in the models' config.json on the Hugging Face hub.
    shared = {"head_dim": 128, "num_layers": 36, "num_kv_heads": 8, "num_heads": 32, "max_position": 40960, "rope_theta": 1e6}
    config, vocabulary = {
        "Qwen3-4B": (ModelConfig(hidden_size=2560, intermediate_size=9728, tie_embeddings=True, **shared), 151_936),
        "Qwen3-8B": (ModelConfig(hidden_size=4096, intermediate_size=12288, tie_embeddings=False, **shared), 151_936),
    }[name]
    config = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16", remat="full")
    grpo = GrpoConfig(mode="lora", group_size=8, max_new_tokens=128, lora=LoraConfig(rank=16, alpha=32))
    mesh = make_mesh(MeshConfig(*sizes))
    b, p, g, c = prompts * sizes[0] * sizes[1], 1024, 8, 128

    def build() -> Decoder:
        model = Decoder(config, vocab_size=vocabulary, rngs=nnx.Rngs(0))
        add_adapters(model, grpo.lora, rngs=nnx.Rngs(1))
        return model

    def lay(tree):
        def one(leaf, sharding):
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), leaf)

        return jax.tree.map(one, tree, find_shardings(tree, mesh), is_leaf=lambda x: isinstance(x, nnx.Variable))

    optimizer = make_optimizer(grpo.optimizer, 100)
    with use_mesh(mesh):
        graphdef, trained, frozen = nnx.split(nnx.eval_shape(build), LoraParam, ...)
        try:
            state, frozen = lay(jax.eval_shape(lambda t: init_state(t, optimizer), trained)), lay(frozen)
        except ConfigError as error:
            print(f"{name} on {sizes}: {error}")
            return []
        policy = Policy(graphdef, state.trained, frozen)

        def array(*shape: int, dtype=jnp.int32, leading: int = 0):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(leading=leading))

        group = GroupBatch(*(array(*s, leading=1) for s in ((1, b, p), (1, b), (1, b, g, c), (1, b, g))))
        batch = GrpoBatch(group, array(1, b, g, dtype=jnp.float32, leading=1), array(1, b, g, c, dtype=jnp.float32, leading=1), None)
        keys = jax.eval_shape(lambda: make_keys(0, 0, jnp.arange(b), g))
        rollout = make_rollout(policy, grpo, stop_ids=(151_645,), pad_id=0)
        lowered = {
            "update": make_grpo_step(policy, optimizer, grpo, LogprobConfig()).lower(state, frozen, None, batch),
            "rollout": rollout.lower(state.trained, frozen, array(b, p), array(b), keys),
        }
        rows = []
        for program, low in lowered.items():
            started = time.perf_counter()
            memory = low.compile().memory_analysis()
            rows.append(
                {
                    "model": name,
                    "mesh": dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)),
                    "program": program,
                    "prompts_a_device": prompts,
                    "argument_bytes": memory.argument_size_in_bytes,
                    "temp_bytes": memory.temp_size_in_bytes,
                    "compile_s": round(time.perf_counter() - started, 1),
                    "jax": jax.__version__,
                }
            )
    return rows


if __name__ == "__main__":
    main()
