"""Pictures read safely: every file has an outcome, no outcome is a crash, and nothing outside the data folder is opened.

| outcome | what it means |
|---|---|
| `read` | decoded as it is |
| `converted` | decoded from CMYK, 16 bits, a palette, grey or with transparency, to 8-bit RGB on white |
| `first_frame` | animated; its first frame |
| `missing` | no such file |
| `outside` | a name with a path separator or `..`, or a link that leaves the folder |
| `not_a_file` | a folder, a pipe, a device |
| `too_many_bytes` | larger than `images.max_bytes` |
| `not_an_image` | no picture of a known format: HTML saved as .jpg, an empty file |
| `too_many_pixels` | more than `images.max_pixels`, after a JPEG decoder's own reduction |
| `damaged` | truncated, or a decoder's error |
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mllmrec_jax.preprocess_config import ImageConfig

Outcome = Literal[
    "read",
    "converted",
    "first_frame",
    "missing",
    "outside",
    "not_a_file",
    "too_many_bytes",
    "not_an_image",
    "too_many_pixels",
    "damaged",
]
READABLE: frozenset[Outcome] = frozenset({"read", "converted", "first_frame"})
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SIDE = 512
"""Longest side of a decoded picture (pixels)."""


class ImageFile(NamedTuple):
    """A picture's bytes and their sha256 (64 hex digits); both empty where `outcome` says why there are none."""

    outcome: Outcome
    digest: str = ""
    content: bytes = b""


class Decoded(NamedTuple):
    """An RGB picture of at most `SIDE` pixels a side; None where `outcome` says why there is none."""

    outcome: Outcome
    image: Image.Image | None = None


def read_image(root: Path, name: str, limits: ImageConfig) -> ImageFile:
    """Reads `root`/`name`, where `name` is one file name and the file, links followed, lies in `root`."""
    if not name or name in (".", "..") or "\0" in name or any(mark in name for mark in "/\\"):
        return ImageFile("outside")
    try:
        folder = root.resolve(strict=True)
        path = (folder / name).resolve(strict=True)
        if not path.is_relative_to(folder):
            return ImageFile("outside")
        # Not to wait for a pipe's writer, and not to follow a link put in place of the file meanwhile.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return ImageFile("missing")
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return ImageFile("not_a_file")
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        return ImageFile("not_a_file")
    with os.fdopen(handle, "rb") as file:
        if status.st_size > limits.max_bytes:
            return ImageFile("too_many_bytes")
        try:
            content = file.read(limits.max_bytes + 1)
        except OSError:
            return ImageFile("damaged")
    if len(content) > limits.max_bytes:
        return ImageFile("too_many_bytes")
    return ImageFile("read", hashlib.sha256(content).hexdigest(), content)


def _reduce_depth(image: Image.Image) -> Image.Image:
    """Grey values of 16 or 32 bits, or floats, as 8 bits: 16-bit ones by their range, others by the picture's own."""
    values = np.nan_to_num(np.asarray(image, np.float64))
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else (float(values.min()), float(values.max()))
    return Image.fromarray(np.round(255 * np.clip((values - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8), "L")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _reduce_depth(image).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")


def decode_image(content: bytes, limits: ImageConfig, *, side: int = SIDE) -> Decoded:
    """Decodes a picture's first frame to RGB, upright, its longer side reduced to `side` pixels where it is more.

    A JPEG is reduced by its decoder (by up to 8 a side) before it is held in memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures, and of odd metadata; both have outcomes here
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.format == "JPEG":
                    image.draft("RGB" if image.mode == "RGB" else None, (side, side))
                if image.width * image.height > limits.max_pixels:
                    return Decoded("too_many_pixels")
                animated = getattr(image, "n_frames", 1) > 1
                plain = image.mode == "RGB"
                image.load()
                rgb = _to_rgb(image)
                # A long side of 100,000 pixels and a short one of 1 leaves a picture of `side` x 1.
                rgb.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
                upright = ImageOps.exif_transpose(rgb)
    except UnidentifiedImageError:
        return Decoded("not_an_image")
    except Image.DecompressionBombError:
        return Decoded("too_many_pixels")
    except Exception:  # decoders raise nearly anything on hostile bytes
        return Decoded("damaged")
    return Decoded("first_frame" if animated else "read" if plain else "converted", upright)
