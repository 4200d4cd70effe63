"""What a compiled program says of itself: its collectives, with the loops they stand in counted."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
# Groups are written as [groups,size]<=..., as {{0,1},...}, or as axes of a mesh: mesh['a'=2,'b'=4], ... {'b'}.
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^]]*)\].*? \{([^}]*)\}")
_SCOPE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One collective instruction."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    """Of its results on one device."""
    size: int
    """Bytes of its results on one device."""
    devices: int
    """Devices that meet in it."""
    count: int
    """Times it runs in one call of the program; a loop whose trip count the compiler does not know counts once."""
    scope: str
    """Where it comes from (`jax.named_scope`)."""

    @property
    def received(self) -> float:
        """Bytes a device receives in all runs, by the ring algorithms: (n - 1) / n of what is gathered, scattered or exchanged, twice
        that for a reduction that every device gets."""
        n = self.devices
        whole = self.size * n if self.kind == "reduce-scatter" else self.size
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.count * whole * share


def list_collectives(text: str) -> list[Collective]:
    """The collectives of an optimised HLO module's text (`compiled.as_text()`) in which two devices or more meet."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            bodies[current] = []
            entry = current if match[1] else entry
        elif current:
            bodies[current].append(line)

    found: list[Collective] = []

    def visit(name: str, count: int) -> None:
        for line in bodies.get(name, ()):
            if match := _COLLECTIVE.search(line):
                shapes = find_shapes(match[1])
                size = sum(BYTES[dtype] * math.prod(dims) for dtype, dims in shapes)
                scope = _SCOPE.search(line)
                collective = Collective(
                    match[2], tuple(dims for _, dims in shapes), size, _group_size(line), count, scope[1] if scope else ""
                )
                if collective.devices > 1:
                    found.append(collective)
                continue  # what it applies is a sum
            trips = int(match[1]) if (match := _TRIPS.search(line)) else 1
            branches = match[1].replace("%", "").split(", ") if (match := _BRANCHES.search(line)) else []
            for called in (*_CALLED.findall(line), *branches):
                visit(called, count * trips)

    visit(entry, 1)
    return found


def find_shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of every array named in `text`, as HLO writes them: `f32[2,8]`."""
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(text)]


def _group_size(line: str) -> int:
    if match := _MESH_GROUPS.search(line):
        sizes = {name: int(size) for name, size in (part.split("=") for part in match[1].split(","))}
        # A part of an axis is 'a':(sizes before it)its size.
        return math.prod(int(name.split(")")[1]) if ":" in name else sizes[name] for name in match[2].split(","))
    if match := _GROUPS.search(line):
        return int(match[1]) if match[1] else len(match[2].split(","))
    return 2  # a permutation names pairs
