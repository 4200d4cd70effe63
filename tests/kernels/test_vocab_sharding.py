"""Rows and vocabulary over a mesh of virtual devices: the same numbers as on one, and little communication."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mllmrec_kernels.logprob_kl import VocabSharding, compute_logprobs

N, D, V = 64, 16, 8 * 27


def make_sharding(rows: int, both: int, parts: int) -> VocabSharding:
    """`both` devices cut rows and vocabulary."""
    mesh = jax.make_mesh((rows, both, parts), ("rows", "both", "parts"), axis_types=(AxisType.Auto,) * 3)
    return VocabSharding(mesh, ("rows", "both"), ("both", "parts"))


def make_inputs():
    keys = jax.random.split(jax.random.key(1), 4)
    hidden = jax.random.normal(keys[0], (N, D)) * 2
    hidden_ref = hidden + 0.3 * jax.random.normal(keys[1], (N, D))
    head = jax.random.normal(keys[2], (V, D))
    return hidden, hidden_ref, head, jax.random.randint(keys[3], (N,), 0, V)


@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, 1, 8), (8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("backward", ["accumulate", "recompute"])
def test_sharded_equals_one_device(sizes, backward):
    hidden, hidden_ref, head, target = make_inputs()
    mask = jnp.arange(N) % 5 != 0
    weight = jax.random.normal(jax.random.key(2), (3, N))

    def loss(hidden, head, sharding):
        out = compute_logprobs(
            hidden, head, target, mask=mask, hidden_ref=hidden_ref, temperature=0.8, entropy=True, kl=True, backward=backward,
            chunk_tokens=5, sharding=sharding,
        )  # fmt: skip
        return sum(jnp.sum(x * w) for x, w in zip((out.logp, out.entropy, out.kl), weight, strict=True)), out

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    expected = gradient(hidden, head, None)
    actual = gradient(hidden, head, make_sharding(*sizes))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, 8, 1), (8, 1, 1)], ids=str)
@pytest.mark.parametrize("backward", ["accumulate", "recompute"])
def test_nothing_of_vocabulary_size_crosses_devices(sizes, backward):
    """The head is frozen: its gradient, as large as its part of the vocabulary, is not summed over rows either."""
    sharding = make_sharding(*sizes)

    def place(array, *spec):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))

    hidden, hidden_ref, head, target = make_inputs()

    def loss(hidden, hidden_ref, head, target):
        options = {"entropy": True, "kl": True, "backward": backward, "sharding": sharding}
        out = compute_logprobs(hidden, head, target, hidden_ref=hidden_ref, **options)
        assert out.kl is not None
        return jnp.sum(out.logp + out.kl)

    rows = ("rows", "both")
    arguments = (place(hidden, rows), place(hidden_ref, rows), place(head, ("both", "parts")), place(target, rows))
    text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text() or ""
    found = [
        math.prod(int(n) for n in shape.split(",") if n)
        for shape in re.findall(r"\w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)", text)
    ]
    assert found, "no collective found: the test reads the wrong text"
    # The largest are hidden states and their gradient; a device's logits are 64 x 27 or 32 x 54, its head 27 x 16 or more.
    assert max(found) <= N * D
    assert V * D > N * D


@pytest.mark.parametrize(("n", "v", "message"), [(N + 1, V, "rows do not divide"), (N, V + 1, "vocabulary of 217 does not divide")])
def test_uneven_sizes_are_refused(n, v, message):
    with pytest.raises(ValueError, match=message):
        compute_logprobs(jnp.zeros((n, D)), jnp.zeros((v, D)), jnp.zeros(n, jnp.int32), sharding=make_sharding(2, 1, 4))
