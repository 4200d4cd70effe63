"""Sampling with temperature, top-k and exact top-p, without sorting the vocabulary.

The nucleus (Holtzman et al. 2020, arXiv:1904.09751) of a sorted distribution is its shortest prefix with mass >= top_p. Its least
probability is found by bisection on the bit patterns of non-negative float32 values, which are ordered like the values: at most 31 sums
over the vocabulary give the exact threshold. Equal probabilities at the threshold are kept from the lowest token id up, as a stable
sort does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Sample(NamedTuple):
    """One token a row."""

    token: Int[Array, " R"]
    logp_raw: Float[Array, " R"]
    """log-prob under softmax(logits / temperature): what training recomputes."""
    logp_sampled: Float[Array, " R"]
    """log-prob under the truncated and renormalised distribution the token was drawn from."""


def _largest_threshold(values: jax.Array, enough: jax.Array, weights: jax.Array) -> jax.Array:
    """Largest t (float32, [R]) with sum(weights where values >= t) >= enough; `values` >= 0, [R, V]."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)

    def reaches(threshold: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(bits >= threshold[:, None], weights, 0), axis=-1) >= enough

    def narrow(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        ok = reaches(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    # Invariant: the threshold `low` reaches enough, `high` does not. Once no value lies strictly between, low is settled.
    def unsettled(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(bounds[1] - bounds[0] > 1)

    low = jnp.zeros(values.shape[0], jnp.int32)
    high = jnp.max(bits, axis=-1) + 1
    low, _ = jax.lax.while_loop(unsettled, narrow, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _keep_first(values: jax.Array, threshold: jax.Array, ties: jax.Array) -> jax.Array:
    """Mask of values above the threshold and of the first `ties` [R] entries equal to it."""
    equal = values == threshold[:, None]
    return (values > threshold[:, None]) | (equal & (_running_sum(equal.astype(jnp.int32)) <= ties[:, None]))


def _running_sum(values: jax.Array) -> jax.Array:
    """Cumulative sum over the vocabulary [R, V], in blocks: a vocabulary that is cut over devices is summed where it lies.

    The blocks are those of the largest mesh, so that a draw does not depend on the mesh.
    """
    rows, size = values.shape
    blocks = values.reshape(rows, math.gcd(size, 128), -1)
    within = jnp.cumsum(blocks, axis=-1)
    before = jnp.pad(jnp.cumsum(within[..., -1], axis=-1)[:, :-1], ((0, 0), (1, 0)))
    return (within + before[..., None]).reshape(rows, size)


def _pick(values: jax.Array, token: jax.Array) -> jax.Array:
    """values[r, token[r]] as a sum, which a cut vocabulary can do where it lies."""
    return jnp.sum(jnp.where(jnp.arange(values.shape[1]) == token[:, None], values, 0), axis=-1)


def keep_top_k(probs: Float[Array, "R V"], k: int) -> Bool[Array, "R V"]:
    """Mask of the k most probable tokens; ties from the lowest id up."""
    count = jnp.ones_like(probs)
    threshold = _largest_threshold(probs, jnp.full(probs.shape[0], float(min(k, probs.shape[1]))), count)
    above = jnp.sum(probs > threshold[:, None], axis=-1)
    return _keep_first(probs, threshold, k - above)


def keep_top_p(probs: Float[Array, "R V"], top_p: float) -> Bool[Array, "R V"]:
    """Mask of the nucleus: the shortest prefix of the sorted probabilities with mass >= top_p * total."""
    enough = top_p * jnp.sum(probs, axis=-1)
    threshold = _largest_threshold(probs, enough, probs)
    above = jnp.sum(jnp.where(probs > threshold[:, None], probs, 0), axis=-1)
    ties = jnp.ceil((enough - above) / jnp.maximum(threshold, jnp.finfo(jnp.float32).tiny))
    return _keep_first(probs, threshold, jnp.maximum(ties, 1))


def sample_tokens(
    logits: Float[Array, "R V"], uniform: Float[Array, " R"], *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Sample:
    """Draws one token a row by inverting the cumulative distribution at `uniform` in [0, 1): one random number a token.

    A row's draw depends on its own logits and number only, never on its place in the batch.
    """
    logits = logits.astype(jnp.float32) / temperature
    log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    probs = jnp.exp(log_p)
    kept = probs
    if top_k:
        kept = jnp.where(keep_top_k(kept, top_k), kept, 0)
    if top_p < 1.0:
        kept = jnp.where(keep_top_p(kept, top_p), kept, 0)
    cumulative = _running_sum(kept)
    total = jnp.max(cumulative, axis=-1)
    token = jnp.sum(cumulative <= (uniform * total)[:, None], axis=-1)
    # Rounding can push the draw past the last kept token (uniform near 1) : take the most probable one then.
    best = jnp.argmax(kept, axis=-1)
    token = jnp.where(_pick(kept, token) > 0, token, best).astype(jnp.int32)
    logp_raw = _pick(log_p, token)
    return Sample(token, logp_raw, logp_raw - jnp.log(total))
