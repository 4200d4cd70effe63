"""The data set a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from mllmrec_jax.config import DataConfig, fingerprint
from mllmrec_jax.data.mllmrec_layout import read_mllmrec
from mllmrec_jax.data.movielens import read_movielens
from mllmrec_jax.data.posterworld import WORLD_VERSION, generate_posterworld
from mllmrec_jax.data.records import Dataset


def load_dataset(config: DataConfig, cache: Path) -> Dataset:
    """Reads or generates the data set that `config.source` names.

    Args:
      config: source, path and the reader's options.
      cache: folder for generated pictures; posterworld's subfolder is named by everything that shapes it.

    Raises:
      DataError: the data cannot be read; the message names file, line, expected and got.
      ConfigError: posterworld's sizes contradict each other.
    """
    if config.source == "posterworld":
        return generate_posterworld(config.posterworld, cache / f"posterworld-{fingerprint(config.posterworld, WORLD_VERSION)}")
    return read_movielens(config) if config.source == "movielens" else read_mllmrec(config)
