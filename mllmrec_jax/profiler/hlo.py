"""An optimised HLO module's text as instructions: what each does, where in the model it comes from, and which loops it stands in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_PATH = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.-]+)")

MATMUL_TARGET = re.compile(r"gemm|matmul|cublas", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    opcode: str
    shape: str
    """Of its result, as HLO writes it."""
    path: str
    """Scopes it comes from (`jax.named_scope`), outermost first; empty where the compiler made it."""
    operands: tuple[str, ...]
    called: tuple[str, ...]
    """Computations it calls."""
    trips: int
    """Of a loop whose trip count the compiler knows; 1 elsewhere."""
    target: str
    """Of a custom call."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop that an instruction stands in."""

    path: str
    trips: int


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program. Names of instructions are unique in it."""

    name: str
    entry: str
    computations: dict[str, dict[str, Instruction]]

    def __iter__(self) -> Iterator[Instruction]:
        for body in self.computations.values():
            yield from body.values()

    def find_callers(self) -> dict[str, Instruction]:
        """The instruction that calls each computation."""
        return {called: instruction for instruction in self for called in instruction.called}

    def find_matmuls(self) -> set[str]:
        """Names of instructions that are matrix products, or fusions and calls that hold one."""
        found: set[str] = set()
        holding: set[str] = set()
        # A computation is written before the one that calls it.
        for name, body in self.computations.items():
            for instruction in body.values():
                product = instruction.opcode in ("dot", "convolution") or MATMUL_TARGET.search(instruction.target)
                if product or (instruction.opcode in ("fusion", "call") and holding.intersection(instruction.called)):
                    found.add(instruction.name)
                    holding.add(name)
        return found

    def resolve_paths(self) -> dict[str, str]:
        """The scopes of every instruction; one that the compiler made gets those of what it feeds, what feeds it, or what calls it."""
        callers = self.find_callers()
        paths: dict[str, str] = {}
        # A caller is written after what it calls, so from the end callers come first.
        for name, body in reversed(self.computations.items()):
            caller = callers.get(name)
            around = paths.get(caller.name, "") if caller else ""
            users: dict[str, str] = {}
            for instruction in reversed(body.values()):
                path = instruction.path or users.get(instruction.name, "")
                if not path:
                    path = next((body[o].path for o in instruction.operands if o in body and body[o].path), around)
                paths[instruction.name] = path
                if path != around:
                    for operand in instruction.operands:
                        users.setdefault(operand, path)
        return paths

    def find_loops(self) -> dict[str, tuple[Loop, ...]]:
        """Of every computation, the loops it runs in, outermost first."""
        callers = self.find_callers()
        home = {instruction.name: name for name, body in self.computations.items() for instruction in body.values()}
        found: dict[str, tuple[Loop, ...]] = {}

        def find(name: str) -> tuple[Loop, ...]:
            if name not in found:
                caller = callers.get(name)
                outer = find(home[caller.name]) if caller else ()
                found[name] = (*outer, Loop(caller.path, caller.trips)) if caller and caller.opcode == "while" else outer
            return found[name]

        for name in self.computations:
            find(name)
        return found


def parse_module(text: str) -> Module:
    """Reads the text of an optimised HLO module (`compiled.as_text()`).

    Raises:
      ValueError: it is not one.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, body = "", {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            body = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            instruction = _parse_instruction(match[1], match[2])
            if instruction is not None:
                body[instruction.name] = instruction
    header = re.match(r"HloModule ([\w.-]+)", text)
    if header is None or not entry:
        raise ValueError(f"text: expected an HLO module with an entry computation, got {text[:60]!r}")
    return Module(header[1], entry, computations)


def _parse_instruction(name: str, rest: str) -> Instruction | None:
    # A tuple's shape holds spaces and, in layouts, parentheses: it ends where they balance.
    end = _find_close(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    match = _OPCODE.match(rest, end)
    if match is None:
        return None
    close = _find_close(rest, match.end() - 1)
    attributes = rest[close:]
    branches = _OPERAND.findall(found[1]) if (found := _BRANCHES.search(attributes)) else []
    path, target, trips = (pattern.search(attributes) for pattern in (_PATH, _TARGET, _TRIPS))
    return Instruction(
        name=name,
        opcode=match[1],
        shape=rest[:end],
        path=path[1] if path else "",
        operands=tuple(_OPERAND.findall(rest[match.end() : close])),
        called=(*_CALLED.findall(attributes), *branches),
        trips=int(trips[1]) if trips else 1,
        target=target[1] if target else "",
    )


def _find_close(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)
