"""What a stage asks of a backend. A backend sees pictures, titles, captions and drafts; no type here has a field for a target or a user."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess.store import Store, hash_content
from mllmrec_jax.preprocess_config import Backend, PreprocessConfig, Stage

Task = Literal["caption", "pseudo_cot", "refine_cot", "quality"]
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
    """One text to write. `prompt` is what a language model reads; the fields below it are the same in parts.

    `draft` is the trace to refine or to rate; `scale` is the scores that a rating may give.
    """

    key: str
    task: Task
    prompt: str
    items: tuple[ShownItem, ...]
    draft: str = ""
    scale: tuple[int, ...] = ()


class Written(NamedTuple):
    """A text and the key of the request it answers; `usage` counts what it cost (tokens, or nothing)."""

    key: str
    text: str
    usage: dict[str, float]


class Unanswered(NamedTuple):
    """Why a request has no text, in a few words that can be counted (`kind`) and in full. The next run asks it again."""

    key: str
    kind: str
    detail: str
    usage: dict[str, float]


class Writer(Protocol):
    """Writes captions and traces, and rates traces."""

    def describe(self) -> dict[str, Any]:
        """Everything that decides its texts, beside the request, as plain JSON: part of every key.

        Where it has an entry `tasks`, that maps each task to what decides the texts of that task alone.
        """
        ...

    def write(self, requests: Iterable[Request]) -> Iterator[Written | Unanswered]:
        """Answers as they are ready, in any order; takes requests as it needs them, and may read ahead."""
        ...


class Embedder(Protocol):
    """Embeds pictures and texts in one space.

    A row must not depend on what else is in the call: a resumed run calls with other groups, and must come to the same bits.
    """

    dimension: int
    truncated: int
    """Texts given to it so far that are longer than it reads; what is beyond its limit counts for nothing."""

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


def make_request(
    task: Task, prompt: str, items: Sequence[ShownItem], writer: dict[str, Any], *, draft: str = "", scale: tuple[int, ...] = ()
) -> Request:
    """A request keyed by its prompt, its pictures' contents and the writer's description; `prompt` must hold all other fields."""
    digests = [item.picture.digest for item in items if item.picture is not None]
    if "tasks" in writer:
        writer = {**writer, "tasks": writer["tasks"].get(task)}
    return Request(hash_content(_VERSION, task, writer, prompt, digests), task, prompt, tuple(items), draft, scale)


@functools.cache
def open_writer(backend: Backend, model: str, config: PreprocessConfig) -> Writer:
    """The writer that a stage's `backend` and `model` name; opened once, however many stages use it."""
    if backend == "local":
        from mllmrec_jax.preprocess.backends.local import LocalWriter

        return LocalWriter()
    if backend == "openai":
        try:
            from mllmrec_jax.preprocess.backends.openai import OpenaiWriter
        except ModuleNotFoundError as error:
            raise ConfigError(f"backend 'openai': expected the package {error.name} (pip install mllmrec-jax[openai]), got none") from error

        return OpenaiWriter(model or config.openai.model, config.openai)
    if backend == "transformers":
        from mllmrec_jax.preprocess.backends.transformers_writer import TransformersWriter

        return TransformersWriter(model, config.transformers)
    raise ValueError(f"backend: expected 'local', 'openai' or 'transformers', got {backend!r}")


def open_embedder(config: PreprocessConfig, pairs: Iterable[Pair], open_store: Callable[[str], Store], folder: Path) -> Embedder:
    """The embedder that `embed.backend` names; one that learns does so from `pairs`, and keeps what it learned in `folder`."""
    if config.embed.backend == "local":
        from mllmrec_jax.preprocess.backends.local_encoder import LocalEmbedder

        return LocalEmbedder(pairs, config.embed, open_store("local_features"), folder / "local_encoders")
    return open_pretrained_embedder(config)


def open_pretrained_embedder(config: PreprocessConfig) -> Embedder:
    """The embedder that `embed.backend` names, where it is one that learns nothing from the catalogue."""
    if config.embed.backend == "transformers":
        from mllmrec_jax.preprocess.backends.transformers_embedder import TransformersEmbedder

        return TransformersEmbedder(config.embed.model, config.transformers)
    raise ConfigError(f"preprocess.embed.backend: expected 'local' or 'transformers', got '{config.embed.backend}'")


def open_text_embedder(config: PreprocessConfig) -> Embedder | None:
    """The embedder of texts alone that `embed.text_model` names; None where s'' is measured in the space of pictures and titles."""
    if not config.embed.text_model:
        return None
    from mllmrec_jax.preprocess.backends.sentence_embedder import SentenceEmbedder

    return SentenceEmbedder(config.embed.text_model, config.transformers)


def check_backends(config: PreprocessConfig, stages: Collection[Stage]) -> None:
    """Looks up what `stages` write and embed with, before anything is done.

    Raises:
      ConfigError: a model, a device, a key or a package that a backend needs is not there.
    """
    for name in ("caption", "pseudo_cot", "refine_cot"):
        stage = getattr(config, name)
        if name in stages and stage.enabled:
            open_writer(stage.backend, stage.model, config)
    if "quality" in stages and config.quality.samples:
        for rater in config.quality.raters:
            open_writer(rater.backend, rater.model, config)
    if "embed" in stages and config.embed.backend == "transformers":
        from mllmrec_jax.preprocess.backends.transformers_embedder import find_dual_encoder

        find_dual_encoder(config.embed.model)
    if "embed" in stages and config.embed.text_model:
        from mllmrec_jax.preprocess.backends.sentence_embedder import find_sentence_model

        find_sentence_model(config.embed.text_model)
