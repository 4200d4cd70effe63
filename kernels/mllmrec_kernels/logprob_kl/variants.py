"""Which tile sizes a kernel runs with: a table, `variants.json`, by device, dtype, kernel, D and N. Nothing is tuned at run time.

`profiling/tune_logprob_kl.py` measures candidates on a GPU and rewrites that device's rows.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import Literal, NamedTuple

KernelName = Literal["forward", "forward_kl", "mean_head", "backward", "backward_kl"]


class Variant(NamedTuple):
    """Tile of one program: rows x tokens x features (`mean_head` steps over tokens, the others over features)."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group: int = 8
    """Row tiles that run beside each other before the next vocabulary tile."""
    splits: int = 1
    """Parts of the vocabulary summed apart (`mean_head`)."""


class TableRow(NamedTuple):
    """A variant and where it was chosen."""

    device: str
    dtype: str
    kernel: str
    d: int
    n: int
    variant: Variant


@functools.cache
def read_table() -> tuple[TableRow, ...]:
    """All rows of `variants.json`."""
    rows = json.loads(resources.files("mllmrec_kernels.logprob_kl").joinpath("variants.json").read_text())
    return tuple(TableRow(r["device"], r["dtype"], r["kernel"], r["d"], r["n"], Variant(**r["variant"])) for r in rows)


def find_variant(kernel: KernelName, *, device: str, dtype: str, d: int, n: int) -> Variant:
    """The row of this device, dtype and kernel whose D, then N, is nearest (by ratio).

    Raises:
      ValueError: the table has no row for the device and dtype.
    """
    rows = [r for r in read_table() if (r.device, r.dtype, r.kernel) == (device, dtype, kernel)]
    if not rows:
        known = sorted({f"{r.device} {r.dtype}" for r in read_table() if r.kernel == kernel})
        raise ValueError(f"kernel {kernel!r}: the table of variants has no row for {device} {dtype}, only for {', '.join(known)}")
    return min(rows, key=lambda r: (abs(math.log2(d / r.d)), abs(math.log2(n / r.n)))).variant
