"""Pictures of items, made small enough to be part of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

POSTER_WIDTH = 144
"""Pictures are scaled down to this width (pixels): twice the widest place they are shown in."""


def encode_thumbnail(picture: Image.Image, *, width: int = POSTER_WIDTH) -> str:
    """A picture as the data URI of a small JPEG, at most `width` wide and twice that high (pixels)."""
    from PIL import Image  # here: only reports need it

    small = picture.convert("RGB")
    small.thumbnail((width, 2 * width), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


class Posters:
    """Thumbnails as data URIs, each picture once however often it is shown.

    `open_picture` opens a picture by its name, or raises OSError, ValueError or Pillow's errors. Once the thumbnails take `max_bytes`
    together, further pictures are left blank.
    """

    def __init__(self, open_picture: Callable[[str], Image.Image], *, max_bytes: int | None = None) -> None:
        self.unreadable: list[str] = []
        self.left_out = 0
        """Pictures left blank for want of room."""
        self._room = max_bytes
        self.uris: dict[str, str] = {}
        self._open = open_picture
        self._names: dict[str, str] = {}

    def add(self, name: str | None) -> str:
        """The CSS class that shows the picture `name`; empty where there is none or it cannot be read (then listed in `unreadable`)."""
        if not name:
            return ""
        if name not in self._names and self._room is not None and self._room <= 0:
            self._names[name] = ""
            self.left_out += 1
        if name not in self._names:
            uri = self._read(name)
            self._names[name] = f"poster-{len(self.uris)}" if uri else ""
            if uri:
                self._room = None if self._room is None else self._room - len(uri)
                self.uris[self._names[name]] = uri
            else:
                self.unreadable.append(name)
        return self._names[name]

    def _read(self, name: str) -> str:
        from PIL import Image

        try:
            with self._open(name) as picture:
                picture.draft("RGB", (POSTER_WIDTH, POSTER_WIDTH))
                return encode_thumbnail(picture)
        except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            return ""
