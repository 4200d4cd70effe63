"""compute_logprobs against float64, and its promise never to hold tokens x vocabulary. Triton kernels run in their interpreter."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllmrec_kernels.logprob_kl import compute_logprobs

TRITON = pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla_chunked", TRITON])
N, D, V = 37, 24, 211  # ragged against every chunk size below


def make_inputs(seed: int = 0, *, scale: float = 1.0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = (jax.random.normal(keys[0], (N, D)) * scale).astype(dtype)
    hidden_ref = (hidden.astype(jnp.float32) + 0.3 * jax.random.normal(keys[1], (N, D))).astype(dtype)
    head = (jax.random.normal(keys[2], (V, D)) * D**-0.5).astype(dtype)
    target = jax.random.randint(keys[3], (N,), 0, V).at[:3].set(jnp.array([0, V - 1, V // 2]))
    return hidden, hidden_ref, head, target


def float64_outputs(hidden, hidden_ref, head, target, temperature):
    h, r, w = (np.asarray(x.astype(jnp.float32), np.float64) for x in (hidden, hidden_ref, head))

    def log_softmax(z):
        z = z - z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    log_p, log_q = log_softmax(h @ w.T / temperature), log_softmax(r @ w.T / temperature)
    p, rows = np.exp(log_p), np.arange(len(h))
    return {
        "logp": log_p[rows, target],
        "logp_ref": log_q[rows, target],
        "entropy": -(p * log_p).sum(axis=1),
        "kl": (p * (log_p - log_q)).sum(axis=1),
    }


@pytest.mark.parametrize(
    ("implementation", "chunk"),
    [("xla_chunked", 8), ("xla_chunked", 37), ("xla_chunked", 64), ("reference", 64), pytest.param("triton", 64, marks=TRITON.marks)],
)
@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 2e-5)])
def test_values_match_float64(implementation, chunk, temperature, dtype, tolerance):
    # bfloat16 inputs are exact in float64 and products are accumulated in float32, so its tolerance is float32's.
    hidden, hidden_ref, head, target = make_inputs(dtype=dtype)
    out = compute_logprobs(
        hidden, head, target, hidden_ref=hidden_ref, temperature=temperature, entropy=True, kl=True,
        implementation=implementation, chunk_tokens=chunk,
    )  # fmt: skip
    for name, expected in float64_outputs(hidden, hidden_ref, head, np.asarray(target), temperature).items():
        value = getattr(out, name)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance, err_msg=name)


@IMPLEMENTATIONS
def test_large_logits_stay_finite_and_right(implementation):
    hidden, hidden_ref, head, target = make_inputs(scale=80.0)
    out = compute_logprobs(
        hidden, head, target, hidden_ref=hidden_ref, entropy=True, kl=True, implementation=implementation, chunk_tokens=8
    )  # fmt: skip
    for name, expected in float64_outputs(hidden, hidden_ref, head, np.asarray(target), 1.0).items():
        np.testing.assert_allclose(getattr(out, name), expected, rtol=1e-5, atol=2e-4, err_msg=name)


def weighted_sum(hidden, head, target, weights, **options):
    out = compute_logprobs(hidden, head, target, **options)
    total = jnp.sum(out.logp * weights[0])
    if out.entropy is not None:
        total += jnp.sum(out.entropy * weights[1])
    if out.kl is not None:
        total += jnp.sum(out.kl * weights[2])
    return total


@IMPLEMENTATIONS
@pytest.mark.parametrize("chunk", [8, 64])
def test_recompute_gradients_match_reference(implementation, chunk):
    hidden, hidden_ref, head, target = make_inputs()
    weights = jax.random.normal(jax.random.key(9), (3, N))
    options = {"hidden_ref": hidden_ref, "temperature": 0.7, "entropy": True, "kl": True}
    gradient = jax.grad(weighted_sum, argnums=(0, 1))
    expected = gradient(hidden, head, target, weights, implementation="reference", **options)
    actual = gradient(hidden, head, target, weights, implementation=implementation, chunk_tokens=chunk, **options)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@IMPLEMENTATIONS
def test_accumulate_gives_the_gradient_of_logp_to_hidden_alone(implementation):
    hidden, _, head, target = make_inputs()
    weights = jax.random.normal(jax.random.key(9), (3, N))
    gradient = jax.grad(weighted_sum, argnums=(0, 1))
    expected = gradient(hidden, head, target, weights, implementation="reference")[0]
    options = {"backward": "accumulate", "entropy": True, "implementation": implementation, "chunk_tokens": 8}
    actual, to_head = gradient(hidden, head, target, weights, **options)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert not np.any(to_head)


@pytest.mark.parametrize("chunk", [8, 64])
def test_the_gradient_of_a_frozen_head_costs_nothing(chunk):
    """`recompute` writes the gradient to the head down in any case; a program in which nobody asks for it does not compute it."""
    inputs = make_inputs()

    def count_flops(*argnums):
        def loss(hidden, hidden_ref, head, target):
            out = compute_logprobs(hidden, head, target, hidden_ref=hidden_ref, kl=True, chunk_tokens=chunk)
            assert out.kl is not None
            return jnp.sum(out.logp + out.kl)

        cost = jax.jit(jax.grad(loss, argnums)).lower(*inputs).compile().cost_analysis()
        assert cost is not None
        return cost["flops"]

    rows = min(N, chunk)  # XLA counts a loop's body once
    assert count_flops(0, 2) - count_flops(0) == pytest.approx(2 * rows * D * V, rel=0.1)  # chunks are added up, too


@IMPLEMENTATIONS
@pytest.mark.parametrize("backward", ["accumulate", "recompute"])
def test_gradient_near_certainty_does_not_cancel(implementation, backward):
    """Where p_t is 1 - 1e-6, the gradient is tiny and must still be right: 1 - p_t is never formed from a rounded p_t."""
    head = jax.random.normal(jax.random.key(0), (V, D)) * 0.1
    target = jnp.arange(N) % V
    hidden = head[target] / jnp.sum(jnp.square(head[target]), axis=1, keepdims=True) * 18.0
    options = {"backward": backward, "implementation": implementation, "chunk_tokens": 8}
    gradient = jax.grad(lambda h: jnp.sum(compute_logprobs(h, head, target, **options).logp))(hidden)
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    onehot = np.eye(V)[np.asarray(target)]
    expected = (onehot - p) @ np.asarray(head, np.float64)
    certain = p[np.arange(N), np.asarray(target)] > 1 - 1e-3
    assert certain.any()
    scale = np.abs(expected[certain]).max(axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(gradient)[certain] / scale, expected[certain] / scale, atol=2e-3)


@IMPLEMENTATIONS
def test_finite_differences(implementation):
    hidden, hidden_ref, head, target = make_inputs(3)
    weights = jax.random.normal(jax.random.key(9), (3, N))

    def loss(h):
        options = {"entropy": True, "kl": True, "implementation": implementation, "chunk_tokens": 8}
        return weighted_sum(h, head, target, weights, hidden_ref=hidden_ref, **options)

    direction = jax.random.normal(jax.random.key(5), hidden.shape)
    step = 1e-2
    numeric = (loss(hidden + step * direction) - loss(hidden - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(hidden), direction), numeric, rtol=2e-3)


@IMPLEMENTATIONS
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_same_policy_and_reference_have_no_kl(implementation, temperature):
    hidden, _, head, target = make_inputs(scale=3.0)
    options = {"temperature": temperature, "kl": True, "implementation": implementation, "chunk_tokens": 8}
    out = jax.jit(lambda h: compute_logprobs(h, head, target, hidden_ref=h, **options))(hidden)
    assert not np.any(out.kl)
    np.testing.assert_array_equal(out.logp, out.logp_ref)


@IMPLEMENTATIONS
@pytest.mark.parametrize("backward", ["accumulate", "recompute"])
def test_masked_rows_give_zero_and_no_gradient_whatever_they_hold(implementation, backward):
    hidden, _, head, target = make_inputs()
    mask = jnp.arange(N) % 3 != 0
    poisoned = jnp.where(mask[:, None], hidden, jnp.nan)

    def loss(h):
        options = {"entropy": True, "backward": backward, "implementation": implementation, "chunk_tokens": 8}
        out = compute_logprobs(h, head, jnp.where(mask, target, -7), mask=mask, **options)
        assert out.entropy is not None
        return jnp.sum(out.logp) + jnp.sum(out.entropy)

    value, gradient = jax.value_and_grad(loss)(poisoned)
    assert np.isfinite(value)
    assert not np.any(np.asarray(gradient)[~np.asarray(mask)])
    assert np.all(np.isfinite(gradient))


@IMPLEMENTATIONS
def test_own_reference_head_is_used(implementation):
    hidden, hidden_ref, head, target = make_inputs()
    other = head[::-1]
    both = {"hidden_ref": hidden_ref, "head_ref": other, "kl": True}
    out = compute_logprobs(hidden, head, target, implementation=implementation, chunk_tokens=8, **both)
    expected = compute_logprobs(hidden, head, target, implementation="reference", **both)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@IMPLEMENTATIONS
def test_bitwise_repeatable(implementation):
    hidden, hidden_ref, head, target = make_inputs()
    options = {"hidden_ref": hidden_ref, "kl": True, "entropy": True, "implementation": implementation, "chunk_tokens": 8}
    function = jax.jit(lambda h: compute_logprobs(h, head, target, **options))
    for a, b in zip(function(hidden), function(hidden), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backward", ["accumulate", "recompute"])
def test_no_buffer_of_tokens_by_vocabulary(backward):
    """Temporary memory of forward and backward stays near chunk x V, far from N x V, by XLA's own account."""
    n, d, v, chunk = 4096, 32, 4096, 128
    shapes = (jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((v, d), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32))

    def loss(implementation):
        def function(h, w, t):
            return jnp.sum(compute_logprobs(h, w, t, backward=backward, implementation=implementation, chunk_tokens=chunk).logp)

        memory = jax.jit(jax.grad(function)).lower(*shapes).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    logits = n * v * 4
    assert loss("reference") > logits
    assert loss("xla_chunked") < logits / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": jnp.zeros((N, 1), jnp.int32)}, "target"),
        ({"kl": True}, "hidden_ref"),
        ({"temperature": 0.0}, "temperature"),
        ({"implementation": "fast"}, "implementation"),
        ({"backward": "magic"}, "backward"),
        ({"mask": jnp.ones((3,), bool)}, "mask"),
    ],
)
def test_bad_arguments_are_named(change, message):
    hidden, _, head, target = make_inputs()
    arguments = {"target": target, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        compute_logprobs(hidden, head, **arguments)
