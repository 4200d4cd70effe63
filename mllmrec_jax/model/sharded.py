"""A model made directly in its shards, or only described.

`build` in these functions makes the whole model from nothing that lives outside it, its random numbers included:
`lambda: Decoder(config, vocab_size=..., rngs=nnx.Rngs(seed))`, with adapters where wanted. The mesh is the one in context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mllmrec_jax.config import ModelConfig
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.sharding import current_mesh, find_shardings


def make_abstract(build: Callable[[], Decoder]) -> Decoder:
    """The model with `jax.ShapeDtypeStruct`s for arrays, with their shardings where a mesh is in context; takes no memory.

    Raises:
      ConfigError: a dimension does not divide over its devices.
    """
    graphdef, state = nnx.split(nnx.eval_shape(build))
    if current_mesh() is not None:
        shardings = find_shardings(state, jax.sharding.get_mesh())
        describe = lambda s, variable: variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=s))  # noqa: E731
        state = jax.tree.map(describe, shardings, state)
    return nnx.merge(graphdef, state)


def abstract_model(config: ModelConfig, *, vocab_size: int) -> Decoder:
    """`make_abstract` of a decoder without adapters, for programs that are compiled and not run."""
    return make_abstract(lambda: Decoder(config, vocab_size=vocab_size, rngs=nnx.Rngs(0)))


def make_sharded(build: Callable[[], Decoder]) -> Decoder:
    """`build()` in one compiled program in which each device makes what it holds; the same numbers on any mesh and on one device.

    Raises:
      ConfigError: a dimension does not divide over its devices.
    """
    graphdef, make = _make_initialiser(build)
    return nnx.merge(graphdef, make())


def _make_initialiser(build: Callable[[], Decoder]) -> tuple[Any, Any]:
    """The model's graphdef, and the jitted function that makes its state."""
    graphdef, abstract = nnx.split(make_abstract(build))
    return graphdef, jax.jit(lambda: nnx.state(build()), out_shardings=jax.tree.map(lambda x: x.sharding, abstract))
