"""Where the time of steps went: every moment of every device under one label, so that the shares sum to 1."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from mllmrec_jax.profiler.hlo import Module
from mllmrec_jax.profiler.phases import CONTROL, KINDS, PHASES, Label, LayerLoop, find_layer_loops, label_module
from mllmrec_jax.profiler.trace import Operation, Span, Step, Trace, TraceError

LISTED_OPERATIONS = 25


class Labelled(NamedTuple):
    """An operation, what it is for, and which layer's it is (None outside of the layers)."""

    operation: Operation
    label: Label
    layer: int | None


class Window(NamedTuple):
    """One steady period of the loop: from one step's end to the next step's."""

    start: float
    end: float
    number: int


UNKNOWN = Label("other", "", "elementwise")
BETWEEN = "between programs"


def match_modules(operations: list[Operation], modules: list[Module]) -> dict[tuple[str, int], Module]:
    """The module of each (name, number) of a program in a trace: of those with its name, the one that has most of its instructions."""
    seen: dict[tuple[str, int], set[str]] = defaultdict(set)
    for operation in operations:
        seen[operation.module, operation.program].add(operation.name)
    names = [(module, {one.name for one in module}) for module in modules]
    found = {}
    for key, used in seen.items():
        candidates = [(len(used & known), index) for index, (module, known) in enumerate(names) if module.name == key[0]]
        if candidates:
            found[key] = names[max(candidates)[1]][0]
    return found


def label_operations(trace: Trace, modules: list[Module]) -> list[Labelled]:
    """Labels of all operations that do work; loops and calls are left out for what they run."""
    matched = match_modules(trace.operations, modules)
    labels: dict[tuple[str, int], dict[str, Label]] = {}
    layers: dict[tuple[str, int], dict[str, LayerLoop]] = {}
    control: dict[tuple[str, int], set[str]] = {}
    by_module = {id(module): (label_module(module), find_layer_loops(module)) for module in matched.values()}
    for key, module in matched.items():
        labels[key], layers[key] = by_module[id(module)]
        control[key] = {one.name for one in module if one.opcode in CONTROL}
    occurrences: dict[tuple[int, int, int, str], int] = defaultdict(int)
    found = []
    for operation in trace.operations:
        key = operation.module, operation.program
        if operation.name in control.get(key, ()):
            continue
        label = labels.get(key, {}).get(operation.name, UNKNOWN)
        loop = layers.get(key, {}).get(operation.name)
        layer = None
        if loop is not None:
            execution = operation.device, operation.program, operation.run, operation.name
            layer = loop.find_layer(occurrences[execution])
            occurrences[execution] += 1
        found.append(Labelled(operation, label, layer))
    return found


def find_windows(steps: list[Step], first: int, count: int) -> list[Window]:
    """The periods of steps `first` to `first + count - 1`; the step before must be in the trace.

    Raises:
      TraceError: one of these steps is not.
    """
    ends = {step.number: step.end for step in steps}
    missing = [number for number in range(first - 1, first + count) if number not in ends]
    if missing:
        raise TraceError(f"trace: expected steps {first - 1} to {first + count - 1}, found {sorted(ends)}")
    return [Window(ends[number - 1], ends[number], number) for number in range(first, first + count)]


def _find_runs(labelled: list[Labelled]) -> list[tuple[float, float]]:
    """When programs ran, from each one's first operation to its last."""
    runs: dict[tuple[int, int, int], tuple[float, float]] = {}
    for operation, _, _ in labelled:
        key = operation.program, operation.run, operation.device
        start, end = runs.get(key, (operation.start, operation.end))
        runs[key] = min(start, operation.start), max(end, operation.end)
    return list(runs.values())


def share_out_time(labelled: list[Labelled], spans: list[Span], window: Window) -> tuple[dict[Label, float], dict[int, float]]:
    """Nanoseconds of one device's `window` by label, and by index into `labelled`; the labels' sum is the window's length.

    A moment in which n operations run counts 1/n for each.
    """
    events: list[tuple[float, int, int, int]] = []  # time, end before start, what, which
    for what, intervals in enumerate(([one.operation for one in labelled], _find_runs(labelled), spans)):
        for index, interval in enumerate(intervals):
            start, end = max(interval[0], window.start), min(interval[1], window.end)
            if start < end:
                events += [(start, 1, what, index), (end, 0, what, index)]
    events.sort()
    active: tuple[dict[int, None], dict[int, None], dict[int, None]] = ({}, {}, {})  # in order of their starts
    times: dict[Label, float] = defaultdict(float)
    of_operation: dict[int, float] = defaultdict(float)
    last, moment = UNKNOWN, window.start
    for time, starts, what, index in [*events, (window.end, 0, -1, -1)]:
        if time > moment:
            operations, runs, works = active
            if operations:
                for one in operations:
                    times[labelled[one].label] += (time - moment) / len(operations)
                    of_operation[one] += (time - moment) / len(operations)
            elif runs:
                times[Label(last.phase, "", "overhead")] += time - moment
            elif works:
                name = spans[next(reversed(works))].name
                times[Label(name, "", "host" if name.startswith("host: ") else "idle")] += time - moment
            else:
                times[Label(BETWEEN, "", "idle")] += time - moment
            moment = time
        if what < 0:
            continue
        if starts:
            active[what][index] = None
            last = labelled[index].label if what == 0 else last
        else:
            del active[what][index]
    return dict(times), dict(of_operation)


def build_breakdown(trace: Trace, modules: list[Module], *, first: int, count: int) -> dict[str, Any]:
    """The breakdown of steps `first` to `first + count - 1`, as plain JSON values; shares are of the mean device's time and sum to 1.

    Args:
      trace: what was recorded; the step before `first` included.
      modules: the compiled programs.
      first: number of the first step.
      count: steps.

    Returns:
      steps: number, seconds and idle share (host and idle) of each;
      rows: phase, part, kind, seconds a step, share; phases, kinds: their shares;
      idle_share: no program runs (kinds host and idle);
      other_share: in programs, but in no phase;
      operations: the instructions that took most time;
      layers: seconds a step of every layer, by phase.

    Raises:
      TraceError: a step is missing.
    """
    labelled, windows, devices = label_operations(trace, modules), find_windows(trace.steps, first, count), trace.devices()
    totals: dict[Label, float] = defaultdict(float)
    steps = []
    own: dict[tuple[str, str], dict[str, Any]] = {}
    layers: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    by_device = {device: [one for one in labelled if one.operation.device == device] for device in devices}
    for window in windows:
        unused = 0.0
        for device in devices:
            times, of_operation = share_out_time(by_device[device], trace.spans, window)
            for label, time in times.items():
                totals[label] += time
                unused += time * (label.kind in ("host", "idle"))
            for index, time in of_operation.items():
                _count(by_device[device][index], time, own, layers)
        length = window.end - window.start
        steps.append({"step": window.number, "seconds": length / 1e9, "idle_share": unused / length / len(devices)})
    whole = sum(totals.values())
    to_seconds = 1e-9 / len(devices) / count
    rows = [
        {"phase": label.phase, "part": label.part, "kind": label.kind, "seconds": time * to_seconds, "share": time / whole}
        for label, time in sorted(totals.items(), key=lambda item: _order(item[0]))
    ]
    operations = sorted(own.values(), key=lambda row: -row["seconds"])[:LISTED_OPERATIONS]
    return {
        "devices": len(devices),
        "steps": steps,
        "step_s": whole * to_seconds,
        "phases": _add_shares(rows, "phase"),
        "kinds": {kind: share for kind in KINDS if (share := _add_shares(rows, "kind").get(kind))},
        "idle_share": sum(row["share"] for row in rows if row["kind"] in ("host", "idle")),
        "other_share": sum(row["share"] for row in rows if row["phase"] == "other"),
        "rows": rows,
        "operations": [
            {**row, "seconds": row["seconds"] * to_seconds, "count": row["count"] / count / len(devices), "share": row["seconds"] / whole}
            for row in operations
        ],
        "layers": {
            phase: [times.get(layer, 0.0) * to_seconds for layer in range(max(times) + 1)]
            for phase, times in sorted(layers.items(), key=lambda item: PHASES.index(item[0]))
        },
    }


def _count(one: Labelled, time: float, own: dict[tuple[str, str], dict[str, Any]], layers: Mapping[str, dict[int, float]]) -> None:
    operation, label, layer = one
    empty = {"program": operation.module, "operation": operation.name, **label._asdict(), "count": 0, "seconds": 0.0}
    row = own.setdefault((operation.module, operation.name), empty)
    row["count"] += 1
    row["seconds"] += time
    if layer is not None:
        layers[label.phase][layer] += time


def _order(label: Label) -> tuple[int, Label]:
    return PHASES.index(label.phase) if label.phase in PHASES else len(PHASES), label


def _add_shares(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    groups = itertools.groupby(sorted(rows, key=lambda row: row[key]), key=lambda row: row[key])
    found = {name: sum(row["share"] for row in group) for name, group in groups}
    return {name: found[name] for name in dict.fromkeys(row[key] for row in rows)}
