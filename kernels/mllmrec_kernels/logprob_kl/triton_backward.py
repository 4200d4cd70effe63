"""Backward kernel: one tile of logits again, turned into the gradient of the loss with respect to the logits on the chip.

The caller multiplies the result with the head and with the hidden states; the kernel saves what XLA would move through memory between
them (float32 logits written, then read once for each function of them).
"""

# The body of a kernel is Triton's language, not Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from mllmrec_kernels.logprob_kl.triton_tile import compute_tile_products, find_tile


@triton.jit
def logit_gradient_kernel(
    hidden,  # [N, D]
    hidden_ref,  # [N, D], read with KL
    head,  # [V, D]
    head_ref,  # [V, D], read with KL and OWN_HEAD
    target,  # [N] int32
    stats,  # [5, N] float32: log-sum-exp, 1 - p_t, entropy, reference's log-sum-exp, KL
    grads,  # [3, N] float32: of logp, entropy, KL
    d_logits,  # out [N, V]
    N: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    OWN_HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_tile, tile = find_tile(N, V, BLOCK_N, BLOCK_V, GROUP)
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    acc, acc_ref = compute_tile_products(
        hidden, hidden_ref, head, head_ref, row, token, N, V, D, KL, OWN_HEAD, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST
    )
    row_read = tl.minimum(row, N - 1)
    is_target = token[None, :] == tl.load(target + row_read)[:, None]
    log_p = acc * INVERSE_TEMPERATURE - tl.load(stats + row_read)[:, None]
    d_logp = tl.load(grads + row_read)
    # The target's own share of d_logp is (1 - p_t), known without cancellation; p_t - 1 would not be.
    at_target = tl.where(is_target, (d_logp * tl.load(stats + N + row_read))[:, None], 0.0)
    factor = tl.where(is_target, 0.0, -d_logp[:, None])
    if ENTROPY:
        entropy = tl.load(stats + 2 * N + row_read)
        factor -= tl.load(grads + N + row_read)[:, None] * (log_p + entropy[:, None])
    if KL:
        log_q = acc_ref * INVERSE_TEMPERATURE - tl.load(stats + 3 * N + row_read)[:, None]
        kl = tl.load(stats + 4 * N + row_read)
        factor += tl.load(grads + 2 * N + row_read)[:, None] * (log_p - log_q - kl[:, None])
    gradient = (tl.exp(log_p) * factor + at_target) * INVERSE_TEMPERATURE
    inside = (row < N)[:, None] & (token < V)[None, :]
    tl.store(d_logits + row[:, None] * V + token[None, :], gradient.to(d_logits.dtype.element_ty), mask=inside)
