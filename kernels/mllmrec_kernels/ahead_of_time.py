"""Compiles a Triton kernel for a GPU that is not there, and reads what its assembler says of it.

Needs triton and nothing else: no GPU, no driver, no CUDA (triton's wheel carries NVIDIA's assembler, ptxas). Kernels must be real ones:
where TRITON_INTERPRET is 1, triton.jit makes interpreted ones, so compile in a process that does not set it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Most shared memory one block may ask for, in bytes, by 10 x compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_BYTES_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
# ptxas gives several reasons, each behind these words.
_SERIALISED = "wgmma.mma_async instructions are serialized"


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """What compiling one kernel gave. Spills are in bytes a thread, registers are per thread, shared memory is bytes a block."""

    name: str
    ptx: str = dataclasses.field(repr=False)
    capability: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    wgmma: int  # warp-group matrix instructions in the program text
    serialised: str  # ptxas's sentence where it gave up overlapping them, else empty
    seconds: float

    def find_faults(self, *, matrix: bool = True) -> list[str]:
        """What makes the kernel slow or impossible to launch, one line each; `matrix`: on Hopper it is to use wgmma."""
        faults = []
        if self.spill_stores or self.spill_loads:
            faults.append(f"{self.name}: spills registers ({self.spill_stores} bytes stored, {self.spill_loads} loaded a thread)")
        if self.serialised:
            faults.append(f"{self.name}: {self.serialised}")
        if matrix and self.capability == 90 and not self.wgmma:
            faults.append(f"{self.name}: has no wgmma instruction; its tile is too small or its operands are of the wrong type")
        if self.shared_bytes > (limit := SHARED_BYTES_LIMIT[self.capability]):
            faults.append(f"{self.name}: needs {self.shared_bytes} bytes of shared memory, at most {limit} can be had")
        return faults


def compile_kernel(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    capability: int = 90,
) -> CompiledKernel:
    """Compiles as jax-triton does: every pointer is taken to be 16-byte aligned, every other parameter is a constant.

    Args:
      kernel: what triton.jit made.
      pointers: parameter name to triton's pointer type, such as "*bf16", "*fp32", "*i32".
      constants: parameter name to value.
      num_warps: warps a block.
      num_stages: depth of the software pipeline.
      capability: 10 x compute capability, such as 90 for H100 and H200.

    Raises:
      ValueError: an interpreted kernel, parameters that do not fit, or an unknown capability.
      triton.runtime.errors.PTXASError: the assembler refused the program.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise ValueError(f"kernel: must be made by triton.jit without TRITON_INTERPRET=1, was {type(kernel).__name__}")
    if set(kernel.arg_names) != {*pointers, *constants} or set(pointers) & set(constants):
        raise ValueError(
            f"{kernel.__name__}: its parameters {sorted(kernel.arg_names)} must be given once each, as pointers or as constants; "
            f"given were {sorted(pointers)} and {sorted(constants)}"
        )
    if capability not in SHARED_BYTES_LIMIT:
        raise ValueError(f"capability: must be one of {sorted(SHARED_BYTES_LIMIT)}, was {capability}")
    signature = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
    source = ASTSource(kernel, signature, dict(constants), aligned)
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache,  # an entry of triton's own cache would come without ptxas's report
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        started = time.perf_counter()
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        seconds = time.perf_counter() - started
    ptx = compiled.asm["ptx"]
    return CompiledKernel(
        name=kernel.__name__,
        ptx=ptx,
        capability=capability,
        shared_bytes=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        seconds=seconds,
        **read_assembler_log(log.getvalue()),
    )


def read_assembler_log(log: str) -> dict[str, Any]:
    """Registers, spills and serialisation out of what `ptxas -v` prints; functions that were not inlined count with their kernel.

    Raises:
      ValueError: the log has no such numbers.
    """
    registers, spills = _REGISTERS.findall(log), _SPILLS.findall(log)
    if not registers or not spills:
        raise ValueError(f"ptxas printed no registers or spills; its output was:\n{log}")
    return {
        "registers": max(map(int, registers)),
        "spill_stores": sum(int(stores) for stores, _ in spills),
        "spill_loads": sum(int(loads) for _, loads in spills),
        "serialised": next((line.split("Loss: ")[-1] for line in log.splitlines() if _SERIALISED in line), ""),
    }
