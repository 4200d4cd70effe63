"""Sampling against the sorting definition, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmrec_jax.generate.sampling import keep_top_k, keep_top_p, sample_tokens

# Loops outside a compiled function are compiled anew at every call.
keep_top_k, keep_top_p = jax.jit(keep_top_k, static_argnums=1), jax.jit(keep_top_p, static_argnums=1)


def sorted_top_p(probs: np.ndarray, top_p: float) -> np.ndarray:
    """Shortest prefix of the stably sorted probabilities with mass >= top_p * total."""
    order = np.argsort(-probs, kind="stable")
    mass = np.cumsum(probs[order].astype(np.float64))
    count = int(np.searchsorted(mass, top_p * probs.astype(np.float64).sum() - 1e-7)) + 1
    keep = np.zeros(len(probs), bool)
    keep[order[:count]] = True
    return keep


def sorted_top_k(probs: np.ndarray, k: int) -> np.ndarray:
    keep = np.zeros(len(probs), bool)
    keep[np.argsort(-probs, kind="stable")[:k]] = True
    return keep


# Multiples of 1/64 are exact in float32, so that sums and ties are exact as well.
counts = st.lists(st.integers(0, 8), min_size=2, max_size=40).filter(lambda c: sum(c) > 0)


@settings(max_examples=200, deadline=None)
@given(counts, st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 0.99]))
def test_top_p_is_the_sorting_definition_with_ties(counts, top_p):
    padded = np.zeros(40, np.float32)
    padded[: len(counts)] = np.array(counts, np.float32) / 64
    keep = np.asarray(keep_top_p(jnp.asarray(padded)[None], top_p))[0]
    np.testing.assert_array_equal(keep & (padded > 0), sorted_top_p(padded, top_p) & (padded > 0))


@settings(max_examples=100, deadline=None)
@given(counts, st.integers(1, 12))
def test_top_k_is_the_sorting_definition_with_ties(counts, k):
    padded = np.zeros(40, np.float32)
    padded[: len(counts)] = np.array(counts, np.float32) / 64
    keep = np.asarray(keep_top_k(jnp.asarray(padded)[None], k))[0]
    np.testing.assert_array_equal(keep & (padded > 0), sorted_top_k(padded, k) & (padded > 0))


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_on_continuous_probabilities(top_p):
    probs = np.asarray(jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (16, 5000)), axis=-1))
    keep = np.asarray(keep_top_p(jnp.asarray(probs), top_p))
    for row, kept in zip(probs, keep, strict=True):
        expected = sorted_top_p(row, top_p)
        # float32 sums may put one borderline token on the other side.
        assert np.sum(kept != expected) <= 1
        assert row[kept].sum() >= top_p - 1e-5
        assert row[kept].sum() - row[kept].min() < top_p + 1e-5


def test_draws_follow_the_truncated_distribution():
    logits = jnp.array([2.0, 1.0, 0.5, -1.0, -3.0])
    rows = 40_000
    sample = sample_tokens(
        jnp.broadcast_to(logits, (rows, 5)), jax.random.uniform(jax.random.key(1), (rows,)), temperature=0.7, top_k=4, top_p=0.9
    )
    p = np.asarray(jax.nn.softmax(logits / 0.7), np.float64)
    kept = sorted_top_p(np.where(sorted_top_k(p, 4), p, 0), 0.9)
    expected = np.where(kept, p, 0) / p[kept].sum()
    frequency = np.bincount(np.asarray(sample.token), minlength=5) / rows
    np.testing.assert_allclose(frequency, expected, atol=4 * np.sqrt(0.25 / rows))
    np.testing.assert_allclose(sample.logp_raw, np.log(p)[sample.token], atol=1e-5)
    np.testing.assert_allclose(sample.logp_sampled, np.log(expected[np.asarray(sample.token)]), atol=1e-5)


def test_extreme_random_numbers_stay_inside_the_nucleus():
    logits = jnp.array([[0.0, 5.0, 0.0, -40.0], [9.0, 0.0, 0.0, 0.0]])
    for uniform in (0.0, 0.99999994):
        sample = sample_tokens(logits, jnp.full((2,), uniform), temperature=1.0, top_p=0.9)
        np.testing.assert_array_equal(sample.token, [1, 0])


def test_one_token_left_has_sampled_logp_zero():
    sample = sample_tokens(jnp.array([[0.0, 3.0, 1.0]]), jnp.array([0.4]), temperature=1.0, top_k=1)
    assert int(sample.token[0]) == 1
    np.testing.assert_allclose(sample.logp_sampled, 0, atol=1e-6)
