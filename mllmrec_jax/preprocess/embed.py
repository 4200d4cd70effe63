"""Stage 5: embeddings of every item's picture and title in one space, float16 rows of length 1, row = item by ascending id."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from mllmrec_jax.data.records import Item
from mllmrec_jax.preprocess.arrays import ROWS, write_array
from mllmrec_jax.preprocess.backends.protocol import Embedder, Picture
from mllmrec_jax.preprocess.samples import Samples
from mllmrec_jax.preprocess.store import Store, hash_content
from mllmrec_jax.progress import Progress

BATCH = 256
"""Pictures or texts given at once to an embedder in this process."""


class Vectors:
    """Vectors by content, each embedded once and kept in a store."""

    def __init__(self, embedder: Embedder, store: Store, *, batch: int = BATCH):
        """`batch` is the most pictures or texts given to the embedder at once."""
        self.dimension = embedder.dimension
        self.identity = embedder.describe()
        self.done = 0
        """Vectors embedded now, not found in the store."""
        self._embedder, self._store, self._batch = embedder, store, batch

    @property
    def truncated(self) -> int:
        """Texts embedded now that the embedder did not read to their end."""
        return self._embedder.truncated

    def is_held_out(self, digest: str) -> bool:
        """See `protocol.Embedder`; False for "", where there is no picture."""
        return bool(digest) and self._embedder.is_held_out(digest)

    def _key(self, content: Picture | str) -> str:
        kind, text = ("text", content) if isinstance(content, str) else ("picture", content.digest)
        return hash_content("embed", self.identity, kind, text)

    def _embed(self, contents: list[Picture | str]) -> None:
        pictures = [content for content in contents if not isinstance(content, str)]
        texts = [content for content in contents if isinstance(content, str)]
        for group, rows in (
            (pictures, self._embedder.embed_pictures(pictures) if pictures else ()),
            (texts, self._embedder.embed_texts(texts) if texts else ()),
        ):
            for content, row in zip(group, rows, strict=True):
                self._store.put(self._key(content), base64.b64encode(row.astype("<f2").tobytes()).decode())
        self.done += len(contents)

    def fill(self, contents: Iterable[Picture | str], *, description: str) -> None:
        """Embeds what is not there yet."""
        waiting: dict[str, Picture | str] = {}
        with Progress(description=description, unit="vector") as progress:
            for content in contents:
                key = self._key(content)
                if key not in self._store:
                    waiting[key] = content
                if len(waiting) == self._batch:
                    self._embed(list(waiting.values()))
                    waiting.clear()
                progress.advance()
            if waiting:
                self._embed(list(waiting.values()))

    def find(self, content: Picture | str | None) -> np.ndarray:
        """float16 [`dimension`] of something embedded before; zeros for None."""
        if content is None:
            return np.zeros(self.dimension, np.float16)
        return np.frombuffer(base64.b64decode(self._store.get(self._key(content))), "<f2")


def split_rows(count: int) -> Iterator[range]:
    """Blocks of `arrays.ROWS` rows."""
    return (range(start, min(start + ROWS, count)) for start in range(0, count, ROWS))


def describe_item(item: Item, caption: str) -> str:
    """What stands for an item where texts alone are compared: its title and, where there is one, its picture's caption."""
    return f"{item.title}. {caption}" if caption else item.title


def embed_items(
    samples: Samples, vectors: Vectors, folder: Path, *, text_vectors: Vectors | None = None, find_caption: Callable[[int], str]
) -> None:
    """Embeds the catalogue and writes `item_id` [I] int64, `picture` and `title` [I, D] float16 to `folder`.

    With `text_vectors`, `text` [I, T] float16 as well, of titles and captions. A row of `picture` is zeros where the item has no picture
    that can be read.
    """
    items = samples.list_items()
    vectors.fill((picture for _, picture in samples.list_distinct()), description="embed pictures")
    vectors.fill((item.title for item in items), description="embed titles")
    write_array(folder / "item_id", (len(items),), "int64", (np.array([items[row].id for row in rows]) for rows in split_rows(len(items))))
    shape = (len(items), vectors.dimension)
    pictures = (np.stack([vectors.find(samples.find_picture(items[row].id)) for row in rows]) for rows in split_rows(len(items)))
    write_array(folder / "picture", shape, "float16", pictures)
    titles = (np.stack([vectors.find(items[row].title) for row in rows]) for rows in split_rows(len(items)))
    write_array(folder / "title", shape, "float16", titles)
    if text_vectors is None:
        return
    text_vectors.fill((describe_item(item, find_caption(item.id)) for item in items), description="embed items as texts")
    texts = (
        np.stack([text_vectors.find(describe_item(items[row], find_caption(items[row].id))) for row in rows])
        for rows in split_rows(len(items))
    )
    write_array(folder / "text", (len(items), text_vectors.dimension), "float16", texts)
