"""The programs of a GRPO step from shapes alone: their arguments, described and laid out over a mesh, and what a compiler says of them."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.generate.rollout import make_keys
from mllmrec_jax.model.lora import LoraParam, add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.model.replay import Activations
from mllmrec_jax.sharding import batch_sharding, find_shardings, use_mesh
from mllmrec_jax.train.grpo_loop import make_rollout
from mllmrec_jax.train.grpo_step import GrpoBatch, make_grpo_step
from mllmrec_jax.train.state import Policy, TrainState, init_state, make_optimizer


class StepState(NamedTuple):
    """What lies on the devices between steps; leaves are `jax.ShapeDtypeStruct`s in nnx variables that name their axes."""

    graphdef: Any
    state: TrainState
    frozen: Any
    reference: Any
    """None where adapters are trained, or nothing is compared with a reference."""


def describe_state(config: RunConfig) -> StepState:
    """The state of `config`'s GRPO stage with a vocabulary of `tokenizer.vocab_size`; takes no memory and no device."""
    grpo = config.grpo

    def build() -> Decoder:
        model = Decoder(config.model, vocab_size=config.tokenizer.vocab_size, rngs=nnx.Rngs(0))
        if grpo.mode == "lora":
            add_adapters(model, grpo.lora, rngs=nnx.Rngs(1))
        return model

    graphdef, trained, frozen = nnx.split(nnx.eval_shape(build), LoraParam if grpo.mode == "lora" else nnx.Param, ...)
    optimizer = make_optimizer(grpo.optimizer, 100)
    trained = jax.eval_shape(lambda t: jax.tree.map(lambda x: x.astype(jnp.float32), t), trained)
    state = jax.eval_shape(lambda t: init_state(t, optimizer), trained)
    return StepState(graphdef, state, frozen, trained if grpo.mode == "full" and grpo.beta > 0 else None)


def count_bytes(tree: Any, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of `tree` on one device.

    Raises:
      ConfigError: a dimension does not divide over its devices.
    """

    def count(sharding: Any, leaf: Any) -> int:
        return sum(jnp.dtype(x.dtype).itemsize * _size(sharding.shard_shape(x.shape)) for x in jax.tree.leaves(leaf))

    shardings = find_shardings(tree, mesh)
    return sum(jax.tree.leaves(jax.tree.map(count, shardings, tree)))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


class Compiled(NamedTuple):
    """What XLA's memory analysis says of one program on one device (bytes)."""

    arguments: int
    temporaries: int
    seconds: float
    """It took to compile."""


def compile_step(config: RunConfig, mesh: Mesh) -> dict[str, Compiled]:
    """Compiles `update` (a micro-batch of `grpo.batch_size` prompts, `grpo.accumulation` times) and `rollout` (all of these prompts) for
    the devices of `mesh`; nothing is run and no weights exist.

    Raises:
      ConfigError: the model does not divide over the mesh.
    """
    grpo, a = config.grpo, config.grpo.accumulation
    b, p, g, c = grpo.batch_size, config.prompt.max_prompt_tokens, grpo.group_size, grpo.max_new_tokens
    layers, d, dtype = config.model.num_layers, config.model.hidden_size, jnp.dtype(config.model.dtype)
    optimizer = make_optimizer(grpo.optimizer, 100)

    def lay(tree: Any) -> Any:
        if mesh.size == 1:
            return tree

        def one(sharding: Any, leaf: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), leaf)

        return jax.tree.map(one, find_shardings(tree, mesh), tree)

    with use_mesh(mesh):
        described = describe_state(config)
        state, frozen, reference = lay(described.state), lay(described.frozen), lay(described.reference)
        policy = Policy(described.graphdef, state.trained, frozen)

        def array(*shape: int, dtype: Any = jnp.int32, leading: int = 0) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(leading=leading))

        group = GroupBatch(*(array(a, *s, leading=1) for s in ((b, p), (b,), (b, g, c), (b, g))))
        floats = array(a, b, g, dtype=jnp.float32, leading=1), array(a, b, g, c, dtype=jnp.float32, leading=1)
        kept = None
        if grpo.reuse_rollout:
            kept = Activations(
                array(a, layers, b, p, d, dtype=dtype, leading=2),
                array(a, layers, b, g, c, d, dtype=dtype, leading=2),
                array(a, b, g, c, d, dtype=dtype, leading=1),
            )
        keys = jax.eval_shape(lambda: make_keys(0, 0, jnp.arange(a * b), g))
        rollout = make_rollout(policy, grpo, stop_ids=(config.tokenizer.vocab_size - 1,), pad_id=0)
        update = make_grpo_step(policy, optimizer, grpo, config.logprob)
        lowered = {
            "update": update.lower(state, frozen, reference, GrpoBatch(group, *floats, None, kept)),
            "rollout": rollout.lower(state.trained, frozen, array(a * b, p), array(a * b), keys),
        }
        return {name: _compile(program) for name, program in lowered.items()}


def _compile(program: Any) -> Compiled:
    started = time.perf_counter()
    memory = program.compile().memory_analysis()
    return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, time.perf_counter() - started)
