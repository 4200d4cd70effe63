"""Rollout: G sampled completions a prompt, the prompt computed and cached once a group."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllmrec_jax.config import ConfigError
from mllmrec_jax.generate.sampling import sample_tokens
from mllmrec_jax.model.kv_cache import KeyValues, make_empty_cache
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.model.replay import Activations
from mllmrec_jax.sharding import constrain


class Rollout(NamedTuple):
    """Sampled completions, right-padded; the stop token counts into the length."""

    completion: Int[Array, "B G C"]
    completion_length: Int[Array, "B G"]
    stopped: Array
    """[B, G] bool: False where the completion was truncated at C."""
    logp_raw: Float[Array, "B G C"]
    logp_sampled: Float[Array, "B G C"]
    activations: Activations | None = None
    """Where they are kept."""


def check_positions(prompt_width: int, max_new_tokens: int, max_position: int) -> None:
    """Raises ConfigError where a prompt and its completion do not fit the model."""
    if prompt_width + max_new_tokens > max_position:
        raise ConfigError(
            f"a prompt of {prompt_width} tokens and {max_new_tokens} new tokens need {prompt_width + max_new_tokens} positions, "
            f"expected at most model.max_position = {max_position}; lower prompt.max_prompt_tokens or grpo.max_new_tokens"
        )


def make_keys(seed: int | Array, step: int | Array, row: Int[Array, " B"], group_size: int) -> Array:
    """Keys [B, G], one a (seed, step, global row, group member): a completion does not depend on its place in the batch or mesh."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    by_row = jax.vmap(lambda r: jax.random.fold_in(key, r))(row)
    return jax.vmap(lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(jnp.arange(group_size)))(by_row)


def rollout_group(
    model: Decoder,
    prompt: Int[Array, "B P"],
    prompt_length: Int[Array, " B"],
    keys: Array,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: tuple[int, ...],
    pad_id: int = 0,
    adapters: bool = True,
    keep_activations: bool = False,
) -> Rollout:
    """Samples completions for keys [B, G] in one compiled loop that ends when every row has stopped.

    With temperature 0 the most probable token is taken. `keep_activations` is for an update that does not repeat the forward pass
    (`model.replay`): L (P + G C) D values a prompt.
    """
    b = prompt.shape[0]
    g, c = keys.shape[1], max_new_tokens
    check_positions(prompt.shape[1], c, model.config.max_position)
    head = model.head_weight

    def draw(hidden: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        with jax.named_scope("sample"):
            rows = constrain(hidden.reshape(b * g, -1), "row", None)
            logits = jax.lax.dot_general(rows, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            logits = constrain(logits, "row", "vocab")
            if temperature == 0:
                log_p = jax.nn.log_softmax(logits)
                token = jnp.argmax(log_p, axis=-1).astype(jnp.int32)
                raw = jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0]
                sample = (token, raw, jnp.zeros_like(raw))
            else:
                uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, index)))(keys.reshape(-1))
                sample = sample_tokens(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)
            return tuple(constrain(x.reshape(b, g), "batch", None) for x in sample)  # type: ignore[return-value]

    def record(state: dict[str, jax.Array], hidden: jax.Array, output: jax.Array) -> dict[str, jax.Array]:
        """Samples token number `index` from `hidden` [B, G, D] and writes it where a member has not stopped."""
        index, live = state["index"], ~state["stopped"]
        token, raw, sampled = draw(hidden, index)
        token = jnp.where(live, token, pad_id)
        stop = jnp.any(token[..., None] == jnp.array(stop_ids, jnp.int32), axis=-1) & live if stop_ids else jnp.zeros_like(live)
        put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), index, axis=2)  # noqa: E731
        kept = {"predicting": put(state["predicting"], output)} if keep_activations else {}
        return {
            **state,
            **kept,
            "index": index + 1,
            "token": token,
            "stopped": state["stopped"] | stop,
            "completion": put(state["completion"], token),
            "completion_length": state["completion_length"] + live,
            "logp_raw": put(state["logp_raw"], jnp.where(live, raw, 0)),
            "logp_sampled": put(state["logp_sampled"], jnp.where(live, sampled, 0)),
        }

    with jax.named_scope("prefill"):
        first = model.prefill(prompt, prompt_length, adapters=adapters, keep_inputs=keep_activations)
    state = {
        "index": jnp.int32(0),
        "token": jnp.zeros((b, g), jnp.int32),
        "stopped": jnp.zeros((b, g), bool),
        "completion": jnp.full((b, g, c), pad_id, jnp.int32),
        "completion_length": jnp.zeros((b, g), jnp.int32),
        "logp_raw": jnp.zeros((b, g, c), jnp.float32),
        "logp_sampled": jnp.zeros((b, g, c), jnp.float32),
    }
    if keep_activations:
        size, dtype = first.output.shape[-1], first.output.dtype
        state["predicting"] = constrain(jnp.zeros((b, g, c, size), dtype), "batch", None, None, None)
        state["inputs"] = constrain(jnp.zeros((model.config.num_layers, b, g, c, size), dtype), None, "batch", None, None, None)
    state = record(state, *(jnp.broadcast_to(x[:, None], (b, g, x.shape[-1])) for x in (first.hidden, first.output)))
    cache = jax.tree.map(lambda x: constrain(x, None, "batch", "heads", None, None, None), make_empty_cache(first.cache, g, c))

    def unfinished(carry: tuple[dict[str, jax.Array], KeyValues]) -> jax.Array:
        return (carry[0]["index"] < c) & ~jnp.all(carry[0]["stopped"])

    def step(carry: tuple[dict[str, jax.Array], KeyValues]) -> tuple[dict[str, jax.Array], KeyValues]:
        state, cache = carry
        given = state["index"] - 1
        made = model.decode(state["token"], given, prompt_length, first.cache, cache, adapters=adapters, keep_inputs=keep_activations)
        if made.inputs is not None:
            state = {**state, "inputs": jax.lax.dynamic_update_index_in_dim(state["inputs"], made.inputs, given, axis=3)}
        return record(state, made.hidden, made.output), made.cache

    with jax.named_scope("decode"):
        state, _ = jax.lax.while_loop(unfinished, step, (state, cache))
    kept = None if first.inputs is None else Activations(first.inputs, state["inputs"], state["predicting"])
    return Rollout(state["completion"], state["completion_length"], state["stopped"], state["logp_raw"], state["logp_sampled"], kept)
