"""What compiled programs move between devices: as designed, as much as the formulas say, and never a vocabulary."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mllmrec_jax.communication import UpdateShape, count_update_bytes
from mllmrec_jax.compiled import list_collectives
from mllmrec_jax.config import GrpoConfig, LogprobConfig, LoraConfig, MeshConfig, ModelConfig, OptimizerConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.generate.rollout import make_keys
from mllmrec_jax.model.lora import add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.sharding import make_mesh, place, place_batch, use_mesh
from mllmrec_jax.train.grpo_loop import cut_activations, make_rollout
from mllmrec_jax.train.grpo_step import GrpoBatch, make_grpo_step
from mllmrec_jax.train.state import init_state, make_optimizer, split_policy

VOCABULARY = 4096
SMALL = ModelConfig(
    num_layers=3, hidden_size=64, intermediate_size=192, num_heads=8, num_kv_heads=8, head_dim=16, max_position=256, dtype="float32",
    param_dtype="float32", remat="full",
)  # fmt: skip
WIDE = dataclasses.replace(SMALL, num_layers=2, hidden_size=128, intermediate_size=512, head_dim=32)
GRPO = GrpoConfig(
    mode="lora", group_size=4, max_new_tokens=12, temperature=0.9, top_p=0.9, beta=0.1, lora=LoraConfig(rank=4),
    optimizer=OptimizerConfig(learning_rate=1e-3),
)  # fmt: skip
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]


def compile_programs(sizes, model_config, *, prompts=16, prompt_tokens=40, reuse_rollout=True):
    """(update, rollout) compiled for a mesh of virtual devices."""
    grpo = dataclasses.replace(GRPO, reuse_rollout=reuse_rollout)
    b, p, g, c = prompts, prompt_tokens, GRPO.group_size, GRPO.max_new_tokens
    optimizer = make_optimizer(GRPO.optimizer, 10)

    def zeros(*shape, dtype=jnp.int32):
        return jnp.zeros(shape, dtype)

    with use_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])):
        model = Decoder(model_config, vocab_size=VOCABULARY, rngs=nnx.Rngs(0))
        add_adapters(model, GRPO.lora, rngs=nnx.Rngs(1))
        policy = split_policy(model, "lora")
        policy = policy._replace(trained=place(policy.trained), frozen=place(policy.frozen))
        state = place(init_state(policy.trained, optimizer))
        group = GroupBatch(zeros(1, b, p), zeros(1, b), zeros(1, b, g, c), zeros(1, b, g))
        batch = GrpoBatch(group, zeros(1, b, g, dtype=jnp.float32), zeros(1, b, g, c, dtype=jnp.float32), None)
        step = make_grpo_step(policy, optimizer, grpo, LogprobConfig(chunk_tokens=64))
        rollout = make_rollout(policy, grpo, stop_ids=(3,), pad_id=0).lower(
            state.trained, policy.frozen, place_batch(zeros(b, p)), place_batch(zeros(b)), make_keys(0, 0, jnp.arange(b), g)
        )
        batch = place_batch(batch, leading=1)
        if reuse_rollout:
            kept = jax.tree.map(lambda x: zeros(*x.shape, dtype=x.dtype), rollout.out_info.activations)
            batch = batch._replace(activations=cut_activations(kept, 1, 1, c))
        return step.lower(state, policy.frozen, None, batch).compile(), rollout.compile(), state


@pytest.fixture(scope="module")
def programs():
    """Programs of the small model by mesh, compiled once."""
    made = {}

    def get(sizes):
        if sizes not in made:
            made[sizes] = compile_programs(sizes, SMALL)
        return made[sizes]

    return get


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_update_moves_what_the_formulas_say(programs, sizes):
    update, _, _ = programs(sizes)
    check_volume(update, SMALL, sizes, UpdateShape(16, 40, 4, 12, rank=4, reuse_rollout=True))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_formulas_hold_at_another_size(sizes):
    update, _, _ = compile_programs(sizes, WIDE, prompts=32, prompt_tokens=96)
    check_volume(update, WIDE, sizes, UpdateShape(32, 96, 4, 12, rank=4, reuse_rollout=True))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8)], ids=str)
def test_formulas_hold_where_the_forward_pass_is_computed_again(sizes):
    update, _, _ = compile_programs(sizes, SMALL, reuse_rollout=False)
    check_volume(update, SMALL, sizes, UpdateShape(16, 40, 4, 12, rank=4))


def check_volume(program, model, sizes, shape):
    collectives = list_collectives(program.as_text())
    data, fsdp, tensor = sizes
    expected = count_update_bytes(model, shape, data=data, fsdp=fsdp, tensor=tensor)
    total = sum(c.received for c in collectives)
    assert total == pytest.approx(sum(expected.values()), rel=0.1), (expected, sorted(collectives, key=lambda c: -c.received)[:8])


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_each_weight_is_gathered_once_forward_and_once_backward(programs, sizes):
    """Seven kernels and the wide sides of their adapters. Policy and reference share the forward's; a policy taken from the rollout
    has none, and a reference has no adapters."""
    for reuse, (update, _, _) in ((True, programs(sizes)), (False, compile_programs(sizes, SMALL, reuse_rollout=False))):
        loops = [c for c in list_collectives(update.as_text()) if c.kind == "all-gather" and "layers" in c.scope]
        assert {c.count for c in loops} == {SMALL.num_layers}
        backward = [c for c in loops if "transpose" in c.scope]
        assert (len(loops) - len(backward), len(backward)) == (7 if reuse else 14, 14)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_no_vocabulary_crosses_devices(programs, sizes):
    """Of all that is gathered or reduced, nothing has a dimension of the vocabulary; in the rollout, nothing is half as large as the
    logits of a data group either, however they are cut into blocks."""
    update, rollout, _ = programs(sizes)
    for program in (update, rollout):
        for collective in list_collectives(program.as_text()):
            assert all(VOCABULARY not in shape for shape in collective.shapes), collective
    rows = 16 * GRPO.group_size // sizes[0]
    for collective in list_collectives(rollout.as_text()):
        assert sum(math.prod(shape) for shape in collective.shapes) < rows * VOCABULARY / 2, collective


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_no_buffer_of_tokens_by_vocabulary(programs, sizes):
    """The largest array with a device's part of the vocabulary has a chunk of 64 rows, not the 768 of the batch."""
    update, _, _ = programs(sizes)
    part = VOCABULARY // (sizes[1] * sizes[2])
    rows = {int(n) for n in re.findall(rf"f32\[(\d+),{part}\]", update.as_text())}
    assert 64 in rows
    assert max(rows) == 64


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_donated_state_is_not_copied(programs, sizes):
    """Every array of the state but the empty ones lives on in place."""
    update, _, state = programs(sizes)
    mine = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert update.memory_analysis().alias_size_in_bytes == pytest.approx(mine, rel=0.001)


def test_weak_scaling_keeps_the_work_of_a_device():
    """Twice the devices and twice the prompts: the FLOPs of a device stay (XLA counts a loop's body once, the same on each mesh)."""

    def count_flops(devices):
        update, rollout, _ = compile_programs((devices, 1, 1), SMALL, prompts=2 * devices)
        return [program.cost_analysis()["flops"] for program in (update, rollout)]

    alone = count_flops(1)
    for devices in (2, 8):
        assert count_flops(devices) == pytest.approx(alone, rel=0.02)
