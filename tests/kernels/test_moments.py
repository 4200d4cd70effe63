"""Parts of a vocabulary merge to the whole, whatever the cut; against float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmrec_kernels.logprob_kl.moments import Others, finish_rows, merge_parts

N, V = 5, 40


def sums_of(z, y, kept):
    """The fields of `Others` of one part, in float64."""
    p = np.where(kept, np.exp(z), 0)
    q = np.where(kept, np.exp(y), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        lse, lse_ref = np.log(p.sum(axis=1)), np.log(q.sum(axis=1))
        pi = p / p.sum(axis=1, keepdims=True)
        log_pi, log_ref = z - lse[:, None], y - lse_ref[:, None]
        entropy = -np.nansum(np.where(kept, pi * log_pi, 0), axis=1)
        kl = np.nansum(np.where(kept, pi * (log_pi - log_ref), 0), axis=1)
    # An empty part's own entropy and KL mean nothing: they must not be read.
    empty = ~kept.any(axis=1)
    return lse, np.where(empty, np.nan, entropy), lse_ref, np.where(empty, np.nan, kl)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, V), max_size=5),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_any_cut_gives_the_whole(cuts, spread, seed):
    rng = np.random.default_rng(seed)
    z, y = rng.normal(0, spread, (2, N, V))
    target = rng.integers(0, V, N)
    edges = [0, *sorted(cuts), V]
    parts = []
    for start, stop in itertools.pairwise(edges):
        inside = (np.arange(V) >= start) & (np.arange(V) < stop)
        parts.append(sums_of(z, y, inside[None, :] & (np.arange(V) != target[:, None])))
    stacked = Others(*(jnp.asarray(np.stack(x), jnp.float32) for x in zip(*parts, strict=True)))
    rows = np.arange(N)
    out = finish_rows(merge_parts(stacked), jnp.asarray(z[rows, target], jnp.float32), jnp.asarray(y[rows, target], jnp.float32))

    log_p, log_q = (x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in (z, y))
    p = np.exp(log_p)
    expected = {
        "logp": log_p[rows, target],
        "logp_ref": log_q[rows, target],
        "entropy": -(p * log_p).sum(axis=1),
        "kl": (p * (log_p - log_q)).sum(axis=1),
        "log_rest": np.log(np.where(np.arange(V) == target[:, None], 0, p).sum(axis=1)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(out, name), value, rtol=2e-5, atol=2e-5 * max(spread, 1), err_msg=name)


def test_a_certain_target_keeps_its_rest():
    """p_t = 1 - 1e-13: the log-prob is -1e-13, where subtracting a log-sum-exp would give 0."""
    others = Others(jnp.float32([0.0]))
    out = finish_rows(others, jnp.float32([30.0]), None)
    np.testing.assert_allclose(out.logp, [-np.exp(-30.0)], rtol=1e-5)
    np.testing.assert_allclose(out.log_rest, [-30.0], rtol=1e-6)


@pytest.mark.parametrize("value", [-80.0, 0.0, 80.0])
def test_a_vocabulary_of_the_target_alone_is_certain(value):
    others = Others(jnp.float32([-jnp.inf]), jnp.float32([jnp.nan]), jnp.float32([-jnp.inf]), jnp.float32([jnp.nan]))
    out = finish_rows(merge_parts(jax.tree.map(lambda x: x[None], others)), jnp.float32([value]), jnp.float32([value]))
    assert (out.logp, out.entropy, out.kl, out.lse) == (0, 0, 0, value)
