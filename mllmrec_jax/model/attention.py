"""Attention on the group layout: G continuations attend to one shared prompt and each to itself.

Scores are made for a block of query rows at a time, so that peak memory grows with the block and not with G x P; blocks are recomputed
in the backward pass. Softmax is float32. Head axes: H query heads share K key/value heads, R = H / K queries each. Within, heads come
first, so that every product of scores takes its operands as they lie: queries are transposed once, scores never.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

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


def _exponentiate(*parts: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Softmax over the last axes of all parts together, not yet divided by its sum, which is the second result.

    A part is scores and the mask of those that count; every row has one that does.
    """
    masked = [jnp.where(mask, scores.astype(jnp.float32), -jnp.inf) for scores, mask in parts]
    top = functools.reduce(jnp.maximum, (jnp.max(scores, axis=-1, keepdims=True) for scores in masked))
    weights = [jnp.exp(scores - jax.lax.stop_gradient(top)) for scores in masked]
    return weights, sum((jnp.sum(part, axis=-1, keepdims=True) for part in weights), jnp.float32(0))


# What a block keeps for its backward pass, which needs it for the division: without it the products with values would be made again.
KEEP_MIXED = jax.checkpoint_policies.save_only_these_names("mixed")


def _divide(mixed: jax.Array, total: jax.Array) -> jax.Array:
    """Softmax's division after the mixing of values, which is narrower than scores are."""
    mixed, total = (checkpoint_name(x, "mixed") for x in (mixed, total))
    return (mixed / total).astype(mixed.dtype)


def cut_prompt(size: int) -> list[tuple[int, int]]:
    """(start, end) of the blocks of query rows of a prompt of `size` tokens."""
    block = PROMPT_BLOCK * max(1, -(-size // (PROMPT_BLOCK * MAX_PROMPT_BLOCKS)))
    return [(start, min(start + block, size)) for start in range(0, size, block)]


@jax.named_scope("attend")
def attend_prompt(q: Float[Array, "B P H d"], k: Float[Array, "B P K d"], v: Float[Array, "B P K d"]) -> Float[Array, "B P H d"]:
    """Causal self-attention of right-padded prompts: padding stands behind every real row, so causality already hides it.

    A block of query rows meets the keys up to its own end, and no scores are made of those behind it. Prompts of up to `QUERY_BLOCK` rows
    keep theirs for the backward pass.
    """
    b, p, h, d = q.shape
    kv = k.shape[2]
    q = (q * d**-0.5).reshape(b, p, kv, h // kv, d).transpose(0, 2, 3, 1, 4)
    k, v = (x.swapaxes(1, 2) for x in (k, v))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        rows, keys = q.shape[3], k.shape[2]
        past = jnp.arange(keys) <= keys - rows + jnp.arange(rows)[:, None]
        (weights,), total = _exponentiate((jnp.einsum("bkrqd,bkpd->bkrqp", q, k), past))
        return _divide(jnp.einsum("bkrqp,bkpd->bkrqd", weights.astype(v.dtype), v), total)

    attend_block = jax.checkpoint(attend, policy=KEEP_MIXED) if p > QUERY_BLOCK else attend
    out = [attend_block(q[:, :, :, start:end], k[:, :, :end], v[:, :, :end]) for start, end in cut_prompt(p)]
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(b, p, h, d)


def _attend_members(
    q: Float[Array, "B K G R Q d"],
    k: Float[Array, "B K G C d"],
    v: Float[Array, "B K G C d"],
    prompt_k: Float[Array, "B K P d"],
    prompt_v: Float[Array, "B K P d"],
    length: Int[Array, " B"],
    in_own: Bool[Array, "Q C"],
) -> Float[Array, "B K G R Q d"]:
    """Query rows of members on their prompt, all members in one product, and on those of their own tokens that `in_own` shows."""
    in_prompt = (jnp.arange(prompt_k.shape[2]) < length[:, None])[:, None, None, None, None, :]
    to_prompt, to_own = jnp.einsum("bkgrqd,bkpd->bkgrqp", q, prompt_k), jnp.einsum("bkgrqd,bkgcd->bkgrqc", q, k)
    (prompt, own), total = _exponentiate((to_prompt, in_prompt), (to_own, in_own))
    out = jnp.einsum("bkgrqp,bkpd->bkgrqd", prompt.astype(v.dtype), prompt_v)
    return _divide(out + jnp.einsum("bkgrqc,bkgcd->bkgrqd", own.astype(v.dtype), v), total)


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
    b, g, c, h, d = q.shape
    kv = k.shape[3]
    q = (q * d**-0.5).reshape(b, g, c, kv, h // kv, d).transpose(0, 3, 1, 4, 2, 5)
    k, v = (jnp.moveaxis(x, 3, 1) for x in (k, v))
    prompt_k, prompt_v = (x.swapaxes(1, 2) for x in (prompt_k, prompt_v))
    past = jnp.arange(c) <= jnp.arange(c)[:, None]

    def attend(own: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _attend_members(*own, prompt_k, prompt_v, length, past)

    members = max(1, QUERY_BLOCK // c)
    if members >= g:
        out = attend((q, k, v))
    else:
        # Whole members a block, so that a block's own keys are its own; G is padded up to full blocks.
        blocks = -(-g // members)

        def split(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, [(0, 0), (0, 0), (0, blocks * members - g)] + [(0, 0)] * (x.ndim - 3))
            return jnp.moveaxis(x.reshape(b, kv, blocks, members, *x.shape[3:]), 2, 0)

        out = jax.lax.map(jax.checkpoint(attend, policy=KEEP_MIXED), (split(q), split(k), split(v)))
        out = jnp.moveaxis(out, 0, 2).reshape(b, kv, blocks * members, *out.shape[4:])[:, :, :g]
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(b, g, c, h, d)


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

    The cache has its heads first, so that nothing is transposed at every token.
    """
    b, g, h, d = q.shape
    kv, c = k.shape[1], k.shape[3]
    q = (q * d**-0.5).reshape(b, g, kv, h // kv, 1, d).swapaxes(1, 2)
    out = _attend_members(q, k, v, prompt_k, prompt_v, length, (jnp.arange(c) <= index)[None, :])
    return out.swapaxes(1, 2).reshape(b, g, h, d)
