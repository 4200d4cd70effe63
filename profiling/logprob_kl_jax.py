"""Worker of bench_logprob_kl.py: this project's kernel, and the same operation left to XLA."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from logprob_kl_work import (
    BETA,
    DISTRIBUTIONS,
    MARGIN,
    Case,
    Size,
    append_line,
    compute_truth,
    describe_machine,
    find_share,
    parse_worker_arguments,
    pick_rows,
    relative_error,
    run_worker,
    sequence_tokens,
    time_calls,
    timing_seconds,
)

from mllmrec_kernels.logprob_kl import compute_logprobs
from mllmrec_kernels.logprob_kl.api import Backward, Implementation

IMPLEMENTATIONS: dict[str, Implementation] = {
    "kernel": "triton",
    "kernel, recompute": "triton",
    "XLA chunked": "xla_chunked",
    "XLA naive": "reference",
}


class Tokens(NamedTuple):
    """[N] each."""

    target: jax.Array
    logp_ref: jax.Array
    advantage: jax.Array
    weight: jax.Array


class Inputs(NamedTuple):
    hidden: jax.Array
    head: jax.Array
    hidden_ref: jax.Array
    tokens: Tokens


def find_backward(case: Case) -> Backward:
    """The cheapest that gives the job's gradient."""
    recompute = case.row == "kernel, recompute" or case.job in ("exact_kl", "grad_head")
    return "recompute" if recompute else "accumulate"


def make_function(case: Case) -> Callable[..., Any]:
    """(hidden, head, hidden_ref, tokens) to log-probs, and but for `forward` to gradients: of hidden, with grad_head of (hidden, head)."""

    def loss(hidden: jax.Array, head: jax.Array, hidden_ref: jax.Array, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
        out = compute_logprobs(
            hidden,
            head,
            tokens.target,
            hidden_ref=hidden_ref if case.job in ("policy_ref", "exact_kl") else None,
            kl=case.job == "exact_kl",
            backward=find_backward(case),
            implementation=IMPLEMENTATIONS[case.row],
        )
        if out.kl is not None:
            kl = out.kl
        else:
            gap = (tokens.logp_ref if out.logp_ref is None else out.logp_ref) - out.logp
            kl = jnp.exp(gap) - gap - 1
        policy = -tokens.advantage * jnp.exp(out.logp - jax.lax.stop_gradient(out.logp))
        return jnp.sum(tokens.weight * (policy + BETA * kl)) / jnp.sum(tokens.weight), out.logp

    if case.job == "forward":
        return lambda *inputs: loss(*inputs)[1]
    argnums = (0, 1) if case.job == "grad_head" else 0

    def gradient(*inputs: Any) -> tuple[jax.Array, Any]:
        gradients, logp = jax.grad(loss, argnums=argnums, has_aux=True)(*inputs)
        return logp, gradients

    return gradient


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw_inputs(key: jax.Array, size: Size, trained: bool) -> Inputs:
    keys = jax.random.split(key, 6)
    head = jax.random.normal(keys[0], (size.v, size.d), jnp.bfloat16) * jnp.bfloat16(size.d**-0.5)
    target = jax.random.randint(keys[1], (size.n,), 0, size.v)
    hidden = jax.random.normal(keys[2], (size.n, size.d), jnp.float32)
    if trained:
        hidden += jax.random.uniform(keys[3], (size.n, 1), minval=MARGIN[0], maxval=MARGIN[1]) * head[target].astype(jnp.float32)
    hidden_ref = hidden + 0.1 * jax.random.normal(keys[4], hidden.shape)
    # Near the true one (the others' log-sum-exp is log V + 1/2), without a pass over the head.
    logit = jnp.sum(hidden_ref * head[target].astype(jnp.float32), axis=-1)
    logp_ref = jax.nn.log_sigmoid(logit - np.log(size.v) - 0.5)
    tokens = sequence_tokens(size)
    advantage = jnp.repeat(jax.random.normal(keys[5], (size.n // tokens,)), tokens)
    hidden, hidden_ref = hidden.astype(jnp.bfloat16), hidden_ref.astype(jnp.bfloat16)
    return Inputs(hidden, head, hidden_ref, Tokens(target, logp_ref, advantage, jnp.ones(size.n)))


@functools.lru_cache(maxsize=1)
def make_inputs(size: Size) -> dict[str, Inputs]:
    """By distribution; one head serves both."""
    inputs = {name: draw_inputs(jax.random.key(size.n + size.d), size, name == "trained_like") for name in DISTRIBUTIONS}
    head = inputs["random"].head
    return jax.block_until_ready({name: x._replace(head=head) for name, x in inputs.items()})


def split_head(head: jax.Array) -> list[jax.Array]:
    """Parts of equal shape, where it divides, so that float64 copies are small and one program serves all."""
    parts = 16 if head.shape[0] % 16 == 0 else 1
    return jnp.split(head, parts)


@jax.jit
def multiply_float64(a: jax.Array, b: jax.Array) -> jax.Array:
    return a.astype(jnp.float64) @ b.astype(jnp.float64)


def find_truth(case: Case, inputs: Inputs, rows: np.ndarray) -> Any:
    with jax.enable_x64(True):
        logits, logits_ref = (
            np.concatenate([np.asarray(multiply_float64(h[rows], part.T)) for part in split_head(inputs.head)], axis=1)
            for h in (inputs.hidden, inputs.hidden_ref)
        )
    target, logp_ref, advantage, _ = (np.asarray(x)[rows] for x in inputs.tokens)
    return compute_truth(logits, logits_ref, target, logp_ref, advantage, job=case.job, nll=False)


def find_errors(case: Case, compiled: Callable[..., Any], inputs: Inputs) -> dict[str, float]:
    """Of log-probs (largest, in nats) and gradients (relative, of the norm) on the checked rows. The head's gradient is taken of a loss of
    these rows alone, the others' weight being 0."""
    rows = pick_rows(case.size.n)
    truth = find_truth(case, inputs, rows)
    only = inputs._replace(tokens=inputs.tokens._replace(weight=jnp.zeros(case.size.n).at[rows].set(1.0)))
    out = compiled(*(only if case.job == "grad_head" else inputs))
    logp, gradients = (out, None) if case.job == "forward" else out
    errors = {"logp_error": float(np.abs(np.asarray(logp)[rows] - truth.logp).max())}
    if gradients is not None:
        d_hidden, d_head = gradients if case.job == "grad_head" else (gradients, None)
        d_logits = truth.d_logits / (len(rows) if case.job == "grad_head" else case.size.n)
        parts, width = split_head(inputs.head), len(split_head(inputs.head)[0])
        with jax.enable_x64(True):
            pulls = [np.asarray(multiply_float64(d_logits[:, i * width : (i + 1) * width], part)) for i, part in enumerate(parts)]
            errors["gradient_error"] = relative_error(np.asarray(d_hidden[rows], np.float64), np.sum(pulls, axis=0))
            if d_head is not None:
                wrong = right = 0.0
                for i, part in enumerate(split_head(d_head)):
                    expected = multiply_float64(d_logits[:, i * width : (i + 1) * width].T, inputs.hidden[rows])
                    wrong += float(jnp.sum(jnp.square(part - expected)))
                    right += float(jnp.sum(jnp.square(expected)))
                errors["head_gradient_error"] = (wrong / right) ** 0.5
    return {**errors, "top_probability": truth.top_probability, "entropy": truth.entropy}


def read_allocator() -> tuple[int, int]:
    """Bytes in use and the most there were; zeros where the device keeps no account."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_in_use", 0), stats.get("peak_bytes_in_use", 0)


def measure_matmul(tiny: bool) -> float:
    """TFLOP/s of a large square bfloat16 product of random numbers."""
    size = 256 if tiny else 8192
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    timing = time_calls(lambda: product(a, b), jax.block_until_ready, seconds=timing_seconds(tiny))
    return 2 * size**3 / (timing.ms["p50"] * 1e-3) / 1e12


def main() -> int:
    options = parse_worker_arguments()
    device = jax.devices()[0]
    matmul_tflops = measure_matmul(options.tiny)
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-triton", "triton", "numpy")
    append_line(options.lines, describe_machine("jax", device.device_kind, matmul_tflops, packages))
    compiled: dict[Case, Any] = {}

    def compile_case(case: Case) -> tuple[Any, float] | Exception:
        started = time.perf_counter()
        try:
            program = jax.jit(make_function(case)).lower(*make_inputs(case.size)["random"]).compile()
        except Exception as error:
            return error
        return program, time.perf_counter() - started

    def prepare(cases: list[Case]) -> None:
        """Compiles the row's jobs beside each other, since nothing is timed meanwhile."""
        make_inputs(cases[0].size)
        compiled.clear()
        with ThreadPoolExecutor(4) as pool:
            compiled.update(zip(cases, pool.map(compile_case, cases), strict=True))
        # One that failed beside others, for want of memory say, may not alone.
        compiled.update({case: compile_case(case) for case, result in compiled.items() if isinstance(result, Exception)})

    def measure(case: Case, distribution: str) -> dict[str, Any]:
        if isinstance(compiled[case], Exception):
            raise compiled[case]
        program, compile_s = compiled[case]
        inputs = make_inputs(case.size)[distribution]
        used, peak_before = read_allocator()
        jax.block_until_ready(program(*inputs))
        peak = read_allocator()[1]
        timing = time_calls(lambda: program(*inputs), jax.block_until_ready, seconds=timing_seconds(options.tiny))
        memory = program.memory_analysis()
        return {
            "backward": None if case.job == "forward" else find_backward(case),
            "ms": timing.ms,
            "samples": timing.samples,
            "calls_a_sample": timing.calls_a_sample,
            "compile_s": round(compile_s, 3),
            "share": find_share(case, timing.ms["p50"], matmul_tflops),
            # The allocator's peak cannot be reset: it tells of this call only where it rose.
            "allocator_bytes": peak - used if peak > peak_before else None,
            "extra_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
            **find_errors(case, program, inputs),
        }

    def is_usable() -> bool:
        try:
            return bool(jnp.arange(8).sum() == 28)
        except Exception:
            return False

    return run_worker("jax", measure, prepare, is_usable)


if __name__ == "__main__":
    sys.exit(main())
