"""Properties of the decoder on the group layout; parity with transformers is in test_hf_weights.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllmrec_jax.config import ModelConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model import attention
from mllmrec_jax.model.kv_cache import KeyValues
from mllmrec_jax.model.qwen3 import Decoder, _drop, predicting_states

B, P, G, C, V = 2, 6, 3, 3, 80
CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, intermediate_size=20, num_heads=4, num_kv_heads=2, head_dim=4, dtype="float32", param_dtype="float32"
)
PROMPT_LENGTH = jnp.array([6, 3])
COMPLETION_LENGTH = jnp.array([[3, 1, 2], [2, 3, 3]])


def make_model(**changes: Any) -> Decoder:
    """Every parameter random, biases and norms too; the same for every choice of dtype, dropout and remat."""
    config = dataclasses.replace(CONFIG, **changes)
    abstract = nnx.eval_shape(lambda: Decoder(config, vocab_size=V, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        noise = rng.standard_normal(variable.shape)
        scale = variable.shape[-2] ** -0.5 if path[-1] == "kernel" else 0.3
        variable.set_value(jnp.asarray(scale * noise + (path[-1] == "weight"), variable.dtype))
    return abstract


def make_batch(seed: int = 0) -> GroupBatch:
    """Ragged; every token is used once, so that a row of the embedding's gradient is the gradient of one place."""
    tokens = jnp.array(np.random.default_rng(seed).permutation(V)[: B * (P + G * C)], jnp.int32)
    return GroupBatch(tokens[: B * P].reshape(B, P), PROMPT_LENGTH, tokens[B * P :].reshape(B, G, C), COMPLETION_LENGTH)


@nnx.jit
def encode(model: Decoder, batch: GroupBatch, dropout_key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    return model.encode_group(batch, dropout_key=dropout_key)


def real_prompt() -> np.ndarray:
    return np.arange(P) < np.asarray(PROMPT_LENGTH)[:, None]


def real_completion() -> np.ndarray:
    return np.arange(C) < np.asarray(COMPLETION_LENGTH)[..., None]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_a_token_sees_its_prompt_and_its_own_past_and_nothing_else(family: Any) -> None:
    graphdef, embedding, rest = nnx.split(make_model(family=family), lambda path, _: path == ("embedding",), ...)
    batch = make_batch()
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(CONFIG.hidden_size), jnp.float32)

    def project(embedding: Any) -> tuple[jax.Array, jax.Array]:
        prompt, completion = nnx.merge(graphdef, embedding, rest).encode_group(batch)
        return prompt @ direction, completion @ direction

    # [..., V]: how much each place matters.
    by_prompt, by_completion = (np.abs(np.asarray(j["embedding"][...])).max(axis=-1) for j in jax.jit(jax.jacrev(project))(embedding))
    prompt, completion = np.asarray(batch.prompt), np.asarray(batch.completion)
    for b, t in np.argwhere(real_prompt()):
        seen = np.zeros(V, bool)
        seen[prompt[b, : t + 1]] = True
        np.testing.assert_array_equal(by_prompt[b, t] > 0, seen)
    for b, g, t in np.argwhere(real_completion()):
        seen = np.zeros(V, bool)
        seen[prompt[b, : PROMPT_LENGTH[b]]] = True
        seen[completion[b, g, : t + 1]] = True
        np.testing.assert_array_equal(by_completion[b, g, t] > 0, seen)


def test_padding_content_changes_nothing() -> None:
    model, batch = make_model(), make_batch()
    other = make_batch(seed=1)
    padded = batch._replace(
        prompt=jnp.where(real_prompt(), batch.prompt, other.prompt),
        completion=jnp.where(real_completion(), batch.completion, other.completion),
    )
    assert np.any(padded.prompt != batch.prompt)
    for mask, a, b in zip((real_prompt(), real_completion()), encode(model, batch), encode(model, padded), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[mask], np.asarray(b)[mask])
    np.testing.assert_array_equal(prefill(model, batch)[0], prefill(model, padded)[0])


def test_more_padding_changes_nothing() -> None:
    model, batch = make_model(), make_batch()
    wider = batch._replace(prompt=jnp.pad(batch.prompt, ((0, 0), (0, 3))), completion=jnp.pad(batch.completion, ((0, 0), (0, 0), (0, 2))))
    prompt, completion = encode(model, wider)
    for mask, a, b in zip((real_prompt(), real_completion()), encode(model, batch), (prompt[:, :P], completion[:, :, :C]), strict=True):
        np.testing.assert_allclose(np.asarray(a)[mask], np.asarray(b)[mask], atol=1e-5)


def test_group_layout_equals_the_repeated_layout() -> None:
    model, batch = make_model(), make_batch()
    prompt, completion = map(np.asarray, encode(model, batch))
    rows = np.zeros((B * G, P + C), np.int32)
    for b, g in np.ndindex(B, G):
        n = int(PROMPT_LENGTH[b])
        rows[b * G + g, : n + C] = [*batch.prompt[b, :n].tolist(), *batch.completion[b, g].tolist()]
    nothing = jnp.zeros((B * G, 1, 1), jnp.int32)
    length = jnp.repeat(PROMPT_LENGTH, G) + C
    repeated = np.asarray(encode(model, GroupBatch(jnp.array(rows), length, nothing, jnp.ones((B * G, 1), jnp.int32)))[0])
    for b, g in np.ndindex(B, G):
        n = int(PROMPT_LENGTH[b])
        expected = np.concatenate([prompt[b, :n], completion[b, g]])
        np.testing.assert_allclose(repeated[b * G + g, : n + C], expected, atol=1e-5)


@nnx.jit
def prefill(model: Decoder, batch: GroupBatch) -> tuple[jax.Array, KeyValues]:
    made = model.prefill(batch.prompt, batch.prompt_length)
    return made.hidden, made.cache


@nnx.jit
def decode(model: Decoder, token: jax.Array, index: jax.Array, prompt_cache: KeyValues, cache: KeyValues) -> tuple[jax.Array, KeyValues]:
    made = model.decode(token, index, PROMPT_LENGTH, prompt_cache, cache)
    return made.hidden, made.cache


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_prefill_and_decoding_equal_encoding(family: Any) -> None:
    model, batch = make_model(family=family), make_batch()
    prompt, completion = encode(model, batch)
    last, prompt_cache = prefill(model, batch)
    np.testing.assert_allclose(last, prompt[jnp.arange(B), PROMPT_LENGTH - 1], atol=1e-5)
    assert prompt_cache.k.shape == (CONFIG.num_layers, B, CONFIG.num_kv_heads, P, CONFIG.head_dim)  # once a group, not once a member
    # A cache that holds garbage: only what was written may be read.
    cache = KeyValues(*(jnp.full((CONFIG.num_layers, B, CONFIG.num_kv_heads, G, C, CONFIG.head_dim), 1e3) for _ in range(2)))
    for t in range(C):
        hidden, cache = decode(model, batch.completion[:, :, t], jnp.int32(t), prompt_cache, cache)
        np.testing.assert_allclose(hidden, completion[:, :, t], atol=1e-5)


def test_predicting_states_are_one_token_behind() -> None:
    prompt, completion = jnp.arange(B * P * 2.0).reshape(B, P, 2), -jnp.arange(B * G * C * 2.0).reshape(B, G, C, 2)
    got = np.asarray(predicting_states(prompt, completion, PROMPT_LENGTH))
    for b, g in np.ndindex(B, G):
        np.testing.assert_array_equal(got[b, g, 0], prompt[b, PROMPT_LENGTH[b] - 1])
        np.testing.assert_array_equal(got[b, g, 1:], completion[b, g, :-1])


def value_and_grad(model: Decoder, dropout_key: jax.Array | None = None) -> tuple[jax.Array, Any]:
    graphdef, state = nnx.split(model)

    def loss(state: Any) -> jax.Array:
        prompt, completion = nnx.merge(graphdef, state).encode_group(make_batch(), dropout_key=dropout_key)
        return jnp.sum(jnp.sin(prompt)) + jnp.sum(jnp.sin(completion))

    return jax.jit(jax.value_and_grad(loss))(state)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_remat_policies_give_the_same_gradients(dropout: float) -> None:
    key = jax.random.key(5) if dropout else None
    expected_value, expected = value_and_grad(make_model(remat="none", dropout=dropout), key)
    assert all(np.any(grad) for grad in jax.tree.leaves(expected))
    for remat in ("dots", "full"):
        value, grads = value_and_grad(make_model(remat=remat, dropout=dropout), key)
        np.testing.assert_allclose(value, expected_value, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block", [2])
def test_query_blocks_change_neither_values_nor_gradients(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected_value, expected = value_and_grad(make_model())
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(attention, "PROMPT_BLOCK", block)
    value, grads = value_and_grad(make_model())
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_dropout_needs_a_rate_and_a_key() -> None:
    batch = make_batch()
    plain, dropping = make_model(), make_model(dropout=0.3)
    expected = encode(plain, batch)[1]
    np.testing.assert_array_equal(encode(dropping, batch)[1], expected)
    np.testing.assert_array_equal(encode(plain, batch, jax.random.key(0))[1], expected)
    first, again, other = (encode(dropping, batch, jax.random.key(seed))[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != expected)
    assert np.any(first != other)


def test_dropout_is_unbiased() -> None:
    x = jnp.array([1.0, -2.0, 0.5, 0.0])
    rate, draws = 0.3, 20_000
    dropped = np.asarray(jax.vmap(lambda key: _drop(x, key, rate))(jax.random.split(jax.random.key(0), draws)))
    np.testing.assert_allclose((dropped[:, :3] == 0).mean(axis=0), rate, atol=0.02)
    deviation = np.abs(np.asarray(x)) * np.sqrt(rate / (1 - rate) / draws)
    assert (np.abs(dropped.mean(axis=0) - np.asarray(x)) <= 5 * deviation).all()


def test_bfloat16_compute_is_near_float32() -> None:
    batch = make_batch()
    half = encode(make_model(dtype="bfloat16"), batch)[1]
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), encode(make_model(), batch)[1], atol=0.15)


def test_families_differ_as_documented() -> None:
    leaves = {
        family: {str(path[-2:]) for path, _ in nnx.to_flat_state(nnx.state(make_model(family=family)))}
        for family in ("qwen3", "qwen2", "llama")
    }
    assert leaves["qwen3"] - leaves["llama"] == {"('q_norm', 'weight')", "('k_norm', 'weight')"}
    assert leaves["qwen2"] - leaves["llama"] == {f"('{name}', 'bias')" for name in ("q_proj", "k_proj", "v_proj")}
    assert make_model().head is None
    assert make_model(tie_embeddings=False).head is not None
