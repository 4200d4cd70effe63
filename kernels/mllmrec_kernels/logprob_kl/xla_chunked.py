"""One chunk of rows in plain XLA: the caller chooses how many, so at most [chunk, V] logits exist at a time. Runs on any device."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mllmrec_kernels.logprob_kl.moments import Others, Rows


def compute_logits(hidden: jax.Array, head: jax.Array, temperature: float) -> jax.Array:
    """[n, V] float32."""
    logits = jax.lax.dot_general(hidden, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return logits * (1.0 / temperature)


def _is_target(target: jax.Array, head: jax.Array) -> jax.Array:
    """[n, V] bool; all False in a row whose target lies in another part of the vocabulary."""
    return jnp.arange(head.shape[0])[None, :] == target[:, None]


def compute_others(
    hidden: jax.Array,
    hidden_ref: jax.Array | None,
    head: jax.Array,
    head_ref: jax.Array,
    target: jax.Array,
    *,
    temperature: float,
    entropy: bool,
    kl: bool,
    mean_head: bool,
) -> tuple[Others, jax.Array | None]:
    """The tokens of this part of the vocabulary other than the target, and the mean [n, D] of their head rows under the policy."""
    is_target = _is_target(target, head)
    logits = jnp.where(is_target, -jnp.inf, compute_logits(hidden, head, temperature))
    lse = jax.nn.logsumexp(logits, axis=-1)
    # A part may hold nothing but the target.
    log_p = logits - jnp.where(jnp.isneginf(lse), 0, lse)[:, None]
    p = jnp.exp(log_p)  # the compiler drops it where nothing reads it
    out = Others(lse)
    if entropy:
        out = out._replace(entropy=-jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1))
    if hidden_ref is not None:
        logits_ref = jnp.where(is_target, -jnp.inf, compute_logits(hidden_ref, head_ref, temperature))
        lse_ref = jax.nn.logsumexp(logits_ref, axis=-1)
        out = out._replace(lse_ref=lse_ref)
        if kl:
            log_q = logits_ref - jnp.where(jnp.isneginf(lse_ref), 0, lse_ref)[:, None]
            out = out._replace(kl=jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1))
    mean = jnp.dot(p.astype(head.dtype), head, preferred_element_type=jnp.float32) if mean_head else None
    return out, mean


def compute_logit_gradient(
    hidden: jax.Array,
    hidden_ref: jax.Array | None,
    head: jax.Array,
    head_ref: jax.Array,
    target: jax.Array,
    rows: Rows,
    grads: Rows,
    *,
    temperature: float,
) -> jax.Array:
    """[n, V] gradient with respect to hidden head^T, in the head's dtype: sum over the outputs in `grads` of gradient x derivative,

    d log p_t / d z_v  = onehot_v - p_v
    d H / d z_v        = -p_v (log p_v + H)
    d KL(p|q) / d z_v  =  p_v (log p_v - log q_v - KL)
    """
    log_p = compute_logits(hidden, head, temperature) - rows.lse[:, None]
    p = jnp.exp(log_p)
    d_logits = grads.logp[:, None] * jnp.where(_is_target(target, head), jnp.exp(rows.log_rest)[:, None], -p)
    if grads.entropy is not None:
        assert rows.entropy is not None
        d_logits -= grads.entropy[:, None] * p * (log_p + rows.entropy[:, None])
    if grads.kl is not None:
        assert hidden_ref is not None and rows.kl is not None and rows.lse_ref is not None
        log_q = compute_logits(hidden_ref, head_ref, temperature) - rows.lse_ref[:, None]
        d_logits += grads.kl[:, None] * p * (log_p - log_q - rows.kl[:, None])
    return (d_logits * (1.0 / temperature)).astype(head.dtype)


def chunk_rows(chunk_tokens: int, vocabulary: int, itemsize: int, *, holds_logits: bool) -> int:
    """Rows a chunk: as asked, since every chunk holds its logits."""
    del vocabulary, itemsize, holds_logits
    return chunk_tokens
