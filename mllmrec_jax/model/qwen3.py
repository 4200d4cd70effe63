"""Decoder of the Qwen3 family (Qwen2 and Llama by configuration) in Flax NNX, on the group layout.

Used functionally: `graphdef, ... = nnx.split(model, ...)`, and every step merges inside `jax.jit`. Layers are stacked on a leading axis
and run by `lax.scan`. The reference policy is the same module called with `adapters=False`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mllmrec_jax.config import ModelConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.attention import attend_cached, attend_group, attend_prompt, rotate
from mllmrec_jax.model.kv_cache import KeyValues, pack, unpack
from mllmrec_jax.model.lora import Linear, draw_normal
from mllmrec_jax.sharding import constrain, gather_weights, take_rows


class Generated(NamedTuple):
    """What generation computes of prompts ([B, ...]) or of one token of each member ([B, G, ...])."""

    hidden: Float[Array, "... D"]
    """What the head reads: of the prompt's last token, or of the token given."""
    output: Float[Array, "... D"]
    """The same before the last norm."""
    cache: KeyValues
    inputs: Array | None
    """Each layer's input, [L, B, P, D] or [L, B, G, D], where it is kept."""


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467), in float32."""

    def __init__(self, size: int, *, stack: tuple[int, ...], eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((*stack, size), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention's projections and norms; the attention pattern is the caller's."""

    def __init__(self, config: ModelConfig, *, stack: tuple[int, ...], dtype: jnp.dtype, rngs: nnx.Rngs):
        inner, kv_inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        bias = config.family == "qwen2"
        self.q_proj = Linear(config.hidden_size, inner, axes=("embed", "heads"), stack=stack, bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, kv_inner, axes=("embed", "heads"), stack=stack, bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, kv_inner, axes=("embed", "heads"), stack=stack, bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(inner, config.hidden_size, axes=("heads", "embed"), stack=stack, bias=False, dtype=dtype, rngs=rngs)
        # A random W_O leaves copying to be found by chance. W_O = W_V^T of its head makes each value pass through as it came, so that a
        # model trained from random weights reads lists within minutes (after Trockman and Kolter 2023, arXiv:2305.09828).
        v = jnp.swapaxes(self.v_proj.kernel[...], -1, -2).reshape(*stack, config.num_kv_heads, 1, config.head_dim, config.hidden_size)
        repeated = jnp.broadcast_to(v, (*stack, config.num_kv_heads, config.num_heads // config.num_kv_heads, *v.shape[-2:]))
        self.o_proj.kernel[...] = repeated.reshape(self.o_proj.kernel[...].shape)
        normed = config.family == "qwen3"
        self.q_norm = RMSNorm(config.head_dim, stack=stack, eps=config.norm_eps, dtype=dtype) if normed else None
        self.k_norm = RMSNorm(config.head_dim, stack=stack, eps=config.norm_eps, dtype=dtype) if normed else None
        self.head_dim = config.head_dim
        self.theta, self.scaling = config.rope_theta, config.rope_scaling

    def project(self, x: jax.Array, position: jax.Array, *, adapters: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., D] at `position` [...] -> q [..., H, d], k and v [..., K, d]."""
        q, k, v = (
            constrain(linear(x, adapters=adapters).reshape(*x.shape[:-1], -1, self.head_dim), "batch", None, "heads", None)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(x, position, theta=self.theta, scaling=self.scaling) for x in (q, k))
        return q, k, v


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, stack: tuple[int, ...], dtype: jnp.dtype, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, f, axes=("embed", "ffn"), stack=stack, bias=False, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(d, f, axes=("embed", "ffn"), stack=stack, bias=False, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(f, d, axes=("ffn", "embed"), stack=stack, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, adapters: bool) -> jax.Array:
        gated = jax.nn.silu(self.gate_proj(x, adapters=adapters)) * self.up_proj(x, adapters=adapters)
        return self.down_proj(constrain(gated, "batch", None, "ffn"), adapters=adapters)


Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def _drop(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    # The barrier makes the mask once: without it XLA's CPU backend draws the random bits again in every fusion that reads them.
    keep = jax.lax.optimization_barrier(jax.random.bernoulli(key, 1 - rate, x.shape))
    return jnp.where(keep, x / (1 - rate), 0)


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig, *, stack: tuple[int, ...], dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = Attention(config, stack=stack, dtype=dtype, rngs=rngs)
        self.feed_forward = FeedForward(config, stack=stack, dtype=dtype, rngs=rngs)
        self.attention_norm = RMSNorm(config.hidden_size, stack=stack, eps=config.norm_eps, dtype=dtype)
        self.feed_forward_norm = RMSNorm(config.hidden_size, stack=stack, eps=config.norm_eps, dtype=dtype)
        self.dropout = config.dropout

    def __call__(
        self, x: jax.Array, position: jax.Array, attend: Attend, *, adapters: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D], `attend(q, k, v)` -> ([B, T, H, d], what it keeps)."""
        keys = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("attention"):
            q, k, v = self.attention.project(self.attention_norm(x), position, adapters=adapters)
            mixed, kept = attend(q, k, v)
            mixed = mixed.reshape(*x.shape[:-1], -1)
            x = constrain(x + _drop(self.attention.o_proj(mixed, adapters=adapters), keys[0], self.dropout), "batch", None, None)
        with jax.named_scope("feed_forward"):
            out = self.feed_forward(self.feed_forward_norm(x), adapters=adapters)
            return constrain(x + _drop(out, keys[1], self.dropout), "batch", None, None), kept


REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


class Decoder(nnx.Module):
    """Token ids in, hidden states out. The head is applied by the log-prob operation, which never holds tokens x vocabulary."""

    def __init__(self, config: ModelConfig, *, vocab_size: int, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.param_dtype)
        scale = config.hidden_size**-0.5
        self.config = config
        self.vocab_size = vocab_size
        embedding = draw_normal(rngs, (vocab_size, config.hidden_size), scale=scale).astype(dtype)
        self.embedding = nnx.Param(embedding, axes=("vocab", None))
        self.layers = Layer(config, stack=(config.num_layers,), dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, stack=(), eps=config.norm_eps, dtype=dtype)
        head = None if config.tie_embeddings else draw_normal(rngs, (vocab_size, config.hidden_size), scale=scale)
        self.head = None if head is None else nnx.Param(head.astype(dtype), axes=("vocab", None))

    @property
    def head_weight(self) -> jax.Array:
        """[V, D], in the compute dtype."""
        weight = self.embedding if self.head is None else self.head
        return weight[...].astype(self.config.dtype)

    def embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Rows of the embedding, in the compute dtype."""
        with jax.named_scope("embed"):
            return take_rows(self.embedding[...], tokens).astype(self.config.dtype)

    def _run_layers(
        self,
        x: jax.Array,
        position: jax.Array,
        attend: Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
        *,
        adapters: tuple[bool, ...],
        per_layer: Any = None,
        dropout_key: jax.Array | None = None,
        remat: bool = False,
        keep_inputs: bool = False,
    ) -> tuple[tuple[jax.Array, ...], Any, jax.Array | None]:
        """Scans the stacked layers; `attend` gets its layer's slice of `per_layer` first.

        Returns x once for each of `adapters` (with or without them); of the first of these, what `attend` kept, stacked, and where asked
        for each layer's input. Each layer's weights are gathered once for all.
        """
        graphdef, stacked = nnx.split(self.layers)
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.num_layers)

        def body(xs: tuple[jax.Array, ...], scanned: Any) -> tuple[tuple[jax.Array, ...], Any]:
            state, own, key = scanned
            layer = nnx.merge(graphdef, gather_weights(state))
            out = [
                layer(x, position, lambda q, k, v: attend(own, q, k, v), adapters=on, key=key) for x, on in zip(xs, adapters, strict=True)
            ]
            return tuple(x for x, _ in out), (out[0][1], xs[0] if keep_inputs else None)

        if remat and self.config.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        with jax.named_scope("layers"):
            xs, (kept, inputs) = jax.lax.scan(body, (x,) * len(adapters), (stacked, per_layer, keys))
        return xs, kept, inputs

    def encode_group(
        self, batch: GroupBatch, *, adapters: bool = True, dropout_key: jax.Array | None = None
    ) -> tuple[Float[Array, "B P D"], Float[Array, "B G C D"]]:
        """Hidden states of every prompt and completion token, each prompt computed once for its G completions."""
        return self._encode(batch, (adapters,), dropout_key)[0]

    def encode_with_reference(
        self, batch: GroupBatch
    ) -> tuple[tuple[Float[Array, "B P D"], Float[Array, "B G C D"]], tuple[Float[Array, "B P D"], Float[Array, "B G C D"]]]:
        """`encode_group` of the policy, and of the reference, which is the policy without its adapters, in one run through the layers."""
        policy, reference = self._encode(batch, (True, False), None)
        return policy, reference

    def _encode(self, batch: GroupBatch, adapters: tuple[bool, ...], dropout_key: jax.Array | None) -> list[tuple[jax.Array, jax.Array]]:
        ids, position = lay_out_group(batch)
        embed_key, layers_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = _drop(self.embed(ids), embed_key, self.config.dropout)

        def attend(_: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return attend_tokens(q, k, v, batch), None

        xs, *_ = self._run_layers(x, position, attend, adapters=adapters, dropout_key=layers_key, remat=True)
        return [split_tokens(self.norm(x), batch) for x in xs]

    def prefill(
        self, prompt: Int[Array, "B P"], prompt_length: Int[Array, " B"], *, adapters: bool = True, keep_inputs: bool = False
    ) -> Generated:
        """States [B, D] of each prompt's last token, and the prompt's keys and values."""
        b, p = prompt.shape
        stored = self.config.cache_dtype

        def attend(_: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KeyValues]:
            return attend_prompt(q, k, v), KeyValues(*(pack(jnp.swapaxes(x, 1, 2), stored) for x in (k, v)))

        position = jnp.broadcast_to(jnp.arange(p), (b, p))
        (x,), cache, inputs = self._run_layers(self.embed(prompt), position, attend, adapters=(adapters,), keep_inputs=keep_inputs)
        last = jnp.take_along_axis(x, (prompt_length - 1)[:, None, None], axis=1)[:, 0]
        return Generated(self.norm(last), last, cache, inputs)

    def decode(
        self,
        token: Int[Array, "B G"],
        index: Int[Array, ""],
        prompt_length: Int[Array, " B"],
        prompt_cache: KeyValues,
        cache: KeyValues,
        *,
        adapters: bool = True,
        keep_inputs: bool = False,
    ) -> Generated:
        """One decoding step: completion token number `index` of all members in, its states [B, G, D] and the grown cache out."""
        b, g = token.shape
        position = jnp.broadcast_to((prompt_length + index)[:, None], (b, g))

        def attend(own: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KeyValues]:
            prompt, cached = own
            new = KeyValues(*(pack(jnp.swapaxes(x, 1, 2), self.config.cache_dtype) for x in (k, v)))
            grown = jax.tree.map(lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, index, axis=3), cached, new)
            own_k, own_v, prompt_k, prompt_v = (unpack(x, q.dtype) for x in (*grown, *prompt))
            return attend_cached(q, own_k, own_v, prompt_k, prompt_v, prompt_length, index), grown

        per_layer = (prompt_cache, cache)
        (x,), cache, inputs = self._run_layers(
            self.embed(token), position, attend, adapters=(adapters,), per_layer=per_layer, keep_inputs=keep_inputs
        )
        return Generated(self.norm(x), x, cache, inputs)


def lay_out_group(batch: GroupBatch) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Token ids and positions on one token axis, T = P + G C: the prompt, then its completions.

    One axis for all, so that each layer's weights are read once for prompts and completions.
    """
    b, p = batch.prompt.shape
    g, c = batch.completion.shape[1:]
    ids = jnp.concatenate([batch.prompt, batch.completion.reshape(b, g * c)], axis=1)
    offsets = jnp.tile(jnp.arange(c), g)
    return ids, jnp.concatenate([jnp.broadcast_to(jnp.arange(p), (b, p)), batch.prompt_length[:, None] + offsets], axis=1)


def split_tokens(x: Float[Array, "B T ..."], batch: GroupBatch) -> tuple[Float[Array, "B P ..."], Float[Array, "B G C ..."]]:
    """The parts of an array on `lay_out_group`'s token axis."""
    p = batch.prompt.shape[1]
    return x[:, :p], x[:, p:].reshape(*batch.completion.shape, *x.shape[2:])


def attend_tokens(
    q: Float[Array, "B T H d"], k: Float[Array, "B T K d"], v: Float[Array, "B T K d"], batch: GroupBatch
) -> Float[Array, "B T H d"]:
    """Attention on `lay_out_group`'s token axis: prompts to themselves, completions to their prompt and their own member."""
    (q_p, q_c), (k_p, k_c), (v_p, v_c) = (split_tokens(x, batch) for x in (q, k, v))
    prompt = attend_prompt(q_p, k_p, v_p)
    own = attend_group(q_c, k_c, v_c, k_p, v_p, batch.prompt_length)
    return jnp.concatenate([prompt, own.reshape(len(own), -1, *own.shape[3:])], axis=1)


def predicting_states(
    prompt_hidden: Float[Array, "B P D"], completion_hidden: Float[Array, "B G C D"], prompt_length: Int[Array, " B"]
) -> Float[Array, "B G C D"]:
    """The hidden state that predicts each completion token: the last prompt token's for the first, then the token before."""
    last = jnp.take_along_axis(prompt_hidden, (prompt_length - 1)[:, None, None], axis=1)
    first = jnp.broadcast_to(last[:, None], (*completion_hidden.shape[:2], 1, completion_hidden.shape[-1]))
    return jnp.concatenate([first, completion_hidden[:, :, :-1]], axis=2)
