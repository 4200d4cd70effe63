from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess.backends.protocol import Picture
from mllmrec_jax.preprocess.backends.transformers_embedder import TransformersEmbedder
from mllmrec_jax.preprocess_config import TransformersConfig

TEXTS = ["", "a", "Heat (1995)", *("word " * count for count in (1, 3, 9, 22, 23, 400))]


def make_picture(seed: int, size: tuple[int, int] = (70, 100)) -> Picture:
    def draw() -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))

    return Picture(f"{seed:064x}", draw)


@pytest.fixture(params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_rows_are_of_length_one_in_one_space(folder: Path) -> None:
    embedder = TransformersEmbedder(str(folder), TransformersConfig())
    pictures, texts = embedder.embed_pictures([make_picture(row) for row in range(5)]), embedder.embed_texts(TEXTS)
    assert pictures.shape == (5, embedder.dimension) and texts.shape == (len(TEXTS), embedder.dimension)
    assert pictures.dtype == texts.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm([*pictures, *texts], axis=1), 1, atol=1e-6)
    assert len(np.unique(pictures, axis=0)) == 5 and embedder.is_held_out("0" * 64)


@pytest.mark.parametrize(("batch", "tolerance"), [(0, 0.0), (4, 1e-6)])
def test_a_row_does_not_depend_on_what_else_is_asked_for(folder: Path, batch: int, tolerance: float) -> None:
    embedder = TransformersEmbedder(str(folder), TransformersConfig(embed_batch_size=batch))
    pictures = [make_picture(row) for row in range(9)]
    by_picture, by_text = embedder.embed_pictures(pictures), embedder.embed_texts(TEXTS)
    order = np.random.default_rng(0).permutation(9)
    assert len(TEXTS) == 9
    for rows in (order[:1], order[:2], order):
        np.testing.assert_allclose(embedder.embed_pictures([pictures[row] for row in rows]), by_picture[rows], rtol=0, atol=tolerance)
        np.testing.assert_allclose(embedder.embed_texts([TEXTS[row] for row in rows]), by_text[rows], rtol=0, atol=tolerance)


def test_batches_of_another_size_agree_to_rounding(folder: Path) -> None:
    one, other = (TransformersEmbedder(str(folder), TransformersConfig(embed_batch_size=size)) for size in (1, 5))
    assert one.describe() == other.describe()
    pictures = [make_picture(row) for row in range(7)]
    np.testing.assert_allclose(one.embed_pictures(pictures), other.embed_pictures(pictures), rtol=0, atol=1e-6)
    np.testing.assert_allclose(one.embed_texts(TEXTS), other.embed_texts(TEXTS), rtol=0, atol=1e-6)


def test_long_texts_are_cut_at_the_models_limit_and_counted(folder: Path) -> None:
    embedder = TransformersEmbedder(str(folder), TransformersConfig())
    assert embedder.truncated == 0
    fits, longer, longest = embedder.embed_texts(["a" * 24, "a" * 25, "a" * 10_000])
    assert embedder.truncated == 2
    np.testing.assert_array_equal(longer, longest)
    np.testing.assert_array_equal(fits, longer)  # these tokenizers add no end of their own


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 512), (512, 1)])
def test_pictures_of_any_shape_are_embedded(folder: Path, size: tuple[int, int]) -> None:
    row = TransformersEmbedder(str(folder), TransformersConfig()).embed_pictures([make_picture(0, size)])
    assert np.isfinite(row).all()


def test_agrees_with_the_model_called_by_itself(clip: Path) -> None:
    import torch
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, images = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessorPil.from_pretrained(clip)
    text = AutoTokenizer.from_pretrained(clip)("a poster", padding="max_length", max_length=24, return_tensors="pt")
    picture = make_picture(3)
    with torch.inference_mode():
        found = model(**text, **images(picture.open(), return_tensors="pt"))
    embedder = TransformersEmbedder(str(clip), TransformersConfig())
    np.testing.assert_allclose(embedder.embed_pictures([picture]), found.image_embeds.numpy(), atol=1e-6)
    np.testing.assert_allclose(embedder.embed_texts(["a poster"]), found.text_embeds.numpy(), atol=1e-6)


def test_models_without_a_common_space_are_refused(qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocess.embed.model: expected a model of pictures and texts .* \(qwen3\)"):
        TransformersEmbedder(str(qwen3), TransformersConfig())
    with pytest.raises(ConfigError, match=r"preprocess\.embed\.model: expected a folder with a model"):
        TransformersEmbedder(str(tmp_path / "absent"), TransformersConfig())
