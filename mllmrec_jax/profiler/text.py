"""A profile as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

IDLE_GOAL = 0.02
"""Share of a step for which no program may run."""


def format_bytes(size: float) -> str:
    """In binary units with three digits: `1.21 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def format_ms(seconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds * 1e3:,.0f} ms"


def format_share(share: float) -> str:
    """Percent with one decimal."""
    return f"{share:.1%}"


def describe_profile(profile: dict[str, Any]) -> list[str]:
    """The findings, a sentence each."""
    breakdown, compiled = profile["breakdown"], profile["compilations"]
    steps = breakdown["steps"]
    idle = breakdown["idle_share"]
    host = breakdown["kinds"].get("host", 0.0)
    lines = [
        f"{len(steps)} steps of {format_ms(breakdown['step_s'])} on average, {steps[0]['step']} to {steps[-1]['step']}; "
        f"{format_ms(profile['untraced_s'])} a step before the trace began.",
        f"No program ran for {idle:.2%} of the time ({'within' if idle < IDLE_GOAL else 'above'} the goal of {IDLE_GOAL:.0%}): "
        f"the loop did named work for {host:.2%}, and {idle - host:.2%} were waits and gaps.",
        f"{breakdown['kinds'].get('overhead', 0.0):.1%} passed inside programs between their operations; "
        f"{breakdown['other_share']:.1%} belong to no phase.",
    ]
    if compiled:
        names = ", ".join(f"{one['name']} ({one['seconds']:.2f} s)" for one in compiled)
        lines.append(f"{len(compiled)} programs were compiled in these steps: {names}.")
    else:
        lines.append("Nothing was compiled in these steps.")
    return lines


def _align(rows: Iterable[tuple[str, ...]], left: int) -> Iterator[str]:
    """Columns of equal width; the first `left` flush left."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join(cells).rstrip()


SMALLEST_SHARE = 0.0005
"""Rows below it are told in one."""


def list_large_rows(breakdown: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows by phase, part and kind, those below SMALLEST_SHARE as the last."""
    small = [row for row in breakdown["rows"] if row["share"] < SMALLEST_SHARE]
    rest = {key: sum(row[key] for row in small) for key in ("seconds", "share")}
    told = {"phase": f"{len(small)} rows below {SMALLEST_SHARE:.2%}", "part": "", "kind": "", **rest}
    return [row for row in breakdown["rows"] if row["share"] >= SMALLEST_SHARE] + [told] * bool(small)


def render_text(profile: dict[str, Any]) -> str:
    """`breakdown.txt`."""
    breakdown = profile["breakdown"]
    lines = [f"{profile['name']}, {profile['stage']}, on {profile['device']}", "", *describe_profile(profile)]
    for title, shares in (("phase", breakdown["phases"]), ("kind of operation", breakdown["kinds"])):
        rows = [(name, format_ms(share * breakdown["step_s"]), format_share(share)) for name, share in shares.items()]
        lines += ["", *_align([(title, "a step", "share"), *rows], 1)]
    rows = [(r["phase"], r["part"], r["kind"], format_ms(r["seconds"]), format_share(r["share"])) for r in list_large_rows(breakdown)]
    lines += ["", *_align([("phase", "part of the model", "kind", "a step", "share"), *rows], 3)]
    rows = [
        (
            r["operation"],
            r["program"],
            r["phase"],
            r["part"],
            r["kind"],
            f"{r['count']:g}",
            format_ms(r["seconds"]),
            format_share(r["share"]),
        )
        for r in breakdown["operations"]
    ]
    lines += ["", *_align([("operation", "program", "phase", "part", "kind", "runs", "a step", "share"), *rows], 5)]
    for program, owners in profile["memory"]["owners"].items():
        rows = [(owner, format_bytes(size)) for owner, size in owners.items() if size]
        total = format_bytes(profile["memory"]["totals"][program])
        lines += ["", *_align([(f"memory of one device, {program}", "bytes"), *rows, ("all", total)], 1)]
    return "\n".join(lines) + "\n"
