"""What a LoRA GRPO update moves between devices, as formulas; a test holds compiled programs to them. See docs/sharding.md."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from mllmrec_jax.config import ModelConfig


class UpdateShape(NamedTuple):
    """One optimizer step on the whole mesh."""

    prompts: int
    """Of one micro-batch."""
    prompt_tokens: int
    group_size: int
    completion_tokens: int
    rank: int
    """Of the adapters, on all linear layers."""
    micro_batches: int = 1
    reuse_rollout: bool = False
    """Whether the policy's forward pass is taken from the rollout."""


def _share(devices: int) -> float:
    """(n - 1) / n: what a device has to receive of what n devices hold together, by a ring."""
    return (devices - 1) / devices


def count_update_bytes(model: ModelConfig, shape: UpdateShape, *, data: int, fsdp: int, tensor: int) -> dict[str, float]:
    """Bytes each device receives in one update with remat "full" and k3 or k2 KL, by what they are for."""
    weight, activation = jnp.dtype(model.param_dtype).itemsize, jnp.dtype(model.dtype).itemsize
    layers, width, rank = model.num_layers, model.hidden_size, shape.rank
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    # (in, out) of the seven linear layers; the sizes other than `width` are cut over the tensor axis.
    linears = [(width, heads), (width, kv), (width, kv), (heads, width)] + [(width, model.intermediate_size)] * 2
    linears.append((model.intermediate_size, width))
    kernels = sum(a * b for a, b in linears) / tensor
    wide_sides = sum(rank * width for _ in linears)
    cut_sides = sum(rank * (b if a == width else a) for a, b in linears) / tensor
    prompts = shape.prompts / (data * fsdp)
    tokens = prompts * (shape.prompt_tokens + shape.group_size * shape.completion_tokens)
    rows = prompts * shape.group_size * shape.completion_tokens
    parts = fsdp * tensor
    per_micro = {
        # Forward (policy and reference together) and backward each gather a layer's weights once.
        "weights": 2 * layers * kernels * weight * _share(fsdp),
        "adapters": 2 * layers * wide_sides * 4 * _share(fsdp),
        # Outputs of o_proj and down_proj: forward of policy and reference (4), the recomputed o_proj (1); inputs of q, k, v, gate and up
        # in the backward pass (5). What adapters add to these is [tokens, rank]. A policy taken from the rollout has no forward (2).
        "activations": layers
        * tokens
        * ((10 - 2 * shape.reuse_rollout) * width + (9 - 2 * shape.reuse_rollout) * rank)
        * (activation * 2 * _share(tensor)),
        "embedding": tokens * width * weight * (fsdp * _share(fsdp) + 2 * _share(tensor)),
        # Hidden states of policy and reference to the vocabulary, the gradient back, and a few numbers a row.
        "hidden": 2 * rows * fsdp * width * activation * _share(fsdp),
        "hidden_gradient": rows * width * 4 * (fsdp * _share(fsdp) + 2 * _share(tensor)),
        "moments": rows * fsdp * 4 * _share(parts) * (3 * parts + 4),
        "adapter_gradients": layers * (wide_sides + cut_sides) * 4 * 2 * _share(data * fsdp),
    }
    return {name: size * shape.micro_batches for name, size in per_micro.items()}
