"""Reads a recorded trace (`.xplane.pb`): operations of each device, work and waits of the training loop, and the steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HOST_PREFIXES = ("host: ", "wait: ")


class TraceError(RuntimeError):
    """A trace that cannot be read; the message says what is missing."""


class Operation(NamedTuple):
    """One execution of one instruction on one device."""

    start: float
    """Nanoseconds since the trace began, here and below."""
    end: float
    device: int
    module: str
    """Name of the compiled program, as `jit_step`; empty where the trace does not say."""
    program: int
    run: int
    """The same for the operations of one call of the program."""
    name: str
    """Of the instruction, or of the kernel where the trace does not say."""


class Span(NamedTuple):
    """Named work, or a named wait, of the training loop."""

    start: float
    end: float
    name: str


class Step(NamedTuple):
    """One pass of the training loop's body."""

    start: float
    end: float
    number: int


class Trace(NamedTuple):
    """What was recorded, each in order of its start."""

    operations: list[Operation]
    spans: list[Span]
    steps: list[Step]

    def devices(self) -> list[int]:
        """Devices that ran anything, ascending."""
        return sorted({operation.device for operation in self.operations})


def find_trace_file(folder: Path) -> Path:
    """The newest `.xplane.pb` below `folder`.

    Raises:
      TraceError: there is none.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise TraceError(f"{folder}: expected a recorded trace (*.xplane.pb), found none")
    return files[-1]


def read_trace(source: Path | Any, *, stage: str) -> Trace:
    """Reads a `.xplane.pb` file, or what `jax.profiler.ProfileData` made of one.

    Operations come from the lines of the CPU backend's threads, whose events name their instruction, or from a GPU's streams.

    Args:
      source: a file, or a `ProfileData`.
      stage: `sft` or `grpo`, the name of the loop's steps.

    Raises:
      TraceError: no operation, or no step of `stage`, was recorded.
    """
    from jax.profiler import ProfileData

    data = ProfileData.from_file(str(source)) if isinstance(source, Path) else source
    operations: list[Operation] = []
    spans: list[Span] = []
    steps: list[Step] = []
    for plane in data.planes:
        gpu = plane.name.startswith("/device:GPU:")
        device = int(plane.name.rsplit(":", 1)[1]) if gpu else 0
        for line in plane.lines:
            if gpu and line.name.startswith("Stream"):
                operations += _read_stream(line, device)
            elif plane.name == "/host:CPU":
                _read_thread(line, stage, operations, spans, steps)
    where = source if isinstance(source, Path) else "the trace"
    if not operations:
        raise TraceError(f"{where}: expected operations of a CPU or GPU backend, found none")
    if not steps:
        raise TraceError(f"{where}: expected steps named '{stage}', found none")
    return Trace(_number_runs(sorted(operations)), sorted(spans), sorted(steps))


def _read_stream(line: Any, device: int) -> Iterator[Operation]:
    for event in line.events:
        stats = dict(event.stats)
        yield Operation(
            event.start_ns,
            event.start_ns + event.duration_ns,
            device,
            str(stats.get("hlo_module", "")),
            int(stats.get("program_id", -1)),
            int(stats.get("run_id", -1)),
            str(stats.get("hlo_op", event.name)),
        )


def _read_thread(line: Any, stage: str, operations: list[Operation], spans: list[Span], steps: list[Step]) -> None:
    for event in line.events:
        name, start, end = event.name, event.start_ns, event.start_ns + event.duration_ns
        if name.startswith(HOST_PREFIXES):
            spans.append(Span(start, end, name))
        elif name == stage:
            number = dict(event.stats).get("step_num")
            if number is not None:
                steps.append(Step(start, end, int(number)))
        elif not name.startswith("end: "):
            stats = dict(event.stats)
            if "hlo_op" in stats:
                ids = (int(stats.get(key, 0)) for key in ("device_ordinal", "program_id", "run_id"))
                device, program, run = ids
                operations.append(Operation(start, end, device, str(stats["hlo_module"]), program, run, str(stats["hlo_op"])))


def _number_runs(operations: list[Operation]) -> list[Operation]:
    """Where a trace numbers no runs, a program's operations up to another program's are one."""
    numbered, last, run = [], {}, 0
    for operation in operations:
        if operation.run == -1:
            if last.get(operation.device) != (operation.module, operation.program):
                run += 1
                last[operation.device] = operation.module, operation.program
            operation = operation._replace(run=run)
        numbered.append(operation)
    return numbered
