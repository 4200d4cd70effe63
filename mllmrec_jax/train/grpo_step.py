"""One GRPO optimizer step on sampled groups: policy and reference log-probs, loss, backward, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from mllmrec_jax.config import GrpoConfig, LogprobConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.lora import LoraParam
from mllmrec_jax.model.replay import Activations, replay_group
from mllmrec_jax.objectives.grpo import GroupTokens, compute_grpo_terms
from mllmrec_jax.objectives.logprobs import completion_logprobs, completion_mask, encode_predicting, encode_predicting_pair
from mllmrec_jax.train.state import Policy, TrainState, apply_gradients, merge_policy


class GrpoBatch(NamedTuple):
    """A micro-batches stacked on a leading axis."""

    group: GroupBatch
    """[A, B, ...]"""
    advantage: Float[Array, "A B G"]
    logp_rollout: Float[Array, "A B G C"]
    """What the sampler computed (`Rollout.logp_raw`); compared with, never trained on."""
    logp_old: Float[Array, "A B G C"] | None
    """None in the first update of a rollout: the policy's own log-probs, gradient stopped, are the old ones."""
    activations: Activations | None = None
    """[A, ...]: of the rollout, where the policy is still the one that sampled; spares the policy's forward pass."""


GrpoStep = Callable[[TrainState, Any, Any, GrpoBatch], tuple[TrainState, dict[str, Array], Array]]


def make_grpo_step(policy: Policy, optimizer: optax.GradientTransformation, grpo: GrpoConfig, logprob: LogprobConfig) -> GrpoStep:
    """Returns the compiled `(state, frozen, reference, batch) -> (state, metrics, logp_old)`; `state` is donated.

    `reference` is None in lora mode (the same weights with the adapters off) and a frozen copy of the trained weights in full mode.
    `logp_old` [A, B, G, C] is what a second update on the same rollout hands back in.
    """
    full = grpo.mode == "full"
    needs_reference = grpo.beta > 0
    exact = needs_reference and grpo.kl_estimator == "exact"
    # The one-pass gradient serves a frozen head and losses that see the policy through logp alone.
    backward = "recompute" if full or exact else "accumulate"

    def micro_terms(trained: Any, frozen: Any, reference: Any, micro: GrpoBatch) -> tuple[Array, tuple[Array, dict[str, Array], Array]]:
        model = merge_policy(policy._replace(frozen=frozen), trained)
        hidden_ref = head_ref = None
        if micro.activations is not None:
            hidden = replay_group(model, micro.group, micro.activations, trained=nnx.Param if full else LoraParam)
            if needs_reference and not full:
                with jax.named_scope("reference"):
                    hidden_ref = jax.lax.stop_gradient(encode_predicting(model, micro.group, adapters=False))
        elif needs_reference and not full:
            hidden, hidden_ref = encode_predicting_pair(model, micro.group)
        else:
            hidden = encode_predicting(model, micro.group, adapters=True)
        if needs_reference and full:
            with jax.named_scope("reference"):
                other = merge_policy(policy._replace(frozen=frozen), reference)
                hidden_ref, head_ref = jax.lax.stop_gradient((encode_predicting(other, micro.group, adapters=False), other.head_weight))
        options = {"temperature": grpo.temperature, "entropy": True, "kl": exact, "backward": backward}
        out = completion_logprobs(hidden, model.head_weight, micro.group, logprob, hidden_ref=hidden_ref, head_ref=head_ref, **options)
        mask = completion_mask(micro.group)
        old = jax.lax.stop_gradient(out.logp) if micro.logp_old is None else micro.logp_old
        tokens = GroupTokens(out.logp, old, out.logp_ref, out.kl, mask)
        terms = compute_grpo_terms(tokens, micro.advantage, grpo)
        assert out.entropy is not None  # asked for in `options`
        gap = jnp.abs(jax.lax.stop_gradient(out.logp) - micro.logp_rollout) * mask
        sums = {
            **terms.sums,
            "entropy": jax.lax.stop_gradient(jnp.sum(out.entropy)),
            "logprob_mismatch": jnp.sum(gap),
            "tokens": terms.tokens,
            "loss": jax.lax.stop_gradient(terms.total),
        }
        return terms.total, (terms.weight, sums, old)

    def step(state: TrainState, frozen: Any, reference: Any, batch: GrpoBatch) -> tuple[TrainState, dict[str, Array], Array]:
        gradient = jax.grad(micro_terms, has_aux=True)

        def accumulate(carry: Any, micro: GrpoBatch) -> tuple[Any, Array]:
            grads, (weight, sums, old) = gradient(state.trained, frozen, reference, micro)
            with jax.named_scope("accumulate"):
                return jax.tree.map(jnp.add, carry, (grads, weight, sums)), old

        micro_shape = jax.eval_shape(gradient, state.trained, frozen, reference, jax.tree.map(lambda x: x[0], batch))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (micro_shape[0], micro_shape[1][0], micro_shape[1][1]))
        (grads, weight, sums), old = jax.lax.scan(accumulate, zeros, batch)
        grads = jax.tree.map(lambda g: g / weight, grads)
        new, norm = apply_gradients(state, grads, optimizer)
        tokens = jnp.maximum(sums.pop("tokens"), 1)
        metrics = {"loss": sums.pop("loss") / weight, "grad_norm": norm, **{name: total / tokens for name, total in sums.items()}}
        return new, metrics, old

    return jax.jit(step, donate_argnums=0)
