"""Mean head row under the policy, [N, D]: sum over tiles and tokens of weight[tile, row] prob[row, token] head[token].

The forward kernel left probabilities relative to their own tile; the weight of a tile is known once all tiles are merged. Each program
sums one SPLITS-th of the vocabulary for one [BLOCK_N, BLOCK_D] block; the splits are added afterwards in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mean_head_kernel(
    prob,  # [N, TILES * TILE]
    weight,  # [TILES, N] float32
    head,  # [V, D]
    mean,  # out [SPLITS, N, D] float32
    N: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tiles_a_split: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    steps: tl.constexpr = tiles_a_split * (TILE // BLOCK_V)
    program = tl.program_id(0)
    row = (program % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = (program // row_tiles % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = program // (row_tiles * columns)

    row_read = tl.minimum(row, N - 1)
    column_read = tl.minimum(column, D - 1)
    offset = tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for step in range(0, steps):
        token = split * (tiles_a_split * TILE) + step * BLOCK_V + offset
        tile = split * tiles_a_split + step // (TILE // BLOCK_V)
        # The last split may have fewer tiles: it reads the last one with weight 0. Tokens past V have probability 0.
        w = tl.load(weight + tl.minimum(tile, TILES - 1) * N + row_read)
        w = tl.where(tile < TILES, w, 0.0)
        p = tl.load(prob + row_read[:, None] * (TILES * TILE) + tl.minimum(token, TILES * TILE - 1)[None, :])
        rows = tl.load(head + tl.minimum(token, V - 1)[:, None] * D + column_read[None, :])
        p = p.to(tl.float32) * w[:, None]
        if UPCAST:
            rows = rows.to(tl.float32)
        acc = tl.dot(p.to(rows.dtype), rows, acc, input_precision="ieee")
    at = (split * N + row)[:, None] * D + column[None, :]
    tl.store(mean + at, acc, mask=(row < N)[:, None] & (column < D)[None, :])
