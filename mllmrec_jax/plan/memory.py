"""Memory of a GRPO step on one device, by owner, from shapes alone; docs/plan.md holds it to compiled programs.

Exact: weights, adapters, optimizer state, reference, caches, and what a backward pass saves (the residuals of the traced programs, so a
change of the model or of a rematerialisation policy is seen). Estimated: what is alive while a layer, a chunk of logits or a token is
computed; the constants below are how many of a layer's or a chunk's arrays XLA keeps at its peak, read off compiled float32 programs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, AxisType

from mllmrec_jax.bench.flops import count_cache
from mllmrec_jax.config import MeshConfig, RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.attention import cut_prompt
from mllmrec_jax.objectives.logprobs import encode_predicting, encode_predicting_pair
from mllmrec_jax.plan.programs import StepState, count_bytes, describe_state
from mllmrec_jax.sharding import MESH_AXES
from mllmrec_jax.train.state import Policy, merge_policy

# Multiples of what one layer would save without rematerialisation: its recomputed values, their gradients, scores of a block.
LAYER_COPIES = {"full": 1.5, "dots": 1.2, "none": 1.15, "reused": 1.6}
CHUNK_COPIES = 2.0
"""Of a chunk's logits: the logits and what they are turned into."""
SAMPLING_COPIES = 4.5
"""Of a token's logits [rows, V]: log-probs, probabilities, the nucleus, running sums."""
SCORE_COPIES = 2.5
"""Of the float32 scores of a layer's prefill, those that causality hides left out by blocks."""
FEED_FORWARD_COPIES = 3.0
STATE_COPIES = 4.0
"""Of the prompts' hidden states in prefill."""


class Memory(NamedTuple):
    """Bytes on one device, by owner."""

    resident: dict[str, int]
    """From the first step to the last."""
    update: dict[str, int]
    rollout: dict[str, int]

    @property
    def peak(self) -> int:
        """The larger of the two phases, on top of what is resident."""
        return sum(self.resident.values()) + max(sum(self.update.values()), sum(self.rollout.values()))

    @property
    def largest(self) -> tuple[str, int]:
        """The owner of most at the peak."""
        phase = max((self.update, self.rollout), key=lambda owners: sum(owners.values()))
        return max((self.resident | phase).items(), key=lambda item: item[1])


def make_abstract_mesh(mesh: MeshConfig) -> AbstractMesh:
    """`mesh`, whose sizes are all given, without devices."""
    return AbstractMesh((mesh.data, mesh.fsdp, mesh.tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def count_prompts(config: RunConfig, mesh: MeshConfig) -> int:
    """Prompts of a micro-batch on one device."""
    return -(-config.grpo.batch_size // (mesh.data * mesh.fsdp))


def cut_config(config: RunConfig, mesh: MeshConfig) -> RunConfig:
    """The sizes one device computes with: its share of heads, feed-forward and micro-batch."""
    t, model = mesh.tensor, config.model
    heads = {"num_heads": model.num_heads // t, "num_kv_heads": model.num_kv_heads // t, "intermediate_size": model.intermediate_size // t}
    grpo = dataclasses.replace(config.grpo, batch_size=count_prompts(config, mesh))
    return dataclasses.replace(config, model=dataclasses.replace(model, **heads), grpo=grpo)


def count_cache_bytes(config: RunConfig, mesh: MeshConfig) -> tuple[int, int]:
    """Keys and values of a rollout's prompts, and of its completions, on one device."""
    own = cut_config(config, mesh)
    prompts = own.grpo.batch_size * own.grpo.accumulation
    tokens = prompts * own.prompt.max_prompt_tokens, prompts * own.grpo.group_size * own.grpo.max_new_tokens
    return int(count_cache(own.model, tokens[0])), int(count_cache(own.model, tokens[1]))


@functools.lru_cache(maxsize=256)
def _count_saved(config: RunConfig, prompts: int) -> int:
    """Bytes that the forward pass of `prompts` prompts saves for the backward pass, arguments of the program left out."""
    described = describe_state(config)
    p, g, c = config.prompt.max_prompt_tokens, config.grpo.group_size, config.grpo.max_new_tokens
    ids: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((prompts, p), (prompts,), (prompts, g, c), (prompts, g))]
    batch = GroupBatch(*ids)
    pair = config.grpo.beta > 0 and config.grpo.mode == "lora"

    def save(trained: Any, frozen: Any, batch: GroupBatch) -> Any:
        def encode(trained: Any) -> jax.Array:
            model = merge_policy(Policy(described.graphdef, trained, frozen))
            return encode_predicting_pair(model, batch)[0] if pair else encode_predicting(model, batch, adapters=True)

        return jax.vjp(encode, trained)[1]

    traced = jax.make_jaxpr(save)(described.state.trained, described.frozen, batch).jaxpr
    made = {v for v in traced.outvars if not isinstance(v, Literal)} - set(traced.invars)
    return sum(v.aval.size * v.aval.dtype.itemsize for v in made)  # type: ignore[union-attr]


def count_saved_bytes(config: RunConfig, mesh: MeshConfig, *, remat: str | None = None) -> int:
    """What a device saves of a micro-batch's forward pass, under `remat` (the model's own where None)."""
    own = cut_config(config, mesh)
    model = dataclasses.replace(own.model, remat=remat or own.model.remat, cache_dtype="compute", weights=None)
    # Only what these shapes depend on, so that a search traces each program once.
    grpo = dataclasses.replace(own.grpo, batch_size=1, accumulation=1, reuse_rollout=False)
    own = RunConfig(model=model, grpo=grpo, tokenizer=own.tokenizer, prompt=own.prompt)
    one, prompts = _count_saved(own, 1), count_prompts(config, mesh)
    if grpo.mode == "lora" or prompts == 1:
        return one * prompts  # nothing of any size is without a batch
    # Trained weights in the compute dtype are saved once, whatever the batch.
    return one + (_count_saved(own, 2) - one) * (prompts - 1)


def count_memory(config: RunConfig, mesh: MeshConfig, described: StepState) -> Memory:
    """Memory of one device of `mesh` (all sizes given); `described` is `describe_state(config)`.

    Raises:
      ConfigError: a dimension of a weight does not divide over the mesh.
    """
    abstract, whole = make_abstract_mesh(mesh), make_abstract_mesh(dataclasses.replace(mesh, fsdp=1))
    model, grpo, vocabulary = config.model, config.grpo, config.tokenizer.vocab_size
    own = cut_config(config, mesh)
    activation = jnp.dtype(model.dtype).itemsize
    prompts = own.grpo.batch_size
    rolled = prompts * grpo.accumulation
    tokens_a_prompt = config.prompt.max_prompt_tokens + grpo.group_size * grpo.max_new_tokens

    trained = count_bytes(described.state.trained, abstract)
    resident = {
        "weights": count_bytes(described.frozen, abstract),
        "adapters" if grpo.mode == "lora" else "trained weights": trained,
        "optimizer": count_bytes(described.state.opt_state, abstract),
        "reference": count_bytes(described.reference, abstract),
    }
    kept = rolled * (model.num_layers * tokens_a_prompt + grpo.group_size * grpo.max_new_tokens) * model.hidden_size * activation
    kept = kept if grpo.reuse_rollout else 0

    stacks = [part["layers"] for part in (described.frozen, described.state.trained) if "layers" in part]
    layer = count_bytes(stacks, whole) // model.num_layers
    # A scan takes a layer out of the stack; along fsdp the next is gathered meanwhile. What a backward pass without rematerialisation
    # reads again is every layer as it was laid out for the forward pass.
    on_mesh = mesh.data * mesh.fsdp * mesh.tensor > 1
    layers = model.num_layers if model.remat == "none" and on_mesh and not grpo.reuse_rollout else 2 if mesh.fsdp > 1 else 1
    parts = mesh.fsdp * mesh.tensor
    chunk = min(config.logprob.chunk_tokens, prompts * mesh.fsdp * grpo.group_size * grpo.max_new_tokens)
    working = (
        LAYER_COPIES["reused" if grpo.reuse_rollout else model.remat] * count_saved_bytes(config, mesh, remat="none") / model.num_layers
    )
    update = {
        "gathered layer": layers * layer,
        "gradients": 2 * trained,  # the running sum, and those of a micro-batch
        "saved activations": 0 if grpo.reuse_rollout else count_saved_bytes(config, mesh),
        "layer or logits chunk": int(max(working, CHUNK_COPIES * 4 * chunk * vocabulary / parts)),
        "kept activations": 2 * kept,  # as the rollout left them, and cut into micro-batches
    }

    prompt_cache, completion_cache = count_cache_bytes(config, mesh)
    prompt_tokens = rolled * config.prompt.max_prompt_tokens
    # Blocks do not wait for each other: nothing keeps a compiler from having the scores of all of them at once.
    pairs = sum((end - start) * end for start, end in cut_prompt(config.prompt.max_prompt_tokens))
    scores = 4 * rolled * own.model.num_heads * pairs
    widest = max(SCORE_COPIES * scores, FEED_FORWARD_COPIES * prompt_tokens * own.model.intermediate_size * activation)
    prefill = int(widest + STATE_COPIES * prompt_tokens * model.hidden_size * activation)
    # A scan over layers writes the grown cache beside the one it read.
    logits = 4 * rolled * mesh.fsdp * grpo.group_size * vocabulary / parts
    decode = int(completion_cache + SAMPLING_COPIES * logits)
    rollout = {
        "gathered layer": (2 if mesh.fsdp > 1 else 1) * layer,
        "KV cache of prompts": prompt_cache,
        "KV cache of completions": completion_cache,
        "prefill or sampling": max(prefill - completion_cache, decode),
        "kept activations": kept,
    }
    drop = lambda owners: {name: int(size) for name, size in owners.items() if size}  # noqa: E731
    return Memory(drop(resident), drop(update), drop(rollout))
