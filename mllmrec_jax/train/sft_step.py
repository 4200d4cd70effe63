"""One SFT optimizer step over accumulated micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mllmrec_jax.config import LogprobConfig, SftConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.objectives.sft import compute_sft_sums, count_sft_tokens
from mllmrec_jax.train.state import Policy, TrainState, apply_gradients, merge_policy


class SftBatch(NamedTuple):
    """A micro-batches stacked on a leading axis: group [A, B, ...] with G = 1, history_mask [A, B, P]."""

    group: GroupBatch
    history_mask: Array


def make_sft_step(
    policy: Policy, optimizer: optax.GradientTransformation, sft: SftConfig, logprob: LogprobConfig, *, seed: int
) -> Callable[[TrainState, Any, SftBatch], tuple[TrainState, dict[str, Array]]]:
    """Returns the compiled `(state, frozen, batch) -> (state, metrics)`; `state` is donated.

    loss = answer sum / answer tokens + history_loss_weight * history sum / history tokens, with the tokens of the whole step, so that the
    result does not depend on how the step was cut into micro-batches.
    """
    weight = sft.history_loss_weight
    full = sft.mode == "full"

    def step(state: TrainState, frozen: Any, batch: SftBatch) -> tuple[TrainState, dict[str, Array]]:
        answer_tokens, history_tokens = count_sft_tokens(batch.group, batch.history_mask)
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def micro_loss(trained: Any, micro: SftBatch, key: Array) -> tuple[Array, dict[str, Array]]:
            model = merge_policy(policy._replace(frozen=frozen), trained)
            sums = compute_sft_sums(
                model, micro.group, micro.history_mask if weight else None, logprob, dropout_key=key, head_trainable=full
            )
            parts = {"answer": sums["answer"] / answer_tokens}
            if weight:
                parts["history"] = sums["history"] / jnp.maximum(history_tokens, 1)
            return parts["answer"] + weight * parts.get("history", 0.0), parts

        def accumulate(carry: tuple[Any, dict[str, Array]], scanned: tuple[SftBatch, Array]) -> tuple[Any, None]:
            micro, key = scanned
            (_, parts), grads = jax.value_and_grad(micro_loss, has_aux=True)(state.trained, micro, key)
            with jax.named_scope("accumulate"):
                return jax.tree.map(jnp.add, carry, (grads, parts)), None

        micros = batch.group.prompt.shape[0]
        zeros = {"answer": jnp.float32(0)} | ({"history": jnp.float32(0)} if weight else {})
        start = (jax.tree.map(jnp.zeros_like, state.trained), zeros)
        (grads, parts), _ = jax.lax.scan(accumulate, start, (batch, jax.random.split(key, micros)))
        new, norm = apply_gradients(state, grads, optimizer)
        metrics = {"loss": parts["answer"], "grad_norm": norm, "tokens": answer_tokens + jnp.sum(batch.group.prompt_length)}
        if weight:
            metrics["history_loss"] = parts["history"]
        return new, metrics

    return jax.jit(step, donate_argnums=0)
