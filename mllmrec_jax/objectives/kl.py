"""Estimators of KL(policy || reference) from one sampled token (Schulman 2020, "Approximating KL divergence").

With r = q(y) / p(y), y ~ p: E[k1] = E[k3] = KL; E[k2] is biased but close, and its gradient is the KL's on-policy.
"""

from __future__ import annotations

import warnings
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

KlEstimator = Literal["k1", "k2", "k3", "exact"]


def estimate_kl(
    logp: Float[Array, "..."], logp_ref: Float[Array, "..."], *, estimator: KlEstimator, exact: Float[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Per-token KL estimate.

    k1 = -log r; k2 = (log r)^2 / 2; k3 = r - 1 - log r (never negative); exact = sum_v p_v (log p_v - log q_v), handed in as `exact`.

    As a loss term on-policy, k1's gradient is zero in expectation (E[grad log p] = 0): it is allowed, and `warn_about_k1` says so.
    """
    log_ratio = logp_ref - logp
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * jnp.square(log_ratio)
    if estimator == "k3":
        return jnp.expm1(log_ratio) - log_ratio
    if estimator == "exact":
        if exact is None:
            raise ValueError("exact: the exact KL must be handed in, was None")
        return exact
    raise ValueError(f"estimator: must be 'k1', 'k2', 'k3' or 'exact', was {estimator!r}")


def warn_about_k1(estimator: KlEstimator, beta: float) -> None:
    """Warns where the KL penalty has no effect in expectation."""
    if estimator == "k1" and beta > 0:
        warnings.warn(
            "grpo.kl_estimator = 'k1': inside the loss its gradient is zero in expectation on-policy, so beta does not hold the policy "
            "near the reference; use 'k2', 'k3' or 'exact'",
            stacklevel=2,
        )
