"""Keys and values stored smaller: how far they are from what was computed."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllmrec_jax.config import ModelConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.kv_cache import KeyValues, make_empty_cache, pack, unpack
from mllmrec_jax.model.qwen3 import Decoder

CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=16, max_position=64, dtype="float32",
    param_dtype="float32",
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "error"), [("compute", 0.0), ("bfloat16", 2.0**-8), ("int8", 0.5 / 127)])
def test_rounding_is_bounded_by_the_largest_of_a_head(dtype: str, error: float) -> None:
    x = jax.random.normal(jax.random.key(0), (3, 5, 2, 16)) * jnp.array([1e-3, 1e3])[:, None]
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    assert float(jnp.max(jnp.abs(unpack(pack(x, dtype), jnp.float32) - x) / largest)) <= error * 1.0001


def test_zeros_stay_zeros() -> None:
    np.testing.assert_array_equal(unpack(pack(jnp.zeros((2, 1, 4)), "int8"), jnp.float32), 0)


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 1 / 2), ("int8", (16 + 4) / 64)])
def test_bytes(dtype: str, share: float) -> None:
    x = jnp.ones((2, 3, 2, 10, 16))  # [L, B, K, P, d]
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(make_empty_cache(KeyValues(pack(x, dtype), None), 4, 6)))
    assert stored == share * 2 * 3 * 4 * 6 * 2 * 16 * 4


@pytest.mark.parametrize(("dtype", "error"), [("compute", 1e-5), ("bfloat16", 1e-2), ("int8", 2e-2)])
def test_decoding_from_it_stays_close_to_encoding(dtype: str, error: float) -> None:
    """Relative to the states' size, in the worst entry of six decoded tokens."""
    model = Decoder(dataclasses.replace(CONFIG, cache_dtype=dtype), vocab_size=64, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 8 + 3 * 6), 0, 64)
    batch = GroupBatch(tokens[:, :8], jnp.array([8, 5]), tokens[:, 8:].reshape(2, 3, 6), jnp.full((2, 3), 6))
    expected = nnx.jit(lambda m: m.encode_group(batch)[1])(model)
    made = nnx.jit(lambda m: m.prefill(batch.prompt, batch.prompt_length))(model)
    cache, worst = make_empty_cache(made.cache, 3, 6), 0.0
    decode = nnx.jit(lambda m, token, t, cache: m.decode(token, t, batch.prompt_length, made.cache, cache))
    for t in range(6):
        out = decode(model, batch.completion[:, :, t], jnp.int32(t), cache)
        cache, worst = out.cache, max(worst, float(jnp.abs(out.hidden - expected[:, :, t]).max() / jnp.abs(expected).max()))
    assert worst <= error
    if dtype != "compute":
        assert worst > 1e-5  # it is stored smaller


def test_a_token_transposes_no_keys_or_values_of_prompts() -> None:
    """They once were, all of a prompt's, at every token and layer: a third of the time of attention in decoding."""
    b, g, c, p = 2, 3, 6, 41
    model = Decoder(CONFIG, vocab_size=64, rngs=nnx.Rngs(0))
    made = jax.eval_shape(lambda: model.prefill(jnp.zeros((b, p), jnp.int32), jnp.full((b,), p)).cache)
    cache = jax.eval_shape(lambda x: make_empty_cache(x, g, c), made)

    @nnx.jit
    def decode(model: Decoder, token: jax.Array, made: KeyValues, cache: KeyValues) -> jax.Array:
        return model.decode(token, jnp.int32(1), jnp.full((b,), p), made, cache).hidden

    text = decode.lower(model, jax.ShapeDtypeStruct((b, g), jnp.int32), made, cache).compile().as_text() or ""
    moved = [set(map(int, found.split(","))) for found in re.findall(r"= f32\[([\d,]+)\]\S* (?:transpose|copy)\(", text)]
    assert moved and not [shape for shape in moved if {p, CONFIG.head_dim} <= shape]
