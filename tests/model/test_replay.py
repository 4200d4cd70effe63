"""The forward pass taken from a rollout: the values and gradients of encoding the batch again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllmrec_jax.config import LoraConfig, ModelConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.generate.rollout import Rollout, make_keys, rollout_group
from mllmrec_jax.model.lora import LoraParam, add_adapters
from mllmrec_jax.model.qwen3 import Decoder, predicting_states
from mllmrec_jax.model.replay import replay_group

V, B, G, P, C = 64, 3, 4, 10, 6
PROMPT_LENGTH = jnp.array([10, 3, 7])


def make_model(dtype: str = "float32", *, tied: bool = True) -> Decoder:
    config = ModelConfig(
        num_layers=3, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=8, max_position=32, dtype=dtype,
        param_dtype="float32", tie_embeddings=tied,
    )  # fmt: skip
    model = Decoder(config, vocab_size=V, rngs=nnx.Rngs(0))
    add_adapters(model, LoraConfig(rank=2), rngs=nnx.Rngs(1))
    graphdef, adapters, rest = nnx.split(model, LoraParam, ...)
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    return nnx.merge(graphdef, moved, rest)


def sample(model: Decoder) -> tuple[GroupBatch, Rollout]:
    """A rollout in which some members stop early."""
    prompt = jax.random.randint(jax.random.key(2), (B, P), 4, V)

    @nnx.jit
    def run(model: Decoder) -> Rollout:
        return rollout_group(
            model, prompt, PROMPT_LENGTH, make_keys(0, 0, jnp.arange(B), G), max_new_tokens=C, temperature=2.0, stop_ids=tuple(range(16)),
            keep_activations=True,
        )  # fmt: skip

    rollout = run(model)
    assert int(rollout.completion_length.min()) < C and int(rollout.completion_length.max()) > 2
    return GroupBatch(prompt, PROMPT_LENGTH, rollout.completion, rollout.completion_length), rollout


def differentiate(model: Decoder, batch: GroupBatch, trained: Any, encode: Any) -> tuple[jax.Array, Any]:
    graphdef, own, rest = nnx.split(model, trained, ...)
    mask = (jnp.arange(C) < batch.completion_length[..., None])[..., None]

    def loss(own: Any) -> tuple[jax.Array, jax.Array]:
        hidden = jnp.where(mask, encode(nnx.merge(graphdef, own, rest)), 0).astype(jnp.float32)
        return jnp.sum(jnp.sin(3 * hidden)), hidden

    gradient, hidden = jax.jit(jax.grad(loss, has_aux=True))(own)
    return hidden, gradient


@pytest.mark.parametrize(("trained", "tied"), [(LoraParam, True), (nnx.Param, True), (nnx.Param, False)], ids=["lora", "all", "untied"])
def test_values_and_gradients_equal_encoding_again(trained: Any, tied: bool) -> None:
    model = make_model(tied=tied)
    batch, rollout = sample(model)
    again = differentiate(model, batch, trained, lambda m: predicting_states(*m.encode_group(batch), batch.prompt_length))
    kept = differentiate(model, batch, trained, lambda m: replay_group(m, batch, rollout.activations, trained=trained))
    np.testing.assert_allclose(kept[0], again[0], atol=1e-5)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(again[1]))
    assert size > 0.1
    for a, b in zip(jax.tree.leaves(kept[1]), jax.tree.leaves(again[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * size)


def test_bfloat16_differs_by_rounding_alone() -> None:
    """No further from the float32 gradient than encoding again in bfloat16 is, within a factor of 1.5."""
    exact_model, model = make_model(), make_model("bfloat16")
    batch, rollout = sample(model)

    def gradient(model: Decoder, encode: Any) -> np.ndarray:
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(differentiate(model, batch, LoraParam, encode)[1])])

    def encode(m: Decoder) -> jax.Array:
        return predicting_states(*m.encode_group(batch), batch.prompt_length)

    exact = gradient(exact_model, encode)
    again = np.linalg.norm(gradient(model, encode) - exact)
    kept = np.linalg.norm(gradient(model, lambda m: replay_group(m, batch, rollout.activations, trained=LoraParam)) - exact)
    assert 0 < kept < 1.5 * again < 0.2 * np.linalg.norm(exact)


def test_the_forward_pass_is_not_computed() -> None:
    """Of the forward pass only the embedding is left: the values come from the rollout."""
    model = make_model()
    batch, rollout = sample(model)
    program = nnx.jit(lambda m: replay_group(m, batch, rollout.activations, trained=LoraParam)).lower(model).compile()
    assert program.cost_analysis()["flops"] < 50 * B * G * C * 16
