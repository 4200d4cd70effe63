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


def make_sharding(rows: int, parts: int) -> VocabSharding:
    mesh = jax.make_mesh((rows, parts), ("rows", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: rows * parts])
    return VocabSharding(mesh, ("rows",), ("tensor",))


def make_inputs():
    keys = jax.random.split(jax.random.key(1), 4)
    hidden = jax.random.normal(keys[0], (N, D)) * 2
    hidden_ref = hidden + 0.3 * jax.random.normal(keys[1], (N, D))
    head = jax.random.normal(keys[2], (V, D))
    return hidden, hidden_ref, head, jax.random.randint(keys[3], (N,), 0, V)


@pytest.mark.parametrize(("rows", "parts"), [(2, 4), (1, 8), (8, 1)])
@pytest.mark.parametrize("backward", ["accumulate", "recompute"])
def test_sharded_equals_one_device(rows, parts, backward):
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
    actual = gradient(hidden, head, make_sharding(rows, parts))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_nothing_of_vocabulary_size_crosses_devices():
    sharding = make_sharding(2, 4)

    def place(array, *spec):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))

    hidden, hidden_ref, head, target = make_inputs()

    def loss(hidden, hidden_ref, head, target):
        out = compute_logprobs(hidden, head, target, hidden_ref=hidden_ref, entropy=True, backward="accumulate", sharding=sharding)
        return jnp.sum(out.logp)

    arguments = (place(hidden, "rows"), place(hidden_ref, "rows"), place(head, "tensor"), place(target, "rows"))
    text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text() or ""
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n)
        for shape in re.findall(r"\w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)", text)
    ]
    assert sizes, "no collective found: the test reads the wrong text"
    # The largest is the sum over shards of this device's [N / 2, D] gradient; logits would be N / 2 x V / 4.
    assert max(sizes) <= N // 2 * D


@pytest.mark.parametrize(("n", "v", "message"), [(N + 1, V, "rows do not divide"), (N, V + 1, "vocabulary of 217 does not divide")])
def test_uneven_sizes_are_refused(n, v, message):
    with pytest.raises(ValueError, match=message):
        compute_logprobs(jnp.zeros((n, D)), jnp.zeros((v, D)), jnp.zeros(n, jnp.int32), sharding=make_sharding(2, 4))
