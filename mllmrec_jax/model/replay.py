"""The policy's forward pass on a rollout, taken from the rollout itself.

On-policy, the update's forward pass over prompts and completions computes what generation has computed already. With each layer's input
kept, its values need no second pass: the backward pass runs layer by layer from the inputs, as it does under full rematerialisation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.qwen3 import Decoder, attend_tokens, lay_out_group, predicting_states, split_tokens
from mllmrec_jax.sharding import gather_weights


class Activations(NamedTuple):
    """What generation keeps for the update, in the compute dtype; entries of tokens that were not generated are zeros."""

    prompt: Float[Array, "L B P D"]
    """Input of each layer."""
    completion: Float[Array, "L B G C D"]
    predicting: Float[Array, "B G C D"]
    """Output of the last layer where each completion token was predicted, before the last norm."""


def replay_group(model: Decoder, batch: GroupBatch, kept: Activations, *, trained: Any) -> Float[Array, "B G C D"]:
    """The states that predict each completion token, with the gradients of `Decoder.encode_group` and the values in `kept`.

    `trained` is the nnx filter of the variables that gradients reach. Costs the backward pass of full rematerialisation and no
    forward pass before it. Equal to encoding the batch again up to rounding, where the weights are those that generated it.
    """
    graphdef, own, rest = nnx.split(model.layers, trained, ...)
    ids, position = lay_out_group(batch)

    @jax.custom_vjp
    def run(own: Any, x: jax.Array, rest: Any, position: jax.Array, batch: GroupBatch, kept: Activations) -> jax.Array:
        return kept.predicting

    def forward(own: Any, x: jax.Array, rest: Any, position: jax.Array, batch: GroupBatch, kept: Activations) -> tuple[jax.Array, Any]:
        return kept.predicting, (own, rest, position, batch, kept)

    def backward(residuals: Any, gradient: jax.Array) -> tuple[Any, ...]:
        own, rest, position, batch, kept = residuals

        def pick(x: jax.Array) -> jax.Array:
            return predicting_states(*split_tokens(x, batch), batch.prompt_length)

        def step(gradient: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
            own, rest, prompt, completion = scanned

            def apply(own: Any, x: jax.Array) -> jax.Array:
                layer = nnx.merge(graphdef, gather_weights(own), gather_weights(rest))
                return layer(x, position, lambda q, k, v: (attend_tokens(q, k, v, batch), None), adapters=True)[0]

            x = jnp.concatenate([prompt, completion.reshape(len(prompt), -1, prompt.shape[-1])], axis=1)
            _, pull = jax.vjp(apply, own, x)
            own_gradient, gradient = pull(gradient)
            return gradient, own_gradient

        tokens = jax.ShapeDtypeStruct((*position.shape, gradient.shape[-1]), gradient.dtype)
        (gradient,) = jax.linear_transpose(pick, tokens)(gradient)
        with jax.named_scope("layers"):
            gradient, own_gradient = jax.lax.scan(step, gradient, (own, rest, kept.prompt, kept.completion), reverse=True)
        return own_gradient, gradient, None, None, None, None

    run.defvjp(forward, backward)
    return model.norm(run(own, model.embed(ids), rest, position, batch, kept))
