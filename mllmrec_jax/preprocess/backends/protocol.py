"""What a stage asks of a backend. A backend sees pictures, titles, captions and drafts; no type here has a field for a target or a user."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from mllmrec_jax.preprocess.store import Store, hash_content
from mllmrec_jax.preprocess_config import Backend, PreprocessConfig

Task = Literal["caption", "pseudo_cot", "refine_cot"]
_VERSION = 1  # counts changes of what a request means


class Picture(NamedTuple):
    """A picture that can be decoded: the sha256 of its file (64 hex digits), and how to decode it when it is needed."""

    digest: str
    open: Callable[[], Image.Image]
    """RGB, at most `images.SIDE` pixels a side."""


class ShownItem(NamedTuple):
    """What is shown of an item; empty or None where it is not shown."""

    title: str
    caption: str = ""
    picture: Picture | None = None


class Pair(NamedTuple):
    """One item that an embedder may learn from; the caption is empty where there is none."""

    picture: Picture
    title: str
    caption: str


class Request(NamedTuple):
    """One text to write. `prompt` is what a language model reads; `items` and `draft` are the same as fields."""

    key: str
    task: Task
    prompt: str
    items: tuple[ShownItem, ...]
    draft: str = ""


class Written(NamedTuple):
    """A text and the key of the request it answers; `usage` counts what it cost (tokens, or nothing)."""

    key: str
    text: str
    usage: dict[str, float]


class Writer(Protocol):
    """Writes captions and traces."""

    def describe(self) -> dict[str, Any]:
        """Everything that decides its texts, beside the request, as plain JSON: part of every key."""
        ...

    def write(self, requests: Iterable[Request]) -> Iterator[Written]:
        """Answers as they are ready, in any order; takes requests as it needs them, and may read ahead."""
        ...


class Embedder(Protocol):
    """Embeds pictures and texts in one space.

    A row must not depend on what else is in the call: a resumed run calls with other groups, and must come to the same bits.
    """

    dimension: int

    def describe(self) -> dict[str, Any]:
        """Everything that decides its vectors, as plain JSON: part of every key."""
        ...

    def is_held_out(self, digest: str) -> bool:
        """Whether it learned nothing from the picture of this content, so that its scores may be tested on it."""
        ...

    def embed_pictures(self, pictures: Sequence[Picture]) -> np.ndarray:
        """float32 [N, `dimension`], rows of length 1."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, `dimension`], rows of length 1."""
        ...


def make_request(task: Task, prompt: str, items: Sequence[ShownItem], writer: dict[str, Any], *, draft: str = "") -> Request:
    """A request keyed by its prompt, its pictures' contents and the writer's description; `prompt` must hold all other fields."""
    digests = [item.picture.digest for item in items if item.picture is not None]
    return Request(hash_content(_VERSION, task, writer, prompt, digests), task, prompt, tuple(items), draft)


@functools.cache
def open_writer(backend: Backend, model: str, config: PreprocessConfig) -> Writer:
    """The writer that a stage's `backend` and `model` name; opened once, however many stages use it."""
    if backend == "local":
        from mllmrec_jax.preprocess.backends.local import LocalWriter

        return LocalWriter()
    raise ValueError(f"backend: expected 'local', got {backend!r}")


def open_embedder(config: PreprocessConfig, pairs: Sequence[Pair], open_store: Callable[[str], Store], folder: Path) -> Embedder:
    """The embedder that `embed.backend` names; one that learns does so from `pairs`, and keeps what it learned in `folder`."""
    if config.embed.backend == "local":
        from mllmrec_jax.preprocess.backends.local_encoder import LocalEmbedder

        return LocalEmbedder(pairs, config.embed, open_store("local_features"), folder / "local_encoders")
    raise ValueError(f"embed.backend: expected 'local', got {config.embed.backend!r}")
