from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllmrec_jax.preprocess.backends.local_encoder import FEATURES, measure_features
from mllmrec_jax.preprocess.backends.measures import describe_measures, measure_image
from mllmrec_jax.preprocess.images import READABLE, SIDE, decode_image, read_image
from mllmrec_jax.preprocess_config import ImageConfig

LIMITS = ImageConfig(max_bytes=2_000_000, max_pixels=4_000_000)
NOISE = np.random.default_rng(0).integers(0, 256, size=(60, 40, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_files() -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, outcome)."""
    picture = Image.fromarray(NOISE)
    jpeg = encode(picture, "JPEG")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    deep = Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64))
    return {
        "plain": (jpeg, "read"),
        "truncated": (jpeg[: len(jpeg) // 2], "damaged"),
        "cut in its head": (jpeg[:20], "not_an_image"),
        "cmyk": (encode(picture.convert("CMYK"), "JPEG"), "converted"),
        "16 bits": (encode(deep, "PNG"), "converted"),
        "float": (encode(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"), "converted"),
        "animated": (encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), "first_frame"),
        "one pixel": (encode(Image.new("RGB", (1, 1), "teal"), "PNG"), "read"),
        "thin": (encode(Image.new("RGB", (5000, 1), "teal"), "PNG"), "read"),
        "100 megapixels": (encode(Image.new("RGB", (10_000, 10_000)), "JPEG", quality=10), "read"),
        "100 megapixels undrafted": (encode(Image.new("L", (10_000, 10_000)), "PNG"), "too_many_pixels"),
        "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not_an_image"),
        "empty": (b"", "not_an_image"),
        "palette": (encode(picture.convert("P"), "PNG"), "converted"),
        "transparent": (encode(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "PNG"), "converted"),
        "grey": (encode(picture.convert("L"), "JPEG"), "converted"),
    }


FILES = make_files()


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_its_outcome_and_what_is_read_can_be_measured(name: str) -> None:
    content, expected = FILES[name]
    outcome, image = decode_image(content, LIMITS)
    assert outcome == expected
    assert (image is not None) == (outcome in READABLE)
    if image is not None:
        assert image.mode == "RGB" and min(image.size) >= 1 and max(image.size) <= SIDE
        caption = describe_measures(measure_image(image))
        assert 10 <= len(caption.split()) <= 50
        features = measure_features(image)
        assert features.shape == (FEATURES,) and np.isfinite(features).all()


def test_damage_at_every_place_of_a_file_is_an_outcome() -> None:
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encode(Image.fromarray(NOISE), kind)
        for _ in range(40):
            broken = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
            for place in rng.integers(max(1, len(broken)), size=4):
                broken[place : place + 1] = bytes([rng.integers(256)])
            outcome, image = decode_image(bytes(broken), LIMITS)
            assert (image is not None) == (outcome in READABLE)


def test_colours_survive_conversion() -> None:
    for mode, kind in (("CMYK", "TIFF"), ("P", "PNG"), ("RGBA", "PNG")):
        plain = Image.new("RGB", (20, 20), (200, 40, 30))
        content = encode(plain.quantize(8) if mode == "P" else plain.convert(mode), kind)
        image = decode_image(content, LIMITS).image
        assert image is not None and np.abs(np.asarray(image, int)[5, 5] - [200, 40, 30]).max() < 12, mode
    ramp = (np.linspace(0, 65535, 64).astype(np.uint16)[None] * np.ones((64, 1), np.uint16)).astype(np.uint16)
    image = decode_image(encode(Image.fromarray(ramp), "PNG"), LIMITS).image
    assert image is not None
    grey = np.asarray(image, int)[0, :, 0]
    assert grey[0] == 0 and grey[-1] == 255 and (np.diff(grey) >= 0).all() and len(set(grey.tolist())) == 64
    clear = decode_image(FILES["transparent"][0], LIMITS).image
    assert clear is not None and np.asarray(clear).min() == 255  # nothing drawn, on white
    first = decode_image(FILES["animated"][0], LIMITS).image
    assert first is not None and first.getpixel((3, 3)) == (255, 0, 0)


def test_large_picture_is_reduced_before_it_is_held() -> None:
    image = decode_image(FILES["100 megapixels"][0], LIMITS).image
    assert image is not None and image.size == (SIDE, SIDE)


@pytest.mark.parametrize("name", ["../secret.jpg", "..", ".", "", "a/b.jpg", "/etc/hostname", "a\\b.jpg", "nul\0.jpg"])
def test_name_that_is_no_file_name_is_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").write_bytes(FILES["plain"][0])
    assert read_image(tmp_path / "images", name, LIMITS) == ("outside", "", b"")


def test_links_are_followed_inside_the_folder_only(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "secret.jpg").write_bytes(FILES["plain"][0])
    (images / "1.jpg").write_bytes(FILES["plain"][0])
    (images / "inside.jpg").symlink_to("1.jpg")
    (images / "outside.jpg").symlink_to("../secret.jpg")
    (images / "absolute.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "chain.jpg").symlink_to("outside.jpg")
    (images / "dangling.jpg").symlink_to("gone.jpg")
    (images / "circle.jpg").symlink_to("circle.jpg")
    assert read_image(images, "inside.jpg", LIMITS) == read_image(images, "1.jpg", LIMITS)
    for name in ("outside.jpg", "absolute.jpg", "chain.jpg"):
        assert read_image(images, name, LIMITS).outcome == "outside"
    assert read_image(images, "dangling.jpg", LIMITS).outcome == "missing"
    assert read_image(images, "circle.jpg", LIMITS).outcome == "not_a_file"
    (tmp_path / "linked").symlink_to(images)  # the folder itself may be a link: the user chose it
    assert read_image(tmp_path / "linked", "1.jpg", LIMITS).outcome == "read"


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "large.jpg").write_bytes(b"x" * (LIMITS.max_bytes + 1))
    outcomes = [read_image(tmp_path, name, LIMITS).outcome for name in ("folder.jpg", "pipe.jpg", "large.jpg", "gone.jpg")]
    assert outcomes == ["not_a_file", "not_a_file", "too_many_bytes", "missing"]
    assert read_image(tmp_path / "gone", "1.jpg", LIMITS).outcome == "missing"
