"""The GRPO loss family on per-token log-probs. Means carry numerator and denominator apart, so that cutting a batch changes nothing."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mllmrec_jax.config import GrpoConfig
from mllmrec_jax.objectives.kl import estimate_kl


class GroupTokens(NamedTuple):
    """Per-token quantities of completions, all [B, G, C] and 0 where `mask` is False."""

    logp: Float[Array, "B G C"]
    logp_old: Float[Array, "B G C"]
    """Log-probs of the policy that sampled, a constant; equal to stop_gradient(logp) in the first update of a rollout."""
    logp_ref: Float[Array, "B G C"] | None
    kl_exact: Float[Array, "B G C"] | None
    mask: Bool[Array, "B G C"]


class LossTerms(NamedTuple):
    """A loss as sum / weight; partial batches add both and divide once. `sums` and `tokens` carry metrics the same way."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    sums: dict[str, Array]
    tokens: Float[Array, ""]


@jax.named_scope("loss")
def compute_grpo_terms(tokens: GroupTokens, advantage: Float[Array, "B G"], config: GrpoConfig) -> LossTerms:
    """Sum and weight of -[min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) - beta KL], rho = exp(logp - logp_old).

    loss_type gives the mean over tokens t of member i of group b:
      grpo     mean over members of (1 / |o_i|) sum_t                     (arXiv:2402.03300, eq. 3)
      bnpo     sum over all tokens / number of tokens of this batch        (arXiv:2506.02864)
      dapo     the same token mean over the whole (accumulated) batch      (arXiv:2503.14476, eq. 8)
      dr_grpo  sum over all tokens / (members * max_new_tokens)                       (arXiv:2503.20783)
      gspo     as grpo with the sequence ratio s_i = exp(mean_t log rho)   (arXiv:2507.18071, eq. 5 to 7)

    bnpo differs from dapo where a batch is accumulated: bnpo means over each micro-batch's own tokens, then over micro-batches.

    A completion of length 0 counts as a member and adds nothing.
    """
    mask = tokens.mask.astype(jnp.float32)
    length = jnp.sum(mask, axis=-1)
    log_rho = (tokens.logp - tokens.logp_old) * mask
    if config.loss_type == "gspo":
        mean = jnp.sum(log_rho, axis=-1, keepdims=True) / jnp.maximum(length, 1)[..., None]
        # The value is the sequence ratio, the gradient reaches every token through its own log-prob (GSPO-token, eq. 13).
        log_rho = (jax.lax.stop_gradient(mean) + tokens.logp - jax.lax.stop_gradient(tokens.logp)) * mask
    rho = jnp.exp(log_rho)
    a = advantage[..., None]
    clipped = jnp.clip(rho, 1 - config.eps_low, 1 + config.eps_high)
    per_token = -jnp.minimum(rho * a, clipped * a)
    kl = None
    if tokens.logp_ref is not None:
        kl = estimate_kl(tokens.logp, tokens.logp_ref, estimator=config.kl_estimator, exact=tokens.kl_exact)
        per_token += config.beta * kl
    per_token *= mask

    members = jnp.float32(mask.shape[0] * mask.shape[1])
    if config.loss_type in ("grpo", "gspo"):
        total, weight = jnp.sum(jnp.sum(per_token, axis=-1) / jnp.maximum(length, 1)), members
    elif config.loss_type == "dr_grpo":
        total, weight = jnp.sum(per_token), members * config.max_new_tokens
    elif config.loss_type == "dapo":
        total, weight = jnp.sum(per_token), jnp.sum(mask)
    elif config.loss_type == "bnpo":
        total, weight = jnp.sum(per_token) / jnp.maximum(jnp.sum(mask), 1), jnp.float32(1)
    else:
        raise ValueError(f"loss_type: must be one of grpo, bnpo, dr_grpo, dapo, gspo, was {config.loss_type!r}")

    outside = ((rho < 1 - config.eps_low) & (a < 0)) | ((rho > 1 + config.eps_high) & (a > 0))
    sums = {"clip_fraction": jnp.sum(outside * mask)}
    if kl is not None:
        sums["kl"] = jnp.sum(kl * mask)
    return LossTerms(total, weight, jax.tree.map(jax.lax.stop_gradient, sums), jnp.sum(mask))
