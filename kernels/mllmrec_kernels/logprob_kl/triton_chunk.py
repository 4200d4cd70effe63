"""One chunk of rows by the Triton kernels; the same two functions as `xla_chunked`.

Three kernels, each a matrix product with something done to its tiles while they are on the chip: logits to per-tile sums (forward),
probabilities to the mean head row (only for the accumulate gradient), logits to their gradient (backward).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mllmrec_kernels.logprob_kl.moments import Others, Rows, merge_parts, part_weights
from mllmrec_kernels.logprob_kl.triton_backward import logit_gradient_kernel
from mllmrec_kernels.logprob_kl.triton_forward import others_kernel
from mllmrec_kernels.logprob_kl.triton_mean_head import mean_head_kernel
from mllmrec_kernels.logprob_kl.variants import KernelName, Variant, find_variant
from mllmrec_kernels.triton_launch import find_device, is_interpreted, launch

SCRATCH_BYTES = 320 * 2**20
"""Memory a chunk may take for its [n, V] probabilities or gradients: 1024 rows of bfloat16 at V = 151,936."""
PARTIAL_BYTES = 64 * 2**20
"""Memory a chunk may take for each [tiles, n] array of partial sums."""


def chunk_rows(chunk_tokens: int, vocabulary: int, itemsize: int, *, holds_logits: bool) -> int:
    """Rows a chunk, a multiple of 128: as many as the scratch memory holds (`chunk_tokens` is for the XLA version)."""
    del chunk_tokens
    rows = SCRATCH_BYTES // (vocabulary * itemsize) if holds_logits else PARTIAL_BYTES // (4 * -(-vocabulary // 128))
    return max(rows // 128, 1) * 128


def compute_others(
    hidden: jax.Array,
    hidden_ref: jax.Array | None,
    head: jax.Array,
    head_ref: jax.Array,
    target: jax.Array,
    *,
    temperature: float,
    entropy: bool,
    kl: bool,
    mean_head: bool,
) -> tuple[Others, jax.Array | None]:
    """As `xla_chunked.compute_others`; policy and reference share one reading of the head where the exact KL needs both at once."""
    tiles, prob = _run_forward(
        hidden, hidden_ref if kl else None, head, head_ref, target, temperature=temperature, entropy=entropy, prob=mean_head
    )
    if hidden_ref is not None and not kl:
        alone, _ = _run_forward(hidden_ref, None, head_ref, head_ref, target, temperature=temperature, entropy=False, prob=False)
        tiles = tiles._replace(lse_ref=alone.lse)
    mean = None if prob is None else _run_mean_head(prob, jnp.exp(part_weights(tiles.lse)[1]), head)
    return merge_parts(tiles), mean


def _run_forward(
    hidden: jax.Array,
    hidden_ref: jax.Array | None,
    head: jax.Array,
    head_ref: jax.Array,
    target: jax.Array,
    *,
    temperature: float,
    entropy: bool,
    prob: bool,
) -> tuple[Others, jax.Array | None]:
    """Sums of every tile of the vocabulary [tiles, n], and with `prob` the probabilities within the tiles [n, tiles * block_v]."""
    joint = hidden_ref is not None
    (n, d), v = hidden.shape, head.shape[0]
    variant = _choose("forward_kl" if joint else "forward", hidden, head)
    tiles = -(-v // variant.block_v)
    _check_offsets(hidden, head)
    # A kernel has all of its parameters: outputs nobody asked for have one element, which is not written.
    partial, absent = jax.ShapeDtypeStruct((tiles, n), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    prob_shape = jax.ShapeDtypeStruct((n, tiles * variant.block_v), _scratch_dtype(head)) if prob else absent
    lse, entropy_out, lse_ref, kl, prob_out = launch(
        others_kernel,
        (hidden, hidden if hidden_ref is None else hidden_ref, head, head_ref, target),
        (partial, partial if entropy else absent, partial if joint else absent, partial if joint else absent, prob_shape),
        grid=(tiles * -(-n // variant.block_n),),
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        constants={
            **_tile_constants(variant, n, v, d, temperature),
            "ENTROPY": entropy,
            "REFERENCE": joint,
            "OWN_HEAD": joint and head_ref is not head,
            "PROB": prob,
        },
    )
    sums = Others(lse, entropy_out if entropy else None, lse_ref if joint else None, kl if joint else None)
    return sums, prob_out if prob else None


def _run_mean_head(prob: jax.Array, weight: jax.Array, head: jax.Array) -> jax.Array:
    """[n, D] float32, from probabilities [n, tiles * tile] and weights [tiles, n]."""
    (v, d), n, tiles = head.shape, prob.shape[0], weight.shape[0]
    variant = _choose("mean_head", prob, head)
    _check_offsets(prob, head)
    (mean,) = launch(
        mean_head_kernel,
        (prob, weight, head),
        (jax.ShapeDtypeStruct((variant.splits, n, d), jnp.float32),),
        grid=(-(-n // variant.block_n) * -(-d // variant.block_d) * variant.splits,),
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        constants={
            "N": n,
            "V": v,
            "D": d,
            "TILES": tiles,
            "TILE": prob.shape[1] // tiles,
            "SPLITS": variant.splits,
            "BLOCK_N": variant.block_n,
            "BLOCK_D": variant.block_d,
            "BLOCK_V": variant.block_v,
            "UPCAST": is_interpreted(),
        },
    )
    return jnp.sum(mean, axis=0)


def compute_logit_gradient(
    hidden: jax.Array,
    hidden_ref: jax.Array | None,
    head: jax.Array,
    head_ref: jax.Array,
    target: jax.Array,
    rows: Rows,
    grads: Rows,
    *,
    temperature: float,
) -> jax.Array:
    """As `xla_chunked.compute_logit_gradient`."""
    joint = grads.kl is not None
    (n, d), v = hidden.shape, head.shape[0]
    variant = _choose("backward_kl" if joint else "backward", hidden, head)
    _check_offsets(hidden, head)

    def stack(*values: jax.Array | None) -> jax.Array:
        return jnp.stack([jnp.zeros(n, jnp.float32) if x is None else x for x in values])

    (d_logits,) = launch(
        logit_gradient_kernel,
        (
            hidden,
            hidden_ref if joint and hidden_ref is not None else hidden,
            head,
            head_ref,
            target,
            stack(rows.lse, jnp.exp(rows.log_rest), rows.entropy, rows.lse_ref, rows.kl),
            stack(grads.logp, grads.entropy, grads.kl),
        ),
        (jax.ShapeDtypeStruct((n, v), _scratch_dtype(head)),),
        grid=(-(-v // variant.block_v) * -(-n // variant.block_n),),
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        constants={
            **_tile_constants(variant, n, v, d, temperature),
            "ENTROPY": grads.entropy is not None,
            "KL": joint,
            "OWN_HEAD": joint and head_ref is not head,
        },
    )
    return d_logits.astype(head.dtype)


def _choose(kernel: KernelName, rows: jax.Array, head: jax.Array) -> Variant:
    return find_variant(kernel, device=find_device(), dtype=str(head.dtype), d=head.shape[1], n=rows.shape[0])


def _check_offsets(*arrays: jax.Array) -> None:
    """The kernels count elements in 32 bits, which saves them registers."""
    for array in arrays:
        if array.size >= 2**31:
            raise ValueError(f"implementation 'triton': an array of {array.shape} has 2^31 elements or more; shard it or use 'xla_chunked'")


def _scratch_dtype(head: jax.Array) -> Any:
    """The head's; float32 in the interpreter, whose bfloat16 stores truncate."""
    return jnp.float32 if is_interpreted() else head.dtype


def _tile_constants(variant: Variant, n: int, v: int, d: int, temperature: float) -> dict[str, Any]:
    return {
        "N": n,
        "V": v,
        "D": d,
        "INVERSE_TEMPERATURE": 1.0 / temperature,
        "BLOCK_N": variant.block_n,
        "BLOCK_V": variant.block_v,
        "BLOCK_D": variant.block_d,
        "GROUP": variant.group,
        "UPCAST": is_interpreted(),
    }
