"""The Triton kernels: in the interpreter at sizes of several tiles, and compiled ahead of time for the GPU of the table."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")

from mllmrec_kernels.logprob_kl import compute_logprobs, triton_chunk, variants


def make_case(n: int, d: int, v: int, *, dtype=jnp.float32, scale: float = 1.0, seed: int = 0):
    """Inputs, and float64 log-probs of policy and reference [n, v]."""
    rng = np.random.default_rng(seed)

    def cast(x):
        return jnp.asarray(x, dtype)

    hidden, head = cast(rng.normal(size=(n, d)) * scale), cast(rng.normal(size=(v, d)) / d**0.5)
    hidden_ref = cast(np.asarray(hidden, np.float64) + 0.3 * rng.normal(size=(n, d)))
    target = rng.integers(0, v, n)
    target[:4] = [0, v - 1, v - 2, v // 2]

    def log_softmax(h):
        z = np.asarray(h, np.float64) @ np.asarray(head, np.float64).T
        z -= z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    return (hidden, hidden_ref, head, jnp.asarray(target, jnp.int32)), (log_softmax(hidden), log_softmax(hidden_ref))


@pytest.mark.parametrize(
    ("n", "d", "v", "dtype"),
    [
        (130, 200, 1501, jnp.float32),
        (130, 200, 1501, jnp.bfloat16),
        pytest.param(256, 256, 8192, jnp.float32, marks=pytest.mark.slow),
        pytest.param(256, 256, 8192, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(16, 16, 151_936, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_several_tiles_match_float64(n, d, v, dtype):
    """Whole and ragged tiles, and the vocabulary of the paper's model. bfloat16 inputs are exact in float64: it has float32's tolerance."""
    (hidden, hidden_ref, head, target), (log_p, log_q) = make_case(n, d, v, dtype=dtype, scale=3.0)
    weight = np.random.default_rng(1).normal(size=n)

    def loss(h):
        out = compute_logprobs(
            h, head, target, hidden_ref=hidden_ref, entropy=True, kl=True, backward="accumulate", implementation="triton"
        )  # fmt: skip
        return jnp.sum(out.logp * jnp.asarray(weight, jnp.float32)), out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(hidden)
    p, rows = np.exp(log_p), np.arange(n)
    expected = {
        "logp": log_p[rows, target],
        "logp_ref": log_q[rows, target],
        "entropy": -(p * log_p).sum(axis=1),
        "kl": (p * (log_p - log_q)).sum(axis=1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(out, name), value, rtol=2e-5, atol=2e-5, err_msg=name)
    wide = np.asarray(head, np.float64)
    direction = weight[:, None] * (wide[np.asarray(target)] - p @ wide)
    error = np.linalg.norm(np.asarray(gradient, np.float64) - direction) / np.linalg.norm(direction)
    assert error < (1e-6 if dtype == jnp.float32 else 5e-3)  # the gradient is returned in the dtype of hidden


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
def test_recompute_gradients_match_float64(scale):
    """Logits to +-80 at the largest scale, where the gradient's error is that of a float32 logit."""
    (hidden, hidden_ref, head, target), _ = make_case(40, 48, 700, scale=scale)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (hidden, hidden_ref, head)]

    def loss(h, r, w, implementation):
        out = compute_logprobs(h, w, target, hidden_ref=r, entropy=True, kl=True, temperature=0.8, implementation=implementation)
        assert out.entropy is not None and out.kl is not None
        return jnp.mean(out.logp) + jnp.mean(out.entropy) - jnp.mean(out.kl)

    gradient = jax.grad(loss, argnums=(0, 2))
    actual = gradient(hidden, hidden_ref, head, "triton")
    with jax.enable_x64(True):
        expected = gradient(*wide, "reference")
    for a, b in zip(actual, expected, strict=True):
        assert b.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("block", [(16, 32, 16), (32, 64, 64), (64, 128, 32)])
def test_tile_sizes_do_not_matter(monkeypatch, block):
    (hidden, hidden_ref, head, target), (log_p, log_q) = make_case(50, 72, 501)
    rows, columns, features = block

    def choose(kernel, **_):
        variant = variants.Variant(rows, columns, features, num_warps=4, num_stages=1, group=3, splits=4)
        # This kernel steps over tokens within a tile of the forward kernel.
        return variant._replace(block_v=16) if kernel == "mean_head" else variant

    monkeypatch.setattr(triton_chunk, "find_variant", choose)

    def loss(h):
        out = compute_logprobs(h, head, target, hidden_ref=hidden_ref, kl=True, backward="accumulate", implementation="triton")
        return jnp.sum(out.logp), out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(hidden)
    p, wide = np.exp(log_p), np.asarray(head, np.float64)
    np.testing.assert_allclose(out.logp, log_p[np.arange(50), target], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.kl, (p * (log_p - log_q)).sum(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, wide[np.asarray(target)] - p @ wide, rtol=1e-4, atol=1e-5)


def test_chunks_hold_what_they_promise():
    """At the paper's vocabulary a chunk's scratch stays under 320 MiB, and a gradient larger than one chunk is cut."""
    rows = triton_chunk.chunk_rows(1, 151_936, 2, holds_logits=True)
    assert rows == 1024
    assert rows * 151_936 * 2 <= triton_chunk.SCRATCH_BYTES
    assert triton_chunk.chunk_rows(1, 151_936, 2, holds_logits=False) >= 8192


def test_chunked_gradient_equals_the_whole(monkeypatch):
    (hidden, _, head, target), _ = make_case(300, 32, 257)

    def gradient(backward):
        return jax.grad(lambda h: jnp.sum(compute_logprobs(h, head, target, backward=backward, implementation="triton").logp))(hidden)

    whole = [gradient("accumulate"), gradient("recompute")]
    monkeypatch.setattr(triton_chunk, "SCRATCH_BYTES", 1)  # chunks of 128 rows
    for backward, expected in zip(("accumulate", "recompute"), whole, strict=True):
        np.testing.assert_allclose(gradient(backward), expected, rtol=1e-5, atol=1e-6)


def test_a_device_the_table_does_not_know_is_named():
    with pytest.raises(ValueError, match=r"no row for sm_70 bfloat16, only for .*sm_90 bfloat16"):
        variants.find_variant("forward", device="sm_70", dtype="bfloat16", d=64, n=64)


def test_the_nearest_sizes_are_chosen():
    rows = [row for row in variants.read_table() if (row.device, row.dtype, row.kernel) == ("sm_90", "bfloat16", "mean_head")]
    by_d = {row.d: row.variant for row in rows}
    assert variants.find_variant("mean_head", device="sm_90", dtype="bfloat16", d=5120, n=100) == by_d[4096]
    assert variants.find_variant("mean_head", device="sm_90", dtype="bfloat16", d=896, n=100) == by_d[1024]


def run_without_interpreter(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **variables}
    environment.pop("TRITON_INTERPRET")
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def test_no_gpu_is_an_error_that_says_what_to_do():
    code = (
        "import jax.numpy as jnp; from mllmrec_kernels.logprob_kl import compute_logprobs;"
        "compute_logprobs(jnp.ones((4, 8)), jnp.ones((9, 8)), jnp.zeros(4, int), implementation='triton')"
    )
    result = run_without_interpreter("-c", code)
    assert result.returncode != 0
    assert "needs an NVIDIA GPU" in result.stderr
    assert "xla_chunked" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_variant_compiles_well_for_its_gpu(dtype):
    """No register spills, no serialised wgmma, wgmma in every bfloat16 kernel, shared memory within the limit."""
    module = "mllmrec_kernels.logprob_kl.compile_report"
    result = run_without_interpreter("-m", module, "--dtype", dtype, MLLMREC_TRITON_DEVICE="sm_90")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["faults"] for row in rows if row["faults"]] == []
    assert result.returncode == 0, result.stderr
    assert {row["name"] for row in rows} == {"others_kernel", "mean_head_kernel", "logit_gradient_kernel"}
