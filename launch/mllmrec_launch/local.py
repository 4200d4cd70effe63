"""This machine: starts the processes, prefixes what they print, and ends them all when one dies."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import IO

from mllmrec_jax.config import PositiveInt
from mllmrec_jax.distributed import EXIT_PREEMPTED
from mllmrec_launch.options import LaunchOptions, build_program

# A process that lost another says so before it ends; after this time it is killed.
_PATIENCE_S = 10.0
_POLL_S = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalOptions(LaunchOptions):
    """Processes on this machine; SIGTERM and Ctrl-C are passed on to them, and they save and stop."""

    processes: PositiveInt = 2
    """Processes."""
    devices_per_process: PositiveInt = 1
    """GPUs of a process, or the virtual devices of a process on the CPU."""
    cpu: bool = False
    """Use the CPU even where there are GPUs."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One process: its words, and what its environment has beside this one's."""

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in self.environment.items()), shlex.join(self.words)])


def plan_local(options: LocalOptions, overrides: Sequence[str], *, port: int) -> list[Command]:
    """The processes; the runtime of process 0 listens at `port`."""
    commands = []
    for index in range(options.processes):
        devices = range(index * options.devices_per_process, (index + 1) * options.devices_per_process)
        environment = {
            "PYTHONUNBUFFERED": "1",
            "JAX_NUM_CPU_DEVICES": str(options.devices_per_process),
            "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, devices)),
        }
        if options.cpu:
            environment["JAX_PLATFORMS"] = "cpu"
        words = build_program(
            options,
            overrides,
            python=sys.executable,
            method="explicit",
            coordinator=f"127.0.0.1:{port}",
            process_count=options.processes,
            process_index=index,
        )
        commands.append(Command(tuple(words), environment))
    return commands


def find_free_port() -> int:
    """A TCP port nothing listens at just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_local(commands: Sequence[Command]) -> int:
    """Runs the processes to their end.

    Returns:
      0 where all ended well, EXIT_PREEMPTED where some were stopped by SIGTERM and none failed, else the status of the first that failed
      (128 + its signal, where it was killed).
    """
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        for index, command in enumerate(commands):
            process = subprocess.Popen(
                command.words,
                env=os.environ | command.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that the terminal's Ctrl-C comes from here only, once
            )
            processes.append(process)
            assert process.stdout is not None
            readers.append(threading.Thread(target=_print_lines, args=(index, process.stdout)))
            readers[-1].start()
        with _passing_signals(processes):
            return _wait_for_all(processes)
    finally:
        for process in processes:
            _kill(process)
        for reader in readers:
            reader.join()  # only now: children of a process may have held its output open


def _print_lines(index: int, stream: IO[str]) -> None:
    with stream:
        for line in stream:
            sys.stdout.write(f"[{index}] {line}")
            sys.stdout.flush()


def _wait_for_all(processes: Sequence[subprocess.Popen[str]]) -> int:
    seen: dict[int, int] = {}
    failed_at: float | None = None
    status = 0
    while len(seen) < len(processes):
        time.sleep(_POLL_S)
        for index, process in enumerate(processes):
            code = process.poll()
            if index in seen or code is None:
                continue
            seen[index] = code
            if code in (0, EXIT_PREEMPTED):
                status = status or code
                continue
            print(f"mllmrec launch: process {index} of {len(processes)} {_describe(code)}", file=sys.stderr, flush=True)
            if failed_at is None:
                failed_at = time.monotonic()
                status = code if code > 0 else 128 - code
        if failed_at is not None and time.monotonic() > failed_at + _PATIENCE_S:
            for index, process in enumerate(processes):
                if index not in seen:
                    print(f"mllmrec launch: killing process {index}: another one failed", file=sys.stderr, flush=True)
                    _kill(process)
    return status


def _describe(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit status {code}"


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with its own children; the group outlives its first process
    process.wait()


@contextlib.contextmanager
def _passing_signals(processes: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """SIGTERM goes to every process; Ctrl-C as SIGTERM, a second one as SIGKILL."""
    interrupts = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if interrupts > 1 else signal.SIGTERM)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
