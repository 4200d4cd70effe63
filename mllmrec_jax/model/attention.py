"""Attention on the group layout: G continuations attend to one shared prompt and each to itself.

Scores are made for a block of query rows at a time, so that peak memory grows with the block and not with G x P; blocks are recomputed
in the backward pass. Softmax is float32. Head axes: H query heads share K key/value heads, R = H / K queries each.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllmrec_jax.config import RopeScalingConfig

NO_ROPE_SCALING = RopeScalingConfig()

# Query rows whose scores exist at a time. 512 rows x 2048 keys x 32 heads of float32 are 128 MiB.
QUERY_BLOCK = 512
# Of prompts: smaller blocks leave out more of the scores that causality hides, and stay in a CPU's cache; each is a piece of program.
PROMPT_BLOCK = 128
MAX_PROMPT_BLOCKS = 16


def rotary_frequencies(head_dim: int, *, theta: float, scaling: RopeScalingConfig) -> Float[Array, " half"]:
    """Radians a position of each rotary pair: theta^(-2 i / head_dim) (Su et al. 2021, arXiv:2104.09864), float32.

    With `scaling.factor` above 1, rescaled as Llama 3.1 does (Grattafiori et al. 2024, arXiv:2407.21783; `apply_scaling` in Meta's
    llama-models): a pair that turns fewer than `low_freq_factor` times within the original context is slowed by `factor`, one that
    turns more than `high_freq_factor` times is kept, and between the two the weight is linear in the number of turns.
    """
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.factor == 1:
        return frequency
    turns = scaling.original_max_position * frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def rotate(
    x: Float[Array, "... H d"], position: Int[Array, "..."], *, theta: float, scaling: RopeScalingConfig = NO_ROPE_SCALING
) -> Float[Array, "... H d"]:
    """Rotary embedding in the half-split convention (Su et al. 2021, arXiv:2104.09864), computed in float32."""
    half = x.shape[-1] // 2
    frequency = rotary_frequencies(x.shape[-1], theta=theta, scaling=scaling)
    angle = position[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def cut_prompt(size: int) -> list[tuple[int, int]]:
    """(start, end) of the blocks of query rows of a prompt of `size` tokens."""
    block = PROMPT_BLOCK * max(1, -(-size // (PROMPT_BLOCK * MAX_PROMPT_BLOCKS)))
    return [(start, min(start + block, size)) for start in range(0, size, block)]


@jax.named_scope("attend")
def attend_prompt(q: Float[Array, "B P H d"], k: Float[Array, "B P K d"], v: Float[Array, "B P K d"]) -> Float[Array, "B P H d"]:
    """Causal self-attention of right-padded prompts: padding stands behind every real row, so causality already hides it.

    A block of query rows meets the keys up to its own end, and no scores are made of those behind it.
    """
    b, p, h, d = q.shape
    kv = k.shape[2]
    q = q.reshape(b, p, kv, h // kv, d) * d**-0.5

    def attend(q_block: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bqkrd,bpkd->bkrqp", q_block, k)
        rows, keys = scores.shape[-2:]
        weights = _softmax(scores, jnp.arange(keys)[None, :] <= keys - rows + jnp.arange(rows)[:, None])
        return jnp.einsum("bkrqp,bpkd->bqkrd", weights.astype(v.dtype), v)

    blocks = cut_prompt(p)
    attend_block = jax.checkpoint(attend) if len(blocks) > 1 else attend
    out = [attend_block(q[:, start:end], k[:, :end], v[:, :end]) for start, end in blocks]
    return jnp.concatenate(out, axis=1).reshape(b, p, h, d)


@jax.named_scope("attend")
def attend_group(
    q: Float[Array, "B G C H d"],
    k: Float[Array, "B G C K d"],
    v: Float[Array, "B G C K d"],
    prompt_k: Float[Array, "B P K d"],
    prompt_v: Float[Array, "B P K d"],
    length: Int[Array, " B"],
) -> Float[Array, "B G C H d"]:
    """Attention of completion tokens to their prompt (stored once a group) and to their own member's tokens up to themselves."""
    b, g, rows, h, d = q.shape
    c, kv = k.shape[2], k.shape[3]
    p = prompt_k.shape[1]
    q = q.reshape(b, g, rows, kv, h // kv, d) * d**-0.5
    in_prompt = jnp.arange(p)[None, :] < length[:, None]
    causal = jnp.arange(c)[None, :] <= jnp.arange(rows)[:, None]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        members = q.shape[1]
        to_prompt = jnp.einsum("bgqkrd,bpkd->bkgrqp", q, prompt_k)
        to_own = jnp.einsum("bgqkrd,bgckd->bkgrqc", q, k)
        mask = jnp.concatenate(
            [
                jnp.broadcast_to(in_prompt[:, None, None, None, None, :], (b, 1, 1, 1, rows, p)),
                jnp.broadcast_to(causal, (b, 1, 1, 1, rows, c)),
            ],
            axis=-1,
        )
        weights = _softmax(jnp.concatenate([to_prompt, to_own], axis=-1), mask).astype(v.dtype)
        out = jnp.einsum("bkgrqp,bpkd->bgqkrd", weights[..., :p], prompt_v)
        out += jnp.einsum("bkgrqc,bgckd->bgqkrd", weights[..., p:], v)
        return out.reshape(b, members, rows, h, d)

    members = max(1, QUERY_BLOCK // rows)
    if members >= g:
        return attend(q, k, v)
    # Whole members a block, so that a block's own keys are its own; G is padded up to full blocks.
    blocks = -(-g // members)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, blocks * members - g)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(b, blocks, members, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(jax.checkpoint(lambda args: attend(*args)), (split(q), split(k), split(v)))
    return out.swapaxes(0, 1).reshape(b, blocks * members, rows, h, d)[:, :g]


@jax.named_scope("attend")
def attend_cached(
    q: Float[Array, "B G H d"],
    k: Float[Array, "B K G C d"],
    v: Float[Array, "B K G C d"],
    prompt_k: Float[Array, "B K P d"],
    prompt_v: Float[Array, "B K P d"],
    length: Int[Array, " B"],
    index: Int[Array, ""],
) -> Float[Array, "B G H d"]:
    """`attend_group` of the members' token number `index` alone, on a cache whose later slots hold anything finite.

    The cache has its heads first: matrix products take it as it lies, and nothing is transposed at every token. A group's queries meet
    the prompt's keys in one product.
    """
    b, g, h, d = q.shape
    kv, c, p = k.shape[1], k.shape[3], prompt_k.shape[2]
    r = h // kv
    q = (q * d**-0.5).reshape(b, g, kv, r, d).transpose(0, 2, 1, 3, 4)
    to_prompt = jnp.einsum("bkmd,bkpd->bkmp", q.reshape(b, kv, g * r, d), prompt_k).reshape(b, kv, g, r, p)
    to_own = jnp.einsum("bkgrd,bkgcd->bkgrc", q, k)
    in_prompt = (jnp.arange(p) < length[:, None])[:, None, None, None, :]
    mask = [jnp.broadcast_to(in_prompt, (b, 1, 1, 1, p)), jnp.broadcast_to(jnp.arange(c) <= index, (b, 1, 1, 1, c))]
    weights = _softmax(jnp.concatenate([to_prompt, to_own], axis=-1), jnp.concatenate(mask, axis=-1)).astype(v.dtype)
    out = jnp.einsum("bkmp,bkpd->bkmd", weights[..., :p].reshape(b, kv, g * r, p), prompt_v).reshape(b, kv, g, r, d)
    out += jnp.einsum("bkgrc,bkgcd->bkgrd", weights[..., p:], v)
    return out.transpose(0, 2, 1, 3, 4).reshape(b, g, h, d)
