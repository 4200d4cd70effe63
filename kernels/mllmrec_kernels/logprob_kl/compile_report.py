"""Compiles every variant of the table for its GPU, without one, and prints what the assembler says: one JSON row a kernel.

    python -m mllmrec_kernels.logprob_kl.compile_report [--dtype bfloat16] [--vocab 151936]

Exits with status 1 where a kernel spills registers, serialises its matrix instructions, uses none, or asks for too much shared memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mllmrec_kernels.ahead_of_time import compile_kernel
from mllmrec_kernels.logprob_kl.api import compute_logprobs
from mllmrec_kernels.logprob_kl.variants import read_table
from mllmrec_kernels.triton_launch import Launch, collect_launches

POINTERS = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}

MODES: dict[str, dict[str, Any]] = {
    "values": {},
    "accumulate": {"entropy": True, "backward": "accumulate"},
    "recompute": {"entropy": True, "backward": "recompute"},
    "recompute with exact KL": {"entropy": True, "kl": True, "backward": "recompute"},
    "accumulate with exact KL": {"kl": True, "backward": "accumulate"},
    "recompute with exact KL, own reference head": {"kl": True, "backward": "recompute", "own_head": True},
}


def list_launches(n: int, d: int, v: int, dtype: str, *, own_head: bool = False, **options: Any) -> list[Launch]:
    """The kernels that one call and its gradient launch."""
    array = jax.ShapeDtypeStruct
    hidden, head, target = array((n, d), jnp.dtype(dtype)), array((v, d), jnp.dtype(dtype)), array((n,), jnp.int32)

    def loss(hidden: jax.Array, head: jax.Array, target: jax.Array) -> jax.Array:
        reference = {"hidden_ref": hidden * 0.9} if options.get("kl") else {}
        reference |= {"head_ref": head * 0.9} if own_head else {}
        out = compute_logprobs(hidden, head, target, implementation="triton", **reference, **options)
        return sum((jnp.sum(x) for x in (out.entropy, out.kl) if x is not None), jnp.sum(out.logp))

    function = jax.grad(loss) if "backward" in options else loss
    with collect_launches() as launches:
        jax.eval_shape(function, hidden, head, target)
    return launches


def compile_variants(dtype: str, vocabulary: int) -> Iterator[dict[str, Any]]:
    """A row for every distinct kernel that the table's sizes launch in any mode."""
    seen = set()
    for n, d in sorted({(row.n, row.d) for row in read_table() if row.device == "sm_90" and row.dtype == dtype}):
        for mode, options in MODES.items():
            for launch in list_launches(n, d, vocabulary, dtype, **options):
                key = (launch.kernel.__name__, *sorted(launch.constants.items()), launch.num_warps, launch.num_stages)
                if key in seen:
                    continue
                seen.add(key)
                pointers = {name: POINTERS[str(x.dtype)] for name, x in launch.pointers.items()}
                compiled = compile_kernel(
                    launch.kernel, pointers, launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages
                )
                row = {k: x for k, x in dataclasses.asdict(compiled).items() if k != "ptx"}
                shape = {k: x for k, x in launch.constants.items() if k != "UPCAST"}
                faults = compiled.find_faults(matrix=dtype == "bfloat16")
                yield {"mode": mode, **row, "num_warps": launch.num_warps, "num_stages": launch.num_stages, **shape, "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--vocab", type=int, default=151_936, help="rows of the head (tokens)")
    options = parser.parse_args()
    failed = False
    for row in compile_variants(options.dtype, options.vocab):
        print(json.dumps(row), flush=True)
        failed |= bool(row["faults"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
