"""The work that benchmarks time: random policies made in their shards, random inputs, and programs with what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllmrec_jax.bench.executed import count_executed
from mllmrec_jax.bench.flops import NO_WORK, Sizes, Work
from mllmrec_jax.bench.measure import Program, compile_program
from mllmrec_jax.bench.rows import describe_program, make_row, rate_tokens, rate_work
from mllmrec_jax.config import LoraConfig, RunConfig
from mllmrec_jax.generate.rollout import check_positions
from mllmrec_jax.model.lora import add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.model.sharded import make_sharded
from mllmrec_jax.objectives.logprobs import check_logprob
from mllmrec_jax.sharding import check_model, current_mesh
from mllmrec_jax.train.state import Policy, split_policy

NO_MESH = jax.sharding.Mesh(np.empty((), dtype=object), ())


def find_sizes(config: RunConfig) -> Sizes:
    """A GRPO micro-batch of the configuration, every prompt and completion as long as it may be."""
    grpo = config.grpo
    return Sizes(grpo.batch_size, config.prompt.max_prompt_tokens, grpo.group_size, grpo.max_new_tokens, config.tokenizer.vocab_size)


def check_work(config: RunConfig, sizes: Sizes) -> None:
    """Refuses what cannot be timed, before anything is made.

    Raises:
      ConfigError: tokens do not fit the model, sizes do not divide over the mesh in context, or the log-prob implementation cannot run.
    """
    check_logprob(config.logprob)
    check_positions(sizes.prompt_tokens, sizes.new_tokens, config.model.max_position)
    if current_mesh() is not None:
        check_model(config.model, jax.sharding.get_mesh(), vocab_size=sizes.vocabulary, batch_size=sizes.prompts)


def make_policy(config: RunConfig, *, mode: Literal["lora", "full"], lora: LoraConfig) -> Policy:
    """A random policy over the mesh in context; each device makes what it holds."""

    def build() -> Decoder:
        model = Decoder(config.model, vocab_size=config.tokenizer.vocab_size, rngs=nnx.Rngs(config.seed))
        if mode == "lora":
            add_adapters(model, lora, rngs=nnx.Rngs(config.seed + 1))
        return model

    return split_policy(make_sharded(build), mode)


def draw_tokens(generator: np.random.Generator, shape: tuple[int, ...], vocabulary: int) -> np.ndarray:
    """Uniform token ids, int32."""
    return generator.integers(0, vocabulary, shape, dtype=np.int32)


class Phase(NamedTuple):
    """A compiled program and what a call of it costs."""

    program: Program | None
    """None for several programs one after the other."""
    work: Work
    """By formula."""
    executed_flops: float | None
    """By XLA; None where it was not asked, or cannot see (Triton kernels)."""
    executed_bytes: float | None
    """The same; None on a mesh too."""


def compile_phase(function: Any, *args: Any, work: Work, while_trips: int = 1, flops_too: bool = True, bytes_too: bool = True) -> Phase:
    """Compiles a jitted function for `args` and has XLA count it; its outermost while loops run `while_trips` times.

    Counting FLOPs traces the function once more, counting bytes compiles its loops' bodies once more; `flops_too` False leaves out both,
    `bytes_too` False the second.
    """
    program = compile_program(function, *args)
    if not flops_too:
        return Phase(program, work, None, None)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    bytes_too &= current_mesh() is None
    with jax.set_mesh(NO_MESH):
        executed = count_executed(function, *shapes, while_trips=while_trips, compiled=program.call if bytes_too else None)
    flops, moved = (None if np.isnan(count) else count for count in executed)
    return Phase(program, work, flops, moved)


def _add(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def repeat_phase(phase: Phase, count: int) -> Phase:
    """`count` calls, one after the other."""
    return join_phases(*[phase] * count)._replace(program=phase.program)


def make_phase_row(name: str, phase: Phase, seconds: list[float], config: RunConfig, sizes: Sizes, **shape: Any) -> dict[str, Any]:
    """A row of one program on a batch of `sizes`; `shape` names what else tells its work from another's."""
    mesh = current_mesh()
    rates = {"executed_flops": phase.executed_flops, "executed_bytes": phase.executed_bytes, "devices": 1 if mesh is None else mesh.size}
    return make_row(
        name,
        seconds,
        shape=describe_shape(config, sizes, **shape),
        **rate_tokens(seconds, sizes),
        **rate_work(seconds, phase.work, dtype=config.model.dtype, **rates),
        **({} if phase.program is None else describe_program(phase.program)),
    )


def call_phase(phase: Phase, arguments: tuple[Any, ...]) -> Any:
    """The phase's program on arguments of the shapes it was compiled for; returns before they are computed."""
    assert phase.program is not None
    return phase.program.call(*arguments)


def join_phases(*phases: Phase) -> Phase:
    """One after the other: costs add up."""
    work = NO_WORK.plus(*(phase.work for phase in phases))
    return Phase(None, work, _add([phase.executed_flops for phase in phases]), _add([phase.executed_bytes for phase in phases]))


def describe_shape(config: RunConfig, sizes: Sizes, **more: Any) -> dict[str, Any]:
    """What a row's work is: sizes of batch and model, dtypes, mesh."""
    model, mesh = config.model, current_mesh()
    names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "dtype")
    return {
        **sizes._asdict(),
        **{name: getattr(model, name) for name in names},
        **{name: getattr(model, name) for name in ("param_dtype", "cache_dtype", "remat")},
        "mesh": None if mesh is None else dict(mesh.shape),
        "logprob": config.logprob.implementation,
        **more,
    }


def full_lengths(count: int, tokens: int) -> np.ndarray:
    """[count] int32, all of them `tokens`."""
    return np.full((count,), tokens, np.int32)


def copy_tree(tree: Any) -> Any:
    """Arrays of their own, where they lie."""
    return jax.tree.map(jnp.copy, tree)
