"""What is kept of a row's logits, and how parts of a vocabulary merge.

The target t is held apart from the other tokens, because everything about a confident policy sits in 1 - p_t, which a sum over all tokens
rounds away. With z_o = log sum_{v != t} exp z_v and a = z_t - z_o,

    log p_t = log sigmoid(a)        log(1 - p_t) = log sigmoid(-a)

and by the chain rules of entropy and KL, with pi the distribution of the others, p_v = (1 - p_t) pi_v:

    H(p)      = H2(p_t) + (1 - p_t) H(pi)
    KL(p | q) = KL2(p_t | q_t) + (1 - p_t) KL(pi | pi')

The same rules merge parts of the others (tiles of a kernel, shards of a head): part s has weight w_s = exp(z_s - z_o), and

    H(pi) = sum_s w_s (H_s - log w_s)        KL(pi | pi') = sum_s w_s (KL_s + log w_s - log w'_s)

Every term is of one sign or exactly zero when policy and reference agree, so nothing cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Others(NamedTuple):
    """The tokens other than the target, float32, each [N] (or [parts, N] before `merge_parts`); None where not asked for."""

    lse: jax.Array
    """log sum of exp(logit); -inf where a part has no token but the target."""
    entropy: jax.Array | None = None
    lse_ref: jax.Array | None = None
    kl: jax.Array | None = None


class Rows(NamedTuple):
    """Outputs of a row and what its gradient needs, float32 [N]; None where not asked for."""

    logp: jax.Array
    log_rest: jax.Array
    """log(1 - p_t)"""
    lse: jax.Array
    """Log-sum-exp over the whole vocabulary."""
    entropy: jax.Array | None = None
    kl: jax.Array | None = None
    logp_ref: jax.Array | None = None
    lse_ref: jax.Array | None = None


def part_weights(lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """([N] total log-sum-exp, [parts, N] log weights of the parts), safe where parts are empty."""
    total = jax.nn.logsumexp(lse, axis=0)
    return total, jnp.where(jnp.isneginf(lse), -jnp.inf, lse - jnp.where(jnp.isneginf(total), 0, total))


def merge_parts(parts: Others) -> Others:
    """Merges [parts, N] over the leading axis, in a fixed order."""
    total, log_w = part_weights(parts.lse)
    w = jnp.exp(log_w)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(w > 0, w * values, 0), axis=0)

    entropy = None if parts.entropy is None else mean(parts.entropy - log_w)
    if parts.lse_ref is None:
        return Others(total, entropy)
    total_ref, log_u = part_weights(parts.lse_ref)
    kl = None if parts.kl is None else mean(parts.kl + log_w - log_u)
    return Others(total, entropy, total_ref, kl)


def finish_rows(others: Others, target: jax.Array, target_ref: jax.Array | None) -> Rows:
    """Adds the target's logit [N] (and the reference's) to the others."""
    logp, log_rest = _split(target, others.lse)
    rest = jnp.exp(log_rest)
    lse = jnp.logaddexp(target, others.lse)

    def chain(at_target: jax.Array, at_rest: jax.Array, within: jax.Array) -> jax.Array:
        """p_t at_target + (1 - p_t) (at_rest + within), where 0 times an infinity is 0."""
        return jnp.exp(logp) * at_target + jnp.where(rest > 0, rest * (at_rest + within), 0)

    entropy = None if others.entropy is None else chain(-logp, -log_rest, others.entropy)
    if target_ref is None or others.lse_ref is None:
        return Rows(logp, log_rest, lse, entropy)
    logp_ref, log_rest_ref = _split(target_ref, others.lse_ref)
    kl = None if others.kl is None else chain(logp - logp_ref, log_rest - log_rest_ref, others.kl)
    return Rows(logp, log_rest, lse, entropy, kl, logp_ref, jnp.logaddexp(target_ref, others.lse_ref))


def _split(target: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log p_t, log(1 - p_t))"""
    return jax.nn.log_sigmoid(target - others), jax.nn.log_sigmoid(others - target)
