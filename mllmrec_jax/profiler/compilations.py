"""Which programs were compiled while something ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilation(NamedTuple):
    """One program made ready to run; one read from the compilation cache counts too."""

    name: str
    seconds: float


@contextlib.contextmanager
def watch_compilations() -> Iterator[list[Compilation]]:
    """Yields a list that grows with every compilation of this process while the block runs."""
    found: list[Compilation] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _EVENT:
            found.append(Compilation(str(kwargs.get("fun_name", "?")), duration_secs))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
