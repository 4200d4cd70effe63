"""Keys and values kept for decoding: as computed, or stored smaller."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


class KeyValues(NamedTuple):
    """Of every layer, heads first, as attention reads them: a prompt's `[L, B, K, P, d]`, a group's completions' `[L, B, K, G, C, d]`;
    arrays or `Quantised`."""

    k: Any
    v: Any


class Quantised(NamedTuple):
    """One vector of a head is `values * scale`: symmetric, a scale for each token and head (as in KVQuant, arXiv:2401.18079, without its
    outliers)."""

    values: Int8[Array, "... d"]
    scale: Float[Array, "... 1"]


def pack(x: Float[Array, "... d"], dtype: str) -> Any:
    """`x` as it is kept: dtype `compute` keeps it as it is, `bfloat16` rounds, `int8` quantises."""
    if dtype == "compute":
        return x
    if dtype == "bfloat16":
        return x.astype(jnp.bfloat16)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32) / 127
    values = jnp.round(x.astype(jnp.float32) / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny))
    return Quantised(values.astype(jnp.int8), scale)


def unpack(x: Any, dtype: Any) -> Float[Array, "... d"]:
    """What `pack` was given, up to its rounding, as `dtype`."""
    return (x.values * x.scale).astype(dtype) if isinstance(x, Quantised) else x.astype(dtype)


def make_empty_cache(prompt: KeyValues, group_size: int, new_tokens: int) -> KeyValues:
    """Zeros for the completions of a group, stored as `prompt` is."""

    def empty(x: jax.Array) -> jax.Array:
        layers, b, heads, _, size = x.shape
        return jnp.zeros((layers, b, heads, group_size, new_tokens, size), x.dtype)

    return jax.tree.map(empty, prompt)
