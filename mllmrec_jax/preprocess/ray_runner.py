"""The stages' work on a Ray cluster: Ray places the workers, moves the data, restarts what dies and repeats what died with it.

The driver runs the stages, and alone writes the stores. Workers hold a backend each and see no store. A bounded number of batches is under
way; results are stored as they arrive. Workers read pictures themselves: the data folder has the same path on every machine.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from mllmrec_jax.config import ConfigError
from mllmrec_jax.data.records import DataError
from mllmrec_jax.preprocess.backends import protocol
from mllmrec_jax.preprocess.backends.protocol import Embedder, Pair, Picture, Request, Unanswered, Writer, Written
from mllmrec_jax.preprocess.store import Store
from mllmrec_jax.preprocess_config import Backend, PreprocessConfig, RayConfig

# Read by Ray when it is imported: nothing is reported to its makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# GPUs are hidden from workers that were given none; Ray means to change this default and says so at every start.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

import ray
from ray.exceptions import RayError, RayTaskError

_REACH_S = 10.0  # wait for a cluster's head (seconds)
A = TypeVar("A")
B = TypeVar("B")


def _cut(values: Iterable[A], size: int) -> Iterator[list[A]]:
    """Lists of `size` values, the last one shorter; takes values as they are asked for."""
    values = iter(values)
    while batch := list(itertools.islice(values, size)):
        yield batch


class _Worker:
    """Holds backends in a process of Ray's."""

    def __init__(self) -> None:
        self._opened: dict[str, Any] = {}

    def call(self, name: str, open_backend: Callable[[], Any], method: str, *values: Any) -> Any:
        """The result of a backend's method; opened under `name` where it is not yet."""
        if name not in self._opened:
            self._opened[name] = open_backend()
        answer = getattr(self._opened[name], method)(*values)
        return list(answer) if isinstance(answer, Iterator) else answer


def _apply(function: Callable[[A], B], values: Sequence[A]) -> list[B]:
    return [function(value) for value in values]


class _Pool:
    """The workers."""

    def __init__(self, config: RayConfig):
        self._config = config
        # Without GPUs: Ray's own default for actors, a CPU to be placed and none to run. So all fit on the machines that are left.
        options: dict[str, Any] = {"num_gpus": config.gpus_per_worker} if config.gpus_per_worker else {}
        # Calls are repeated without limit: each look for a worker that is still starting counts as one. A batch that kills its worker every
        # time comes to an end with the restarts.
        make = ray.remote(_Worker).options(max_restarts=config.restarts, max_task_retries=-1, scheduling_strategy="SPREAD", **options)
        self.actors: list[Any] = [make.remote() for _ in range(_count_workers(config))]

    def call(self, name: str, open_backend: Any, method: str, calls: Iterable[Sequence[Any]]) -> Iterator[tuple[int, Any]]:
        """(number of the call, its result) as they are ready. After an error, calls under way are waited for, then it is raised."""
        waiting, error = enumerate(calls), None
        starting: dict[Any, Any] = {actor.__ray_ready__.remote(): actor for actor in self.actors}
        running: dict[Any, tuple[int, Any]] = {}
        idle: deque[Any] = deque()
        while True:
            while idle and error is None and (call := next(waiting, None)) is not None:
                actor = idle.popleft()
                running[actor.call.remote(name, open_backend, method, *call[1])] = (call[0], actor)
            if not running and (error is not None or idle):
                break
            (ready,), _ = ray.wait([*starting, *running], num_returns=1)
            if ready in starting:  # workers that are not placed yet get nothing to do
                idle.extend([starting.pop(ready)] * self._config.in_flight)
                continue
            number, actor = running.pop(ready)
            idle.append(actor)
            try:
                result = ray.get(ready)
            except RayTaskError as failed:  # the backend's own error
                error = error or (failed.cause if isinstance(failed.cause, Exception) else failed)
            except RayError as failed:
                reason = f"{type(failed).__name__}: {str(failed).splitlines()[0]}"
                lost = f"ray: expected an answer of a worker that is started again up to {self._config.restarts} times, got {reason}"
                error = error or DataError(f"{lost}; what others answered is kept")
            else:
                yield number, result
        if error is not None:
            raise error


def _count_workers(config: RayConfig) -> int:
    if config.workers:
        return config.workers
    there = ray.cluster_resources()
    count = int(there.get("GPU", 0) / config.gpus_per_worker) if config.gpus_per_worker else int(there.get("CPU", 0))
    if not count:
        raise ConfigError(
            f"preprocess.ray.workers: expected a cluster with room for a worker ({config.gpus_per_worker} GPUs), got one with {there}; "
            "give a number of workers where machines join later"
        )
    return count


def _reach(address: str | None) -> None:
    """Asks for an answer at host:port within seconds; Ray itself would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()


class _RayWriter:
    """Answers requests on workers, a batch each; `here` is the same writer in this process, which writes nothing."""

    def __init__(self, here: Writer, name: str, open_writer: Callable[[], Writer], pool: _Pool, batch: int):
        self._here, self._name, self._open, self._pool, self._batch = here, name, ray.put(open_writer), pool, batch

    def describe(self) -> dict[str, Any]:
        return self._here.describe()

    def write(self, requests: Iterable[Request]) -> Iterator[Written | Unanswered]:
        for _, answers in self._pool.call(self._name, self._open, "write", ((batch,) for batch in _cut(requests, self._batch))):
            yield from answers


class _CountingEmbedder:
    """An embedder on a worker: each call says what the driver keeps count of."""

    def __init__(self, embedder: Embedder):
        self._embedder = embedder

    def find_identity(self) -> tuple[int, dict[str, Any]]:
        return self._embedder.dimension, self._embedder.describe()

    def embed(self, method: str, contents: Sequence[Any]) -> tuple[np.ndarray, int]:
        before = self._embedder.truncated
        return getattr(self._embedder, method)(contents), self._embedder.truncated - before


class _RayEmbedder:
    """Embeds on workers, a batch each."""

    def __init__(
        self, name: str, open_embedder: Callable[[], _CountingEmbedder], is_held_out: Callable[[str], bool], pool: _Pool, batch: int
    ):
        self._name, self._open, self._pool, self._batch = name, ray.put(open_embedder), pool, batch
        ((_, (self.dimension, self._identity)),) = pool.call(name, self._open, "find_identity", [()])
        self._is_held_out = is_held_out
        self.truncated = 0

    def describe(self) -> dict[str, Any]:
        return self._identity

    def is_held_out(self, digest: str) -> bool:
        return self._is_held_out(digest)

    def _embed(self, method: str, contents: Sequence[Any]) -> np.ndarray:
        found: dict[int, np.ndarray] = {}
        calls = ((method, batch) for batch in _cut(contents, self._batch))
        for number, (rows, truncated) in self._pool.call(self._name, self._open, "embed", calls):
            found[number] = rows
            self.truncated += truncated
        return np.concatenate([found[number] for number in range(len(found))])

    def embed_pictures(self, pictures: Sequence[Picture]) -> np.ndarray:
        return self._embed("embed_pictures", pictures)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._embed("embed_texts", texts)


def _open_pretrained(config: PreprocessConfig) -> _CountingEmbedder:
    return _CountingEmbedder(protocol.open_pretrained_embedder(config))


def _open_text_embedder(config: PreprocessConfig) -> _CountingEmbedder:
    embedder = protocol.open_text_embedder(config)
    assert embedder is not None
    return _CountingEmbedder(embedder)


class RayRunner:
    """A context manager; see `runner.Runner`."""

    def __init__(self, config: RayConfig, address: str | None):
        """Connects, and asks for workers.

        Args:
          config: workers and batches.
          address: as `ray.init` takes it: `host:port` of a cluster's head, "auto", "local" for a cluster on this machine alone; None lets
            Ray look for one and start one where there is none.

        Raises:
          ConfigError: there is no cluster at `address`, or none with room for a worker.
        """
        self._batch = config.batch
        try:
            _reach(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--address: expected a Ray cluster at {address!r}, got {str(error).splitlines()[0]}") from error
        try:
            self._pool = _Pool(config)
        except ConfigError:
            ray.shutdown()
            raise
        self.embed_batch = config.batch * config.in_flight * len(self._pool.actors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ray.shutdown()

    def open_writer(self, backend: Backend, model: str, config: PreprocessConfig) -> Writer:
        here = protocol.open_writer(backend, model, config)
        if backend == "openai":  # its work is on a server; here are one rate limit and one place where paid answers arrive one by one
            return here
        return _RayWriter(here, f"{backend} {model}", partial(protocol.open_writer, backend, model, config), self._pool, self._batch)

    def open_embedder(self, config: PreprocessConfig, pairs: Iterable[Pair], open_store: Callable[[str], Store], folder: Path) -> Embedder:
        if config.embed.backend == "local":  # trained here, on the catalogue, and sent to the workers
            here = protocol.open_embedder(config, pairs, open_store, folder)
            return _RayEmbedder("embed", partial(_CountingEmbedder, here), here.is_held_out, self._pool, self._batch)
        return _RayEmbedder("embed", partial(_open_pretrained, config), lambda digest: True, self._pool, self._batch)

    def open_text_embedder(self, config: PreprocessConfig) -> Embedder | None:
        if not config.embed.text_model:
            return None
        return _RayEmbedder("text", partial(_open_text_embedder, config), lambda digest: True, self._pool, self._batch)

    def spread(self, function: Callable[[A], B], values: Iterable[A]) -> Iterator[B]:
        task = ray.remote(_apply).options(max_retries=-1, scheduling_strategy="SPREAD")
        for ref in [task.remote(function, batch) for batch in _cut(values, self._batch)]:
            yield from ray.get(ref)
