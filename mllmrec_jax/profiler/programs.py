"""Compiled programs: their text, and what it says of fusions, collectives, buffers, FLOPs and bytes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import jax

from mllmrec_jax.compiled import BYTES, find_shapes, list_collectives
from mllmrec_jax.profiler.hlo import Module, parse_module
from mllmrec_jax.profiler.phases import find_phase

LISTED_BUFFERS = 12
NO_BUFFER = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")
"""Instructions whose result lies where another's does."""


class Program(NamedTuple):
    """One compiled program of this process."""

    text: str
    module: Module
    memory: dict[str, int]
    """Bytes of one device: argument, output, alias, temp, peak."""
    cost: dict[str, float]
    """FLOPs and bytes accessed by XLA's count, which takes a loop's body once."""


def collect_programs() -> list[Program]:
    """All programs that are loaded; call it while what made them still holds them."""
    found = []
    for executable in jax.local_devices()[0].client.live_executables():
        text = executable.hlo_modules()[0].to_string()
        stats = executable.get_compiled_memory_stats()
        memory = {part: int(getattr(stats, f"{part}_size_in_bytes")) for part in ("argument", "output", "alias", "temp")}
        memory["peak"] = memory["argument"] + memory["output"] - memory["alias"] + memory["temp"]
        cost = executable.cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        found.append(Program(text, parse_module(text), memory, {key: float(cost.get(key, 0)) for key in ("flops", "bytes accessed")}))
    return found


def summarise_program(program: Program) -> dict[str, Any]:
    """Plain JSON values: counts of instructions, matrix products by phase, collectives, largest buffers, memory and cost."""
    module = program.module
    paths, matmuls = module.resolve_paths(), module.find_matmuls()
    fused = {name for one in module if one.opcode in ("fusion", "reduce", "map", "scatter", "sort") for name in one.called}
    run = [one for name, body in module.computations.items() if name not in fused for one in body.values()]
    opcodes = Counter(one.opcode for one in run)
    buffers = sorted(((_count_bytes(one.shape), one) for one in run if one.opcode not in NO_BUFFER), key=lambda pair: -pair[0])
    collectives = list_collectives(program.text)
    return {
        "name": module.name,
        "instructions": len(run),
        "fusions": opcodes["fusion"],
        "opcodes": dict(opcodes.most_common(12)),
        "matmuls": dict(Counter(find_phase(paths[one.name]) for one in run if one.name in matmuls and one.opcode != "call")),
        "collectives": [
            {"kind": c.kind, "bytes": c.size, "devices": c.devices, "count": c.count, "received": c.received, "scope": c.scope}
            for c in collectives
        ],
        "largest_buffers": [
            {"bytes": size, "instruction": one.name, "shape": _shorten(one.shape), "scope": paths[one.name]}
            for size, one in buffers[:LISTED_BUFFERS]
        ],
        "memory": program.memory,
        **{key.replace(" ", "_"): value for key, value in program.cost.items()},
    }


def _count_bytes(shape: str) -> int:
    return sum(BYTES.get(dtype, 4) * math.prod(dims) for dtype, dims in find_shapes(shape))


def _shorten(shape: str) -> str:
    return shape if len(shape) <= 80 else f"{shape[:77]}..."
