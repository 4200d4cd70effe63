"""Where the work of the stages is done: in this process, or elsewhere (`ray_runner`). Stages and stores do not know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess.backends import protocol
from mllmrec_jax.preprocess.backends.protocol import Embedder, Pair, Writer
from mllmrec_jax.preprocess.embed import BATCH
from mllmrec_jax.preprocess.store import Store
from mllmrec_jax.preprocess_config import Backend, PreprocessConfig

A = TypeVar("A")
B = TypeVar("B")


class Runner(Protocol):
    """Opens what stages ask for. Results do not depend on which runner it is."""

    embed_batch: int
    """Pictures or texts given to an embedder at once."""

    def open_writer(self, backend: Backend, model: str, config: PreprocessConfig) -> Writer:
        """See `protocol.open_writer`."""
        ...

    def open_embedder(self, config: PreprocessConfig, pairs: Iterable[Pair], open_store: Callable[[str], Store], folder: Path) -> Embedder:
        """See `protocol.open_embedder`."""
        ...

    def open_text_embedder(self, config: PreprocessConfig) -> Embedder | None:
        """See `protocol.open_text_embedder`."""
        ...

    def spread(self, function: Callable[[A], B], values: Iterable[A]) -> Iterator[B]:
        """`map`, for pure functions."""
        ...


class LocalRunner:
    """This process."""

    embed_batch = BATCH

    def open_writer(self, backend: Backend, model: str, config: PreprocessConfig) -> Writer:
        return protocol.open_writer(backend, model, config)

    def open_embedder(self, config: PreprocessConfig, pairs: Iterable[Pair], open_store: Callable[[str], Store], folder: Path) -> Embedder:
        return protocol.open_embedder(config, pairs, open_store, folder)

    def open_text_embedder(self, config: PreprocessConfig) -> Embedder | None:
        return protocol.open_text_embedder(config)

    def spread(self, function: Callable[[A], B], values: Iterable[A]) -> Iterator[B]:
        return map(function, values)


@contextlib.contextmanager
def open_runner(name: Literal["local", "ray"], config: PreprocessConfig, address: str | None) -> Iterator[Runner]:
    """The runner of that name; `address` is of a Ray cluster, see `ray_runner.RayRunner`.

    Raises:
      ConfigError: Ray is not installed, there is no cluster at `address`, or an address is given without Ray.
    """
    if name == "local":
        if address is not None:
            raise ConfigError(f"--address: expected it with --runner ray alone, got {address!r}")
        yield LocalRunner()
        return
    try:
        from mllmrec_jax.preprocess.ray_runner import RayRunner
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("--runner ray: expected Ray, which is not installed; pip install mllmrec-jax[ray]") from None
    with RayRunner(config.ray, address) as runner:
        yield runner
