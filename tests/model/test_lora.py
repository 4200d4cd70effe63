from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllmrec_jax.config import ALL_LINEARS, LinearName, LoraConfig, ModelConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.lora import Linear, LoraParam, add_adapters, apply_adapter, merge_adapters
from mllmrec_jax.model.qwen3 import Decoder

CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, intermediate_size=20, num_heads=4, num_kv_heads=2, head_dim=4, dtype="float32", param_dtype="float32"
)
BATCH = GroupBatch(
    jnp.array(np.random.default_rng(0).integers(0, 30, (2, 5)), jnp.int32),
    jnp.array([5, 3]),
    jnp.array(np.random.default_rng(1).integers(0, 30, (2, 2, 3)), jnp.int32),
    jnp.array([[3, 1], [2, 3]]),
)


def make_model() -> Decoder:
    """Every parameter random, biases and norms too."""
    abstract = nnx.eval_shape(lambda: Decoder(CONFIG, vocab_size=30, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        noise = rng.standard_normal(variable.shape)
        scale = variable.shape[-2] ** -0.5 if path[-1] == "kernel" else 0.3
        variable.set_value(jnp.asarray(scale * noise + (path[-1] == "weight"), variable.dtype))
    return abstract


def make_adapted(lora: LoraConfig, *, fresh: bool = False) -> Decoder:
    """A model with adapters; B is random unless `fresh`."""
    model = make_model()
    add_adapters(model, lora, rngs=nnx.Rngs(1))
    if not fresh:
        for index, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(model, LoraParam))):
            if path[-1] == "lora_b":
                variable.set_value(0.3 * jax.random.normal(jax.random.key(index), variable.shape))
    return model


def compute_logits(model: Decoder, *, adapters: bool = True) -> jax.Array:
    _, completion = model.encode_group(BATCH, adapters=adapters)
    return completion @ model.head_weight.T


logits = nnx.jit(compute_logits, static_argnames="adapters")


def adapted_names(model: Decoder) -> set[str]:
    return {str(path[-2]) for path, _ in nnx.to_flat_state(nnx.state(model, LoraParam))}


def test_fresh_adapter_changes_nothing() -> None:
    np.testing.assert_array_equal(logits(make_adapted(LoraConfig(rank=3), fresh=True)), logits(make_model()))


def test_adapter_is_the_published_formula() -> None:
    linear = Linear(5, 7, axes=("embed", "ffn"), stack=(), bias=True, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    holder = nnx.Dict(up_proj=linear)
    add_adapters(holder, LoraConfig(rank=3, alpha=6.0, targets=("up_proj",)), rngs=nnx.Rngs(1))
    assert linear.bias is not None
    assert linear.lora_a is not None
    assert linear.lora_b is not None
    linear.bias.set_value(jnp.arange(7.0))
    linear.lora_b.set_value(jax.random.normal(jax.random.key(0), (3, 7)))
    x = jax.random.normal(jax.random.key(1), (2, 5))
    a, b, w = (np.asarray(v[...], np.float64) for v in (linear.lora_a, linear.lora_b, linear.kernel))
    np.testing.assert_allclose(linear(x, adapters=True), x @ w + np.arange(7) + 6 / 3 * (x @ a) @ b, atol=1e-5)
    np.testing.assert_allclose(linear(x, adapters=False), x @ w + np.arange(7), atol=1e-5)


@pytest.mark.parametrize("targets", [ALL_LINEARS, ("v_proj",), ("q_proj", "gate_proj", "down_proj")])
def test_only_targets_carry_adapters_and_each_matters(targets: tuple[LinearName, ...]) -> None:
    model = make_adapted(LoraConfig(rank=3, alpha=5.0, targets=targets))
    assert adapted_names(model) == set(targets)
    assert np.abs(logits(model) - logits(make_model())).max() > 1e-2


@pytest.mark.parametrize("targets", [ALL_LINEARS, ("v_proj",)])
def test_adapters_off_is_the_base(targets: tuple[LinearName, ...]) -> None:
    model = make_adapted(LoraConfig(rank=3, targets=targets))
    np.testing.assert_array_equal(logits(model, adapters=False), logits(make_model()))


@pytest.mark.parametrize("targets", [ALL_LINEARS, ("q_proj", "down_proj")])
def test_merge_is_exact_and_leaves_room_for_another(targets: tuple[LinearName, ...]) -> None:
    model = make_adapted(LoraConfig(rank=3, alpha=5.0, targets=targets))
    expected = logits(model)
    merge_adapters(model)
    assert not adapted_names(model)
    np.testing.assert_allclose(logits(model), expected, atol=5e-6)
    np.testing.assert_array_equal(logits(model, adapters=False), logits(model))
    merged = logits(model)
    add_adapters(model, LoraConfig(rank=2, alpha=32.0), rngs=nnx.Rngs(3))
    np.testing.assert_array_equal(logits(model), merged)


def test_merge_without_adapters_does_nothing() -> None:
    model = make_model()
    merge_adapters(model)
    np.testing.assert_array_equal(logits(model), logits(make_model()))


def test_merge_into_bfloat16_rounds_once() -> None:
    linear = Linear(64, 32, axes=("embed", "ffn"), stack=(2,), bias=False, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))
    holder = nnx.Dict(up_proj=linear)
    add_adapters(holder, LoraConfig(rank=4, alpha=3.0, targets=("up_proj",)), rngs=nnx.Rngs(1))
    assert linear.lora_a is not None
    assert linear.lora_b is not None
    linear.lora_b.set_value(0.02 * jax.random.normal(jax.random.key(0), linear.lora_b.shape))
    assert (linear.lora_a.dtype, linear.lora_b.dtype) == (jnp.float32, jnp.float32)
    a, b, w = (np.asarray(v[...], np.float64) for v in (linear.lora_a, linear.lora_b, linear.kernel))
    merge_adapters(holder)
    merged = np.asarray(linear.kernel[...].astype(jnp.float32))
    assert linear.kernel.dtype == jnp.bfloat16
    exact = w + 3 / 4 * a @ b
    assert (np.abs(merged - exact) <= np.abs(exact) * 2**-8 + 1e-7).all()  # half a unit in the last of bfloat16's 8 binary places


def test_gradient_reaches_adapters_and_nothing_else() -> None:
    model = make_adapted(LoraConfig(rank=3))
    graphdef, lora, rest = nnx.split(model, LoraParam, ...)

    def loss(lora: Any, adapters: bool) -> jax.Array:
        return jnp.sum(jnp.square(compute_logits(nnx.merge(graphdef, lora, rest), adapters=adapters)))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    grads = nnx.to_flat_state(gradient(lora, True))
    assert {str(path[-1]) for path, _ in grads} == {"lora_a", "lora_b"}
    assert len(grads) == 2 * len(ALL_LINEARS)
    for path, grad in grads:
        per_layer = np.abs(np.asarray(grad[...])).max(axis=(1, 2))
        assert (per_layer > 0).all(), path
    for _, grad in nnx.to_flat_state(gradient(lora, False)):
        assert not np.any(grad[...])


def test_fresh_adapter_learns_through_b_first() -> None:
    graphdef, lora, rest = nnx.split(make_adapted(LoraConfig(rank=3), fresh=True), LoraParam, ...)
    grads = jax.jit(jax.grad(lambda lora: jnp.sum(jnp.square(compute_logits(nnx.merge(graphdef, lora, rest))))))(lora)
    for path, grad in nnx.to_flat_state(grads):
        assert np.any(grad[...]) == (path[-1] == "lora_b")


def test_same_seed_same_adapter_and_layers_differ() -> None:
    first, second = (dict(nnx.to_flat_state(nnx.state(make_adapted(LoraConfig(rank=3)), LoraParam))) for _ in range(2))
    for path, variable in first.items():
        np.testing.assert_array_equal(variable[...], second[path][...])
        assert np.any(variable[...][0] != variable[...][1])


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_written_gradients_are_those_of_the_formula(dtype: str, error: float) -> None:
    """Of x, A and B against differentiation of the formula in float32, relative to each gradient's size."""
    shapes = {"x": (2, 3, 5, 12), "a": (12, 4), "b": (4, 9), "g": (2, 3, 5, 9)}
    x, a, b, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes.values()))
    scale = jnp.float32(1.5)
    expected = jax.grad(lambda x, a, b: jnp.vdot(x @ a @ b * scale, g), argnums=(0, 1, 2))(x, a, b)

    def apply(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.vdot(apply_adapter(x, a, b, scale).astype(jnp.float32), g)

    got = jax.jit(jax.grad(apply, argnums=(0, 1, 2)))(x.astype(dtype), a, b)
    assert [y.dtype for y in got] == [jnp.dtype(dtype), jnp.float32, jnp.float32]
    for y, expected_y in zip(got, expected, strict=True):
        np.testing.assert_allclose(y.astype(jnp.float32), expected_y, atol=error * float(jnp.abs(expected_y).max()))
