"""KL estimators on a vocabulary small enough to enumerate: expectations and gradients are sums, not samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllmrec_jax.objectives.kl import estimate_kl, warn_about_k1

LOGITS = jnp.array([0.3, -1.0, 0.8, 0.1, -0.4])
LOG_Q = jax.nn.log_softmax(jnp.array([0.1, -0.2, 0.4, 0.5, -1.0]))


def true_kl(logits):
    log_p = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - LOG_Q))


def expected_estimate(logits, estimator):
    log_p = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * estimate_kl(log_p, LOG_Q, estimator=estimator, exact=jnp.full(5, true_kl(logits))))


def expected_gradient(logits, estimator):
    """E_{y ~ p}[d estimate(y) / d logits]: what a loss term gives on-policy, the sampling not differentiated."""
    weights = jax.lax.stop_gradient(jax.nn.softmax(logits))

    def loss(logits):
        log_p = jax.nn.log_softmax(logits)
        exact = jnp.full(5, true_kl(logits))
        return jnp.sum(weights * estimate_kl(log_p, LOG_Q, estimator=estimator, exact=exact))

    return jax.grad(loss)(logits)


@pytest.mark.parametrize("estimator", ["k1", "k3", "exact"])
def test_unbiased(estimator):
    np.testing.assert_allclose(expected_estimate(LOGITS, estimator), true_kl(LOGITS), rtol=1e-5)


def test_k2_is_biased_but_close():
    value, kl = float(expected_estimate(LOGITS, "k2")), float(true_kl(LOGITS))
    assert value != pytest.approx(kl, rel=1e-3)
    assert value == pytest.approx(kl, rel=0.5)


@pytest.mark.parametrize("estimator", ["k2", "exact"])
def test_gradient_is_the_kls(estimator):
    np.testing.assert_allclose(expected_gradient(LOGITS, estimator), jax.grad(true_kl)(LOGITS), atol=1e-6)


def test_k1_has_no_gradient_in_expectation():
    np.testing.assert_allclose(expected_gradient(LOGITS, "k1"), 0, atol=1e-6)


def test_k3_gradient_is_that_of_the_reverse_direction():
    """E_p[d k3] = E_p[(1 - r) d log p] = -sum_v q_v d log p_v: the gradient of KL(q | p)."""

    def forward_kl(logits):
        return jnp.sum(jnp.exp(LOG_Q) * (LOG_Q - jax.nn.log_softmax(logits)))

    np.testing.assert_allclose(expected_gradient(LOGITS, "k3"), jax.grad(forward_kl)(LOGITS), atol=1e-6)


def test_k3_is_never_negative():
    gap = jnp.linspace(-5, 5, 101)
    assert np.all(np.asarray(estimate_kl(gap, jnp.zeros(101), estimator="k3")) >= 0)


def test_k1_penalty_is_warned_about():
    with pytest.warns(UserWarning, match="k1"):
        warn_about_k1("k1", 0.1)
    warn_about_k1("k1", 0.0)
    warn_about_k1("k3", 0.1)


def test_exact_must_be_given():
    with pytest.raises(ValueError, match="exact"):
        estimate_kl(LOG_Q, LOG_Q, estimator="exact")
