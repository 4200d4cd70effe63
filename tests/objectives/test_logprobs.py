"""The group layout against the repeated layout: what the whole design rests on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllmrec_jax.config import LogprobConfig, LoraConfig, ModelConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.lora import add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.objectives.logprobs import completion_logprobs, completion_mask, encode_predicting
from mllmrec_jax.train.state import merge_policy, split_policy

CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32", param_dtype="float32"
)
V = 97


@functools.cache
def make_policy(config: ModelConfig = CONFIG, vocab_size: int = V):
    model = Decoder(config, vocab_size=vocab_size, rngs=nnx.Rngs(0))
    add_adapters(model, LoraConfig(rank=4), rngs=nnx.Rngs(1))
    policy = split_policy(model, "lora")
    # B starts at zero, where A has no gradient: move both.
    noise = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), policy.trained)
    return policy._replace(trained=noise)


def make_batch(b: int, g: int, p: int, c: int, *, vocab_size: int = V, seed: int = 0) -> GroupBatch:
    keys = jax.random.split(jax.random.key(seed), 4)
    return GroupBatch(
        jax.random.randint(keys[0], (b, p), 0, vocab_size),
        jax.random.randint(keys[1], (b,), 1, p + 1).at[0].set(p),
        jax.random.randint(keys[2], (b, g, c), 0, vocab_size),
        jax.random.randint(keys[3], (b, g), 1, c + 1).at[0, 0].set(c),
    )


def repeat(batch: GroupBatch) -> GroupBatch:
    """The layout of other trainers: every completion with a copy of its prompt, G = 1."""
    g, c = batch.completion.shape[1:]
    return GroupBatch(
        jnp.repeat(batch.prompt, g, axis=0),
        jnp.repeat(batch.prompt_length, g),
        batch.completion.reshape(-1, 1, c),
        batch.completion_length.reshape(-1, 1),
    )


def total_logp(trained, policy, batch, weights):
    model = merge_policy(policy, trained)
    hidden = encode_predicting(model, batch, adapters=True)
    logp = completion_logprobs(hidden, model.head_weight, batch, LogprobConfig(), backward="accumulate").logp
    return jnp.sum(logp * weights), logp


@pytest.mark.parametrize("g", [1, 2, 5, 8, 16])
def test_group_layout_equals_repeated_layout(g):
    """Log-probs within 1e-5, LoRA gradients within 1e-5 relative, on ragged prompts and completions."""
    policy, batch = make_policy(), make_batch(3, g, 17, 6, seed=g)
    weights = jax.random.normal(jax.random.key(7), batch.completion.shape)
    gradient = jax.jit(jax.grad(lambda trained, *inputs: total_logp(trained, policy, *inputs), has_aux=True))
    grads, logp = gradient(policy.trained, batch, weights)
    again, expected = gradient(policy.trained, repeat(batch), weights.reshape(-1, 1, 6))
    np.testing.assert_allclose(logp.reshape(expected.shape), expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(again), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def flops(policy, batch, *, temp: bool = False):
    weights = jnp.ones(batch.completion.shape)
    compiled = jax.jit(jax.grad(lambda t: total_logp(t, policy, batch, weights)[0])).lower(policy.trained).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    assert cost is not None
    return memory.temp_size_in_bytes if temp else cost["flops"]


def test_flop_ratio_is_the_formulas():
    """Trunk tokens fall by G (P + C) / (P + G C); the compiled programs' FLOPs follow within 10%.

    The trunk is wide and the vocabulary small, so that the trunk is what costs; one layer, since XLA counts a loop's body once.
    """
    config = dataclasses.replace(CONFIG, num_layers=1, hidden_size=256, intermediate_size=1024, remat="none")
    policy = make_policy(config, vocab_size=16)
    b, g, p, c = 1, 8, 96, 12
    batch = make_batch(b, g, p, c, vocab_size=16)
    ratio = flops(policy, repeat(batch)) / flops(policy, batch)
    assert ratio == pytest.approx(g * (p + c) / (p + g * c), rel=0.10)


def test_peak_memory_does_not_grow_with_prompt_times_group():
    """From G = 32 to G = 64, memory grows by what 32 more completions need, not by 32 more prompts or by scores of G x P."""
    config = dataclasses.replace(CONFIG, remat="full")
    policy = make_policy(config)
    p, c = 2048, 32
    few, many = (flops(policy, make_batch(1, g, p, c), temp=True) for g in (32, 64))
    short = [flops(policy, make_batch(1, g, p // 4, c), temp=True) for g in (32, 64)]
    growth, growth_short = many - few, short[1] - short[0]
    # Repeating 32 more prompts would keep at least one residual stream each, per layer.
    repeated = 32 * p * config.hidden_size * 4 * config.num_layers
    assert growth < repeated / 2
    # Held scores of 32 more members would be this much; blocks hold those of 16 members at a time.
    scores = 32 * c * p * config.num_heads * 4
    assert growth < scores / 8
    # What G adds would be four times as much at four times the prompt, if it grew with G x P.
    assert growth < 2 * growth_short


def test_tokens_past_the_end_are_zero_and_do_not_matter():
    policy, batch = make_policy(), make_batch(2, 3, 9, 5)
    weights = jnp.ones(batch.completion.shape)
    find_logp = jax.jit(lambda batch: total_logp(policy.trained, policy, batch, weights)[1])
    logp = find_logp(batch)
    mask = np.asarray(completion_mask(batch))
    assert not np.any(np.asarray(logp)[~mask])
    other = batch._replace(
        completion=jnp.where(mask, batch.completion, 5), prompt=jnp.where(jnp.arange(9) < batch.prompt_length[:, None], batch.prompt, 3)
    )
    np.testing.assert_allclose(find_logp(other), logp, atol=1e-6)
