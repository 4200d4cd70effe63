"""The definition, written plainly: the oracle of the tests and the baseline of the benchmarks."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def compute_logprobs_reference(
    hidden: jax.Array,
    hidden_ref: jax.Array | None,
    head: jax.Array,
    head_ref: jax.Array | None,
    target: jax.Array,
    *,
    temperature: float,
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array | None]:
    """(logp, logp_ref, entropy, kl), each [N]; holds [N, V] logits. Computes in float64 where x64 is on and inputs are, else float32."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def log_softmax(states: jax.Array, head: jax.Array) -> jax.Array:
        logits = jnp.einsum("nd,vd->nv", states, head, preferred_element_type=dtype).astype(dtype)
        return jax.nn.log_softmax(logits / temperature, axis=-1)

    log_p = log_softmax(hidden, head)
    p = jnp.exp(log_p)
    logp = jnp.take_along_axis(log_p, target[:, None], axis=1)[:, 0]
    entropy = -jnp.sum(p * log_p, axis=-1)
    if hidden_ref is None:
        return logp, None, entropy, None
    log_q = jax.lax.stop_gradient(log_softmax(hidden_ref, head if head_ref is None else head_ref))
    logp_ref = jnp.take_along_axis(log_q, target[:, None], axis=1)[:, 0]
    return logp, logp_ref, entropy, jnp.sum(p * (log_p - log_q), axis=-1)
