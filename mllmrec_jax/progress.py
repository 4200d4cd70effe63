"""Progress of a loop: a bar on a terminal, a plain line every few seconds elsewhere (log files, CI)."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Self, TextIO, TypeVar

LINE_EVERY_S = 10.0
"""Seconds between plain lines."""

T = TypeVar("T")


def format_seconds(seconds: float) -> str:
    """A duration in the two largest units that matter: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 07 min`; `?` when unknown."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_rate(rate: float, unit: str) -> str:
    """Units a second, or seconds a unit where that is the larger number: `120 it/s`, `3.2 it/s`, `4.0 s/it`."""
    if not math.isfinite(rate) or rate <= 0:
        return f"? {unit}/s"
    if rate < 0.995:
        return f"{1 / rate:.3g} s/{unit}"
    return f"{rate:,.0f} {unit}/s" if rate >= 99.5 else f"{rate:.3g} {unit}/s"


def format_fields(fields: dict[str, Any]) -> str:
    """`name=value` pairs; floats with four significant digits."""
    return " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items())


class Progress:
    """Shows how far a loop is, its rate and the time left; a context manager.

        with Progress(total=steps, description="grpo", unit="step") as progress:
            for step in range(steps):
                ...
                progress.advance(reward=0.52)

    Values given to `advance` must be on the host already: formatting a device array would wait for the device.
    The rate of plain lines is that since the previous line, so that a slow first step (compilation) does not spoil the time left.
    """

    def __init__(
        self,
        *,
        description: str,
        total: int | None = None,
        unit: str = "it",
        completed: int = 0,
        stream: TextIO | None = None,
        line_every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        description: what the loop does.
        total: how many units there will be; None when unknown.
        unit: name of one unit, singular.
        completed: units done before (a resumed run); shown, but not counted in the rate.
        stream: where to write; standard error by default.
        line_every_s: least time between plain lines (seconds).
        clock: seconds, monotonic.
        """
        self.description = description
        self.total = total
        self.unit = unit
        self.completed = completed
        self.fields: dict[str, Any] = {}
        self._stream = sys.stderr if stream is None else stream
        self._line_every_s = line_every_s
        self._clock = clock
        self._start = self._last_line = (0.0, completed)
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        now = self._clock()
        self._start = self._last_line = (now, self.completed)
        if self._stream.isatty():
            self._bar = _make_bar(self._stream, self.unit)
            self._bar.start()
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self.completed, fields="", baseline=self.completed
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._print_line("done" if kind is None else "stopped", since=self._start)

    def advance(self, count: int = 1, **fields: Any) -> None:
        """Counts `count` more units and replaces the fields shown beside them."""
        self.completed += count
        self.fields.update(fields)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.completed, fields=format_fields(self.fields))
        elif self._clock() - self._last_line[0] >= self._line_every_s:
            self._print_line("", since=self._last_line)
            self._last_line = (self._clock(), self.completed)

    def _print_line(self, ending: str, *, since: tuple[float, int]) -> None:
        now = self._clock()
        elapsed, done = now - since[0], self.completed - since[1]
        rate = done / elapsed if elapsed > 0 else 0.0
        count = f"{self.completed:,}" if self.total is None else f"{self.completed:,}/{self.total:,}"
        parts = [f"{count} {self.unit}", format_rate(rate, self.unit)]
        if ending:
            parts.append(f"{ending} after {format_seconds(now - self._start[0])}")
        elif self.total is not None:
            left = (self.total - self.completed) / rate if rate > 0 else math.inf
            parts.append(f"{format_seconds(left)} left")
        if self.fields:
            parts.append(format_fields(self.fields))
        print(f"{self.description}: {', '.join(parts)}", file=self._stream, flush=True)


def track(iterable: Iterable[T], *, description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yields from `iterable` while showing progress on standard error; `total` defaults to its length where it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(description=description, total=total, unit=unit) as progress:
        for item in iterable:
            yield item
            progress.advance()


def _make_bar(stream: TextIO, unit: str) -> Any:
    from rich import progress as rich_progress  # here: importing rich's display costs a start-up that plain runs need not pay
    from rich.console import Console
    from rich.text import Text

    class RateColumn(rich_progress.ProgressColumn):
        def render(self, task: rich_progress.Task) -> Text:
            # Over the whole run once it has ended (rich's finished_speed would count units done before a resume).
            rate = task.speed
            if task.finished and task.finished_time:
                rate = (task.completed - task.fields["baseline"]) / task.finished_time
            return Text(format_rate(rate or 0.0, unit), style="progress.data.speed")

    return rich_progress.Progress(
        # Descriptions and fields are data, not rich markup: `[sft]` must be shown as it is.
        rich_progress.TextColumn("{task.description}", markup=False, style="bold"),
        rich_progress.BarColumn(bar_width=None),
        rich_progress.MofNCompleteColumn(),
        RateColumn(),
        rich_progress.TimeRemainingColumn(elapsed_when_finished=True),
        rich_progress.TextColumn("{task.fields[fields]}", markup=False, style="cyan"),
        console=Console(file=stream),
        speed_estimate_period=120.0,  # seconds; long enough that steps of half a minute still have a rate
        expand=True,
    )
