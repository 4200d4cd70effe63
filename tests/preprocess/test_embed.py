from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllmrec_jax.config import PosterworldConfig
from mllmrec_jax.data.posters import render_poster
from mllmrec_jax.data.posterworld import build_world
from mllmrec_jax.data.records import DataError
from mllmrec_jax.preprocess.arrays import ROWS, read_array, write_array
from mllmrec_jax.preprocess.backends.local_encoder import LocalEmbedder
from mllmrec_jax.preprocess.backends.protocol import Pair, Picture
from mllmrec_jax.preprocess.embed import BATCH, Vectors
from mllmrec_jax.preprocess.folders import fill_folder, is_current
from mllmrec_jax.preprocess.score import measure_agreement
from mllmrec_jax.preprocess.store import Store, hash_content
from mllmrec_jax.preprocess_config import EmbedConfig


def make_pairs(count: int) -> list[Pair]:
    """Items of a posterworld; a picture is painted when it is opened."""
    world = build_world(PosterworldConfig(items=count, users=1, min_length=2, max_length=3))

    def paint(row: int) -> Picture:
        def draw() -> Image.Image:
            poster = render_poster(world.titles[row], int(world.palette[row]), int(world.shape[row]), seed=(0, row))
            return Image.open(io.BytesIO(poster)).convert("RGB")

        return Picture(hash_content(count, row), draw)

    return [Pair(paint(row), world.titles[row], f"A picture of {('dim', 'vivid')[row % 2]} colour.") for row in range(count)]


class CountingEmbedder:
    """Vectors that depend on the content alone; counts what it is asked."""

    dimension = 4
    truncated = 0

    def __init__(self, name: str = "a"):
        self.name = name
        self.asked: list[str] = []

    def describe(self) -> dict[str, str]:
        return {"name": self.name}

    def is_held_out(self, digest: str) -> bool:
        return True

    def _embed(self, contents: Sequence[str]) -> np.ndarray:
        assert len(contents) <= BATCH
        self.asked += contents
        rows = np.array([np.random.default_rng(int(hash_content(content)[:8], 16)).standard_normal(4) for content in contents], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def embed_pictures(self, pictures: Sequence[Picture]) -> np.ndarray:
        return self._embed([picture.digest for picture in pictures])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._embed(texts)


def test_each_content_is_embedded_once_per_embedder(tmp_path: Path) -> None:
    texts = [f"text {number % 300}" for number in range(700)]
    with Store(tmp_path) as store:
        first = CountingEmbedder()
        Vectors(first, store).fill(texts, description="first")
        assert sorted(first.asked) == sorted(set(texts))
        again = CountingEmbedder()
        vectors = Vectors(again, store)
        vectors.fill([*texts, "new"], description="again")
        assert again.asked == ["new"]
        np.testing.assert_array_equal(vectors.find("text 7"), first.embed_texts(["text 7"])[0].astype(np.float16))
        np.testing.assert_array_equal(vectors.find(None), np.zeros(4))
        other = CountingEmbedder("b")
        Vectors(other, store).fill(texts, description="other")
        assert len(other.asked) == 300


def test_arrays_come_back_over_several_chunks(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((2 * ROWS + 5, 3)).astype(np.float16)
    write_array(tmp_path / "rows", rows.shape, "float16", (rows[start : start + ROWS] for start in range(0, len(rows), ROWS)))
    np.testing.assert_array_equal(read_array(tmp_path / "rows"), rows)
    with pytest.raises(ValueError, match="expected 5 rows, got 3"):
        write_array(tmp_path / "short", (5, 3), "float16", [rows[:3]])


def test_folder_is_current_only_for_its_content_and_whole(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (tmp_path / ".out.killed.part").mkdir()
    for content in ({"key": "a"}, {"key": "b"}):
        assert not is_current(folder, content)
        with fill_folder(folder, content) as scratch:
            (scratch / "file").write_text(content["key"])
        assert is_current(folder, content) and (folder / "file").read_text() == content["key"]
    assert not is_current(folder, {"key": "a"})
    with pytest.raises(RuntimeError, match="stopped"), fill_folder(folder, {"key": "c"}):
        raise RuntimeError("stopped")
    assert is_current(folder, {"key": "b"}) and [path.name for path in tmp_path.iterdir()] == ["out"]
    (folder / "file").write_text("damaged")
    assert not is_current(folder, {"key": "b"})


def test_encoder_gives_the_same_bits_however_it_is_called(tmp_path: Path) -> None:
    pairs = make_pairs(60)
    config = EmbedConfig(steps=20, dimension=16, batch_size=16)
    pictures, titles = [pair.picture for pair in pairs], [pair.title for pair in pairs]
    with Store(tmp_path / "features") as features:
        one = LocalEmbedder(pairs, config, features, tmp_path / "one")
        other = LocalEmbedder(pairs[::-1], config, features, tmp_path / "other")
        assert one.describe() == other.describe()
        assert one.describe() != LocalEmbedder(pairs, EmbedConfig(steps=21, dimension=16), features, tmp_path / "one").describe()
        by_picture, by_title = one.embed_pictures(pictures), one.embed_texts(titles)
        parts = (slice(7), slice(7, 8), slice(8, None))
        np.testing.assert_array_equal(np.concatenate([other.embed_pictures(pictures[part]) for part in parts]), by_picture)
        np.testing.assert_array_equal(np.concatenate([other.embed_texts(titles[part]) for part in parts]), by_title)
    np.testing.assert_allclose(np.linalg.norm([by_picture, by_title], axis=-1), 1, atol=1e-5)


def test_encoder_needs_two_pictures(tmp_path: Path) -> None:
    with Store(tmp_path) as features, pytest.raises(DataError, match="at least two pictures"):
        LocalEmbedder(make_pairs(10)[:1], EmbedConfig(held_out=0.0), features, tmp_path)


@pytest.mark.slow
def test_mismatched_pairs_fall_to_the_bottom_on_pairs_not_trained_on(tmp_path: Path) -> None:
    pairs = make_pairs(1500)
    rng = np.random.default_rng(0)
    planted = rng.choice(len(pairs), len(pairs) // 10, replace=False)  # 10%: the title of one, the picture of another
    titles = [pairs[row].title for row in planted]
    for row, title in zip(planted, titles[1:] + titles[:1], strict=True):
        pairs[row] = pairs[row]._replace(title=title)
    config = EmbedConfig(held_out=0.2)
    with Store(tmp_path / "features") as features:
        embedder = LocalEmbedder(pairs, config, features, tmp_path)
        rows = [row for row, pair in enumerate(pairs) if embedder.is_held_out(pair.picture.digest)]
        titles = embedder.embed_texts([pairs[row].title for row in rows])
        pictures = embedder.embed_pictures([pairs[row].picture for row in rows])
    cosines = (titles * pictures).sum(axis=1)
    is_planted = np.isin(rows, planted)
    auc = (cosines[~is_planted][:, None] > cosines[is_planted][None]).mean()
    agreement = measure_agreement(titles[~is_planted], pictures[~is_planted])
    print(f"planted {is_planted.sum()} of {len(rows)}: AUC {auc:.4f}; all mismatched pairs: {agreement}")
    assert auc > 0.9
    assert agreement is not None and agreement.low > 0.9
