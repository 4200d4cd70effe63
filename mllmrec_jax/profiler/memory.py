"""Device memory by owner: what the known arrays hold, and what is left of XLA's plan for temporaries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mllmrec_jax.config import ModelConfig, RunConfig
from mllmrec_jax.profiler.programs import Program
from mllmrec_jax.sharding import count_devices, current_mesh
from mllmrec_jax.train.state import Policy, init_state, make_optimizer, merge_policy


def count_device_bytes(tree: Any) -> int:
    """Bytes that one device holds of the arrays in `tree`."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))


def count_cache_bytes(model: ModelConfig, *, prompts: int, prompt_tokens: int, completion_tokens: int) -> int:
    """Bytes one device holds of a rollout's keys and values: of `prompts` prompts once, and of `completion_tokens` for each prompt."""
    mesh = current_mesh()
    devices = 1 if mesh is None else count_devices(mesh, "batch") * count_devices(mesh, "heads")
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    return prompts * (prompt_tokens + completion_tokens) * token // devices


def split_memory(config: RunConfig, policy: Policy, programs: dict[str, Program], *, stage: str, prompt_tokens: int) -> dict[str, Any]:
    """Bytes of one device by owner while each of a stage's programs runs, and the allocator's peak where the backend counts.

    Weights, optimizer state and gradients are counted from the arrays; the KV cache from its shape; what the program's temporaries hold
    beside these is activations and other temporaries. Arrays that only wait for another program (a rollout's, while the update runs)
    are not listed.

    Args:
      config: of the run.
      policy: what the stage trains.
      programs: `rollout` and `update`, or `update` alone.
      stage: `sft` or `grpo`.
      prompt_tokens: width of the prompts.
    """
    settings = getattr(config, stage)
    model = merge_policy(policy).config
    trained, frozen = count_device_bytes(policy.trained), count_device_bytes(policy.frozen)
    optimizer = make_optimizer(settings.optimizer, 1)
    state = jax.eval_shape(lambda trained: init_state(trained, optimizer), policy.trained)
    # The optimizer's arrays lie as the weights they belong to.
    share = _count_bytes(state.opt_state) / _count_bytes(policy.trained)
    reference = trained if stage == "grpo" and settings.mode == "full" and settings.beta > 0 else 0
    resident = {"base weights": frozen, "trained weights": trained, "reference weights": reference, "optimizer": round(trained * share)}
    owners = {}
    for name, program in programs.items():
        own = {"gradients": trained}
        if name == "rollout":
            prompts = settings.batch_size * settings.accumulation
            tokens = settings.group_size * settings.max_new_tokens
            own = {"KV cache": count_cache_bytes(model, prompts=prompts, prompt_tokens=prompt_tokens, completion_tokens=tokens)}
        inputs = program.memory["argument"] - frozen - trained - (0 if name == "rollout" else reference + resident["optimizer"])
        rest = program.memory["temp"] - sum(own.values())
        outputs = program.memory["output"] - program.memory["alias"]
        parts = {**resident, **own, "activations and other temporaries": rest, "inputs": inputs, "outputs": outputs}
        owners[name] = {owner: max(0, size) for owner, size in parts.items()}
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "unit": "bytes of one device",
        "owners": owners,
        "totals": {name: sum(parts.values()) for name, parts in owners.items()},
        "allocator_peak": stats.get("peak_bytes_in_use"),
        "allocator_limit": stats.get("bytes_limit"),
    }


def _count_bytes(tree: Any) -> int:
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
