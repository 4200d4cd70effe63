"""The forward pass taken from a rollout: the values and gradients of encoding the batch again."""

from __future__ import annotations

from typing import Any, Literal

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
from mllmrec_jax.model.replay import Activations, replay_group

V, B, G, P, C = 64, 3, 4, 10, 6
PROMPT_LENGTH = jnp.array([10, 3, 7])


def make_model(dtype: Literal["float32", "bfloat16"] = "float32", *, tied: bool = True) -> Decoder:
    config = ModelConfig(
        num_layers=3, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=8, max_position=32, dtype=dtype,
        param_dtype="float32", tie_embeddings=tied,
    )  # fmt: skip
    model = Decoder(config, vocab_size=V, rngs=nnx.Rngs(0))
    add_adapters(model, LoraConfig(rank=2), rngs=nnx.Rngs(1))
    graphdef, adapters, rest = nnx.split(model, LoraParam, ...)
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    return nnx.merge(graphdef, moved, rest)


def sample(model: Decoder) -> tuple[GroupBatch, Activations]:
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
    assert rollout.activations is not None
    return GroupBatch(prompt, PROMPT_LENGTH, rollout.completion, rollout.completion_length), rollout.activations


def encode(model: Decoder, batch: GroupBatch) -> jax.Array:
    prompt, completion = model.encode_group(batch)
    return predicting_states(prompt, completion, batch.prompt_length)


def differentiate(model: Decoder, batch: GroupBatch, trained: Any, compute: Any) -> tuple[jax.Array, Any]:
    graphdef, own, rest = nnx.split(model, trained, ...)
    mask = (jnp.arange(C) < batch.completion_length[..., None])[..., None]

    def loss(own: Any) -> tuple[jax.Array, jax.Array]:
        hidden = jnp.where(mask, compute(nnx.merge(graphdef, own, rest)), 0).astype(jnp.float32)
        return jnp.sum(jnp.sin(3 * hidden)), hidden

    gradient, hidden = jax.jit(jax.grad(loss, has_aux=True))(own)
    return hidden, gradient


@pytest.mark.parametrize(("trained", "tied"), [(LoraParam, True), (nnx.Param, True), (nnx.Param, False)], ids=["lora", "all", "untied"])
def test_values_and_gradients_equal_encoding_again(trained: Any, tied: bool) -> None:
    model = make_model(tied=tied)
    batch, activations = sample(model)
    again = differentiate(model, batch, trained, lambda m: encode(m, batch))
    kept = differentiate(model, batch, trained, lambda m: replay_group(m, batch, activations, trained=trained))
    # To 1e-5 of the largest entry, as sharded steps are held to one device's.
    np.testing.assert_allclose(kept[0], again[0], rtol=0, atol=1e-5 * float(jnp.abs(again[0]).max()))
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(again[1]))
    assert size > 0.1
    for a, b in zip(jax.tree.leaves(kept[1]), jax.tree.leaves(again[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * size)


def test_bfloat16_differs_by_rounding_alone() -> None:
    """No further from the float32 gradient than encoding again in bfloat16 is, within a factor of 1.5."""
    exact_model, model = make_model(), make_model("bfloat16")
    batch, activations = sample(model)

    def gradient(model: Decoder, compute: Any) -> np.ndarray:
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(differentiate(model, batch, LoraParam, compute)[1])])

    exact = gradient(exact_model, lambda m: encode(m, batch))
    again = np.linalg.norm(gradient(model, lambda m: encode(m, batch)) - exact)
    kept = np.linalg.norm(gradient(model, lambda m: replay_group(m, batch, activations, trained=LoraParam)) - exact)
    assert 0 < kept < 1.5 * again < 0.2 * np.linalg.norm(exact)


def test_the_forward_pass_is_not_computed() -> None:
    """Of the forward pass only the embedding is left: the values come from the rollout."""
    model = make_model()
    batch, activations = sample(model)
    program = nnx.jit(lambda m: replay_group(m, batch, activations, trained=LoraParam)).lower(model).compile()
    cost = program.cost_analysis()
    assert cost is not None and cost["flops"] < 50 * B * G * C * 16
