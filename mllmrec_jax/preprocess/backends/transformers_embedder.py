"""Backend `transformers`: pictures and texts in the space of a pretrained dual encoder (CLIP, SigLIP and their like), in float32.

Every call of the model has the same shape: texts are padded to the model's limit, a batch is filled up. So a row does not depend on what
else is in its batch. In a batch of one, a CPU's default, it has the same bits each time. In a larger one its place can change the last bits
of float32, since matrix products are divided among threads or tiles; what is stored is float16, a thousand times coarser.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess.backends.pretrained import (
    choose_device,
    find_model,
    identify_model,
    load_model,
    load_processor,
    open_picture,
    read_settings,
)
from mllmrec_jax.preprocess.backends.protocol import Picture
from mllmrec_jax.preprocess_config import TransformersConfig

_VERSION = 1  # raise it when the same content gives another vector
_KEY = "preprocess.embed.model"
_BATCH = 32
T = TypeVar("T")


def find_dual_encoder(name: str) -> tuple[Path, Any]:
    """Folder and configuration of a dual encoder.

    Raises:
      ConfigError: no such model, or one that does not embed both pictures and texts.
    """
    folder = find_model(name, _KEY)
    settings = read_settings(folder, _KEY)
    known = MODEL_MAPPING.get(type(settings), None)
    if not (hasattr(known, "get_image_features") and hasattr(known, "get_text_features")):
        raise ConfigError(f"{_KEY}: expected a model of pictures and texts in one space (CLIP, SigLIP), got {name} ({settings.model_type})")
    return folder, settings


class TransformersEmbedder:
    """A pretrained dual encoder; it learned nothing from this catalogue, so that every pair counts as held out."""

    def __init__(self, name: str, config: TransformersConfig):
        """Loads the model (folder or hub name); raises as `find_dual_encoder` does."""
        folder, settings = find_dual_encoder(name)
        self._config, self._device = config, choose_device(config.device)
        self._batch = config.embed_batch_size or (1 if self._device.type == "cpu" else _BATCH)
        self._identity = identify_model(folder)
        self._processor = load_processor(folder, settings)
        self._limit = settings.text_config.max_position_embeddings
        self._model = load_model(AutoModel, folder, device=self._device, dtype="float32")
        self.truncated = 0
        self.dimension = int(self._embed_texts(self._read_texts([""])).shape[1])

    def describe(self) -> dict[str, Any]:
        return {"backend": "transformers", "version": _VERSION, "model": self._identity}

    def is_held_out(self, digest: str) -> bool:
        return True

    def _split(self, contents: Sequence[T]) -> Iterator[Sequence[T]]:
        return (contents[start : start + self._batch] for start in range(0, len(contents), self._batch))

    def _fill(self, contents: Sequence[T]) -> list[T]:
        """As many as a batch has: the last one again and again."""
        return [*contents, *[contents[-1]] * (self._batch - len(contents))]

    def _read_pictures(self, pictures: Sequence[Picture]) -> Any:
        return self._processor(images=self._fill([open_picture(picture) for picture in pictures]), return_tensors="pt")

    def _read_texts(self, texts: Sequence[str]) -> Any:
        options = {"padding": "max_length", "truncation": True, "max_length": self._limit}
        return self._processor(text=self._fill(texts), return_tensors="pt", **options)

    @torch.inference_mode()
    def _embed_texts(self, inputs: Any) -> torch.Tensor:
        return functional.normalize(self._model.get_text_features(**inputs.to(self._device)).pooler_output, dim=-1).cpu()

    @torch.inference_mode()
    def _embed_pictures(self, inputs: Any) -> torch.Tensor:
        return functional.normalize(self._model.get_image_features(**inputs.to(self._device)).pooler_output, dim=-1).cpu()

    def embed_pictures(self, pictures: Sequence[Picture]) -> np.ndarray:
        with ThreadPoolExecutor(self._config.decode_threads) as pool:
            rows = [self._embed_pictures(inputs) for inputs in pool.map(self._read_pictures, self._split(pictures))]
        return torch.cat(rows)[: len(pictures)].numpy()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        lengths = map(len, self._processor.tokenizer(list(texts), verbose=False)["input_ids"])
        self.truncated += sum(length > self._limit for length in lengths)
        return torch.cat([self._embed_texts(self._read_texts(part)) for part in self._split(texts)])[: len(texts)].numpy()
