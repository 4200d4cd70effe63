"""What a step reads and writes: trained weights, optimizer state, and the frozen rest."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from mllmrec_jax.config import OptimizerConfig
from mllmrec_jax.model.lora import LoraParam, merge_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.sharding import lay_out


class TrainState(NamedTuple):
    """Donated to and returned by every step."""

    trained: Any
    """Pytree of float32 weights: the adapters, or all weights in full mode."""
    opt_state: Any
    step: Int[Array, ""]
    """Optimizer steps done."""


class Policy(NamedTuple):
    """A model split for functional use: `nnx.merge(graphdef, trained, frozen)` is the policy."""

    graphdef: Any
    trained: Any
    frozen: Any


def split_policy(model: Decoder, mode: Literal["lora", "full"]) -> Policy:
    """Splits into trained and frozen parts; in full mode every weight is trained, in float32."""
    if mode == "lora":
        graphdef, trained, frozen = nnx.split(model, LoraParam, ...)
        if not jax.tree.leaves(trained):
            raise ValueError("model: must carry adapters in lora mode, had none; call add_adapters first")
    else:
        graphdef, trained, frozen = nnx.split(model, nnx.Param, ...)
    return Policy(graphdef, jax.tree.map(lambda x: x.astype(jnp.float32), trained), frozen)


def merge_policy(policy: Policy, trained: Any | None = None) -> Decoder:
    """The policy as a module, inside or outside `jit`, with other trained weights where given."""
    return nnx.merge(policy.graphdef, policy.trained if trained is None else trained, policy.frozen)


def fold_policy(policy: Policy, trained: Any) -> Decoder:
    """The policy with its adapters merged, as a module with variables of its own: changing it in place changes nothing else."""
    model = nnx.merge(policy.graphdef, *jax.tree.map(lambda x: x, (trained, policy.frozen)))
    merge_adapters(model)
    return model


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then constant, linear or cosine decay to `final_fraction` of it at `total_steps`."""
    peak, last = config.learning_rate, config.learning_rate * config.final_fraction
    decay_steps = max(1, total_steps - config.warmup_steps)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, last, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_fraction),
    }[config.schedule]()
    if not config.warmup_steps:
        return after
    # The first step already learns: warm-up runs from peak / (n + 1) to the peak.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) behind global-norm clipping; weight decay reaches matrices only, never norms or biases."""

    def matrices(params: Any) -> Any:
        # By name: stacked norms and biases are [L, D] and look like matrices.
        def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
            names = {str(getattr(part, "key", getattr(part, "name", part))) for part in path}
            return not names & {"weight", "bias"}

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    steps = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    adamw = optax.adamw(
        make_schedule(config, total_steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=matrices
    )
    return optax.chain(*steps, adamw)


def init_state(trained: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state; `trained` is copied, since steps donate their state."""
    trained = jax.tree.map(jnp.copy, trained)
    return TrainState(trained, optimizer.init(trained), jnp.int32(0))


@jax.named_scope("optimizer")
def apply_gradients(state: TrainState, grads: Any, optimizer: optax.GradientTransformation) -> tuple[TrainState, Array]:
    """One optimizer step; also returns the gradient's global norm before clipping.

    A gradient that is not finite leaves weights and optimizer as they were: the caller sees the norm and stops with the cause.
    """
    grads = lay_out(grads)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    new = TrainState(optax.apply_updates(state.trained, updates), opt_state, state.step + 1)
    return lay_out(jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(norm), a, b), new, state)), norm
