"""Small kernels, one for each thing the harness must tell apart; run as a script, prints one JSON row a kernel."""

from __future__ import annotations

import dataclasses
import json

import triton
import triton.language as tl

from mllmrec_kernels.ahead_of_time import compile_kernel


@triton.jit
def multiply(a_ptr, b_ptr, out_ptr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + m[:, None] * K + k[None, :])
        b = tl.load(b_ptr + n[None, :] * K + k[:, None])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + m[:, None] * 1024 + n[None, :], total)


@triton.jit
def centre(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Keeps the whole block in registers until its sum is known."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x - tl.sum(x))


POINTERS = {
    multiply: {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32"},
    centre: {"x_ptr": "*fp32", "out_ptr": "*fp32"},
}
TILE = {"K": 512, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
CASES = {
    "good": (multiply, TILE, 8, 3),
    "other GPU": (multiply, TILE, 8, 3),
    "too much shared memory": (multiply, {**TILE, "BLOCK_N": 256}, 8, 5),
    "serialised": (multiply, {**TILE, "BLOCK_N": 256}, 4, 1),  # 256 accumulators a thread: more than it has registers
    "no matrix": (centre, {"BLOCK": 1024}, 4, 1),
    "spills": (centre, {"BLOCK": 16384}, 1, 1),  # 512 values a thread
}

if __name__ == "__main__":
    rows = {}
    for case, (kernel, constants, num_warps, num_stages) in CASES.items():
        capability = 80 if case == "other GPU" else 90
        compiled = compile_kernel(kernel, POINTERS[kernel], constants, num_warps=num_warps, num_stages=num_stages, capability=capability)
        rows[case] = {**dataclasses.asdict(compiled), "faults": compiled.find_faults()}
    print(json.dumps(rows))
