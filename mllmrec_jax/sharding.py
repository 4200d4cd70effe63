"""Which device holds what: one mesh, one table from logical axes to mesh axes.

Parameters name their logical axes where they are made (`nnx.Param(x, axes=("embed", "heads"))`); activations name theirs where a layout
changes (`constrain`). Everything else is derived by the compiler. Without a mesh in context (`use_mesh`) all of this does nothing.

    data      batches
    fsdp      batches; weights between uses, gathered for each layer and dropped after it
    tensor    heads, feed-forward, and, together with fsdp, the vocabulary

The vocabulary lies over fsdp and tensor and is never gathered: its V x D weights are more than the hidden states of a batch, so these go
to the weights instead.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mllmrec_jax.config import ConfigError, MeshConfig, ModelConfig
from mllmrec_kernels.logprob_kl import VocabSharding
from mllmrec_kernels.logprob_kl.vocab_sharding import gather_rows, look_up, sum_parts_of_own_rows

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "row": ("data",),  # of what meets the vocabulary
    "vocab": ("fsdp", "tensor"),
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "embed": ("fsdp",),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all of them by default); one size may be -1, the rest of the devices.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    named = ", ".join(f"{axis} = {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or not known or len(devices) % known:
        raise ConfigError(f"mesh: expected at most one -1 and sizes that divide {len(devices)} devices, got {named}")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ConfigError(f"mesh: expected sizes that multiply to {len(devices)} devices, got {named}; make one of them -1")
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=list(devices))


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Inside, arrays are laid out over `mesh`; None, or a mesh of one device, lays nothing out."""
    if mesh is None or mesh.size == 1:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def current_mesh() -> Any | None:
    """The mesh in context, also inside `jit`; None where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def count_devices(mesh: Mesh | AbstractMesh, axis: str | None) -> int:
    """Devices that a logical axis is cut over."""
    return 1 if axis is None else math.prod(mesh.shape[name] for name in RULES[axis])


def make_spec(*axes: str | None) -> PartitionSpec:
    """The layout of an array whose dimensions have these logical axes (None: on every device).

    Raises:
      ValueError: an unknown axis, or two dimensions over the same mesh axis.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"axes: must be of {sorted(RULES)} or None, had {unknown}")
    parts = [() if axis is None else RULES[axis] for axis in axes]
    used = [name for part in parts for name in part]
    if len(used) != len(set(used)):
        raise ValueError(f"axes: {axes} would lay two dimensions over the same mesh axis ({used})")
    return PartitionSpec(*(part or None for part in parts))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by the logical axes of its dimensions; `x` itself where no mesh is in context."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, make_spec(*axes))


def gather_weights(state: Any) -> Any:
    """A layer's weights (no stack axis) as its computation wants them: whole along `embed`, cut along `heads` and `ffn`."""
    if current_mesh() is None:
        return state

    def gather(variable: nnx.Variable) -> nnx.Variable:
        axes = _axes_of(variable)[-variable[...].ndim :]
        spec = make_spec(*(None if axis == "embed" else axis for axis in axes))
        return variable.replace(jax.lax.with_sharding_constraint(variable[...], spec))

    return jax.tree.map(gather, state, is_leaf=_is_variable)


def find_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """For each variable in `tree` the NamedSharding its axes ask for, for every other array a replicated one; a prefix tree.

    Raises:
      ConfigError: a dimension does not divide over its devices.
    """

    def find(leaf: Any) -> NamedSharding:
        if not _is_variable(leaf):
            return NamedSharding(mesh, PartitionSpec())
        axes, shape = _axes_of(leaf), leaf.shape
        for axis, size in zip(axes, shape, strict=True):
            count = count_devices(mesh, axis)
            if size % count:
                raise ConfigError(
                    f"mesh: {axis} of size {size} (of a weight of {shape}) does not divide over {count} devices, {mesh.shape}"
                )
        return NamedSharding(mesh, make_spec(*axes))

    return jax.tree.map(find, tree, is_leaf=_is_variable)


def lay_out(tree: Any) -> Any:
    """Inside `jit`: `tree` as its variables' axes ask for; `tree` itself where no mesh is in context."""
    mesh = current_mesh()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, find_shardings(tree, mesh))


def place(tree: Any) -> Any:
    """`tree` laid out over the mesh in context; `tree` itself where there is none."""
    return tree if current_mesh() is None else jax.device_put(tree, find_shardings(tree, jax.sharding.get_mesh()))


def batch_sharding(*, leading: int = 0) -> NamedSharding | None:
    """Layout of arrays [..., B, ...] with `leading` dimensions before the batch; None where no mesh is in context."""
    if current_mesh() is None:
        return None
    return NamedSharding(jax.sharding.get_mesh(), make_spec(*(None,) * leading, "batch"))


def place_batch(tree: Any, *, leading: int = 0) -> Any:
    """Host arrays with this process's rows as global arrays; arrays on this device where no mesh is in context."""
    sharding = batch_sharding(leading=leading)
    if sharding is None:
        return jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def take_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids]: [V, D] rows for ids [B, ...]. On a mesh each device looks up what its part of the vocabulary holds."""
    sharding = vocab_sharding()
    if sharding is None:
        return table[ids]

    def take(part: jax.Array, ids: jax.Array) -> jax.Array:
        return sum_parts_of_own_rows(sharding, look_up(sharding, part, gather_rows(sharding, ids)))

    specs = (make_spec("vocab", None), make_spec("batch"))
    return jax.shard_map(take, mesh=sharding.mesh, in_specs=specs, out_specs=make_spec("batch"), check_vma=False)(table, ids)


def vocab_sharding() -> VocabSharding | None:
    """How the log-prob operation lies on the mesh in context."""
    mesh = current_mesh()
    if mesh is None:
        return None
    row_axes, vocab_axes = (tuple(axis for axis in RULES[name] if mesh.shape[axis] > 1) for name in ("batch", "vocab"))
    return VocabSharding(mesh, row_axes, vocab_axes)


def check_model(model: ModelConfig, mesh: Mesh | AbstractMesh, *, vocab_size: int, batch_size: int) -> None:
    """Raises ConfigError where a model or a batch does not divide over `mesh`, before anything is made."""
    wanted = {
        "model.num_kv_heads": (model.num_kv_heads, "heads"),
        "model.intermediate_size": (model.intermediate_size, "ffn"),
        "model.hidden_size": (model.hidden_size, "embed"),
        "vocabulary": (vocab_size, "vocab"),
        "batch_size": (batch_size, "batch"),
    }
    for name, (size, axis) in wanted.items():
        count = count_devices(mesh, axis)
        if size % count:
            raise ConfigError(
                f"{name}: expected a multiple of {count} ({' x '.join(RULES[axis])}) on the mesh {dict(mesh.shape)}, got {size}"
            )


def round_batch(size: int) -> int:
    """`size` rounded up to rows that divide over the devices of the mesh in context."""
    mesh = current_mesh()
    count = 1 if mesh is None else count_devices(mesh, "batch")
    return -(-size // count) * count


def find_own_rows(size: int) -> np.ndarray:
    """Which rows of a batch of `size` lie on this process's devices, ascending; all of them where no mesh is in context."""
    sharding, rows = batch_sharding(), np.arange(size)
    if sharding is None:
        return rows
    return np.unique(np.concatenate([rows[index] for index in sharding.addressable_devices_indices_map((size,)).values()]))


def read_own_rows(tree: Any) -> Any:
    """To the host: the rows on this process's devices of arrays [B, ...] laid out as a batch, in the order of `find_own_rows`."""

    def read(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable:
            return np.asarray(x)
        parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(read, tree)


@jax.jit
def _replicate(tree: Any) -> Any:
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def share_rows(tree: Any, *, leading: int = 0) -> Any:
    """Host arrays [..., b, ...] with this process's rows -> those of the whole batch, on every process. For a few numbers a row."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, _replicate(place_batch(tree, leading=leading)))


def read_whole(x: jax.Array) -> np.ndarray:
    """The whole of an array, on the host of every process; all processes call this together."""
    # Waited for, so that a process that has nothing else to do does not pile up arrays that others still write.
    return np.asarray(x if x.is_fully_addressable else jax.block_until_ready(_replicate(x)))


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _axes_of(variable: nnx.Variable) -> tuple[str | None, ...]:
    return variable.get_metadata().get("axes") or (None,) * len(variable.shape)
