"""What the forward and the backward kernel share: which tile a program has, and its logits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(N: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, vocabulary tile) of this program: GROUP row tiles, then the next vocabulary tile.

    Programs that run together then share hidden states and head rows in the L2 cache.
    """
    row_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    first = (program // (GROUP * tiles)) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * tiles)
    return first + within % size, within // size


@triton.jit
def load_operand(at, feature, left, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Elements at `at`, 0 past the last feature; float32 with UPCAST (Triton's interpreter multiplies bfloat16 wrongly)."""
    x = tl.load(at) if D % BLOCK_D == 0 else tl.load(at, mask=feature < left, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def compute_tile_products(
    hidden,
    hidden_ref,
    head,
    head_ref,
    row,
    token,
    N: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    REFERENCE: tl.constexpr,
    OWN_HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(hidden head^T, hidden_ref head_ref^T) at rows [BLOCK_N] and tokens [BLOCK_V]; one reading of a shared head serves both.

    Rows and tokens past the end repeat the last one: the loop needs no masks, and the caller keeps nothing of them.
    """
    feature = tl.arange(0, BLOCK_D)
    across = feature[None, :]
    down = feature[:, None]
    row_offset = tl.minimum(row, N - 1)[:, None] * D + across
    token_offset = tl.minimum(token, V - 1)[None, :] * D + down
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    acc_ref = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        h = load_operand(hidden + row_offset + start, across, D - start, D, BLOCK_D, UPCAST)
        w = load_operand(head + token_offset + start, down, D - start, D, BLOCK_D, UPCAST)
        acc = tl.dot(h, w, acc, input_precision="ieee")
        if REFERENCE:
            r = load_operand(hidden_ref + row_offset + start, across, D - start, D, BLOCK_D, UPCAST)
            if OWN_HEAD:
                w = load_operand(head_ref + token_offset + start, down, D - start, D, BLOCK_D, UPCAST)
            acc_ref = tl.dot(r, w, acc_ref, input_precision="ieee")
    return acc, acc_ref
