"""The operations a step is made of, each alone on one device: log-probs by every implementation, attention, sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllmrec_jax.bench.flops import HeadJob, Sizes, Work, count_completion_pairs, count_head, count_prompt_pairs
from mllmrec_jax.bench.measure import read_clocks, repeat_runs, time_call
from mllmrec_jax.bench.rows import describe_program, make_document, make_row, rate_work
from mllmrec_jax.bench.step import WARMUP
from mllmrec_jax.bench.work import NO_MESH, Phase, call_phase, compile_phase, find_sizes
from mllmrec_jax.config import LogprobConfig, RunConfig
from mllmrec_jax.generate.sampling import sample_tokens
from mllmrec_jax.model.attention import attend_group, attend_prompt
from mllmrec_kernels.logprob_kl import compute_logprobs

BETA = 0.04


class Job(NamedTuple):
    """What GRPO asks of the log-prob operation."""

    head: HeadJob
    reference: bool = False
    exact: bool = False


JOBS = {
    "forward": Job("forward"),
    "grad_hidden": Job("accumulate"),
    "policy_ref": Job("accumulate", reference=True),
    "exact_kl": Job("recompute", reference=True, exact=True),
    "grad_head": Job("train"),
}
"""forward: log-probs. grad_hidden: and the gradient to the hidden states, head frozen. policy_ref: the same with the k3 KL to a reference
whose log-probs are computed too. exact_kl: the same with the exact KL. grad_head: grad_hidden with a gradient to the head."""


class Kernel(NamedTuple):
    """A function of random inputs, and what it costs."""

    name: str
    function: Callable[..., Any]
    draw: Callable[[jax.Array], tuple[jax.Array, ...]]
    work: Work
    shape: dict[str, Any]


def list_implementations() -> list[Literal["triton", "xla_chunked", "reference"]]:
    """Those that run on this device; Triton's interpreter is not timed."""
    return ["triton", "xla_chunked", "reference"] if jax.default_backend() == "gpu" else ["xla_chunked", "reference"]


def make_logprob_kernel(name: str, implementation: Any, config: RunConfig, sizes: Sizes) -> Kernel:
    """Job `name` on as many rows as a micro-batch has completion tokens."""
    job, dtype = JOBS[name], jnp.dtype(config.model.dtype)
    n, d, v = sizes.completion_tokens, config.model.hidden_size, sizes.vocabulary
    settings = LogprobConfig(implementation, config.logprob.chunk_tokens)
    options = {"kl": job.exact, "backward": "accumulate" if job.head in ("forward", "accumulate") else "recompute"}

    def loss(hidden: jax.Array, head: jax.Array, hidden_ref: jax.Array, target: jax.Array, advantage: jax.Array) -> jax.Array:
        reference = hidden_ref if job.reference else None
        out = compute_logprobs(
            hidden, head, target, hidden_ref=reference, implementation=implementation, chunk_tokens=settings.chunk_tokens, **options
        )
        kl = out.kl
        if kl is None:
            gap = jnp.zeros_like(out.logp) if out.logp_ref is None else out.logp_ref - out.logp
            kl = jnp.exp(gap) - gap - 1
        return jnp.sum(BETA * kl - advantage * out.logp)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, 5)
        hidden, hidden_ref = (jax.random.normal(k, (n, d), dtype) for k in keys[:2])
        head = jax.random.normal(keys[2], (v, d), dtype) * jnp.asarray(d**-0.5, dtype)
        return hidden, head, hidden_ref, jax.random.randint(keys[3], (n,), 0, v), jax.random.normal(keys[4], (n,))

    argnums = (0, 1) if name == "grad_head" else 0
    work = count_head(config.model, n, v, settings, job=job.head, reference=job.reference, exact=job.exact)
    shape = {"rows": n, "hidden_size": d, "vocabulary": v, "dtype": dtype.name, "implementation": implementation}
    return Kernel(f"logprob {name}", loss if name == "forward" else jax.grad(loss, argnums=argnums), draw, work, shape)


def list_attention_kernels(config: RunConfig, sizes: Sizes) -> list[Kernel]:
    """Attention of one layer, forward, and forward with the gradients to queries, keys and values."""
    b, p, g, c, _ = sizes
    model = config.model
    h, kv, d, dtype = model.num_heads, model.num_kv_heads, model.head_dim, jnp.dtype(model.dtype)

    def draw_all(*shapes: tuple[int, ...]) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
        def draw(key: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(jax.random.normal(k, shape, dtype) for k, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True))

        return draw

    def attend_completions(q: jax.Array, k: jax.Array, v: jax.Array, prompt_k: jax.Array, prompt_v: jax.Array) -> jax.Array:
        return attend_group(q, k, v, prompt_k, prompt_v, jnp.full((b,), p, jnp.int32))

    prompt, cached, own = (b, p, kv, d), (b, p, kv, d), (b, g, c, kv, d)
    kernels = []
    for name, function, shapes, pairs in (
        ("attention prompt", attend_prompt, ((b, p, h, d), prompt, prompt), count_prompt_pairs(sizes)),
        ("attention group", attend_completions, ((b, g, c, h, d), own, own, cached, cached), count_completion_pairs(sizes)),
    ):

        def total(*arrays: jax.Array, function: Callable[..., jax.Array] = function) -> jax.Array:
            return jnp.sum(function(*arrays).astype(jnp.float32) ** 2)

        moved = float(sum(np.prod(shape) for shape in (shapes[0], *shapes)) * dtype.itemsize)
        once, needed = (4.0 * count * h * d for count in (pairs.executed, pairs.needed))
        # Forward, twice that for the gradients, and the scores of blocks again.
        both = Work(3 * once + 2.0 * pairs.blocked * h * d, 3 * needed, 2 * moved)
        shape = {**sizes._asdict(), "num_heads": h, "num_kv_heads": kv, "head_dim": d, "dtype": dtype.name}
        gradient = jax.grad(total, argnums=tuple(range(len(shapes))))
        kernels.append(Kernel(f"{name} forward", function, draw_all(*shapes), Work(once, needed, moved), shape))
        kernels.append(Kernel(f"{name} gradient", gradient, draw_all(*shapes), both, shape))
    return kernels


def make_sampling_kernel(config: RunConfig, sizes: Sizes) -> Kernel:
    """One token of every member, from its logits; no matrix products."""
    rows, v, grpo = sizes.prompts * sizes.group_size, sizes.vocabulary, config.grpo

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key)
        return 4 * jax.random.normal(keys[0], (rows, v)), jax.random.uniform(keys[1], (rows,))

    def sample(logits: jax.Array, uniform: jax.Array) -> Any:
        return sample_tokens(logits, uniform, temperature=grpo.temperature, top_k=grpo.top_k, top_p=grpo.top_p)

    shape = {"rows": rows, "vocabulary": v, "top_p": grpo.top_p, "top_k": grpo.top_k, "temperature": grpo.temperature}
    return Kernel("sampling", sample, draw, Work(0.0, 0.0, 4.0 * rows * v), shape)


def bench_kernels(config: RunConfig, *, repeats: int = 20) -> dict[str, Any]:
    """Times each operation at the sizes of a GRPO micro-batch, on fresh normal inputs; a mesh is not used.

    Returns:
      Rows `logprob <job>` for each implementation that runs here (`JOBS`), `attention prompt|group forward|gradient` of one layer,
      and `sampling`.
    """
    sizes = find_sizes(config)
    kernels = [make_logprob_kernel(name, made, config, sizes) for name in JOBS for made in list_implementations()]
    kernels += [*list_attention_kernels(config, sizes), make_sampling_kernel(config, sizes)]
    clocks, rows = read_clocks(), []
    with jax.set_mesh(NO_MESH):
        for kernel in kernels:
            rows.append(_measure(kernel, config, repeats))
    return make_document("kernels", config, rows, repeats=repeats, clocks=clocks, shapes=sizes._asdict())


def _measure(kernel: Kernel, config: RunConfig, repeats: int) -> dict[str, Any]:
    draw = jax.jit(kernel.draw)
    phase: Phase = compile_phase(jax.jit(kernel.function), *draw(jax.random.key(config.seed)), work=kernel.work)

    def run(repeat: int) -> dict[str, float]:
        inputs = jax.block_until_ready(draw(jax.random.key(config.seed + 1 + repeat)))
        return {"call": time_call(call_phase, phase, inputs)[0]}

    seconds = repeat_runs(run, warmup=WARMUP, repeats=repeats, description=f"bench {kernel.name}")["call"]
    assert phase.program is not None
    rates = rate_work(
        seconds, kernel.work, dtype=config.model.dtype, executed_flops=phase.executed_flops, executed_bytes=phase.executed_bytes
    )
    return make_row(kernel.name, seconds, shape=kernel.shape, **rates, **describe_program(phase.program))
