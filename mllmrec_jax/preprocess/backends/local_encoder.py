"""A small dual encoder trained on the catalogue's own pairs, so that consistency scores mean something without a download.

Pictures are a grid of edge strength (where a poster's lettering and shapes lie) and a coarse grid of colour, mapped linearly. Texts are
sums of learned vectors of words, of runs of three letters and, for short texts, of the letters and length of each of the last words:
posters often set a title a word a line, and the longer the word, the longer the line. Both are trained with InfoNCE (van den Oord et al.
2018, arXiv:1807.03748) in both directions, titles and captions each against the pictures.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from mllmrec_jax.config import to_dict
from mllmrec_jax.data.atomic import write_file
from mllmrec_jax.data.records import DataError
from mllmrec_jax.preprocess.backends.protocol import Pair, Picture
from mllmrec_jax.preprocess.store import Store, hash_content
from mllmrec_jax.preprocess_config import EmbedConfig
from mllmrec_jax.progress import track

_VERSION = 1  # counts changes of features and training
_WIDTH, _HEIGHT = 96, 144  # pictures are looked at in this size (pixels), whatever their shape
_EDGE_CELL, _COLOUR_CELL = 4, 24  # sides of the grids' cells (pixels)
FEATURES = (_HEIGHT // _EDGE_CELL) * (_WIDTH // _EDGE_CELL) + 3 * (_HEIGHT // _COLOUR_CELL) * (_WIDTH // _COLOUR_CELL)
_BUCKETS = 8192  # of hashed text features
_LONGEST, _SHORT, _LINES = 64, 8, 4  # words read, words of a short text, last words read by their letters
_DROPOUT, _WEIGHT_DECAY, _WARMUP = 0.2, 0.1, 20
_CAPTION_WEIGHT = 0.05  # captions are easy to match: at more than this they crowd out what tells titles apart


def _average_cells(values: np.ndarray, side: int) -> np.ndarray:
    """Means over side x side cells of [H, W, ...], flattened."""
    height, width = values.shape[:2]
    return values.reshape(height // side, side, width // side, side, -1).mean(axis=(1, 3)).reshape(-1)


def measure_features(image: Image.Image) -> np.ndarray:
    """float32 [`FEATURES`] of an RGB picture."""
    rgb = np.asarray(image.resize((_WIDTH, _HEIGHT), Image.Resampling.BOX), np.float32) / 255
    grey = rgb.mean(axis=2)
    steps = np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
    return np.concatenate([np.log(_average_cells(steps, _EDGE_CELL) + 0.01), _average_cells(rgb, _COLOUR_CELL)]).astype(np.float32)


def list_text_features(text: str) -> list[int]:
    """Buckets of a text's features, at least one."""
    words = text.casefold().split()[:_LONGEST]
    names = ["text"]
    for place, word in enumerate(words):
        word = word[:40]
        framed = f"^{word}$"
        names.append(f"word:{word}")
        names += [f"run:{framed[start : start + 3]}" for start in range(len(framed) - 2)]
        line = len(words) - 1 - place
        if len(words) <= _SHORT and line < _LINES:
            names += [f"letter:{line}:{letter}" for letter in word] + [f"length:{line}:{count}" for count in range(len(word))]
    return [zlib.crc32(name.encode()) % _BUCKETS for name in names]


def _pack_texts(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of all texts end to end, and where each text begins."""
    rows = [list_text_features(text) for text in texts]
    starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
    return torch.from_numpy(np.concatenate([np.asarray(row, np.int64) for row in rows])), torch.from_numpy(starts)


class DualEncoder(nn.Module):
    """Both towers; `mean` and `scale` standardise picture features."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, dimension: int, mean: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.pictures = nn.Linear(FEATURES, dimension)
        self.texts = nn.EmbeddingBag(_BUCKETS, dimension, mode="sum")
        nn.init.normal_(self.texts.weight, std=0.03)
        self.log_temperature = nn.Parameter(torch.tensor(2.0))

    def embed_pictures(self, features: torch.Tensor, *, drop: float = 0.0) -> torch.Tensor:
        """[N, `FEATURES`] -> [N, dimension], rows of length 1."""
        standard = (features - self.mean) / self.scale
        return functional.normalize(self.pictures(functional.dropout(standard, drop, drop > 0)), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, dimension], rows of length 1."""
        return functional.normalize(self.texts(*_pack_texts(texts)), dim=-1)

    def contrast(self, texts: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """InfoNCE in both directions, averaged; row i of both belongs together."""
        logits = self.log_temperature.exp().clamp(max=50.0) * texts @ pictures.T
        own = torch.arange(len(logits))
        return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def _is_held_out(digest: str, config: EmbedConfig) -> bool:
    return int(hash_content("held out", config.seed, digest)[:12], 16) < config.held_out * 16**12


def _train(features: np.ndarray, pairs: Sequence[Pair], config: EmbedConfig) -> DualEncoder:
    """Trains on one thread, so that the same pairs give the same bits, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            seen = torch.from_numpy(features)
            model = DualEncoder(config.dimension, seen.mean(dim=0), seen.std(dim=0, correction=0) + 0.05)
            optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=_WEIGHT_DECAY)
            rng = np.random.default_rng(config.seed & 0xFFFFFFFF)
            for step in track(range(config.steps), description="train the dual encoder", unit="step"):
                rate = min(1.0, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / config.steps)) / 2
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * rate
                rows = rng.choice(len(pairs), min(config.batch_size, len(pairs)), replace=False)
                pictures = model.embed_pictures(seen[torch.from_numpy(rows)], drop=_DROPOUT)
                loss = model.contrast(model.embed_texts([pairs[row].title for row in rows]), pictures)
                if any(pair.caption for pair in pairs):
                    loss = loss + _CAPTION_WEIGHT * model.contrast(model.embed_texts([pairs[row].caption for row in rows]), pictures)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return model.eval()


class LocalEmbedder:
    """The trained encoder; features of pictures are kept in a store, so that each is decoded once."""

    def __init__(self, pairs: Iterable[Pair], config: EmbedConfig, features: Store, folder: Path):
        """Trains on `pairs` that are not held out, or loads what these pairs gave before from `folder`.

        Raises:
          DataError: fewer than two pairs are left to train on.
        """
        self.dimension, self._config = config.dimension, config
        self.truncated = 0
        self._features: Store | None = features
        usable = (pair for pair in pairs if not _is_held_out(pair.picture.digest, config))
        # Of any number of pairs, `max_pairs` are in memory.
        chosen = heapq.nsmallest(config.max_pairs, usable, lambda pair: hash_content("order", config.seed, pair.picture.digest, pair.title))
        if len(chosen) < 2:
            raise DataError(f"embed: expected at least two pictures with titles to train on, got {len(chosen)} that are not held out")
        contents = [[pair.picture.digest, pair.title, pair.caption] for pair in chosen]
        own = {name: value for name, value in to_dict(config).items() if name not in ("model", "text_model")}
        key = hash_content("dual encoder", _VERSION, torch.__version__, own, contents)
        path = folder / f"{key}.safetensors"
        if not path.is_file():
            measured = np.stack([self._find_features(pair.picture) for pair in track(chosen, description="measure pictures")])
            trained = {name: value.contiguous() for name, value in _train(measured, chosen, config).state_dict().items()}
            write_file(path, safetensors.torch.save(trained))
        weights = path.read_bytes()
        self._digest = hashlib.sha256(weights).hexdigest()
        state = safetensors.torch.load(weights)
        self._model = DualEncoder(config.dimension, state["mean"], state["scale"]).eval()
        self._model.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to another process: without the store, which has one writer."""
        return {**self.__dict__, "_features": None}

    def _find_features(self, picture: Picture) -> np.ndarray:
        if self._features is None:
            return measure_features(picture.open()).astype("<f2").astype(np.float32)
        key = hash_content("features", _VERSION, picture.digest)
        if key not in self._features:
            values = measure_features(picture.open()).astype("<f2")
            self._features.put(key, base64.b64encode(values.tobytes()).decode())
        return np.frombuffer(base64.b64decode(self._features.get(key)), "<f2").astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return {"backend": "local", "version": _VERSION, "weights": self._digest}

    def is_held_out(self, digest: str) -> bool:
        return _is_held_out(digest, self._config)

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[Picture]) -> np.ndarray:
        # One row a product: a matrix product of several rounds a row by how many there are.
        rows = [self._model.embed_pictures(torch.from_numpy(self._find_features(picture)[None])) for picture in pictures]
        return torch.cat(rows).numpy()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.truncated += sum(len(text.split()) > _LONGEST for text in texts)
        return self._model.embed_texts(texts).numpy()
