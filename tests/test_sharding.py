"""GRPO on eight virtual devices: the numbers of one device, on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mllmrec_jax.config import ConfigError, GrpoConfig, LogprobConfig, LoraConfig, MeshConfig, ModelConfig, OptimizerConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.generate.rollout import make_keys
from mllmrec_jax.model.lora import add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.sharding import check_model, make_mesh, make_spec, place, place_batch, take_rows, use_mesh
from mllmrec_jax.train.grpo_loop import cut_activations, make_rollout
from mllmrec_jax.train.grpo_step import GrpoBatch, make_grpo_step
from mllmrec_jax.train.state import init_state, make_optimizer, split_policy

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]
V, B, P, G, C = 64, 16, 10, 4, 5
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, intermediate_size=64, num_heads=8, num_kv_heads=8, head_dim=8, max_position=64, dtype="float32",
    param_dtype="float32", remat="full",
)  # fmt: skip


# "again": the policy's forward pass is computed again, not taken from the rollout.
MODES = ("lora", "lora again", "full")


def make_grpo(mode):
    return GrpoConfig(
        mode=mode.removesuffix(" again"), reuse_rollout="again" not in mode, group_size=G, max_new_tokens=C, temperature=0.9, top_p=0.9,
        beta=0.1, kl_estimator="k3", accumulation=2, lora=LoraConfig(rank=4), optimizer=OptimizerConfig(learning_rate=1e-3),
    )  # fmt: skip


def run_steps(mesh, mode, *, steps=3):
    """Sampled tokens, metrics and gradients' effect (trained weights) of a few whole GRPO steps."""
    grpo = make_grpo(mode)
    mode = grpo.mode
    # Plain gradient descent: the adapters' B starts at 0, so its weights are the sum of its gradients. (Adam divides a gradient by its own
    # size: where that is rounding, so is the step.)
    optimizer = optax.sgd(0.5) if mode == "lora" else make_optimizer(grpo.optimizer, 10)
    with use_mesh(mesh):
        model = Decoder(MODEL, vocab_size=V, rngs=nnx.Rngs(0))
        if mode == "lora":
            add_adapters(model, grpo.lora, rngs=nnx.Rngs(1))
        policy = split_policy(model, mode)
        policy = policy._replace(trained=place(policy.trained), frozen=place(policy.frozen))
        state = place(init_state(policy.trained, optimizer))
        reference = None if mode == "lora" else jax.tree.map(jnp.copy, policy.trained)
        rollout_fn = make_rollout(policy, grpo, stop_ids=(3,), pad_id=0)
        step_fn = make_grpo_step(policy, optimizer, grpo, LogprobConfig(chunk_tokens=7))
        rng = np.random.default_rng(0)
        out = []
        for step in range(steps):
            prompt = rng.integers(4, V, (B, P)).astype(np.int32)
            length = rng.integers(2, P + 1, B).astype(np.int32)
            keys = make_keys(0, step, jnp.arange(B), G)
            sampled = rollout_fn(state.trained, policy.frozen, place_batch(prompt), place_batch(length), keys)
            host = jax.tree.map(np.asarray, sampled._replace(activations=None))
            reward = (host.completion % 7 == 0).sum(-1).astype(np.float32)
            advantage = reward - reward.mean(axis=1, keepdims=True)
            group = GroupBatch(*(jnp.asarray(x) for x in (prompt, length, host.completion, host.completion_length)))
            batch = jax.tree.map(lambda x: x.reshape(2, B // 2, *x.shape[1:]), GrpoBatch(group, advantage, host.logp_raw, None))
            batch = place_batch(batch, leading=1)
            if grpo.reuse_rollout:
                batch = batch._replace(activations=cut_activations(sampled.activations, 2, 1, C))
            state, metrics, logp_old = step_fn(state, policy.frozen, reference, batch)
            out.append((host.completion, jax.tree.map(np.asarray, (metrics, logp_old, host.logp_raw, host.logp_sampled))))
        return out, jax.tree.map(np.asarray, jax.tree.leaves(state.trained))


@pytest.fixture(scope="module")
def one_device():
    return {mode: run_steps(None, mode) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_three_steps_equal_one_device(one_device, sizes, mode):
    mesh = make_mesh(MeshConfig(*sizes))
    steps, weights = run_steps(mesh, mode)
    expected_steps, expected_weights = one_device[mode]
    for (tokens, values), (expected_tokens, expected_values) in zip(steps, expected_steps, strict=True):
        np.testing.assert_array_equal(tokens, expected_tokens)
        for metrics in (values[0], expected_values[0]):
            assert metrics.pop("logprob_mismatch", 0) < 1e-5  # itself rounding
        for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(expected_values), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1e-3, np.abs(b).max()))
    for a, b in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, 4), (1, 2, 4))],
)
def test_minus_one_is_what_is_left(sizes, expected):
    assert tuple(make_mesh(MeshConfig(*sizes)).shape.values()) == expected


@pytest.mark.parametrize("sizes", [(3, 1, 1), (2, 2, 1), (-1, -1, 1), (0, 1, 1), (-1, 5, 1)], ids=str)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"8 devices, got data = .*fsdp = .*tensor = "):
        make_mesh(MeshConfig(*sizes))


def test_two_dimensions_never_share_a_mesh_axis():
    assert make_spec("batch", None, "heads") == PartitionSpec(("data", "fsdp"), None, ("tensor",))
    with pytest.raises(ValueError, match="same mesh axis"):
        make_spec("batch", "embed")
    with pytest.raises(ValueError, match=r"had \['head'\]"):
        make_spec("head")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"num_heads": 6, "num_kv_heads": 2}, r"model.num_kv_heads: expected a multiple of 4 \(tensor\).*got 2"),
        ({"intermediate_size": 30}, r"model.intermediate_size: expected a multiple of 4 .*got 30"),
        ({"hidden_size": 33}, r"model.hidden_size: expected a multiple of 2 \(fsdp\).*got 33"),
    ],
)
def test_models_that_do_not_divide_are_refused(change, message):
    model, mesh = dataclasses.replace(MODEL, **change), make_mesh(MeshConfig(1, 2, 4))
    if message is None:
        return check_model(model, mesh, vocab_size=V, batch_size=B)
    with pytest.raises(ConfigError, match=message):
        check_model(model, mesh, vocab_size=V, batch_size=B)


def test_every_device_holds_its_share_of_the_weights():
    """On fsdp 2 x tensor 4 no matrix lies whole on a device: 1/8 each, and a norm on every device."""
    with use_mesh(make_mesh(MeshConfig(1, 2, 4))):
        trained = place(split_policy(Decoder(MODEL, vocab_size=V, rngs=nnx.Rngs(0)), "full").trained)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        share = leaf.addressable_shards[0].data.size / leaf.size
        assert share == (1 if "norm" in jax.tree_util.keystr(path) else 1 / 8), jax.tree_util.keystr(path)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_are_looked_up_where_they_lie(sizes):
    table = jnp.arange(V * 4, dtype=jnp.float32).reshape(V, 4)
    ids = jax.random.randint(jax.random.key(0), (B, 3), 0, V)

    def loss(table, ids):
        rows = take_rows(table, ids)
        return jnp.sum(rows**2), rows

    (_, expected), gradient = jax.value_and_grad(loss, has_aux=True)(table, ids)
    with use_mesh(make_mesh(MeshConfig(*sizes))):
        (_, rows), sharded = jax.jit(jax.value_and_grad(loss, has_aux=True))(table, place_batch(ids))
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(sharded, gradient, rtol=1e-6)
