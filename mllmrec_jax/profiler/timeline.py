"""The trace once more with names: a file for Perfetto whose tracks are steps, loop, phases, layers and operations."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mllmrec_jax.profiler.breakdown import Labelled, Window
from mllmrec_jax.profiler.trace import Span, Trace


class Slice(NamedTuple):
    """A stretch of one name on a track; nanoseconds."""

    start: float
    end: float
    name: str


def merge_slices(slices: Iterable[Slice], *, gap: float) -> Iterator[Slice]:
    """Neighbours of one name, at most `gap` nanoseconds apart and with nothing else between them, as one; in order of their starts."""
    current: Slice | None = None
    for one in slices:
        if current is not None and one.name == current.name and one.start - current.end <= gap:
            current = current._replace(end=max(current.end, one.end))
            continue
        if current is not None:
            yield current
        # Operations overlap on devices with several streams or threads; slices of a track must not.
        start = one.start if current is None else max(one.start, current.end)
        current = one._replace(start=start, end=max(start, one.end))
    if current is not None:
        yield current


def list_phases(labelled: list[Labelled], *, device: int, gap: float) -> list[Slice]:
    """When a device was in which phase."""
    own = (one for one in labelled if one.operation.device == device)
    return list(merge_slices((Slice(one.operation.start, one.operation.end, one.label.phase) for one in own), gap=gap))


def _name_part(one: Labelled) -> str:
    layer = "" if one.layer is None else f"layer {one.layer} "
    return f"{one.label.phase}: {layer}{one.label.part}".rstrip(": ")


def write_timeline(trace: Trace, labelled: list[Labelled]) -> bytes:
    """A gzipped Chrome trace (JSON), which ui.perfetto.dev and chrome://tracing open."""
    events: list[dict[str, Any]] = []

    def name_track(process: int, process_name: str, thread: int, thread_name: str) -> None:
        for kind, name in (("process_name", process_name), ("thread_name", thread_name)):
            events.append({"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": name}})
        events.append({"ph": "M", "pid": process, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}})

    def add(process: int, thread: int, one: Slice | Span, **details: Any) -> None:
        event = {"ph": "X", "pid": process, "tid": thread, "ts": one.start / 1e3, "dur": (one.end - one.start) / 1e3, "name": one.name}
        events.append({**event, "args": details} if details else event)

    name_track(0, "training loop", 0, "steps")
    name_track(0, "training loop", 1, "work and waits")
    for step in trace.steps:
        add(0, 0, Slice(step.start, step.end, f"step {step.number}"))
    for span in trace.spans:
        add(0, 1, span)
    for device in trace.devices():
        process, lanes = device + 1, list[float]()
        name_track(process, f"device {device}", 0, "phases")
        name_track(process, f"device {device}", 1, "layers and parts")
        for one in list_phases(labelled, device=device, gap=float("inf")):
            add(process, 0, one)
        own = [one for one in labelled if one.operation.device == device]
        for part in merge_slices((Slice(one.operation.start, one.operation.end, _name_part(one)) for one in own), gap=float("inf")):
            add(process, 1, part)
        for one in own:
            operation = one.operation
            # The first lane that is free: what runs at the same time lies side by side.
            lane = next((i for i, end in enumerate(lanes) if end <= operation.start), len(lanes))
            lanes[lane:] = [operation.end, *lanes[lane + 1 :]]
            name = Slice(operation.start, operation.end, operation.name)
            add(process, 2 + lane, name, program=operation.module, phase=one.label.phase, part=_name_part(one), kind=one.label.kind)
        for lane in range(len(lanes)):
            name_track(process, f"device {device}", 2 + lane, f"operations {lane + 1}")
    return gzip.compress(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}).encode(), compresslevel=6, mtime=0)


def draw_step(trace: Trace, labelled: list[Labelled], window: Window) -> dict[str, list[tuple[float, float]]]:
    """One step as lanes: for each phase of the first device, and each work and wait of the loop, stretches as shares of the step."""
    length = window.end - window.start
    lanes: dict[str, list[tuple[float, float]]] = {}
    phases = list_phases(labelled, device=trace.devices()[0], gap=length / 400)
    for one in (*(Slice(*span) for span in trace.spans), *phases):
        start, end = (min(1.0, max(0.0, (time - window.start) / length)) for time in (one.start, one.end))
        if end > start:
            lanes.setdefault(one.name, []).append((start, end))
    return {name: _join(stretches) for name, stretches in lanes.items()}


def _join(stretches: list[tuple[float, float]], gap: float = 1 / 400) -> list[tuple[float, float]]:
    """Stretches less than `gap` apart as one: a picture shows no more, and a decoding loop has thousands."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(stretches):
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined
