"""SFT and GRPO steps: accumulation, modes, several updates, and refusing what is not finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllmrec_jax.config import GrpoConfig, LogprobConfig, LoraConfig, ModelConfig, OptimizerConfig, SftConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.lora import add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.train.grpo_step import GrpoBatch, make_grpo_step
from mllmrec_jax.train.sft_step import SftBatch, make_sft_step
from mllmrec_jax.train.state import init_state, make_optimizer, make_schedule, split_policy

V, P, G, C = 37, 8, 3, 4
CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8, dtype="float32", param_dtype="float32"
)
# Plain gradient steps in disguise: with a huge eps Adam's update is proportional to the gradient, so updates compare like gradients.
LINEAR = OptimizerConfig(learning_rate=1.0, eps=1e6, max_grad_norm=0.0)


@functools.cache
def make_policy(mode: str):
    model = Decoder(CONFIG, vocab_size=V, rngs=nnx.Rngs(0))
    if mode == "lora":
        add_adapters(model, LoraConfig(rank=2), rngs=nnx.Rngs(1))
    policy = split_policy(model, mode)  # type: ignore[arg-type]
    noise = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), policy.trained)
    return policy._replace(trained=noise)


def make_group(n: int, seed: int = 0) -> GroupBatch:
    keys = jax.random.split(jax.random.key(seed), 4)
    return GroupBatch(
        jax.random.randint(keys[0], (n, P), 0, V),
        jax.random.randint(keys[1], (n,), 2, P + 1),
        jax.random.randint(keys[2], (n, G, C), 0, V),
        jax.random.randint(keys[3], (n, G), 1, C + 1),
    )


def cut(batch, parts: int):
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


def difference(state, policy):
    return jax.tree.map(lambda a, b: a - b, state.trained, policy.trained)


def assert_close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.linalg.norm(x - y) <= rtol * max(np.linalg.norm(y), 1e-12)


def run_grpo(mode, config, batch, *, updates=1):
    policy = make_policy(mode)
    optimizer = make_optimizer(config.optimizer, 10)
    step = make_grpo_step(policy, optimizer, config, LogprobConfig(chunk_tokens=16))
    reference = jax.tree.map(jnp.copy, policy.trained) if mode == "full" else None
    state = init_state(policy.trained, optimizer)
    metrics = {}
    for _ in range(updates):
        state, metrics, old = step(state, policy.frozen, reference, batch)
        batch = batch._replace(logp_old=old)
    return difference(state, policy), metrics


def make_grpo_batch(n: int, parts: int) -> GrpoBatch:
    advantage = jax.random.normal(jax.random.key(4), (n, G))
    return cut(GrpoBatch(make_group(n), advantage, jnp.zeros((n, G, C)), None), parts)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_grpo_accumulation_equals_the_unsplit_batch(loss_type):
    config = GrpoConfig(optimizer=LINEAR, loss_type=loss_type, beta=0.1)
    whole, metrics = run_grpo("lora", config, make_grpo_batch(4, 1))
    split, again = run_grpo("lora", config, make_grpo_batch(4, 4))
    assert_close(split, whole, 1e-5)
    for name in metrics:
        np.testing.assert_allclose(again[name], metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_zero_advantage_on_policy_moves_nothing(mode):
    """With the policy at its reference, the k3 penalty has no slope and zero advantages give no policy gradient."""
    batch = make_grpo_batch(2, 1)._replace(advantage=jnp.zeros((1, 2, G)))
    policy = make_policy(mode)
    config = GrpoConfig(optimizer=LINEAR, beta=0.1 if mode == "full" else 0.0)
    optimizer = make_optimizer(config.optimizer, 10)
    step = make_grpo_step(policy, optimizer, config, LogprobConfig())
    reference = jax.tree.map(jnp.copy, policy.trained) if mode == "full" else None
    _, metrics, _ = step(init_state(policy.trained, optimizer), policy.frozen, reference, batch)
    assert float(metrics["grad_norm"]) < 1e-6
    if mode == "full":
        assert abs(float(metrics["kl"])) < 1e-7


@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_kl_penalty_pulls_towards_the_reference(mode, estimator):
    """With no advantage, steps on the penalty alone lower the KL to the reference."""
    policy = make_policy(mode)
    config = GrpoConfig(mode=mode, optimizer=OptimizerConfig(learning_rate=3e-3), beta=1.0, kl_estimator=estimator)
    optimizer = make_optimizer(config.optimizer, 100)
    step = make_grpo_step(policy, optimizer, config, LogprobConfig())
    reference = None
    if mode == "full":
        reference = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), policy.trained)
    batch = make_grpo_batch(4, 1)._replace(advantage=jnp.zeros((1, 4, G)))
    state = init_state(policy.trained, optimizer)
    kls = []
    for _ in range(12):
        state, metrics, _ = step(state, policy.frozen, reference, batch)
        kls.append(float(metrics["kl"]))
    assert kls[-1] < 0.7 * kls[0]


def test_second_update_uses_the_first_ones_log_probs():
    """On the second update the ratio is no longer 1: with steps large enough, some tokens are clipped."""
    config = GrpoConfig(optimizer=OptimizerConfig(learning_rate=0.05), beta=0.0)
    _, first = run_grpo("lora", config, make_grpo_batch(4, 1), updates=1)
    _, third = run_grpo("lora", config, make_grpo_batch(4, 1), updates=3)
    assert float(first["clip_fraction"]) == 0.0
    assert float(third["clip_fraction"]) > 0.0


def test_weights_that_are_not_finite_change_nothing_and_are_seen():
    policy = make_policy("lora")
    config = GrpoConfig(beta=0.0)
    optimizer = make_optimizer(config.optimizer, 10)
    step = make_grpo_step(policy, optimizer, config, LogprobConfig())
    batch = make_grpo_batch(2, 1)
    state = init_state(policy.trained, optimizer)
    before = jax.tree.map(np.array, state)
    after, metrics, _ = step(state, policy.frozen, None, batch._replace(advantage=jnp.full((1, 2, G), jnp.nan)))
    assert not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, before, after)


def make_sft_batch(n: int, parts: int) -> SftBatch:
    group = make_group(n)
    group = group._replace(completion=group.completion[:, :1], completion_length=group.completion_length[:, :1])
    mask = jax.random.bernoulli(jax.random.key(8), 0.5, (n, P)).astype(jnp.uint8)
    return cut(SftBatch(group, mask), parts)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_sft_accumulation_equals_the_unsplit_batch(weight):
    policy = make_policy("full")
    config = SftConfig(mode="full", optimizer=LINEAR, history_loss_weight=weight)
    optimizer = make_optimizer(LINEAR, 10)
    results = []
    for parts in (1, 4):
        step = make_sft_step(policy, optimizer, config, LogprobConfig(chunk_tokens=16), seed=0)
        state, metrics = step(init_state(policy.trained, optimizer), policy.frozen, make_sft_batch(4, parts))
        results.append((difference(state, policy), metrics))
    assert_close(results[1][0], results[0][0], 1e-5)
    np.testing.assert_allclose(results[1][1]["loss"], results[0][1]["loss"], rtol=1e-5)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_sft_learns_a_batch_by_heart(mode):
    policy = make_policy(mode)
    config = SftConfig(mode=mode, optimizer=OptimizerConfig(learning_rate=0.02))
    optimizer = make_optimizer(config.optimizer, 100)
    step = make_sft_step(policy, optimizer, config, LogprobConfig(), seed=0)
    state, losses = init_state(policy.trained, optimizer), []
    for _ in range(60):
        state, metrics = step(state, policy.frozen, make_sft_batch(4, 1))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0]


def test_schedule_warms_up_and_decays_to_its_end():
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_steps=4, final_fraction=0.1)
    schedule = make_schedule(config, 20)
    rates = [float(np.asarray(schedule(step))) for step in range(21)]
    assert 0 < rates[0] < rates[1] < rates[3] < rates[4]
    assert rates[4] == pytest.approx(2.0)
    assert rates[20] == pytest.approx(0.2)
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert float(np.asarray(make_schedule(dataclasses.replace(config, schedule="constant"), 20)(20))) == pytest.approx(2.0)
