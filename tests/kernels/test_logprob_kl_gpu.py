"""The Triton kernels at full size on an NVIDIA GPU, against float64 on sampled rows: `make gpu-check`.

The same checks run everywhere at a small size in Triton's interpreter, so that they are known to work before a GPU is there.
"""

from __future__ import annotations

import functools
import math
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllmrec_kernels.logprob_kl import compute_logprobs
from mllmrec_kernels.triton_launch import is_interpreted

ON_GPU = jax.default_backend() == "gpu" and not is_interpreted()
GPU = (pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU and TRITON_INTERPRET=0: run `make gpu-check`"))
INTERPRETER = pytest.mark.skipif(
    find_spec("triton") is None or not is_interpreted(), reason="needs triton, and TRITON_INTERPRET=1 for its interpreter"
)
# N, D, V. 5000 rows fill neither the last chunk nor the last tile.
SIZES = [
    pytest.param((16384, 2560, 151_936), marks=GPU),
    pytest.param((16384, 1024, 151_936), marks=GPU),
    pytest.param((5000, 4096, 151_936), marks=GPU),
    pytest.param((45, 64, 301), marks=INTERPRETER),
]
TEMPERATURE = 0.8
CHECKED = 32


class Inputs(NamedTuple):
    hidden: jax.Array
    head: jax.Array
    hidden_ref: jax.Array
    target: jax.Array
    mask: jax.Array


class Truth(NamedTuple):
    """Float64, for `rows`."""

    rows: np.ndarray
    largest: float
    """Largest logit."""
    log_p: np.ndarray
    log_q: np.ndarray
    values: dict[str, np.ndarray]


class Sample(NamedTuple):
    inputs: Inputs
    truth: Truth


@jax.jit
def multiply_float64(a: jax.Array, b: jax.Array) -> jax.Array:
    return a.astype(jnp.float64) @ b.astype(jnp.float64)


def split(head: jax.Array) -> list[jax.Array]:
    """Parts, so that float64 copies of the head are small."""
    return jnp.split(head, 16 if head.shape[0] % 16 == 0 else 1)


def project(rows: jax.Array, head: jax.Array) -> np.ndarray:
    with jax.enable_x64(True):
        logits = np.concatenate([np.asarray(multiply_float64(rows, part.T)) for part in split(head)], axis=1)
    return logits / TEMPERATURE


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


@functools.partial(jax.jit, static_argnums=range(3))
def draw_inputs(n: int, d: int, v: int) -> Inputs:
    """Even rows favour their target, by 6 to 24 nats before the temperature; odd rows are spread over the vocabulary. Every seventh row is
    masked and holds NaN."""
    keys = jax.random.split(jax.random.key(d), 5)
    head = jax.random.normal(keys[0], (v, d), jnp.bfloat16) * jnp.bfloat16(d**-0.5)
    target = jax.random.randint(keys[1], (n,), 0, v).at[:4].set(jnp.array([0, v - 1, 1, v - 2]))
    margin = jax.random.uniform(keys[2], (n,), minval=6.0, maxval=24.0) * (jnp.arange(n) % 2 == 0)
    hidden = jax.random.normal(keys[3], (n, d)) + margin[:, None] * head[target].astype(jnp.float32)
    hidden_ref = hidden + 0.3 * jax.random.normal(keys[4], (n, d))
    mask = jnp.arange(n) % 7 != 6
    hidden, hidden_ref = (jnp.where(mask[:, None], x, jnp.nan).astype(jnp.bfloat16) for x in (hidden, hidden_ref))
    return Inputs(hidden, head, hidden_ref, target, mask)


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: "x".join(map(str, size)))
def sample(request: pytest.FixtureRequest) -> Sample:
    inputs = draw_inputs(*request.param)
    kept = np.flatnonzero(np.asarray(inputs.mask))
    rows = np.unique(kept[np.linspace(0, len(kept) - 1, CHECKED).astype(int)])
    logits = project(inputs.hidden[rows], inputs.head)
    log_p, log_q = log_softmax(logits), log_softmax(project(inputs.hidden_ref[rows], inputs.head))
    p, at = np.exp(log_p), (np.arange(len(rows)), np.asarray(inputs.target)[rows])
    values = {
        "logp": log_p[at],
        "logp_ref": log_q[at],
        "entropy": -(p * log_p).sum(axis=1),
        "kl": (p * (log_p - log_q)).sum(axis=1),
    }
    return Sample(inputs, Truth(rows, float(np.abs(logits).max()), log_p, log_q, values))


def compute(inputs: Inputs, **options: Any) -> Any:
    options = {"implementation": "triton", "temperature": TEMPERATURE, **options}
    return compute_logprobs(inputs.hidden, inputs.head, inputs.target, mask=inputs.mask, hidden_ref=inputs.hidden_ref, **options)


@functools.partial(jax.jit, static_argnames=("entropy", "kl"))
def compute_values(inputs: Inputs, *, entropy: bool, kl: bool) -> Any:
    return compute(inputs, entropy=entropy, kl=kl)


@functools.partial(jax.jit, static_argnames=("backward",))
def compute_gradients(inputs: Inputs, weights: jax.Array, *, backward: str) -> tuple[jax.Array, jax.Array | None]:
    """Of a weighted sum of log-probs (with "recompute", of entropy and KL too) to hidden and, with "recompute", head."""
    both = backward == "recompute"

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        out = compute(inputs._replace(hidden=hidden, head=head), entropy=both, kl=both, backward=backward)
        return sum((jnp.sum(w * x) for w, x in zip(weights, (out.logp, out.entropy, out.kl), strict=True) if x is not None), jnp.float32(0))

    if both:
        return jax.grad(loss, argnums=(0, 1))(inputs.hidden, inputs.head)
    return jax.grad(loss)(inputs.hidden, inputs.head), None


def find_tolerance(sample: Sample) -> float:
    """Nats that float32 accumulation may cost. Inputs and products of bfloat16 are exact in it. A tensor core adds 16 features at a time
    and truncates, losing at most a unit of the last place (2^-23) of the sum each time; as much again is allowed for the order of the
    rest, and a few units for the functions of the sums, whose size is that of the largest logit plus log V."""
    d, v = sample.inputs.head.shape[1], sample.inputs.head.shape[0]
    return (d / 16 * 2**-22 + 2**-20) * (sample.truth.largest + math.log(v))


@pytest.mark.parametrize("kl", [True, False], ids=["joint", "apart"])
def test_values_match_float64_and_masked_rows_are_zero(sample: Sample, kl: bool) -> None:
    """With the exact KL, policy and reference share one pass; without it they take one each."""
    out = compute_values(sample.inputs, entropy=kl, kl=kl)
    masked = ~np.asarray(sample.inputs.mask)
    for name, values in out._asdict().items():
        if values is None:
            assert not kl and name in ("entropy", "kl")
            continue
        values = np.asarray(values)
        error = np.abs(values[sample.truth.rows] - sample.truth.values[name]).max()
        assert error <= (2 if name == "kl" else 1) * find_tolerance(sample), f"{name}: {error}"  # a KL has the errors of both
        assert np.all(np.isfinite(values)) and not values[masked].any()


def test_accumulated_gradient_matches_float64(sample: Sample) -> None:
    inputs, truth = sample
    weights = jax.random.normal(jax.random.key(9), (3, len(inputs.mask)))
    gradient = np.asarray(compute_gradients(inputs, weights, backward="accumulate")[0].astype(jnp.float32))
    assert np.all(np.isfinite(gradient)) and not gradient[~np.asarray(inputs.mask)].any()
    d_logits = np.asarray(weights)[0, truth.rows, None] * (find_onehot(sample) - np.exp(truth.log_p))
    expected = pull_back(d_logits, inputs.head)
    wrong, right = (np.linalg.norm(x, axis=1) for x in (gradient[truth.rows] - expected, expected))
    for favoured in (0, 1):
        group = truth.rows % 2 == favoured
        assert np.linalg.norm(wrong[group]) < 5e-3 * np.linalg.norm(right[group])
    # Of every row by itself, where p is 1 - 1e-6 too: a few units of bfloat16's last place (2^-9).
    assert np.all(wrong < 1e-2 * right), (wrong / right).max()


def test_recomputed_gradients_match_float64(sample: Sample) -> None:
    """Of log-prob, entropy and KL, to hidden states and head. Other rows than the checked ones weigh 0, so that float64 can follow."""
    inputs, truth = sample
    weights = np.zeros((3, len(inputs.mask)), np.float32)
    weights[:, truth.rows] = np.random.default_rng(9).normal(size=(3, len(truth.rows)))
    d_hidden, d_head = compute_gradients(inputs, jnp.asarray(weights), backward="recompute")
    assert d_head is not None and d_head.dtype == d_hidden.dtype == jnp.bfloat16
    on_logp, on_entropy, on_kl = (w[truth.rows, None].astype(np.float64) for w in weights)
    p, gap = np.exp(truth.log_p), truth.log_p - truth.log_q
    d_logits = on_logp * (find_onehot(sample) - p)
    d_logits -= on_entropy * p * (truth.log_p + truth.values["entropy"][:, None])
    d_logits += on_kl * p * (gap - truth.values["kl"][:, None])

    d_hidden = np.asarray(d_hidden.astype(jnp.float32))
    expected = pull_back(d_logits, inputs.head)
    assert np.linalg.norm(d_hidden[truth.rows] - expected) < 5e-3 * np.linalg.norm(expected)
    assert not np.delete(d_hidden, truth.rows, axis=0).any()
    wrong = right = 0.0
    parts = split(d_head)
    with jax.enable_x64(True):
        for part, d in zip(parts, np.split(d_logits / TEMPERATURE, len(parts), axis=1), strict=True):
            expected = multiply_float64(d.T, inputs.hidden[truth.rows])
            wrong += float(jnp.sum(jnp.square(part - expected)))
            right += float(jnp.sum(jnp.square(expected)))
    assert math.sqrt(wrong) < 5e-3 * math.sqrt(right)


def test_same_policy_and_reference_have_no_kl(sample: Sample) -> None:
    out = compute_values(sample.inputs._replace(hidden_ref=sample.inputs.hidden), entropy=True, kl=True)
    assert not np.any(out.kl)
    np.testing.assert_array_equal(np.asarray(out.logp), np.asarray(out.logp_ref))


def test_every_bit_repeats(sample: Sample) -> None:
    weights = jax.random.normal(jax.random.key(9), (3, len(sample.inputs.mask)))

    def run() -> list[jax.Array]:
        gradients = [compute_gradients(sample.inputs, weights, backward=b) for b in ("accumulate", "recompute")]
        return jax.tree.leaves((compute_values(sample.inputs, entropy=True, kl=True), gradients))

    for first, second in zip(run(), run(), strict=True):
        assert bool(jnp.array_equal(first, second))


def find_onehot(sample: Sample) -> np.ndarray:
    target = np.asarray(sample.inputs.target)[sample.truth.rows]
    return np.arange(sample.inputs.head.shape[0])[None, :] == target[:, None]


def pull_back(d_logits: np.ndarray, head: jax.Array) -> np.ndarray:
    """Gradient to the hidden states [rows, D] in float64."""
    parts = split(head)
    with jax.enable_x64(True):
        pulls = [multiply_float64(d, part) for d, part in zip(np.split(d_logits / TEMPERATURE, len(parts), axis=1), parts, strict=True)]
        return np.sum([np.asarray(pull) for pull in pulls], axis=0)
