"""Forward kernel: one [BLOCK_N, BLOCK_V] tile of logits per program, reduced before it leaves the chip.

A tile gives, for each of its rows, the log-sum-exp of the tokens other than the target, and where asked for their entropy, the reference's
log-sum-exp, the KL, and the probabilities within the tile. Tiles are merged afterwards in a fixed order (`moments.merge_parts`), so there
are no atomics and no dependence on the order in which programs run.

Logits are in base 2 inside the kernel (log2 e is folded into the scale), because the hardware's exponential is exp2.
"""

# The body of a kernel is Triton's language, not Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from mllmrec_kernels.logprob_kl.triton_tile import compute_tile_products, find_tile


@triton.jit
def others_kernel(
    hidden,  # [N, D]
    hidden_ref,  # [N, D], read with REFERENCE
    head,  # [V, D]
    head_ref,  # [V, D], read with REFERENCE and OWN_HEAD
    target,  # [N] int32, outside [0, V) where it lies in another part of the vocabulary
    lse,  # out [tiles, N] float32
    entropy,  # out [tiles, N] float32, with ENTROPY
    lse_ref,  # out [tiles, N] float32, with REFERENCE
    kl,  # out [tiles, N] float32, with REFERENCE
    prob,  # out [N, tiles * BLOCK_V], with PROB: exp(logit - lse of the tile), 0 at the target and past V
    N: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    REFERENCE: tl.constexpr,
    OWN_HEAD: tl.constexpr,
    PROB: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    ln_2: tl.constexpr = 0.6931471805599453
    scale: tl.constexpr = INVERSE_TEMPERATURE * 1.4426950408889634
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row_tile, tile = find_tile(N, V, BLOCK_N, BLOCK_V, GROUP)
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    acc, acc_ref = compute_tile_products(
        hidden, hidden_ref, head, head_ref, row, token, N, V, D, REFERENCE, OWN_HEAD, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST
    )
    goal = tl.load(target + tl.minimum(row, N - 1))
    kept = (token[None, :] < V) & (token[None, :] != goal[:, None])
    out = tile * N + row
    in_range = row < N

    # Finite, so that 0 times a left-out token is 0 below; exp2 of it is 0.
    left_out: tl.constexpr = -1e30
    z = tl.where(kept, acc * scale, left_out)
    top = tl.max(z, 1)
    some = top > left_out  # else the tile holds no token but the target: its weight is 0, whatever else is stored
    e = tl.exp2(z - top[:, None])
    total = tl.sum(e, 1)
    log_total = top + tl.log2(total)
    tl.store(lse + out, tl.where(some, log_total * ln_2, float("-inf")), mask=in_range)
    if ENTROPY:
        below = tl.sum(e * (top[:, None] - z), 1) / total
        tl.store(entropy + out, (below + tl.log2(total)) * ln_2, mask=in_range)
    if PROB:
        at = row[:, None] * (tiles * BLOCK_V) + token[None, :]
        tl.store(prob + at, (e * (1.0 / total)[:, None]).to(prob.dtype.element_ty), mask=in_range[:, None])
    if REFERENCE:
        y = tl.where(kept, acc_ref * scale, left_out)
        top_ref = tl.max(y, 1)
        log_total_ref = top_ref + tl.log2(tl.sum(tl.exp2(y - top_ref[:, None]), 1))
        tl.store(lse_ref + out, tl.where(some, log_total_ref * ln_2, float("-inf")), mask=in_range)
        gap = (z - log_total[:, None]) - (y - log_total_ref[:, None])
        tl.store(kl + out, tl.sum(e * gap, 1) / total * ln_2, mask=in_range)
