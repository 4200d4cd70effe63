"""The processes of one run: starting JAX's distributed runtime, ending together, stopping together on SIGTERM.

A run over several processes calls `start_distributed` before anything else of JAX and `stop_distributed` when all its files are written.
In between a process can be lost in two ways, and the others stop either way:

- it ends by itself (an exception, `abort_distributed`, an exit without `stop_distributed`): it leaves its reason in the key-value store of
  JAX's coordination service, where the others look every second;
- it is killed, or its machine is lost: its heartbeats stop, and after `heartbeat_timeout_s` JAX ends the others (exit status 134) with the
  number of the lost one. Where process 0 is the lost one, its closed connection ends them at once.

`python -m mllmrec_jax.distributed --check [CONFIG] [overrides]` tries all this on a cluster before a long run does.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO

from mllmrec_jax.config import ConfigError, DistributedConfig, RunConfig, check_config, load_config
from mllmrec_jax.resources import find_config

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75
"""Stopped by SIGTERM after a whole step, with everything saved: start again with --resume (EX_TEMPFAIL of sysexits.h)."""

_FAILURES = "mllmrec/failures/"
_TURNS = "mllmrec/turns/"
_TURN_TIMEOUT_MS = 7 * 86_400_000
_POLL_S = 1.0
_CHECK_PAUSE_S = 0.2
# Process 0 may write the report while the others wait; a process lost in that time is noticed by the ways above, not by this.
_SHUTDOWN_TIMEOUT_S = 3600
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
# What the loss of another process looks like from here. The cause itself is known a little later: see _report_exception.
_PEER_LOSS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection closed by peer", "Connection reset by peer")


class PreemptedError(Exception):
    """A training that SIGTERM stopped after a whole step, with everything saved; the message says where."""


class DistributedError(RuntimeError):
    """Processes that cannot find each other; the message names field, expected, got."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process (`index`, from 0) among the `count` of the run; `coordinator` is `host:port` of process 0, empty for one process."""

    index: int
    count: int
    coordinator: str

    def __str__(self) -> str:
        return f"process {self.index} of {self.count} on {socket.gethostname()}"


def resolve_processes(config: DistributedConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """What `jax.distributed.initialize` is told about the processes.

    Args:
      config: `method` other than `none`; fields that are set win over what the environment says.
      environment: the variables of this process.

    Returns:
      Its arguments `cluster_detection_method`, and those of `coordinator_address`, `num_processes`, `process_id` and `local_device_ids`
      that JAX is not to detect.

    Raises:
      DistributedError: the method lacks what it needs.
    """
    known: dict[str, Any] = {
        "coordinator_address": config.coordinator,
        "num_processes": config.process_count,
        "process_id": config.process_index,
    }
    detection: str | None = None
    match config.method:
        case "explicit":
            detection = "deactivate"
            names = {"coordinator_address": "coordinator", "num_processes": "process_count", "process_id": "process_index"}
            missing = [f"distributed.{name}" for key, name in names.items() if known[key] is None]
            if missing:
                raise DistributedError(f"distributed.method 'explicit': expected {' and '.join(missing)}, got nothing")
        case "slurm":
            detection = "slurm"
            _require(environment, _SLURM, "slurm", "a task started by srun")
        case "mpi":
            _require(environment, _OPEN_MPI, "mpi", "a process started by Open MPI's mpirun")
            count, index, local = (int(environment[name]) for name in _OPEN_MPI)
            known["num_processes"] = config.process_count or count
            known["process_id"] = index if config.process_index is None else config.process_index
            known["local_device_ids"] = None if "JAX_LOCAL_DEVICE_IDS" in environment else [local]
            if config.coordinator is None and "OMPI_MCA_orte_hnp_uri" not in environment:
                raise DistributedError("distributed.method 'mpi': expected distributed.coordinator, got nothing; only Open MPI 4 tells it")
            detection = "ompi" if config.coordinator is None else "deactivate"
        case "kubernetes":
            if config.process_index is None and "JOB_COMPLETION_INDEX" in environment:
                known["process_id"] = int(environment["JOB_COMPLETION_INDEX"])
            if None not in known.values():
                detection = "deactivate"
            elif "KUBERNETES_SERVICE_HOST" in environment and importlib.util.find_spec("kubernetes"):
                detection = "k8s"
            else:
                raise DistributedError(
                    "distributed.method 'kubernetes': expected distributed.coordinator, distributed.process_count and an indexed Job "
                    "(JOB_COMPLETION_INDEX), or a pod with the package `kubernetes` (pip install 'jax[k8s]'); got neither"
                )
        case "tpu":
            if importlib.util.find_spec("libtpu") is None:
                raise DistributedError("distributed.method 'tpu': expected libtpu (pip install 'mllmrec-jax[tpu]'), got none")
            on_gke = "TPU_WORKER_HOSTNAMES" in environment or "TPU_PROCESS_ADDRESSES" in environment
            detection = "gketpu" if on_gke else "gcetpu"
    index, count = known["process_id"], known["num_processes"]
    if index is not None and count is not None and index >= count:
        raise DistributedError(f"distributed.process_index: expected less than distributed.process_count = {count}, got {index}")
    address = known["coordinator_address"]
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise DistributedError(f"distributed.coordinator: expected host:port, got {address!r}")
    return {"cluster_detection_method": detection} | {key: value for key, value in known.items() if value is not None}


def _require(environment: Mapping[str, str], names: Sequence[str], method: str, expected: str) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        raise DistributedError(f"distributed.method '{method}': expected {expected}, got an environment without {', '.join(missing)}")


class _Runtime(threading.Thread):
    """What a started runtime needs until it is stopped; the thread watches for failures of other processes."""

    def __init__(self, processes: Processes, heartbeat_timeout_s: int, client: Any) -> None:
        super().__init__(name="distributed-watch", daemon=True)
        self.processes = processes
        self.heartbeat_timeout_s = heartbeat_timeout_s
        self.client = client
        self.stopped = threading.Event()
        self.boundaries = 0
        """Step boundaries passed so far, by all guards."""
        self.turns = 0
        """Blocks of `main_process_first` entered so far."""

    def run(self) -> None:
        while not self.stopped.wait(_POLL_S):
            try:
                failures = self.client.key_value_dir_get(_FAILURES)
            except Exception:
                continue  # the service is gone: JAX ends this process with that reason
            if failures:
                _say(f"error: {failures[0][1]}; {self.processes} stops too", sys.stderr)
                _exit_now(EXIT_FAILURE)


_runtime: _Runtime | None = None


def start_distributed(config: DistributedConfig) -> Processes:
    """Connects this process with the others of the run; first thing, before JAX has looked for devices.

    Raises:
      DistributedError: the processes cannot find each other by `config.method`. Where some do not come within
        `initialization_timeout_s`, JAX ends this process with exit status 134 (DEADLINE_EXCEEDED).
    """
    global _runtime
    if config.method == "none":
        return Processes(0, 1, "")
    if _runtime is not None:
        raise DistributedError("start_distributed: expected to be called once, got a second call")
    arguments = resolve_processes(config, os.environ)
    import jax
    from jax._src.distributed import global_state  # the client has no public name

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    waiting = threading.Timer(10, _say_waiting, [config])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=config.initialization_timeout_s,
            heartbeat_timeout_seconds=config.heartbeat_timeout_s,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S,
        )
    except (ValueError, OSError) as error:
        hint = "; `auto` needs a cluster JAX can detect" if config.method == "auto" else ""
        raise DistributedError(f"distributed.method '{config.method}': {error}{hint}") from error
    finally:
        waiting.cancel()
    processes = Processes(global_state.process_id, global_state.num_processes, global_state.coordinator_address or "")
    _runtime = _Runtime(processes, config.heartbeat_timeout_s, global_state.client)
    _runtime.start()
    sys.excepthook = _report_exception
    # Registered after JAX's own, so called before it: JAX's would wait for processes that never come to the end.
    atexit.register(_abort_unstopped)
    if config.method == "mpi":
        # mpirun passes SIGUSR2 on; SIGTERM it answers by killing its processes.
        signal.signal(signal.SIGUSR2, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    return processes


def _say_waiting(config: DistributedConfig) -> None:
    text = f"{socket.gethostname()}: waiting for the other processes of the run, {config.initialization_timeout_s} s at most"
    _say(text, sys.stderr)


def stop_distributed() -> None:
    """Waits until every process is here, then leaves the runtime; does nothing where none was started.

    From then on SIGTERM is ignored: a scheduler that ends the others when the first has left must not change their exit status.
    """
    global _runtime
    if _runtime is None:
        return
    import jax

    # Python's flag alone would not do: JAX's shutdown takes its own handler away.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    jax.distributed.shutdown()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _runtime.stopped.set()
    _runtime.join()
    _runtime = None
    sys.excepthook = sys.__excepthook__
    atexit.unregister(_abort_unstopped)


def is_main_process() -> bool:
    """Whether this process writes reports, logs and checkpoints' descriptions: process 0."""
    return _runtime is None or _runtime.processes.index == 0


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Process 0 runs the block while the others wait, for as long as it takes; then they run it too, and find what it left on disk.

    Every process passes through the same blocks in the same order.
    """
    if _runtime is None:
        yield
        return
    _runtime.turns += 1
    key = f"{_TURNS}{_runtime.turns}"
    if _runtime.processes.index == 0:
        yield
        _runtime.client.key_value_set(key, "done")
    else:
        _runtime.client.blocking_key_value_get(key, _TURN_TIMEOUT_MS)  # where process 0 fails, the watching thread ends this process
        yield


def abort_distributed(reason: str, code: int = EXIT_FAILURE) -> None:
    """Ends this process at once with `code` and makes the others end with `reason`; returns where no runtime was started.

    An ordinary exit would wait for the others to come to the end as well, which they may never do.
    """
    if _runtime is None:
        return
    _runtime.stopped.set()  # the thread would read this process's own reason
    text = f"{_runtime.processes} failed: {reason}"
    with contextlib.suppress(Exception):  # the service may be what failed
        _runtime.client.key_value_set(f"{_FAILURES}{_runtime.processes.index}", text)
        if _runtime.processes.index == 0:
            time.sleep(3 * _POLL_S)  # the service lives in process 0: the others have to read it first
    _say(f"error: {text}", sys.stderr)
    _exit_now(code)


def _say(text: str, stream: TextIO) -> None:
    stream.write(text + "\n")  # at once: print writes twice, and lines of several processes would mix
    stream.flush()


def _exit_now(code: int) -> NoReturn:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _report_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    text = f"{kind.__name__}: {error}".splitlines()[0]
    if _runtime is not None and any(sign in text for sign in _PEER_LOSS):
        # A consequence, most likely. Within this time the watching thread, or JAX, ends this process with the cause.
        patience = _runtime.heartbeat_timeout_s + 5
        _say(f"{_runtime.processes}: another process may be lost; waiting {patience} s to hear which", sys.stderr)
        time.sleep(patience)
    abort_distributed(text)


def _abort_unstopped() -> None:
    abort_distributed("it ended before the run did; its own log says why")


class PreemptionGuard:
    """Turns SIGTERM into a stop at a step boundary, the same one on every process.

        with PreemptionGuard() as guard:
            for batch in batches:
                ...                       # one step
                if guard.should_stop():   # once a step, on every process
                    ...                   # save; then stop_distributed() and sys.exit(EXIT_PREEMPTED)

    Over several processes JAX's preemption service catches the signal, whichever process gets it, and agrees on the first boundary no
    process has passed (no collective, nothing waits for a device). A boundary is counted from the start of the process, so that a run with
    two loops, one after the other, agrees as well.
    """

    def __init__(self) -> None:
        self._stopping = False
        self._previous: Any = None

    def __enter__(self) -> PreemptionGuard:
        if _runtime is None:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if _runtime is None and self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._stopping = True

    def should_stop(self) -> bool:
        """Whether to save and stop now; true from the first time on."""
        if _runtime is not None and not self._stopping:
            from jax.experimental import multihost_utils

            _runtime.boundaries += 1
            self._stopping = multihost_utils.reached_preemption_sync_point(_runtime.boundaries)
        return self._stopping

    @property
    def stopping(self) -> bool:
        """What `should_stop` said last."""
        return self._stopping


def sum_over_devices() -> tuple[int, int]:
    """Sums (process index + 1) over all devices of all processes by a collective; returns it and what it must be."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("device",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("device")
    own = np.full(1, jax.process_index() + 1, np.int32)
    values = jax.make_array_from_callback((count,), NamedSharding(mesh, spec), lambda _: own)
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "device"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))(values)
    return int(np.asarray(total.addressable_data(0))[0]), sum(device.process_index + 1 for device in jax.devices())


def check_processes(config: DistributedConfig, *, seconds: float = 0.0) -> int:
    """Starts the runtime, prints a line a process, sums over all devices (again and again for `seconds`); returns the exit status."""
    processes = start_distributed(config)
    import jax

    steps = 1 + int(seconds / _CHECK_PAUSE_S)  # counted, not timed: every process makes the same number
    with PreemptionGuard() as guard:
        for step in range(1, steps + 1):
            total, expected = sum_over_devices()
            if step == 1:
                devices = f"{jax.local_device_count()} of {jax.device_count()} {jax.default_backend()} devices"
                _say(f"{processes}: {devices}, sum over processes {total}, expected {expected}", sys.stdout)
            if total != expected:
                return EXIT_FAILURE
            if guard.should_stop():
                _say(f"{processes}: stopped by SIGTERM after step {step}", sys.stdout)
                stop_distributed()
                return EXIT_PREEMPTED
            if step < steps:
                time.sleep(_CHECK_PAUSE_S)
    stop_distributed()
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m mllmrec_jax.distributed --check [--seconds S] [CONFIG] [overrides]`."""
    import tyro

    parser = argparse.ArgumentParser(prog="python -m mllmrec_jax.distributed", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", required=True, help="start the runtime, sum over all devices, stop")
    parser.add_argument("--seconds", type=float, default=0.0, help="go on summing for this long, to try the loss of a process or SIGTERM")
    options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        default = load_config(find_config(rest.pop(0) if rest and not rest[0].startswith("-") else "quickstart"))
        config = tyro.cli(RunConfig, default=default, args=rest, prog=parser.prog)
        status = check_processes(check_config(config).distributed, seconds=options.seconds)
    except (ConfigError, DistributedError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    sys.exit(status)


if __name__ == "__main__":
    main()
