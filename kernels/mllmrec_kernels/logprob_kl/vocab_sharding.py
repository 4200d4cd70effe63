"""Rows and vocabulary over a mesh: what one device holds, and the few ways in which devices meet.

An axis may cut both rows and vocabulary (FSDP does). Its devices then gather each other's rows, chunk by chunk, and every one of them
works on all of these with its own part of the vocabulary; afterwards each keeps what belongs to its own rows. Outside `shard_map`, and
without a sharding, nothing is communicated.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh


class VocabSharding(NamedTuple):
    """Where rows and vocabulary lie on a mesh."""

    mesh: Mesh | AbstractMesh
    row_axes: tuple[str, ...]
    """Mesh axes that cut N; their product divides N."""
    vocab_axes: tuple[str, ...]
    """Mesh axes that cut V; their product divides V."""

    @property
    def shared_axes(self) -> tuple[str, ...]:
        """Axes that cut both."""
        return tuple(axis for axis in self.row_axes if axis in self.vocab_axes)


def count_devices(sharding: VocabSharding, axes: tuple[str, ...]) -> int:
    """Devices along `axes`."""
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def first_token(sharding: VocabSharding | None, part: int) -> jax.Array | int:
    """Id of the first token of this device's part, `part` tokens long."""
    return 0 if sharding is None or not sharding.vocab_axes else jax.lax.axis_index(sharding.vocab_axes) * part


def look_up(sharding: VocabSharding | None, table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids - first_token] of this device's part [V / parts, D], 0 where another part holds the id."""
    if sharding is None:
        return table[ids]
    row = ids - first_token(sharding, len(table))
    here = (row >= 0) & (row < len(table))
    return jnp.where(here[..., None], table[jnp.clip(row, 0, len(table) - 1)], 0)


def gather_rows(sharding: VocabSharding | None, rows: Any) -> Any:
    """Rows [n, ...] of every device that shares its rows with this one, [devices x n, ...]."""
    if sharding is None or not sharding.shared_axes:
        return rows
    return jax.tree.map(lambda x: jax.lax.all_gather(x, sharding.shared_axes, tiled=True), rows)


def keep_own_rows(sharding: VocabSharding | None, rows: Any) -> Any:
    """This device's part of gathered rows that every device knows."""
    if sharding is None or not sharding.shared_axes:
        return rows
    devices, index = count_devices(sharding, sharding.shared_axes), jax.lax.axis_index(sharding.shared_axes)
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * (len(x) // devices), len(x) // devices), rows)


def sum_parts(sharding: VocabSharding | None, values: jax.Array) -> jax.Array:
    """The sum over all parts of the vocabulary, on every device."""
    return values if sharding is None or not sharding.vocab_axes else jax.lax.psum(values, sharding.vocab_axes)


def sum_parts_of_own_rows(sharding: VocabSharding | None, values: jax.Array) -> jax.Array:
    """The sum over all parts of the vocabulary of gathered rows, each device its own rows."""
    if sharding is None or not sharding.vocab_axes:
        return values
    rest = tuple(axis for axis in sharding.vocab_axes if axis not in sharding.shared_axes)
    if sharding.shared_axes:
        values = jax.lax.psum_scatter(values, sharding.shared_axes, scatter_dimension=0, tiled=True)
    return jax.lax.psum(values, rest) if rest else values


def gather_parts(sharding: VocabSharding | None, values: Any) -> Any | None:
    """[parts, n] of each array [n], in the order of the vocabulary; None where there is one part."""
    if sharding is None or not sharding.vocab_axes:
        return None
    return jax.lax.all_gather(values, sharding.vocab_axes)


def sum_rows(sharding: VocabSharding | None, values: jax.Array) -> jax.Array:
    """The sum over all rows of a value of this part of the vocabulary."""
    axes = () if sharding is None else tuple(axis for axis in sharding.row_axes if axis not in sharding.vocab_axes)
    return jax.lax.psum(values, axes) if axes else values
