"""Progress: what is printed, and how often."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from mllmrec_jax.progress import Progress, format_fields, format_rate, format_seconds, track


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_loop(*, steps, seconds_a_step, total, line_every_s=10.0, completed=0, first_step=None):
    clock, stream = Clock(), io.StringIO()
    with Progress(
        description="[sft]", total=total, unit="step", completed=completed, stream=stream, line_every_s=line_every_s, clock=clock
    ) as progress:
        for step in range(steps):
            clock.now += first_step if step == 0 and first_step is not None else seconds_a_step
            progress.advance(loss=1.0 / (step + 1))
    return stream.getvalue().splitlines()


def test_plain_lines_are_at_most_one_every_interval_plus_one_at_the_end():
    lines = run_loop(steps=1000, seconds_a_step=0.125, total=1000)
    assert len(lines) == 125 // 10 + 1
    assert lines[0] == "[sft]: 80/1,000 step, 8 step/s, 1 min 55 s left, loss=0.0125"
    assert lines[-1] == "[sft]: 1,000/1,000 step, 8 step/s, done after 2 min 05 s, loss=0.001"


def test_a_short_loop_prints_its_end_only():
    assert run_loop(steps=3, seconds_a_step=0.5, total=3) == ["[sft]: 3/3 step, 2 step/s, done after 1.5 s, loss=0.3333"]


def test_a_slow_first_step_does_not_spoil_the_time_left():
    lines = run_loop(steps=60, seconds_a_step=1.0, total=100, first_step=60.0)
    assert "99 min" not in lines[1] and "1 step/s, 1 min 29 s left" in lines[1]


def test_units_done_before_a_resume_count_in_the_total_but_not_in_the_rate():
    lines = run_loop(steps=10, seconds_a_step=1.0, total=110, completed=100)
    assert "110/110 step, 1 step/s, done" in lines[-1]


def test_without_a_total_there_is_a_count_and_a_rate_but_no_time_left():
    lines = run_loop(steps=20, seconds_a_step=1.0, total=None)
    assert lines[0].startswith("[sft]: 10 step, 1 step/s, loss=") and "left" not in lines[0]


def test_an_exception_is_reported_as_stopped_and_passes_through():
    stream = io.StringIO()

    def run():
        with Progress(description="d", total=5, stream=stream) as progress:
            progress.advance(2)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run()
    assert "2/5 it" in stream.getvalue() and "stopped after" in stream.getvalue() and "done" not in stream.getvalue()


def test_a_terminal_gets_a_bar_with_fields_shown_verbatim():
    stream = Terminal()
    with Progress(description="[grpo]", total=4, unit="step", stream=stream) as progress:
        for _ in range(4):
            progress.advance(reward=0.52, note="[red]x")
    text = stream.getvalue()
    assert "[grpo]" in text and "4/4" in text and "reward=0.52 note=[red]x" in text and "━" in text


def test_bars_nest_on_a_terminal():
    stream = Terminal()
    with Progress(description="outer", total=2, stream=stream) as outer:
        for _ in range(2):
            with Progress(description="inner", total=2, stream=stream) as inner:
                inner.advance(2)
            outer.advance()
    assert "outer" in stream.getvalue() and "inner" in stream.getvalue()


@pytest.mark.parametrize(("iterable", "count"), [([1, 2, 3], "3/3"), (iter([1, 2, 3]), "3"), (range(0), "0/0")])
def test_track_yields_everything_and_takes_the_length_as_total(iterable, count, capsys):
    seen = list(track(iterable, description="reading", unit="row"))
    assert seen == ([] if count == "0/0" else [1, 2, 3])
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"reading: {count} row,") and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.97, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.9, "1 h 00 min"),
        (7620, "2 h 07 min"),
        (float("inf"), "?"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(12345.6, "12,346 it/s"), (3.21, "3.21 it/s"), (0.25, "4 s/it"), (0.0, "? it/s")])
def test_format_rate(rate, text):
    assert format_rate(rate, "it") == text


def test_format_fields_keeps_text_and_shortens_floats():
    assert format_fields({"reward": 0.523456, "step": 12, "phase": "warm"}) == "reward=0.5235 step=12 phase=warm"


def test_importing_progress_does_not_import_rich():
    code = "import sys, mllmrec_jax.progress; raise SystemExit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
